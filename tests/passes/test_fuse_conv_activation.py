"""fuse-conv-activation: a convolution, its residual and its activation become one node of the same bits."""

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

PASSES = ("fuse-conv-activation",)
ACTIVATION, RIGHT, LEFT = "activation", "residual-right", "residual-left"
FUSED = "fxopt.convolution"
SHAPE = (2, 4, 6, 6)
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


def conv(**options: Any) -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1, **options)


@both
@pytest.mark.parametrize(
    ("name", "function", "numbers"), [pytest.param(*row[1:], id=row[0]) for row in SPELLINGS]
)
def test_fuses_every_activation(
    name: str, function: Callable[[Any], Any], numbers: list[float], front_end: str
) -> None:
    model, x = Network(lambda m, x: function(m.conv(x)), conv=conv()).eval(), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert fired(compiled) == [ACTIVATION]
    assert operations(compiled.fused_graph) == {FUSED: 1}
    given = ops.convolution_arguments(only(compiled.fused_graph, FUSED))
    assert (given["activation"], list(given["activation_arguments"])) == (name, numbers)
    assert bits(compiled(x)) == bits(model(x))
    assert FUSED not in operations(compiled.graph_module)
    assert bits(compiled.graph_module(x)) == bits(model(x))


def test_every_activation_of_the_operation_is_tested() -> None:
    assert {row[1] for row in SPELLINGS} == set(ops.ACTIVATIONS)


LAYERS: list[tuple[str, nn.Module, tuple[int, ...]]] = [
    ("conv1d", nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (2, 4, 9)),
    ("conv2d", nn.Conv2d(4, 6, (1, 3), stride=(1, 2), padding=(0, 1), bias=False), SHAPE),
    ("conv3d", nn.Conv3d(4, 6, 2, stride=2), (1, 4, 4, 4, 4)),
    ("a transposed conv1d", nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5)),
    ("a transposed conv2d", nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2), SHAPE),
    ("a transposed conv3d", nn.ConvTranspose3d(4, 6, 2), (1, 4, 3, 3, 3)),
    ("an unbatched conv2d", nn.Conv2d(4, 6, 3), SHAPE[1:]),
    ("padding_mode=reflect", nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), SHAPE),
]


@both
@pytest.mark.parametrize(("layer", "shape"), [pytest.param(*row[1:], id=row[0]) for row in LAYERS])
def test_fuses_every_convolution(layer: nn.Module, shape: tuple[int, ...], front_end: str) -> None:
    model, x = nn.Sequential(layer, nn.ReLU()).eval(), torch.randn(shape)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert fired(compiled) == [ACTIVATION]
    assert operations(compiled.fused_graph)[FUSED] == 1
    assert bits(compiled(x)) == bits(model(x))


RESIDUALS: list[tuple[str, Body, list[str], dict[str, int]]] = [
    ("conv + r", lambda m, x: m.conv(x) + x, [RIGHT], {FUSED: 1}),
    ("r + conv", lambda m, x: x + m.conv(x), [LEFT], {FUSED: 1}),
    ("an in-place sum", lambda m, x: m.conv(x).add_(x), [RIGHT], {FUSED: 1}),
    ("conv + r with alpha=1", lambda m, x: torch.add(m.conv(x), x, alpha=1), [RIGHT], {FUSED: 1}),
    ("activation(conv + r)", lambda m, x: F.relu(m.conv(x) + x), [ACTIVATION, RIGHT], {FUSED: 1}),
    (
        "of two convs the later one takes the sum",
        lambda m, x: m.conv(x) + m.other(x),
        [LEFT],
        {"conv2d": 1, FUSED: 1},
    ),
    (
        "of two convs the later one takes the sum, on the left",
        lambda m, x: (y := m.conv(x), m.other(x) + y)[1],
        [RIGHT],
        {"conv2d": 1, FUSED: 1},
    ),
    (
        "a residual that has its own activation",
        lambda m, x: m.conv(x) + F.relu(m.other(x)),
        [ACTIVATION, RIGHT],
        {FUSED: 2},
    ),
    (
        "two residual blocks",
        lambda m, x: F.relu((y := F.relu(m.conv(x) + x)) + m.other(y)),
        [ACTIVATION, ACTIVATION, LEFT, RIGHT],
        {FUSED: 2},
    ),
]


