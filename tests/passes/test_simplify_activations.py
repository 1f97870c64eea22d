"""simplify-activations: what one activation does to another is bounds; what goes, what composes, what stays and why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

import fxopt
from fxopt import ir
from graphs import FRONT_ENDS, Network, assert_declined, bits, compiled_by, fired, operations

PASSES = ("simplify-activations",)
RELU, CLAMP, IS_RELU = "relu-of-nonnegative", "clamp-of-clamp", "clamp-is-relu"
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]
aten = torch.ops.aten
NAN, INF = float("nan"), float("inf")


def numbers(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers on both sides of every bound, and those that a clamp can lose."""
    odd = [NAN, INF, -INF, -0.0, 0.0, 1e-40, -1e-40, 0.1, 0.5, 1.0, 3.0, 6.0, -1.0, -2.0, -6.0, 7.0]
    line = torch.linspace(-8, 8, 84, dtype=torch.float64)
    return torch.cat([torch.tensor(odd, dtype=torch.float64), line]).reshape(4, 25).to(dtype)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """The same bits, and NaN where there was NaN: PyTorch does not say which one."""
    assert torch.equal(left.isnan(), right.isnan())
    return bits(left.nan_to_num(0.0)) == bits(right.nan_to_num(0.0))


def calls(module: fx.GraphModule) -> list[str]:
    """The operators of a graph with their literals."""
    found = [node for node in module.graph.nodes if ir.is_compute(node)]
    return [f"{ir.target_name(node)}({', '.join(map(str, node.args[1:]))})" for node in found]


SIMPLER: list[tuple[str, Body, list[str]]] = [
    ("relu twice", lambda m, x: F.relu(F.relu(x)), ["relu()"]),
    ("relu four times", lambda m, x: m.relu(m.relu(F.relu(F.relu(x)))), ["relu()"]),
    ("relu in place, twice", lambda m, x: torch.relu_(torch.relu(x)), ["relu()"]),
    ("relu after relu6", lambda m, x: F.relu(F.relu6(x)), ["relu6()"]),
    ("relu after sigmoid", lambda m, x: F.relu(torch.sigmoid(x)), ["sigmoid()"]),
    ("relu after hardsigmoid", lambda m, x: F.relu(F.hardsigmoid(x)), ["hardsigmoid()"]),
    ("relu after exp", lambda m, x: F.relu(torch.exp(x)), ["exp()"]),
    ("relu after softmax", lambda m, x: F.relu(F.softmax(x, -1)), ["softmax(-1)"]),
    ("relu after a clamp to positive numbers", lambda m, x: F.relu(x.clamp(0.5, 2)), ["clamp(0.5, 2)"]),
    ("relu after a clamp without upper bound", lambda m, x: F.relu(x.clamp(0.5)), ["clamp(0.5)"]),
    ("relu after hardtanh", lambda m, x: F.relu(F.hardtanh(x, 0.0, 3.0)), ["hardtanh(0.0, 3.0)"]),
    ("relu after a clamp of integers to floats", lambda m, x: F.relu((x > 0).to(torch.int64).clamp(0.5)), [
        "gt(0)", "to(torch.int64)", "clamp(0.5)"]),
    ("relu after a clamp to numbers of both signs", lambda m, x: F.relu(x.clamp(-1, 1)), ["clamp(0, 1)"]),
    ("relu after a clamp from above", lambda m, x: F.relu(x.clamp(max=2.5)), ["clamp(0, 2.5)"]),
    ("relu after a clamp from below", lambda m, x: F.relu(x.clamp_min(-2)), ["relu()"]),
    ("relu after hardtanh of both signs", lambda m, x: F.relu(F.hardtanh(x)), ["clamp(0, 1.0)"]),
    ("relu6 after relu", lambda m, x: F.relu6(F.relu(x)), ["relu6()"]),
    ("relu6 twice", lambda m, x: F.relu6(F.relu6(x)), ["relu6()"]),
    ("a clamp from above after relu is relu6 by other words", lambda m, x: F.relu(x).clamp_max(6), ["clamp(0, 6)"]),
    ("a wider clamp", lambda m, x: F.relu6(x).clamp(-1, 7), ["relu6()"]),
    ("a narrower clamp", lambda m, x: F.hardtanh(F.hardtanh(x, -2, 2), -1.5, 1.5), ["hardtanh(-1.5, 1.5)"]),
    ("clamps that overlap", lambda m, x: x.clamp(-3, 1.5).clamp(0.25, 4), ["clamp(0.25, 1.5)"]),
    ("clamps that overlap, the other way", lambda m, x: x.clamp(0.25, 4).clamp(-3, 1.5), ["clamp(0.25, 1.5)"]),
    ("clamps that touch", lambda m, x: x.clamp(-3, 0).clamp(0, 4), ["clamp(0, 0)"]),
    ("one-sided clamps of either side", lambda m, x: x.clamp(min=-1).clamp(max=1), ["clamp(-1, 1)"]),
    ("one-sided clamps of one side", lambda m, x: x.clamp(max=1).clamp(max=3), ["clamp(None, 1)"]),
    ("three clamps", lambda m, x: F.relu(x.clamp(-3, 5)).clamp(1, 9), ["clamp(1, 5)"]),
    ("infinite bounds", lambda m, x: x.clamp(-INF, 2).clamp(-1, INF), ["clamp(-1, 2)"]),
    ("bounds that are one in float32", lambda m, x: x.clamp(1, 2).clamp(1 + 1e-12, 2), ["clamp(1, 2)"]),
    ("a clamp at zero", lambda m, x: x.clamp_min(0), ["relu()"]),
    ("a clamp at zero and at infinity", lambda m, x: x.clamp(0.0, INF), ["relu()"]),
    ("hardtanh at zero and at infinity", lambda m, x: F.hardtanh(x, 0, INF), ["relu()"]),
]  # fmt: skip


