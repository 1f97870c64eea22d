"""fold-affine: constants beside a layer or a norm, by the rules of its page: what folds, what declines and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from graphs import (
    FRONT_ENDS,
    Network,
    assert_declined,
    assert_declined_somewhere,
    compiled_by,
    fired,
    operations,
    randomised,
)

PASSES = ("fold-affine",)
AFTER, BEFORE = "constant-after-layer", "constant-before-layer"
AFTER_NORM, BEFORE_NORM = "constant-after-norm", "constant-before-norm"
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]
IMAGE = (2, 4, 6, 6)


def parts(**more: Any) -> dict[str, Any]:
    """Layers, and constants of every shape that aligns with one of them, or with none."""
    return {
        "conv": nn.Conv2d(4, 6, 3),
        "padded": nn.Conv2d(4, 6, 3, padding=1),
        "grouped": nn.Conv2d(4, 6, 3, groups=2, bias=False),
        "square": nn.Conv2d(4, 4, 3),
        "one": nn.Conv2d(4, 1, 3),
        "transposed": nn.ConvTranspose2d(4, 4, 3, groups=2),
        "linear": nn.Linear(6, 5),
        "norm": nn.BatchNorm2d(4),
        "free": nn.BatchNorm2d(4, track_running_stats=False),
        "c4": torch.randn(4, 1, 1),
        "c6": torch.randn(1, 6, 1, 1),
        "c5": torch.randn(5),
        "row6": torch.randn(6),
        "row4": torch.randn(4),
        "scalar": torch.tensor(0.7, dtype=torch.float64),
        "single": torch.tensor([[[-1.3]]]),
        "wide": torch.randn(6, 1, 1, dtype=torch.float64),
        "wide4": torch.randn(4, 1, 1, dtype=torch.float64),
        "whole": torch.randn(6, 4, 4),
        "batch": torch.randn(2, 1, 1, 1),
        "deep": torch.randn(1, 1, 6, 1, 1),
        "shell": torch.full((1, 1, 1, 1, 1), 3.0),
        "zero": torch.tensor([[[1.0]], [[0.0]], [[2.0]], [[1.0]]]),
        "nan": torch.tensor(float("nan")),
        "whole_number": torch.tensor([[[2]]]),
    } | more


def model_of(body: Body) -> nn.Module:
    return randomised(Network(body, **parts()))


FOLDS: list[tuple[str, Body, list[str]]] = [
    ("conv * number", lambda m, x: m.conv(x) * 0.3, [AFTER]),
    ("number * conv", lambda m, x: -2 * m.conv(x), [AFTER]),
    ("conv / number", lambda m, x: m.conv(x) / 3, [AFTER]),
    ("conv + number", lambda m, x: m.conv(x) + 2.5, [AFTER]),
    ("conv - number", lambda m, x: m.conv(x) - 2.5, [AFTER]),
    ("number - conv", lambda m, x: 2.5 - m.conv(x), [AFTER]),
    ("conv + alpha * constant", lambda m, x: torch.add(m.conv(x), m.c6, alpha=3), [AFTER]),
    ("constant + alpha * conv", lambda m, x: torch.add(m.c6, m.conv(x), alpha=3), [AFTER]),
    ("conv - alpha * constant", lambda m, x: torch.sub(m.conv(x), m.c6, alpha=3), [AFTER]),
    ("constant - alpha * conv", lambda m, x: torch.sub(m.c6, m.conv(x), alpha=3), [AFTER]),
    ("rsub", lambda m, x: torch.rsub(m.conv(x), m.c6, alpha=2), [AFTER]),
    ("rsub of the constant", lambda m, x: torch.rsub(m.c6, m.conv(x), alpha=2), [AFTER]),
    ("constant * conv", lambda m, x: m.c6 * m.conv(x), [AFTER]),
    ("conv / constant", lambda m, x: m.conv(x) / m.c6, [AFTER]),
    ("a grouped conv without bias", lambda m, x: m.grouped(x) * m.c6 + m.c6, [AFTER, AFTER]),
    ("a grouped transposed conv, as many inputs as outputs", lambda m, x: m.transposed(x) * m.c4 - m.c4, [AFTER] * 2),
    ("a padded conv", lambda m, x: m.padded(x) * m.c6 + 1, [AFTER, AFTER]),
    ("a constant without dimensions, of a wider dtype", lambda m, x: m.conv(x) * m.scalar, [AFTER]),
    ("a constant of one element", lambda m, x: m.conv(x) * m.single, [AFTER]),
    ("an unbatched conv and a number", lambda m, x: m.conv(x[0]) * 2.0, [AFTER]),
    ("a linear layer of any rank, along the last dim", lambda m, x: m.linear(x) * m.c5 + m.c5, [AFTER, AFTER]),
    ("conv(x * number)", lambda m, x: m.conv(x * 0.3), [BEFORE]),
    ("conv(x / constant)", lambda m, x: m.conv(x / m.c4), [BEFORE]),
    ("conv(number - x)", lambda m, x: m.conv(1.0 - x), [BEFORE]),
    ("conv(constant - x)", lambda m, x: m.conv(m.c4 - x), [BEFORE]),
    ("conv(x - alpha * constant)", lambda m, x: m.conv(torch.sub(x, m.c4, alpha=2)), [BEFORE]),
    ("a padded conv takes a scale", lambda m, x: m.padded(x * m.c4), [BEFORE]),
    ("a grouped conv takes scales and sums per group", lambda m, x: m.grouped(x * m.c4 + m.c4), [BEFORE, BEFORE]),
    ("a transposed conv takes a scale", lambda m, x: m.transposed(m.c4 * x), [BEFORE]),
    ("a linear layer in front", lambda m, x: m.linear((x - m.row6) * m.row6), [BEFORE, BEFORE]),
    ("both sides", lambda m, x: m.conv(x * 2) * 3, [AFTER, BEFORE]),
    ("norm * constant + constant", lambda m, x: m.norm(x) * m.c4 + m.c4, [AFTER_NORM, AFTER_NORM]),
    ("constant - norm", lambda m, x: m.c4 - m.norm(x), [AFTER_NORM]),
    ("norm(x * constant - number)", lambda m, x: m.norm(x * m.c4 - 0.5), [BEFORE_NORM, BEFORE_NORM]),
]


@both
@pytest.mark.parametrize(("body", "rules"), [pytest.param(*row[1:], id=row[0]) for row in FOLDS])
def test_folds(body: Body, rules: list[str], front_end: str) -> None:
    compiled = compiled_by(PASSES, model_of(body), (torch.randn(IMAGE),), front_end)
    assert sorted(fired(compiled)) == rules
    assert not set(operations(compiled.fused_graph)) & {"mul", "div", "add", "sub", "rsub"}


def written(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x) * m.c6
    m.c6.add_(1)
    return y


DECLINES: list[tuple[str, Body, str, str]] = [
    ("another value", lambda m, x: m.square(x) * x[:, :, :4, :4], AFTER, "computed at run time"),
    ("the layer itself", lambda m, x: (y := m.conv(x)) * y, AFTER, "computed at run time"),
    ("True, which is no number", lambda m, x: torch.ops.aten.mul.Tensor(m.conv(x), True), AFTER, "is no number"),
    ("the conv is read twice", lambda m, x: (y := m.conv(x)) * 2 + y, AFTER, "is also read by"),
    ("constant / conv", lambda m, x: m.c6 / (m.conv(x) + 9), AFTER, "no affine map"),
    ("division by zero", lambda m, x: m.square(x) / m.zero, AFTER, "not finite"),
    ("division by the number zero", lambda m, x: m.square(x) / 0.0, AFTER, "not finite"),
    ("a constant that is NaN", lambda m, x: m.conv(x) * m.nan, AFTER, "the constant holds NaN"),
    ("an infinite number", lambda m, x: m.conv(x) * float("inf"), AFTER, "not finite"),
    ("integers", lambda m, x: m.conv(x) * m.whole_number, AFTER, "the constant is torch.int64"),
    ("a constant that is written", written, AFTER, "may write to c6"),
    ("a wider constant", lambda m, x: m.conv(x) * m.wide, AFTER, "torch.float64 and makes torch.float32 wider"),
    ("a (C,) vector runs along W", lambda m, x: m.square(x) * m.row4, AFTER, "does not run along the channels"),
    ("an image", lambda m, x: m.conv(x) + m.whole, AFTER, "does not run along the channels"),
    ("a constant per image", lambda m, x: m.conv(x) * m.batch, AFTER, "does not run along the channels"),
    ("one channel that becomes six", lambda m, x: m.one(x) * m.c6, AFTER, "does not run along the channels"),
    ("one element in more dimensions", lambda m, x: m.conv(x) * m.shell, AFTER, "does not run along the channels"),
    ("a constant of more dimensions", lambda m, x: m.conv(x) * m.deep, AFTER, "does not run along the channels"),
    (
        "an unbatched conv, whose channels are dim 0",
        lambda m, x: m.square(x[0]) * m.c4,
        AFTER,
        "does not run along|unbatched",
    ),
    ("an unbatched conv and one element", lambda m, x: m.square(x[0]) * m.single, AFTER, "unbatched"),
    ("a linear layer along dim 1", lambda m, x: m.linear(x) * m.c4, AFTER, r"dim 3 of 4"),
    ("a sum in front of zero padding", lambda m, x: m.padded(x + m.c4), BEFORE, "pads with zeros"),
    ("a sum in front of a transposed conv", lambda m, x: m.transposed(x + 1), BEFORE, "taps vary by position"),
    ("x that is broadcast", lambda m, x: m.conv(x[:, :1] * m.c4), BEFORE, "is broadcast over the constant"),
    ("a vector along W in front", lambda m, x: m.conv(x[..., :4] * m.row4), BEFORE, "does not run along the channels"),
    ("x that is an integer", lambda m, x: m.conv((x > 0).to(torch.int64) * 0.5), BEFORE, "makes torch.int64 torch.fl"),
    ("the product is read twice", lambda m, x: m.conv(y := x * 2).sum() + y, BEFORE, "is also read by"),
    ("two values", lambda m, x: m.conv(x * torch.abs(x)), BEFORE, "computed at run time"),
    ("division by x in front", lambda m, x: m.conv(m.c4 / (x.abs() + 1)), BEFORE, "no affine map"),
    ("an infinite scale in front", lambda m, x: m.conv(x / m.zero), BEFORE, "not finite"),
    ("a norm by the batch", lambda m, x: m.free(x) * 2, AFTER_NORM, "training mode"),
    ("a norm by the batch, behind", lambda m, x: m.free(x * 2), BEFORE_NORM, "training mode"),
    ("a vector along W behind a norm", lambda m, x: m.norm(x[..., :4]) * m.row4, AFTER_NORM, "does not run along"),
    ("a vector along W before a norm", lambda m, x: m.norm(x[..., :4] * m.row4), BEFORE_NORM, "does not run along"),
    ("a wider constant behind a norm", lambda m, x: m.norm(x) * m.wide4, AFTER_NORM, "makes torch.float32 wider"),
    ("an infinite scale behind a norm", lambda m, x: m.norm(x) / m.zero, AFTER_NORM, "leave the range"),
    ("an infinite scale before a norm", lambda m, x: m.norm(x / m.zero), BEFORE_NORM, "leave the range"),
    ("another value beside a norm", lambda m, x: m.norm(x) * x, AFTER_NORM, "computed at run time"),
    ("x that is broadcast before a norm", lambda m, x: m.norm(x[:, :1] * m.c4), BEFORE_NORM, "is broadcast over"),
]


@both
@pytest.mark.parametrize(("body", "rule", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, rule: str, reason: str, front_end: str) -> None:
    finite = "not finite" not in reason and "NaN" not in reason and "leave the range" not in reason
    compiled = compiled_by(PASSES, model_of(body), (torch.randn(IMAGE),), front_end, verify=finite)
    assert_declined_somewhere(compiled, rule, reason)


def test_alpha_that_is_computed_declines() -> None:
    model = model_of(lambda m, x: torch.add(m.conv(x), m.c6, alpha=x.shape[0]))
    compiled = compiled_by(PASSES, model, (torch.randn(IMAGE),), "export")
    assert_declined(compiled, AFTER, "alpha=sym_size.* is no number that is known")


@both
def test_layer_scale(front_end: str) -> None:
    """ConvNeXt's gamma, along the last dim of a linear layer of rank 4."""
    model = Network(
        lambda m, x: x + m.gamma * m.second(F.gelu(m.first(x))),
        first=nn.Linear(4, 8),
        second=nn.Linear(8, 4),
        gamma=nn.Parameter(torch.randn(4)),
    ).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(2, 3, 3, 4),), front_end)
    assert fired(compiled) == [AFTER]
    assert operations(compiled.fused_graph)["mul"] == 0