@both
@pytest.mark.parametrize(("body", "rules", "left"), [pytest.param(*row[1:], id=row[0]) for row in RESIDUALS])
def test_fuses_residuals(body: Body, rules: list[str], left: dict[str, int], front_end: str) -> None:
    model, x = Network(body, conv=conv(), other=conv()).eval(), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert sorted(fired(compiled)) == rules
    assert operations(compiled.fused_graph) == left
    assert bits(compiled(x)) == bits(model(x))
    assert bits(compiled.graph_module(x)) == bits(model(x))


def write_to_input(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    x.mul_(2)
    return F.relu(y)


def write_to_residual(m: Any, x: torch.Tensor) -> torch.Tensor:
    r = torch.neg(x)
    y = m.conv(x)
    r.view(-1).mul_(2)
    return y + r


DECLINES: list[tuple[str, Body, str, str]] = [
    ("the conv is read twice", lambda m, x: F.relu(y := m.conv(x)) + y, ACTIVATION, "is also read by add"),
    ("the conv is a result", lambda m, x: (F.relu(y := m.conv(x)), y), ACTIVATION, "is a result of the model"),
    ("a sum whose conv is a result", lambda m, x: ((y := m.conv(x)) + x, y), RIGHT, "is a result of the model"),
    ("a second activation", lambda m, x: torch.tanh(F.relu(m.conv(x))), ACTIVATION, "already ends in relu"),
    ("an activation in front of the sum", lambda m, x: F.relu(m.conv(x)) + x, RIGHT, "already has an epilogue"),
    ("a second residual", lambda m, x: (m.conv(x) + x) + torch.neg(x), RIGHT, "already has an epilogue"),
    ("a number", lambda m, x: m.conv(x) + 1.5, RIGHT, r"a number \(1.5\) is added"),
    ("alpha=2", lambda m, x: torch.add(m.conv(x), x, alpha=2), RIGHT, "scaled by alpha=2"),
    ("alpha=2 on the conv", lambda m, x: torch.add(x, m.conv(x), alpha=2), LEFT, "scaled by alpha=2"),
    ("a residual that is broadcast", lambda m, x: m.conv(x) + x[:, :1], RIGHT, "is broadcast over"),
    ("a conv that is broadcast", lambda m, x: m.conv(x) + torch.stack([x, x]), RIGHT, "is broadcast over"),
    ("a residual of another dtype", lambda m, x: m.conv(x) + x.to(torch.float64), RIGHT, "is torch.float64, conv2d"),
    ("the conv itself", lambda m, x: (y := m.conv(x)) + y, RIGHT, "is added to itself"),
    ("the conv that is computed first", lambda m, x: m.conv(x) + m.other(x), RIGHT, "is computed later, and takes"),
    ("a write to the conv's input in between", write_to_input, ACTIVATION, "mul_ may write to a value of the match"),
    ("a write to the residual in between", write_to_residual, RIGHT, "mul_ may write to a value of the match"),
    ("a view in between", lambda m, x: F.relu(m.conv(x).flatten(1)), ACTIVATION, "is flatten, not"),
    ("dropout in training in between", lambda m, x: F.relu(F.dropout(m.conv(x))), ACTIVATION, "is dropout, not"),
    ("uneven padding=same", lambda m, x: F.relu(m.uneven(x)), ACTIVATION, "is conv2d, not"),
]


@both
@pytest.mark.parametrize(("body", "rule", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
def test_declines(body: Body, rule: str, reason: str, front_end: str) -> None:
    model = Network(body, conv=conv(), other=conv(), uneven=nn.Conv2d(4, 4, 2, padding="same")).eval()
    x = torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert_declined_somewhere(compiled, rule, reason)


def test_declines_bounds_that_are_computed() -> None:
    model = Network(lambda m, x: m.conv(x).clamp(0, x.shape[0]), conv=conv()).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(SHAPE),), "export")
    assert_declined_somewhere(compiled, ACTIVATION, "computed at run time")


def test_a_residual_waits_for_its_shape() -> None:
    compiled = fxopt.compile(Network(lambda m, x: m.conv(x) + x, conv=conv()).eval(), passes=PASSES)
    assert [d.reason for d in compiled.report.pending] == ["whether x has the shape of conv2d"]
    compiled(torch.randn(SHAPE))
    assert fired(compiled) == [RIGHT]


@both
def test_a_residual_may_be_an_input_of_its_own(front_end: str) -> None:
    model = TwoInputs(lambda m, x, y: F.relu(m.conv(x) + y), conv=conv()).eval()
    inputs = (torch.randn(SHAPE), torch.randn(SHAPE))
    compiled = compiled_by(PASSES, model, inputs, front_end)
    assert operations(compiled.fused_graph) == {FUSED: 1}
    assert bits(compiled(*inputs)) == bits(model(*inputs))
