"""eliminate-dead-code: what nobody reads goes, unless it does something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt import effects, ir, plugins
from fxopt.driver import apply
from fxopt.edit import Editor
from fxopt.journal import Journal
from graphs import FRONT_ENDS, Network, TwoInputs, assert_declined, compiled_by, fired, operations

PASSES = ("eliminate-dead-code",)
RULE = "unread"
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]


def module_of(body: Body, **parts: Any) -> nn.Module:
    return Network(body, **parts).eval()


def unread(work: Body) -> Body:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        work(m, x)
        return torch.abs(x)

    return body


DEAD: list[tuple[str, Body]] = [
    ("one operation", lambda m, x: x * 2),
    ("a chain", lambda m, x: F.relu(x * 2 + 1).sum()),
    ("a layer and its weights", lambda m, x: m.layer(x)),
    ("a view", lambda m, x: x.reshape(-1)),
    ("dropout in inference", lambda m, x: F.dropout(x, training=False)),
    ("dropout of nothing", lambda m, x: F.dropout(x, 0.0, training=True)),
    ("a norm in inference mode", lambda m, x: m.norm(x.unsqueeze(0))),
]


@both
@pytest.mark.parametrize("work", [pytest.param(row[1], id=row[0]) for row in DEAD])
def test_removes(work: Body, front_end: str) -> None:
    model = module_of(unread(work), layer=nn.Linear(4, 4), norm=nn.BatchNorm1d(4))
    compiled = compiled_by(PASSES, model, (torch.randn(4, 4),), front_end)
    assert set(fired(compiled)) <= {RULE}
    assert operations(compiled.fused_graph) == {"abs": 1}
    assert not compiled.state_dict()


def write_input(m: Any, x: torch.Tensor) -> torch.Tensor:
    x.mul_(2)
    return torch.abs(x)


def write_alias(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.neg(x)
    z = y.view(-1)
    z += 1
    return y * 2


def write_counter(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.count.add_(1)
    return torch.abs(x)


KEPT: list[tuple[str, Body, str]] = [
    ("an unread write to an input [pytorch#68301]", write_input, "it writes to x"),
    ("a write to an alias of what is read", write_alias, "it writes to"),
    ("a counter", write_counter, "it writes to count"),
    ("a norm in training mode", unread(lambda m, x: F.batch_norm(x, m.mean, m.variance, training=True)), "it writes"),
    ("dropout in training", unread(lambda m, x: F.dropout(x, 0.5, training=True)), "later draws depend on its own"),
    ("a random draw", unread(lambda m, x: torch.rand_like(x)), "later draws depend on its own"),
]


@both
@pytest.mark.parametrize(("body", "reason"), [pytest.param(*row[1:], id=row[0]) for row in KEPT])
def test_keeps(body: Body, reason: str, front_end: str) -> None:
    parts = {"count": torch.zeros(1), "mean": torch.zeros(4), "variance": torch.ones(4)}
    model = module_of(body, **parts)
    compiled = fxopt.compile(
        model, (torch.randn(4, 4),) if front_end == "export" else None, passes=PASSES, backend="aten", strict=True
    )
    assert fired(compiled) == []
    # torch.export lets the next reader of what is written read the write itself, so that it is not unread.
    if body is write_input and front_end == "export":
        assert operations(compiled.fused_graph)["mul_"] == 1
    else:
        assert_declined(compiled, RULE, reason)


@both
def test_random_numbers_behind_an_unread_draw_are_the_models_own(front_end: str) -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        torch.rand_like(x)
        return x + torch.rand_like(x)

    model, x = module_of(body), torch.randn(3)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    assert torch.equal(compiled(x), expected)


def test_keeps_an_opaque_call_that_nobody_reads() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    opaque = graph.call_function(print, (x,))
    graph.output((x,))
    module = ir.new_module(graph)
    journal = Journal()
    apply(plugins.named("eliminate-dead-code"), Editor(module), journal)
    assert opaque in list(graph.nodes)
    assert [decline.reason for decline in journal.declines.values()] == [
        "nobody reads it, but what it does is not known"
    ]


@pytest.mark.parametrize(
    "target", [torch.ops.aten._assert_async.default, torch.ops.aten._linalg_check_errors.default], ids=str
)
def test_what_gives_nothing_is_there_for_its_error(target: Any) -> None:
    graph = torch.fx.Graph()
    info = graph.placeholder("info")
    extra = () if target is torch.ops.aten._assert_async.default else ("linalg.inv",)
    node = graph.call_function(target, (info, *extra), {} if extra == () else {"is_matrix": True})
    assert effects.of(node).raises
    assert not effects.of(node).pure


def test_an_unread_assertion_stays() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.shape[1] == 4, "four features")
        return torch.abs(x)

    compiled = fxopt.compile(module_of(body), passes=PASSES, backend="aten", strict=True)
    assert_declined(compiled, RULE, "it may raise")
    with pytest.raises(fxopt.InputError, match="four features"):
        compiled(torch.randn(2, 3))


@both
def test_an_input_that_nobody_reads_is_still_taken(front_end: str) -> None:
    model = TwoInputs(lambda m, x, y: torch.abs(x)).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(3), torch.randn(2)), front_end)
    assert fired(compiled) == []
    assert len(compiled.fused_graph.graph.find_nodes(op="placeholder")) == 2