ORDERS: list[tuple[str, Body]] = [
    ("a constant between a conv and its norm", lambda m, x: m.norm(m.square(x) * m.c4)),
    ("a constant behind a conv and its norm", lambda m, x: m.norm(m.square(x)) * m.c4 + 1),
    ("a constant between a norm and a conv", lambda m, x: m.conv(m.norm(x) * 2)),
    ("constants all around", lambda m, x: 1 - m.conv(m.norm(x * m.c4 + 1) / 2) * m.c6),
]


@both
@pytest.mark.parametrize("body", [pytest.param(row[1], id=row[0]) for row in ORDERS])
def test_no_constant_keeps_a_norm_from_its_layer(body: Body, front_end: str) -> None:
    compiled = compiled_by(("fold-affine", "fold-batchnorm"), model_of(body), (torch.randn(IMAGE),), front_end)
    assert operations(compiled.fused_graph) == {"conv2d": 1}


def test_numbers_fold_before_the_first_call_and_front_constants_wait() -> None:
    compiled = fxopt.compile(model_of(lambda m, x: m.conv(x * 2) * 3), passes=PASSES)
    assert fired(compiled) == [AFTER]
    assert {decline.reason for decline in compiled.report.pending} == {"whether x has the shape and dtype of mul"}
    compiled(torch.randn(IMAGE))
    assert sorted(fired(compiled)) == [AFTER, BEFORE]


