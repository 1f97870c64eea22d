"""Lowered graphs: an elementwise operator overwrites its operand where nobody else could miss it, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from graphs import Network, operations

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
