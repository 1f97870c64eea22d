"""Lowered graphs: an elementwise operator overwrites its operand where nobody else could miss it, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxopt
from graphs import Network, operations, unmodified

aten = torch.ops.aten
pytestmark = pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice")

Body = Callable[[Any, Any], Any]

OVERWRITES: list[tuple[str, Body, set[str]]] = [
    ("a relu of a sum", lambda m, x: F.relu(x + m.row), {"relu_"}),
    ("a chain", lambda m, x: torch.tanh(F.silu(F.layer_norm(x, (6,)))), {"silu_", "tanh_"}),
    ("gelu by tanh", lambda m, x: F.gelu(x.cumsum(1), approximate="tanh"), {"gelu_"}),
    ("a product with a row", lambda m, x: x.cumsum(1) * m.row, {"mul_"}),
    ("a sum with alpha", lambda m, x: torch.add(x.cumsum(1), x, alpha=2), {"add_"}),
    ("what is not finite", lambda m, x: F.hardtanh(x / 0), {"hardtanh_"}),
]

STAYS: list[tuple[str, Body]] = [
    ("the input", lambda m, x: F.relu(x)),
    ("a weight", lambda m, x: x.cumsum(1).sum() + F.relu(m.square)),
    ("it has another reader", lambda m, x: [y := x.cumsum(1), torch.maximum(F.silu(y), y.cumsum(0))][1]),
    ("it is handed out", lambda m, x: [y := x.cumsum(1), F.relu(y), y][1:]),
    ("it is a view", lambda m, x: F.relu(x.transpose(0, 1))),
    ("it has a view", lambda m, x: [y := x.cumsum(1), z := y[0], torch.maximum(F.silu(y), z)][2]),
    ("the result is larger", lambda m, x: x[:1].cumsum(1) * x),
    ("the result has another dtype", lambda m, x: x.argsort(1) * m.row),
    ("it is both operands", lambda m, x: [y := x.cumsum(1), y * y][1]),
    ("it is the second operand", lambda m, x: m.row - x.cumsum(1)),
    ("one of two results", lambda m, x: F.relu(x.sort(1)[0])),
]


def written_and_viewed(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x.cumsum(1)
    v = y[0]
    return F.relu(y.add_(1)).sum(0) + v


#: Most hand out what is computed of what stays: only other readers, or tensors of the caller's, could show a write.
STAYS_INSIDE: list[tuple[str, Body, str]] = [
    ("the input", lambda m, x: torch.tanh(F.relu(x)).sum(0), "relu"),
    ("a weight", lambda m, x: (x.cumsum(1) @ F.relu(m.square).t()).sum(0), "relu"),
    ("a view of the input", lambda m, x: F.relu(x.transpose(0, 1)).sum(0), "relu"),
    ("a view of the input that is written", lambda m, x: F.relu(x[:, 1:].mul_(1)).sum(0), "relu"),
    ("one of several views", lambda m, x: F.relu(x.chunk(2, 1)[0]).sum(0), "relu"),
    ("it has another reader", lambda m, x: [y := x.cumsum(1), z := F.relu(y).sum(0), z + y.sum(0)][2], "relu"),
    ("it has a view", lambda m, x: [y := x.cumsum(1), v := y[0], torch.tanh(F.relu(y)).sum(0) + v][2], "relu"),
    ("it is written, and has a view", written_and_viewed, "relu"),
    ("it is a number", lambda m, x: aten.div.Tensor(2.0, x.cumsum(1)).sum(0), "div"),
    ("the result has another dtype", lambda m, x: (torch.gt(x, 0) * m.square).sum(0), "mul"),
    ("the result is larger", lambda m, x: (x[:1].cumsum(1) * x).sum(0), "mul"),
    ("the result has other strides", lambda m, x: F.relu(x.new_empty_strided((5, 6), (1, 7)).fill_(2)), "relu"),
    ("only running it tells its size", lambda m, x: (x[x > 0].sum(0, keepdim=True) * x).sum(0), "mul"),
    ("only running it tells the result's size", lambda m, x: (x[0].cumsum(0) * (x * x[x > 0].sum())).sum(0), "mul"),
]

SEEN: list[torch.Tensor] = []


@fx.wrap
def remembered(x: torch.Tensor) -> torch.Tensor:
    """Gives a tensor that it keeps; capture cannot look into it."""
    SEEN.append(x * 2 if x.is_contiguous() else x * 3)
    return SEEN[-1]


def lowered(body: Body, x: torch.Tensor) -> tuple[nn.Module, fxopt.CompiledModule, set[str]]:
    model = Network(body, row=torch.randn(6), square=nn.Parameter(torch.randn(5, 6))).eval()
    compiled = fxopt.compile(model, (x,), backend="onednn", passes=(), strict=True)
    compiled(x)
    assert compiled.report.backend == "onednn", compiled.report.notices
    found = operations(list(compiled._ready.values())[-1].module)
    return model, compiled, {name for name in found if name.endswith("_")}


def assert_equal(model: nn.Module, compiled: fxopt.CompiledModule, x: torch.Tensor) -> None:
    kept = x.clone()
    for _ in range(2):
        for left, right in zip(*(r if isinstance(r, list) else [r] for r in (model(x), compiled(x))), strict=True):
            assert torch.equal(left, right) or bool((left.isnan() & right.isnan()).any())
            assert left.stride() == right.stride()
        assert torch.equal(x, kept)


@pytest.mark.parametrize(("body", "written"), [pytest.param(*row[1:], id=row[0]) for row in OVERWRITES])
def test_overwrites(body: Body, written: set[str]) -> None:
    x = torch.randn(5, 6)
    model, compiled, found = lowered(body, x)
    assert found == written
    assert_equal(model, compiled, x)


@pytest.mark.parametrize("body", [pytest.param(row[1], id=row[0]) for row in STAYS])
def test_what_somebody_could_miss_stays(body: Body) -> None:
    x = torch.randn(5, 6)
    model, compiled, found = lowered(body, x)
    assert not found
    assert_equal(model, compiled, x)


@pytest.mark.parametrize(("body", "stays"), [pytest.param(*row[1:], id=row[0]) for row in STAYS_INSIDE])
def test_what_is_read_elsewhere_or_cannot_be_overwritten_stays_inside_the_graph(body: Body, stays: str) -> None:
    x = torch.randn(5, 6)
    model, compiled, _ = lowered(body, x)
    with unmodified(model):
        assert_equal(model, compiled, x)
    assert stays in operations(list(compiled._ready.values())[-1].module)


def test_what_an_opaque_function_gives_stays() -> None:
    model, x = Network(lambda m, x: F.relu(remembered(x.cumsum(1))).sum(0)).eval(), torch.randn(5, 6)
    compiled = fxopt.compile(model, backend="onednn", passes=(), strict=True)
    assert torch.equal(compiled(x), model(x))
    compiled(x)
    assert torch.equal(SEEN[-1], x.cumsum(1) * 2)
    assert compiled.report.backend == "onednn", compiled.report.notices


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        pytest.param("(Tensor(a) x, Tensor(b!) count) -> Tensor(a)", 0, id="one behind it"),
        pytest.param("(Tensor(b!) count, Tensor(a) x) -> Tensor(a)", 1, id="one in front of it"),
        pytest.param("(Tensor(b!) count, Tensor(a!) x) -> Tensor(a!)", 1, id="one in front of it, and itself"),
    ],
)
def test_what_lies_in_one_operands_memory_stays_where_another_is_written(schema: str, place: int) -> None:
    with torch.library._scoped_library("fxopt_test", "DEF") as library:
        library.define(f"counted{schema}")
        library.impl("counted", lambda *given: given[place], "CompositeExplicitAutograd")

        def body(m: Any, x: torch.Tensor) -> torch.Tensor:
            count = x.new_zeros(5, 6)
            return F.relu(torch.ops.fxopt_test.counted.default(*((x, count) if place == 0 else (count, x)))).sum(0)

        model, x = Network(body).eval(), torch.randn(5, 6)
        compiled = fxopt.compile(model, backend="onednn", passes=(), strict=True)
        assert_equal(model, compiled, x)
        assert compiled.report.backend == "onednn", compiled.report.notices


def growing(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first = m.a(x)
    second = torch.cat([first, m.b(F.silu(first))], 1)
    third = torch.cat([second, m.c(F.silu(second))], 1)
    return F.silu(third), m.d(second.tanh())


def test_a_concat_in_whose_memory_another_lies_stays() -> None:
    """Nobody else reads the last concat, but the one before lies in its memory, and is read behind it."""
    convolutions = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 1), "c": nn.Conv2d(8, 4, 1), "d": nn.Conv2d(8, 5, 3)}
    model, x = Network(growing, **convolutions).eval(), torch.randn(2, 3, 11, 11)
    compiled = fxopt.compile(model, (x,), backend="onednn", strict=True)
    for left, right in zip(compiled(x), model(x), strict=True):
        torch.testing.assert_close(left, right, rtol=2e-5, atol=2e-5)
    found = operations(list(compiled._ready.values())[-1].module)
    assert "empty_strided" in found
    assert "silu_" not in found


def test_what_lies_in_the_memory_of_an_out_argument_stays() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        before = m.kept.sum()
        return F.silu(torch.add(x.cumsum(0), x, out=m.kept)).sum() + before

    ours, theirs = (Network(body, kept=torch.zeros(6, 6)).eval() for _ in range(2))
    x = torch.randn(6, 6)
    compiled = fxopt.compile(ours, (x,), backend="onednn", passes=(), strict=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), theirs(x))


def test_a_callers_tensor_that_is_an_out_argument_is_left_as_eager_leaves_it() -> None:
    model = Network(lambda m, x: F.relu(torch.add(x.cumsum(0), 1.0, out=x)).sum()).eval()
    x, y = (torch.linspace(-3, 3, 36).reshape(6, 6) for _ in range(2))
    compiled = fxopt.compile(model, (x.clone(),), backend="onednn", passes=(), strict=True)
    torch.testing.assert_close(compiled(x), model(y))
    torch.testing.assert_close(x, y)