def test_folds_in_front_of_a_layer_that_is_fused_already() -> None:
    passes = ("fold-affine", "fuse-conv-activation")
    compiled = compiled_by(passes, model_of(lambda m, x: F.relu(m.conv(x * 2 - 1))), (torch.randn(IMAGE),), "symbolic")
    assert operations(compiled.fused_graph) == {"fxopt.convolution": 1}


def test_a_layer_without_bias_that_is_only_scaled_has_none_afterwards() -> None:
    compiled = compiled_by(PASSES, model_of(lambda m, x: m.grouped(x) * 2), (torch.randn(IMAGE),), "symbolic")
    assert list(compiled.state_dict()) == ["grouped.weight_folded"]


def test_a_constant_that_becomes_the_bias_of_two_layers_is_a_copy_in_each() -> None:
    """In float64 nothing is rounded, and the bias could be the constant itself: one tensor under three names."""
    model = Network(
        lambda m, x: (m.shift + m.first(x)) * (m.shift + m.second(x)) + m.shift,
        first=nn.Linear(6, 5, bias=False),
        second=nn.Linear(6, 5, bias=False),
        shift=torch.randn(5),
    )
    compiled = compiled_by(PASSES, model.double().eval(), (torch.randn(2, 6).double(),), "symbolic")
    assert fired(compiled) == [AFTER, AFTER]
