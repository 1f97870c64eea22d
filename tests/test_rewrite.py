"""The driver: what it holds every rule to, whatever the rule's own guard says, and what it writes down."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxopt
from fxopt import UNKNOWN, Match, NoMatch, Pass, Rewriter, Rule, call, check, const, var
from fxopt.driver import apply
from fxopt.edit import Editor
from fxopt.journal import Journal
from fxopt.lowering import backend
from graphs import Network, operations
from test_edit import picture

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


# -- several roots ---------------------------------------------------------------------------------------------------


def _join_copies(*, reading: Callable[[fx.Node], list[fx.Node]] | None = None) -> Callable[[Rewriter], None]:
    """x.clone() and x.clone() -> halves of cat([x, x]): several roots, whose results share memory."""

    def join(rewriter: Rewriter) -> None:
        roots = list(rewriter.graph.find_nodes(op="call_function", target=aten.clone.default))
        if len(roots) < 2:
            return
        refusal = rewriter.refusal((), *roots)
        if refusal is not None:
            rewriter.decline(roots[0], refusal.reason, rule="copies")
            return

        def build() -> list[fx.Node]:
            width = 4 * len(roots)
            wide = rewriter.call(aten.cat.default, [root.args[0] for root in roots], 1)
            cuts = range(0, width, 4)
            return [rewriter.call(aten.slice.Tensor, wide, 1, start, start + 4) for start in cuts]

        result = rewriter.substitute_all(roots, build, rule="copies")
        if isinstance(result, NoMatch):
            rewriter.decline(roots[0], result.reason, rule="copies")

    return join


COPIES = Pass("copies", run=_join_copies())


def test_several_roots_are_replaced_in_one_rewrite() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        first = m.left(x).sum(1)
        return first + m.right(x).sum(1)

    copies = {name: Network(lambda m, x: x.clone()) for name in ("left", "right")}
    module, journal, _ = run(COPIES, body, **copies)
    (rewrite,) = journal.rewrites
    names = [node.name for node in module.graph.nodes]
    assert rewrite.replaced == (("clone", "slice_1"), ("clone_1", "slice_2"))
    assert (rewrite.root, rewrite.result) == ("clone", "slice_1")
    assert set(rewrite.removed) == {"clone", "clone_1"}
    assert set(rewrite.added) == {"cat", "slice_1", "slice_2"}
    assert {origin.module for origin in rewrite.origins} == {"left", "right"}
    assert all(node.meta["origin"] == rewrite.origins for node in module.graph.nodes if node.name in rewrite.added)
    assert names.index("cat") < names.index("slice_2") < names.index("sum_1"), "built in front of the first root"


def test_several_roots_are_built_behind_what_the_last_of_them_reads() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        first = x.clone()
        second = x.exp().clone()
        return first.sum(1) + second.sum(1)

    module, journal, _ = run(COPIES, body)
    names = [node.name for node in module.graph.nodes]
    assert len(journal.rewrites) == 1
    assert names.index("exp") < names.index("cat") < names.index("sum_1")


def _read_too_early(m: Any, x: torch.Tensor) -> torch.Tensor:
    first = x.clone()
    return first.sum(1) + first.exp().clone().sum(1)


def _both_handed_out(m: Any, x: torch.Tensor) -> Any:
    return x.clone(), x.clone()


def _one_handed_out_as_a_view(m: Any, x: torch.Tensor) -> Any:
    return x.clone().sum(1), x.clone()[:, :1][:1, 0]


def _written_later(m: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = x.clone(), x.clone()
    total = first.sum(1)
    view = second[:, 0]
    view.mul_(2)
    return total + second.sum(1)


def _memory_behind_it(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x.clone().sum(1) + torch.as_strided(x.clone()[:1], (2,), (4,))


def _written_in_between(m: Any, x: torch.Tensor) -> torch.Tensor:
    first = x.clone()
    x.mul_(2)
    return first.sum(1) + x.clone().sum(1)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(_read_too_early, "stands in front|computed behind", id="one root depends on another"),
        pytest.param(_both_handed_out, "must not share memory", id="both are handed out"),
        pytest.param(_one_handed_out_as_a_view, "must not share memory", id="a view of one is handed out"),
        pytest.param(_written_later, "may write to", id="one is written later"),
        pytest.param(_memory_behind_it, "looks at the memory", id="the memory behind one is looked at"),
        pytest.param(_written_in_between, "may write to", id="what they read is written between them"),
    ],
)
def test_several_roots_stay_because(body: Callable[..., Any], reason: str) -> None:
    _, journal, _ = run(COPIES, body)
    assert not journal.rewrites
    assert re.search(reason, reasons(journal)[0]), reasons(journal)


def test_what_is_declined_behind_its_edits_is_undone_whole() -> None:
    module = fxopt.trace(Network(_read_too_early).eval(), (torch.randn(2, 4),))
    before, editor = picture(module), Editor(module)
    apply(COPIES, editor, Journal())
    assert picture(module) == before
    assert not editor.log


@pytest.mark.parametrize(
    ("build", "error"),
    [
        pytest.param(lambda rewriter, roots: roots[:1], "1 nodes to read instead of 2", id="too few"),
        pytest.param(lambda rewriter, roots: [1, 2], "gave 1, not the node", id="no nodes"),
        pytest.param(lambda rewriter, roots: roots[::-1], "itself replaced", id="another root"),
        pytest.param(
            lambda rewriter, roots: [roots[0], rewriter.call(aten.sum.default, roots[1].args[0])],
            "changes f32",
            id="another shape",
        ),
    ],
)
def test_a_rewrite_of_several_roots_that_goes_wrong_is_undone_whole(build: Any, error: str) -> None:
    def wrong(rewriter: Rewriter) -> None:
        roots = list(rewriter.graph.find_nodes(op="call_function", target=aten.clone.default))
        rewriter.substitute_all(roots, lambda: build(rewriter, roots), rule="wrong")

    module = fxopt.trace(Network(lambda m, x: x.clone() + x.clone()).eval(), (torch.randn(2, 4),))
    before = picture(module)
    with pytest.raises(fxopt.RewriteError, match=error):
        apply(Pass("wrong", run=wrong), Editor(module), Journal())
    assert picture(module) == before


def test_what_reads_a_later_value_is_undone() -> None:
    def early(rewriter: Rewriter) -> None:
        (root,) = rewriter.graph.find_nodes(op="call_function", target=aten.clone.default)
        (later,) = rewriter.graph.find_nodes(op="call_function", target=aten.exp.default)
        found = rewriter.substitute(root, lambda: rewriter.call(aten.mul.Tensor, root.args[0], later), rule="early")
        assert isinstance(found, NoMatch)
        assert found.reason == "exp is computed behind where it would be read"

    module = fxopt.trace(Network(lambda m, x: x.clone() + x.exp()).eval(), (torch.randn(2, 4),))
    before = picture(module)
    apply(Pass("early", run=early), Editor(module), Journal())
    assert picture(module) == before


# -- memory that is written ------------------------------------------------------------------------------------------


def _made_and_written(m: Any, x: torch.Tensor) -> torch.Tensor:
    k = x.new_zeros(2, 4)
    k[1:].fill_(1)
    return x * k


def _others_hold_it(m: Any, x: torch.Tensor) -> torch.Tensor:
    k = x.new_zeros(4)
    k[1:].fill_(1)
    return torch.einsum("j,ij->i", k, x) * 2


def _written_for_something_else(m: Any, x: torch.Tensor) -> torch.Tensor:
    k = x.new_zeros(4)
    return F.batch_norm(x, k, m.variance, training=True) * 2


def _other_memory_is_written(m: Any, x: torch.Tensor) -> torch.Tensor:
    k = x.new_zeros(4)
    k[1:].fill_(1)
    return torch.einsum("j,ij->i", k, F.batch_norm(x, m.mean, m.variance, training=True)) * 2


RIGHT = torch.tensor([[0.0] * 4, [1.0] * 4])


def _with_memory(value: torch.Tensor) -> Pass:
    def replace(rewriter: Rewriter) -> None:
        (base,) = rewriter.graph.find_nodes(op="call_function", target=aten.new_zeros.default)
        found = rewriter.substitute_memory(
            base, lambda node: rewriter.constant(value, "held", keep_strides=True), rule="memory"
        )
        if found is not None:
            rewriter.decline(base, found.reason, rule="memory")

    return Pass("memory", run=replace)


def test_memory_is_replaced_with_all_that_writes_to_it() -> None:
    module, journal, _ = run(_with_memory(RIGHT), _made_and_written)
    (rewrite,) = journal.rewrites
    assert operations(module) == {"mul": 1}
    assert (rewrite.root, rewrite.result) == ("new_zeros", "held")


@pytest.mark.parametrize(
    ("body", "value", "reason"),
    [
        pytest.param(_others_hold_it, RIGHT, "may be memory that others hold", id="others hold it"),
        pytest.param(_written_for_something_else, RIGHT[0], "gives something else", id="a norm's statistics"),
        pytest.param(_other_memory_is_written, RIGHT, "writes to other memory, too", id="other memory is written"),
        pytest.param(_made_and_written, RIGHT.t().contiguous().t(), "strides would change", id="other strides"),
    ],
)
def test_memory_stays_because(body: Callable[..., Any], value: torch.Tensor, reason: str) -> None:
    module, journal, _ = run(_with_memory(value), body, mean=torch.zeros(4), variance=torch.ones(4))
    assert not journal.rewrites
    assert [reason in found for found in reasons(journal)] == [True], reasons(journal)
    assert "new_zeros" in operations(module)
    assert "held" not in dict(module.named_parameters())


def test_memory_of_another_shape_is_an_error_and_undone_whole() -> None:
    module = fxopt.trace(Network(_made_and_written).eval(), (torch.randn(2, 4),))
    before = picture(module)
    with pytest.raises(fxopt.RewriteError, match="changes f32"):
        apply(_with_memory(RIGHT[0]), Editor(module), Journal())
    assert picture(module) == before


# -- constants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "keep_strides"),
    [
        pytest.param(lambda weight: weight * 2, True, id="computed"),
        pytest.param(lambda weight: (weight.t() * 2).t(), True, id="computed in another order"),
        pytest.param(lambda weight: weight.as_strided((2, 4), (1, 2)), False, id="a view that is copied"),
    ],
)
def test_a_constant_made_under_inference_mode_serves_autograd_later(make: Any, keep_strides: bool) -> None:
    def replaced(rewriter: Rewriter) -> None:
        (root,) = rewriter.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
        held, x = fxopt.ir.tensor(root.args[1]), root.args[0]
        rewriter.substitute(
            root,
            lambda: rewriter.call(aten.mul.Tensor, x, rewriter.constant(make(held), "held", keep_strides=keep_strides)),
            rule="constant",
        )

    weight = torch.rand(4, 4)[:2]
    module = fxopt.trace(Network(lambda m, x: x * m.weight, weight=weight).eval(), (torch.randn(2, 4),))
    with torch.inference_mode():
        apply(Pass("replaced", run=replaced), Editor(module), Journal())
    module.recompile()
    assert module.held.stride() == (make(weight).stride() if keep_strides else (4, 1))
    x = torch.randn(2, 4, requires_grad=True)
    module(x)[0].sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, make(weight))


# -- strides ---------------------------------------------------------------------------------------------------------


def _transpose_relu(match: Match, rewriter: Rewriter) -> fx.Node:
    turned = rewriter.call(aten.permute.default, match["x"], [1, 0])
    dense = rewriter.call(aten.contiguous.default, turned)
    return rewriter.call(aten.permute.default, rewriter.call(aten.clamp_min.default, dense, 0), [1, 0])


TRANSPOSE = Pass("transpose", rules=(Rule("transposed", call(aten.relu.default, var("x")), _transpose_relu),))


def actual_strides(module: fx.GraphModule, x: torch.Tensor) -> dict[str, Any]:
    """The strides of each value when the graph runs."""
    found: dict[str, Any] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                found[n.name] = result.stride()
            return result

    Recorder(module).run(x)
    return found


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda m, x: x.relu().sum(1), id="a sum forgets them"),
        pytest.param(lambda m, x: (x.relu().exp() * 2).sum(1), id="elementwise steps pass them on to a sum"),
        pytest.param(lambda m, x: x.relu() @ x.t(), id="a matrix product forgets them"),
        pytest.param(lambda m, x: torch.cat([x.relu(), x], 0), id="a concat copies"),
        pytest.param(lambda m, x: x.relu().reshape(8)[1:] * 2, id="a reshape becomes a copy that nobody can tell"),
        pytest.param(lambda m, x: x.relu().chunk(2, 1)[1].sum(1), id="through a tuple of views"),
    ],
)
def test_strides_may_change_where_nobody_can_tell(body: Callable[..., Any]) -> None:
    module, journal, _ = run(TRANSPOSE, body)
    assert len(journal.rewrites) == 1
    actual = actual_strides(module, torch.randn(2, 4))
    for node in module.graph.nodes:
        found = fxopt.ir.fake(node)
        if found is not None and node.op == "call_function" and node.name in actual:
            assert tuple(found.stride()) == actual[node.name], f"{node.name} has other strides than are known of it"


def _kept(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x.relu()
    x.copy_(y)
    return y.sum(1)


def _view_written(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x.relu()
    y.reshape(8).mul_(2)
    return y.sum(1)


def _opaque(m: Any, x: torch.Tensor) -> torch.Tensor:
    return _looks(x.relu())


@fx.wrap
def _looks(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.is_contiguous() else x * 3


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(lambda m, x: x.relu(), "hands out permute", id="handed out"),
        pytest.param(lambda m, x: x.relu() * 2, "hands out mul", id="an elementwise step is handed out"),
        pytest.param(lambda m, x: x.relu()[:, 1:], "hands out slice", id="a view is handed out"),
        pytest.param(lambda m, x: x.relu().reshape(8), "might then be a copy", id="a view becomes a copy"),
        pytest.param(lambda m, x: torch.as_strided(x.relu(), (2,), (1,)) * 2, "reads memory by them", id="as_strided"),
        pytest.param(lambda m, x: x.relu().clamp(0, 0).bernoulli().sum(1), "draws at random", id="draws in order"),
        pytest.param(_view_written, "might then be a copy", id="a view that is written becomes a copy"),
        pytest.param(_kept, "writes", id="an operand of a write"),
        pytest.param(lambda m, x: x.relu()[x > 0], "would give", id="a result of unknown size"),
    ],
)
def test_strides_stay_because(body: Callable[..., Any], reason: str) -> None:
    _, journal, _ = run(TRANSPOSE, body)
    assert not journal.rewrites
    assert re.search(reason, " ".join(reasons(journal))), reasons(journal)


def test_strides_stay_where_an_opaque_node_reads_them() -> None:
    module = fxopt.trace(Network(_opaque).eval())
    backend.set_concrete_values(module, (torch.randn(2, 4),))
    journal = Journal()
    apply(TRANSPOSE, Editor(module), journal)
    assert not journal.rewrites
    assert "is opaque and may look at them" in reasons(journal)[0]


def test_strides_stay_in_a_pass_that_promises_the_same_bits() -> None:
    exact = Pass("exact", rules=TRANSPOSE.rules, numerics="bitwise")
    _, journal, _ = run(exact, lambda m, x: x.relu().sum(1))
    assert not journal.rewrites
    assert any("the strides would change" in reason for reason in reasons(journal))


def test_strides_that_only_a_dimension_of_one_has_do_not_matter() -> None:
    def widened(match: Match, rewriter: Rewriter) -> fx.Node:
        wide = rewriter.call(aten.cat.default, [match["x"], match["x"]], 1)
        return rewriter.call(aten.clamp_min.default, rewriter.call(aten.slice.Tensor, wide, 1, 0, 4), 0)

    rule = Rule("widened", call(aten.relu.default, var("x")), widened)
    module = fxopt.trace(Network(lambda m, x: x.relu() * 2).eval(), (torch.randn(2, 4),))
    backend.set_concrete_values(module, (torch.randn(1, 4),))
    journal = Journal()
    apply(Pass("widen", rules=(rule,)), Editor(module), journal)
    assert len(journal.rewrites) == 1
