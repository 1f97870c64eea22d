"""The driver: what it holds every rule to, whatever the rule's own guard says, and what it writes down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxopt
from fxopt import UNKNOWN, Match, NoMatch, Pass, Rewriter, Rule, call, check, const, var
from fxopt.edit import Editor
from fxopt.rewrite import Journal, apply
from graphs import Network, operations

aten = torch.ops.aten


def _fused(match: Match, rewriter: Rewriter) -> fx.Node:
    """relu(a * b) -> clamp_min(a * b, 0), which is the same."""
    product = rewriter.call(aten.mul.Tensor, match["a"], match["b"])
    return rewriter.call(aten.clamp_min.default, product, 0)


PRODUCT = call(aten.mul.Tensor, var("a"), var("b"), name="product")
RULE = Rule("relu-of-product", call(aten.relu.default, PRODUCT, name="relu"), _fused)
PASS = Pass("fuse", rules=(RULE,))


def run(current: Pass, body: Callable[..., Any], **parts: Any) -> tuple[fx.GraphModule, Journal, nn.Module]:
    """One pass over a model of one tensor of 2 by 4."""
    model = Network(body, **parts).eval()
    module = fxopt.trace(model, (torch.randn(2, 4),))
    journal = Journal()
    apply(current, Editor(module), journal)
    check.check(module, after=current.name)
    given = torch.randn(2, 4)
    ours, theirs = given.clone(), given.clone()
    expected = torch.utils._pytree.tree_leaves(model(theirs))
    module.recompile()
    for left, right in zip(module(ours), expected, strict=True):
        torch.testing.assert_close(left, right)
    return module, journal, model


def reasons(journal: Journal) -> list[str]:
    return [decline.reason for decline in journal.declines.values()]


def test_a_rewrite_is_written_down_with_what_went_and_came() -> None:
    module, journal, _ = run(PASS, lambda m, x: (x * 2).relu())
    (rewrite,) = journal.rewrites
    assert (rewrite.pass_name, rewrite.rule, rewrite.root) == ("fuse", "relu-of-product", "relu")
    assert set(rewrite.removed) == {"relu", "mul"}
    assert len(rewrite.added) == 2
    assert rewrite.result in rewrite.added
    assert rewrite.origins
    assert operations(module) == {"mul": 1, "clamp_min": 1}
    made = next(node for node in module.graph.nodes if node.name == rewrite.result)
    assert {origin.line for origin in made.meta["origin"]}, "the origin of what was replaced is lost"


def _read_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    return y.relu() + y


def _handed_out(m: Any, x: torch.Tensor) -> Any:
    y = x * 2
    return y.relu(), y


def _written_between(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * m.weight
    m.weight.add_(1)
    return y.relu()


def _viewed_and_written(m: Any, x: torch.Tensor) -> torch.Tensor:
    z = x + 1
    y = z * 2
    z.view(-1).add_(1)
    return y.relu() + z


def _written_behind(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = (x * m.weight).relu()
    m.weight.add_(1)
    return y


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(_read_twice, "mul is also read by add", id="an inner value is read elsewhere"),
        pytest.param(_handed_out, "mul is a result of the model", id="an inner value is a result"),
        pytest.param(_written_between, "may write to", id="an operand is written in between"),
        pytest.param(_viewed_and_written, "may write to a value of the match", id="an operand's alias is written"),
        pytest.param(_written_behind, "may write to weight", id="a constant is written, if only behind"),
    ],
)
def test_the_driver_declines(body: Callable[..., Any], reason: str) -> None:
    module, journal, _ = run(PASS, body, weight=torch.rand(4))
    assert not journal.rewrites
    assert any(reason in found for found in reasons(journal)), reasons(journal)
    assert "clamp_min" not in operations(module)


def test_a_random_draw_is_never_matched() -> None:
    pattern = call(aten.relu.default, call(aten.rand_like.default, var("a"), name="drawn"))

    def rewrite(match: Match, rewriter: Rewriter) -> fx.Node:
        return rewriter.call(aten.rand_like.default, match["a"])

    model = Network(lambda m, x: torch.rand_like(x).relu()).eval()
    module, journal = fxopt.trace(model, (torch.randn(2, 4),)), Journal()
    apply(Pass("draws", rules=(Rule("r", pattern, rewrite),)), Editor(module), journal)
    assert not journal.rewrites
    assert any("draws at random" in reason for reason in reasons(journal))


def test_a_shared_inner_call_may_be_read_elsewhere() -> None:
    shared = call(aten.mul.Tensor, var("a"), var("b"), name="product", shared=True)
    rule = Rule("shared", call(aten.relu.default, shared), _fused)
    module, journal, _ = run(Pass("shares", rules=(rule,)), _read_twice)
    assert len(journal.rewrites) == 1
    assert operations(module)["mul"] == 2


def test_a_result_of_other_strides_is_declined_unless_the_pass_is_about_layout() -> None:
    def transposed(match: Match, rewriter: Rewriter) -> fx.Node:
        back = rewriter.call(aten.contiguous.default, rewriter.call(aten.permute.default, match["x"], [1, 0]))
        return rewriter.call(aten.permute.default, rewriter.call(aten.relu.default, back), [1, 0])

    def guard(match: Match) -> NoMatch | None:
        return None if match.node("x").op == "placeholder" else NoMatch("once is enough", match.root)

    rule = Rule("transposed", call(aten.relu.default, var("x")), transposed, guard)
    _, journal, _ = run(Pass("plain", rules=(rule,)), lambda m, x: x.relu())
    assert any("the strides would change" in reason for reason in reasons(journal))
    _, journal, _ = run(Pass("layout", rules=(rule,), layout=True), lambda m, x: x.relu())
    assert len(journal.rewrites) == 1


def test_a_rewrite_may_give_a_node_that_is_there() -> None:
    rule = Rule("twice", call(aten.neg.default, call(aten.neg.default, var("x"))), lambda match, _: match.node("x"))
    module, journal, _ = run(Pass("cancel", rules=(rule,)), lambda m, x: (x + 1).neg().neg() * 2)
    assert operations(module) == {"add": 1, "mul": 1}
    assert journal.rewrites[0].added == ()


def test_a_guards_reason_is_kept_and_a_reason_that_waits_is_pending() -> None:
    guarded = Rule("guarded", RULE.pattern, _fused, lambda match: NoMatch("not on a Sunday", match.root))
    waiting = Rule("waiting", RULE.pattern, _fused, lambda match: NoMatch(f"{UNKNOWN}the weather", match.root))
    _, journal, _ = run(Pass("guards", rules=(guarded, waiting)), lambda m, x: (x * 2).relu())
    found = {decline.rule: decline for decline in journal.declines.values()}
    assert (found["guarded"].reason, found["guarded"].pending) == ("not on a Sunday", False)
    assert (found["waiting"].reason, found["waiting"].pending) == ("the weather", True)


def test_a_new_constant_gets_a_free_name_and_the_old_one_stays() -> None:
    def doubled(match: Match, rewriter: Rewriter) -> fx.Node:
        weight = fxopt.ir.tensor(match.node("w"))
        assert weight is not None
        return rewriter.call(aten.div.Tensor, match["x"], rewriter.constant(1 / weight, "weight"))

    pattern = call(aten.mul.Tensor, var("x"), const("w"))
    module, journal, model = run(
        Pass("inverse", rules=(Rule("r", pattern, doubled),)),
        lambda m, x: x * m.weight + m.weight,
        weight=torch.rand(4),
    )
    assert len(journal.rewrites) == 1
    names = {node.target for node in module.graph.nodes if node.op == "get_attr"}
    assert names == {"weight", "weight_1"}
    assert torch.equal(module.weight, model.weight)


def test_the_budget_names_the_rule_that_does_not_end() -> None:
    endless = Rule("endless", call(aten.relu.default, var("x")), lambda m, r: r.call(aten.relu.default, m["x"]))
    module = fxopt.trace(nn.ReLU(), (torch.randn(2, 4),))
    with pytest.raises(fxopt.ConvergenceError, match="within 7 rewrites") as caught:
        apply(Pass("loops", rules=(endless,)), Editor(module), Journal(), budget=7)
    assert (caught.value.pass_name, caught.value.rule) == ("loops", "endless")


def test_rules_feed_one_another_until_none_applies() -> None:
    """add(add(x, 1), 1) ... of ten additions becomes one, whatever the order of the nodes."""
    pattern = call(aten.add.Tensor, call(aten.add.Tensor, var("x"), var("a")), var("b"))

    def summed(match: Match, rewriter: Rewriter) -> fx.Node:
        return rewriter.call(aten.add.Tensor, match["x"], match["a"] + match["b"])

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        for number in range(10):
            x = x + number
        return F.relu(x)

    module, journal, _ = run(Pass("sum", rules=(Rule("r", pattern, summed),)), body)
    assert operations(module) == {"add": 1, "relu": 1}
    assert len(journal.rewrites) == 9


def test_a_function_pass_removes_and_declines_through_the_same_rewriter() -> None:
    def tidy(rewriter: Rewriter) -> None:
        for node in reversed(list(rewriter.graph.nodes)):
            if node.op == "call_function" and not node.users:
                rewriter.remove(node, rule="unread")
            elif node.op == "call_function":
                rewriter.decline(node, "it is read", rule="unread")

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        (x * 3).relu()
        return x + 1

    module, journal, _ = run(Pass("tidy", run=tidy), body)
    assert operations(module) == {"add": 1}
    assert {name for rewrite in journal.rewrites for name in rewrite.removed} == {"relu", "mul"}
    assert reasons(journal) == ["it is read"]
