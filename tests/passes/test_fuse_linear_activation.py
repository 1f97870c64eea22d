"""fuse-linear-activation: a linear layer, its residual and its activation become one node of the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt import ops
from graphs import (
    FRONT_ENDS,
    Network,
    TwoInputs,
    assert_declined_somewhere,
    bits,
    compiled_by,
    fired,
    only,
    operations,
)

PASSES = ("fuse-linear-activation",)
ACTIVATION, RIGHT, LEFT = "activation", "residual-right", "residual-left"
FUSED = "fxopt.linear"
SHAPE = (2, 3, 4)
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[..., Any]

#: activation -> a function that is it
SPELLINGS: list[tuple[str, str, Callable[[Any], Any], list[float]]] = [
    ("relu", "relu", F.relu, []),
    ("relu in place", "relu", lambda y: F.relu(y, inplace=True), []),
    ("relu6", "relu6", F.relu6, []),
    ("clamp", "clamp", lambda y: y.clamp(-0.5, 1), [-0.5, 1.0]),
    ("clamp from below", "clamp", lambda y: y.clamp(min=0.1), [0.1, float("inf")]),
    ("clamp from above", "clamp", lambda y: torch.clamp(y, max=0.25), [-float("inf"), 0.25]),
    ("hardtanh", "hardtanh", lambda y: F.hardtanh(y, -2.0, 0.5), [-2.0, 0.5]),
    ("leaky_relu", "leaky_relu", lambda y: F.leaky_relu(y, 0.3), [0.3]),
    ("silu", "silu", F.silu, []),
    ("gelu by erf", "gelu", F.gelu, []),
    ("gelu by tanh", "gelu_tanh", lambda y: F.gelu(y, approximate="tanh"), []),
    ("hardswish", "hardswish", F.hardswish, []),
    ("hardsigmoid", "hardsigmoid", F.hardsigmoid, []),
    ("sigmoid", "sigmoid", torch.sigmoid, []),
    ("tanh", "tanh", torch.tanh, []),
    ("elu", "elu", lambda y: F.elu(y, 0.7), [0.7, 1.0, 1.0]),
    ("mish", "mish", F.mish, []),
]


def layer(**options: Any) -> nn.Module:
    return nn.Linear(4, 4, **options)


@both
@pytest.mark.parametrize(
    ("name", "function", "numbers"), [pytest.param(*row[1:], id=row[0]) for row in SPELLINGS]
)
def test_fuses_every_activation(
    name: str, function: Callable[[Any], Any], numbers: list[float], front_end: str
) -> None:
    model, x = Network(lambda m, x: function(m.layer(x)), layer=layer()).eval(), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert fired(compiled) == [ACTIVATION]
    assert operations(compiled.fused_graph) == {FUSED: 1}
    given = ops.linear_arguments(only(compiled.fused_graph, FUSED))
    assert (given["activation"], list(given["activation_arguments"])) == (name, numbers)
    assert bits(compiled(x)) == bits(model(x))
    assert FUSED not in operations(compiled.graph_module)
    assert bits(compiled.graph_module(x)) == bits(model(x))


def test_every_activation_of_the_operation_is_tested() -> None:
    assert {row[1] for row in SPELLINGS} == set(ops.ACTIVATIONS)


LAYERS: list[tuple[str, nn.Module, tuple[int, ...]]] = [
    ("a vector", nn.Linear(4, 6), (4,)),
    ("rank 2", nn.Linear(4, 6, bias=False), (3, 4)),
    ("rank 3", nn.Linear(4, 6), SHAPE),
    ("rank 4", nn.Linear(4, 6), (2, 3, 5, 4)),
]


@both
@pytest.mark.parametrize(("layer", "shape"), [pytest.param(*row[1:], id=row[0]) for row in LAYERS])
def test_fuses_every_rank(layer: nn.Module, shape: tuple[int, ...], front_end: str) -> None:
    model, x = nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(shape)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert fired(compiled) == [ACTIVATION]
    assert operations(compiled.fused_graph) == {FUSED: 1}
    assert bits(compiled(x)) == bits(model(x))


@both
def test_fuses_a_weight_that_is_computed(front_end: str) -> None:
    model = Network(lambda m, x: F.relu(F.linear(x, m.weight * 2)), weight=torch.randn(3, 4)).eval()
    x = torch.randn(2, 4)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert fired(compiled) == [ACTIVATION]
    assert bits(compiled(x)) == bits(model(x))


RESIDUALS: list[tuple[str, Body, list[str], dict[str, int]]] = [
    ("layer + r", lambda m, x: m.layer(x) + x, [RIGHT], {FUSED: 1}),
    ("r + layer", lambda m, x: x + m.layer(x), [LEFT], {FUSED: 1}),
    ("an in-place sum", lambda m, x: m.layer(x).add_(x), [RIGHT], {FUSED: 1}),
    ("layer + r with alpha=1", lambda m, x: torch.add(m.layer(x), x, alpha=1), [RIGHT], {FUSED: 1}),
    ("activation(layer + r)", lambda m, x: F.relu(m.layer(x) + x), [ACTIVATION, RIGHT], {FUSED: 1}),
    (
        "of two layers the later one takes the sum",
        lambda m, x: m.layer(x) + m.other(x),
        [LEFT],
        {"linear": 1, FUSED: 1},
    ),
    (
        "of two layers the later one takes the sum, on the left",
        lambda m, x: (y := m.layer(x), m.other(x) + y)[1],
        [RIGHT],
        {"linear": 1, FUSED: 1},
    ),
    (
        "a residual that has its own activation",
        lambda m, x: m.layer(x) + F.relu(m.other(x)),
        [ACTIVATION, RIGHT],
        {FUSED: 2},
    ),
    (
        "two residual blocks",
        lambda m, x: F.relu((y := F.relu(m.layer(x) + x)) + m.other(y)),
        [ACTIVATION, ACTIVATION, LEFT, RIGHT],
        {FUSED: 2},
    ),
]


@both
@pytest.mark.parametrize(("body", "rules", "left"), [pytest.param(*row[1:], id=row[0]) for row in RESIDUALS])
def test_fuses_residuals(body: Body, rules: list[str], left: dict[str, int], front_end: str) -> None:
    model, x = Network(body, layer=layer(), other=layer()).eval(), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert sorted(fired(compiled)) == rules
    assert operations(compiled.fused_graph) == left
    assert bits(compiled(x)) == bits(model(x))
    assert bits(compiled.graph_module(x)) == bits(model(x))


def write_to_input(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.layer(x)
    x.mul_(2)
    return F.relu(y)


def write_to_residual(m: Any, x: torch.Tensor) -> torch.Tensor:
    r = torch.neg(x)
    y = m.layer(x)
    r.view(-1).mul_(2)
    return y + r


DECLINES: list[tuple[str, Body, str, str]] = [
    ("the layer is read twice", lambda m, x: F.relu(y := m.layer(x)) + y, ACTIVATION, "is also read by add"),
    ("the layer is a result", lambda m, x: (F.relu(y := m.layer(x)), y), ACTIVATION, "is a result of the model"),
    ("a sum whose layer is a result", lambda m, x: ((y := m.layer(x)) + x, y), RIGHT, "is a result of the model"),
    ("a second activation", lambda m, x: torch.tanh(F.relu(m.layer(x))), ACTIVATION, "already ends in relu"),
    ("an activation in front of the sum", lambda m, x: F.relu(m.layer(x)) + x, RIGHT, "already has an epilogue"),
    ("a second residual", lambda m, x: (m.layer(x) + x) + torch.neg(x), RIGHT, "already has an epilogue"),
    ("a number", lambda m, x: m.layer(x) + 1.5, RIGHT, r"a number \(1.5\) is added"),
    ("alpha=2", lambda m, x: torch.add(m.layer(x), x, alpha=2), RIGHT, "scaled by alpha=2"),
    ("alpha=2 on the layer", lambda m, x: torch.add(x, m.layer(x), alpha=2), LEFT, "scaled by alpha=2"),
    ("a residual that is broadcast", lambda m, x: m.layer(x) + x[:, :1], RIGHT, "is broadcast over"),
    ("a layer that is broadcast", lambda m, x: m.layer(x) + torch.stack([x, x]), RIGHT, "is broadcast over"),
    ("a residual of another dtype", lambda m, x: m.layer(x) + x.to(torch.float64), RIGHT, "is torch.float64, linear"),
    ("the layer itself", lambda m, x: (y := m.layer(x)) + y, RIGHT, "is added to itself"),
    ("the layer that is computed first", lambda m, x: m.layer(x) + m.other(x), RIGHT, "is computed later, and takes"),
    ("a write to the layer's input in between", write_to_input, ACTIVATION, "mul_ may write to a value of the match"),
    ("a write to the residual in between", write_to_residual, RIGHT, "mul_ may write to a value of the match"),
    ("a view in between", lambda m, x: F.relu(m.layer(x).flatten(1)), ACTIVATION, "is flatten, not"),
    ("dropout in training in between", lambda m, x: F.relu(F.dropout(m.layer(x))), ACTIVATION, "is dropout, not"),
]


@both
@pytest.mark.parametrize(("body", "rule", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, rule: str, reason: str, front_end: str) -> None:
    model = Network(body, layer=layer(), other=layer()).eval()
    x = torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert_declined_somewhere(compiled, rule, reason)


def test_declines_bounds_that_are_computed() -> None:
    model = Network(lambda m, x: m.layer(x).clamp(0, x.shape[0]), layer=layer()).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(SHAPE),), "export")
    assert_declined_somewhere(compiled, ACTIVATION, "computed at run time")


def test_a_residual_waits_for_its_shape() -> None:
    compiled = fxopt.compile(Network(lambda m, x: m.layer(x) + x, layer=layer()).eval(), passes=PASSES)
    assert [d.reason for d in compiled.report.pending] == ["whether x has the shape of linear"]
    compiled(torch.randn(SHAPE))
    assert fired(compiled) == [RIGHT]


@both
def test_a_residual_may_be_an_input_of_its_own(front_end: str) -> None:
    model = TwoInputs(lambda m, x, y: F.relu(m.layer(x) + y), layer=layer()).eval()
    inputs = (torch.randn(SHAPE), torch.randn(SHAPE))
    compiled = compiled_by(PASSES, model, inputs, front_end)
    assert operations(compiled.fused_graph) == {FUSED: 1}
    assert bits(compiled(*inputs)) == bits(model(*inputs))