@both
@pytest.mark.parametrize(("body", "after"), [pytest.param(*row[1:], id=row[0]) for row in SIMPLER])
def test_simplifies(body: Body, after: list[str], front_end: str) -> None:
    model, x = Network(body, relu=nn.ReLU()).eval(), numbers()
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert calls(compiled.fused_graph) == after
    assert same(compiled(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("body", [pytest.param(row[1], id=row[0]) for row in SIMPLER])
def test_simplifies_other_dtypes(body: Body, dtype: torch.dtype) -> None:
    model, x = Network(body, relu=nn.ReLU()).eval(), numbers(dtype)
    compiled = compiled_by(PASSES, model, (x,), "symbolic")
    assert fired(compiled)
    assert same(compiled(x), model(x))


DECLINES: list[tuple[str, Body, str, str]] = [
    ("the first one is read twice", lambda m, x: (y := F.relu(x)) + F.relu(y), RELU, "is also read by"),
    ("the first one is handed out", lambda m, x: (y := F.relu(x), F.relu(y)), RELU, "is a result of the model"),
    ("the first clamp is read twice", lambda m, x: (y := x.clamp(-1, 1)) + F.relu(y), CLAMP, "is also read by"),
    ("relu after tanh", lambda m, x: F.relu(torch.tanh(x)), RELU, "tanh is tanh, not relu"),
    ("relu after abs, which is negative for the smallest integer", lambda m, x: F.relu(x.abs()), RELU, "abs_1 is abs"),
    ("ranges that do not meet", lambda m, x: x.clamp(2, 3).clamp(-1, 0), CLAMP, "do not meet"),
    ("ranges that do not meet, the other way", lambda m, x: F.relu(x.clamp(-3, -1)), CLAMP, "do not meet"),
    ("bounds in the wrong order", lambda m, x: F.relu(x.clamp(1, -1)), CLAMP, "lower bound 1 of clamp is above"),
    ("outer bounds in the wrong order", lambda m, x: F.relu(x).clamp(1, 0.5), CLAMP, "lower bound 1 of clamp is above"),
    ("a bound that is NaN", lambda m, x: F.relu(x.clamp(NAN, 1)), CLAMP, "is NaN"),
    ("an upper bound that is NaN", lambda m, x: F.relu6(x.clamp(0, NAN)), CLAMP, "is NaN"),
    ("a bound of -0.0", lambda m, x: F.relu(x.clamp(-0.0, 1.0)), CLAMP, "is -0.0 in torch.float32"),
    ("a bound that rounds to -0.0", lambda m, x: F.relu(x.clamp(-1e-60, 1.0)), CLAMP, "is -0.0 in torch.float32"),
    ("tensors for bounds", lambda m, x: F.relu(torch.clamp(x, m.low)), CLAMP, "not relu"),
    ("integers and a bound of 0.5", lambda m, x: (x > 0).long().clamp(0, 3).clamp(0.5, 2), CLAMP, "clamps torch.int64"),
    ("integers", lambda m, x: (x > 0).long().clamp(-1, 1).clamp(0, 2), CLAMP, "clamps torch.int64"),
    ("integers at zero", lambda m, x: (x > 0).long().clamp(0.0), IS_RELU, "clamps torch.int64"),
    ("a clamp at zero and six", lambda m, x: x.clamp(0, 6), IS_RELU, "clamps to 0 and 6"),
    ("a clamp at one", lambda m, x: x.clamp(1), IS_RELU, "clamps to 1 and None"),
    ("a clamp at -0.0", lambda m, x: x.clamp(-0.0), IS_RELU, "is -0.0"),
]  # fmt: skip


@both
@pytest.mark.parametrize(("body", "rule", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, rule: str, reason: str, front_end: str) -> None:
    model, x = Network(body, low=torch.zeros(1)).eval(), numbers()
    compiled = compiled_by(PASSES, model, (x,), front_end, verify=False)
    assert_declined(compiled, rule, reason)
    results = [found if isinstance(found, tuple) else (found,) for found in (compiled(x), model(x))]
    assert all(map(same, *results))


def test_a_bound_that_is_computed_declines() -> None:
    model = Network(lambda m, x: F.relu(x.clamp(-x.shape[0], 3))).eval()
    compiled = compiled_by(PASSES, model, (numbers(),), "export")
    assert_declined(compiled, CLAMP, "is no number that is known")


def test_what_needs_no_shapes_happens_before_the_first_call() -> None:
    compiled = fxopt.compile(Network(lambda m, x: F.relu(F.relu(x).clamp(0, 3))).eval(), passes=PASSES)
    assert fired(compiled) == [CLAMP]
    assert [decline.reason for decline in compiled.report.pending] == ["the dtype of x"]


def test_a_layer_takes_the_one_activation_that_is_left() -> None:
    model = Network(lambda m, x: F.relu(m.layer(x)).clamp_max(4), layer=nn.Linear(25, 3)).eval()
    compiled = compiled_by((*PASSES, "fuse-linear-activation"), model, (torch.randn(4, 25),), "symbolic")
    assert operations(compiled.fused_graph) == {"fxopt.linear": 1}


BOUNDS = st.sampled_from([None, -INF, -2, -1.5, -1, 0, 0.0, 0.25, 1, 1.5, 2.0, 3, INF])
STEPS = st.one_of(
    st.just(("relu",)),
    st.just(("relu6",)),
    st.just(("sigmoid",)),
    st.tuples(st.just("clamp"), BOUNDS, BOUNDS).filter(lambda step: step[1:] != (None, None)),
    st.tuples(st.just("hardtanh"), BOUNDS, BOUNDS).filter(
        lambda step: None not in step[1:] and step[1] <= step[2]  # type: ignore[operator]
    ),
)


@given(st.lists(STEPS, min_size=2, max_size=5), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_any_chain_keeps_its_bits_and_settles(steps: list[Any], dtype: torch.dtype) -> None:
    functions: dict[str, Any] = {"relu": F.relu, "relu6": F.relu6, "sigmoid": torch.sigmoid, "clamp": torch.clamp}
    functions["hardtanh"] = F.hardtanh

    def chain(m: Any, x: torch.Tensor) -> torch.Tensor:
        for name, *arguments in steps:
            x = functions[name](x, *arguments)
        return x

    model, x = Network(chain).eval(), numbers(dtype)
    compiled = fxopt.compile(model, passes=PASSES, verify=False, strict=True, backend="aten")
    assert same(compiled(x), model(x))
    again = fxopt.compile(model, passes=PASSES * 2, verify=False, strict=True, backend="aten")
    again(x)
    assert calls(again.fused_graph) == calls(compiled.fused_graph)


def test_the_ties_that_it_relies_on() -> None:
    """A clamp keeps x where x equals a bound, whatever its sign; and keeps NaN."""
    for low, high in ((0, None), (0, 6), (None, 0), (0, 0), (-1, 0)):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            for size in (1, 7, 8, 33):
                x = torch.full((size,), -0.0, dtype=dtype)
                assert bits(x.clamp(low, high)) == bits(x)
                assert math.isnan(float((x * NAN).clamp(low, high)[-1]))
