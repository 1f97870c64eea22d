"""merge-parallel-branches: the sums of layers that stay, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from branches import IMAGE, MERGE, PASSES, Body, both, merged_by, model_of, parts
from graphs import Network, assert_declined, assert_declined_somewhere, compiled_by, fired, randomised


def written_between(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.one(x)
    x.mul_(2)
    return y + m.three(x)


def computed(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(x, m.one.weight * x.mean()) + m.three(x)


DECLINES: list[tuple[str, Body, str]] = [
    ("other values", lambda m, x: m.one(x) + m.three(x.relu()), "no two addends are branches of one value"),
    ("one layer alone", lambda m, x: m.one(x) + x.relu(), "no two addends are branches of one value"),
    ("a layer and a number", lambda m, x: m.one(x) + 2, "no two addends are branches of one value"),
    ("no layer", lambda m, x: m.norm(x) + x, "no two addends are branches of one value"),
    ("x that is written in between", written_between, "may write to a value of the match|no two addends"),
    ("a weight that is computed", computed, "weight or bias of conv2d is computed at run time"),
    (
        "a branch that is read elsewhere",
        lambda m, x: (y := m.one(x)) + m.three(x).sub(y.relu()),
        "is also read by relu",
    ),
    ("a branch that is a result", lambda m, x: ((y := m.one(x)) + m.three(x), y), "is a result of the model"),
    ("a norm that is read elsewhere", lambda m, x: (y := m.norm(x)) + m.three(x) * y.relu(), "no two addends"),
    (
        "other strides, on one pixel",
        lambda m, x: m.strided(y := x[..., :1, :1]) + m.one(y),
        r"strides are \(2, 2\) and \(1, 1\)",
    ),
    (
        "a stride and identity, on one pixel",
        lambda m, x: m.strided(y := x[..., :1, :1]) + y,
        r"strides are \(2, 2\) and \(1, 1\)",
    ),
    ("other groups", lambda m, x: m.three(x) + m.depthwise(x), "1 and 4 groups"),
    ("other channels", lambda m, x: m.single(x) + m.three(x), "1 and 4 channels, of which one is broadcast"),
    (
        "more channels than x",
        lambda m, x: m.single(x) + x,
        "x has 4 channels, conv2d 1: one is broadcast|tensors_0 has 4",
    ),
    ("other dilations", lambda m, x: m.three(x) + m.dilated(x), r"dilations are \(1, 1\) and \(2, 2\)"),
    ("an even kernel", lambda m, x: m.dilated(x) + m.even(x), "have no common centre"),
    ("other paddings", lambda m, x: m.unpadded(y := x[..., :3, :3]) + m.one(y), "have other centres"),
    (
        "twice the work",
        lambda m, x: m.long_row(x) + m.long_column(x),
        "400 multiply-adds for each pixel, the branches take 160",
    ),
    (
        "a pooling that makes a 1x1 conv 3x3",
        lambda m, x: m.one(x) + m.pool(x),
        "144 multiply-adds for each pixel, the branches take 52",
    ),
    ("a pooling that rounds up", lambda m, x: m.strided(x) + F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), "ceil_mode"),
    (
        "a pooling that divides by less at the border",
        lambda m, x: m.three(x) + F.avg_pool2d(x, 3, 1, 1, False, False),
        "count_include_pad=False",
    ),
    ("a transposed conv and a conv", lambda m, x: m.up_same(x) + m.three(x), "conv2d is conv2d|is conv_transpose2d"),
    ("a transposed conv and identity", lambda m, x: m.up_same(x) + x, "is a transposed convolution"),
    ("transposed convs of other kernels", lambda m, x: m.up(x) + m.up_larger(x), "merge only with equal kernel"),
    ("a norm by the batch", lambda m, x: m.one(x) + m.free(x), "training mode"),
    ("True, which is no number", lambda m, x: torch.ops.aten.add.Tensor(m.one(x) + m.three(x), True), "True is added"),
    ("an infinite number", lambda m, x: m.one(x) + m.three(x) + float("inf"), "inf is added"),
    (
        "a residual of another dtype",
        lambda m, x: m.one(x) + x.double() + m.three(x),
        "to is torch.float64, conv2d_1 torch.float32",
    ),
]


@both
@pytest.mark.parametrize(("body", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, reason: str, front_end: str) -> None:
    compiled = compiled_by(PASSES, model_of(body), (torch.randn(IMAGE),), front_end, verify="inf" not in reason)
    assert_declined(compiled, MERGE, reason)


def test_a_factor_that_is_computed_declines() -> None:
    body: Body = lambda m, x: torch.add(m.one(x), m.three(x), alpha=x.shape[0])  # noqa: E731
    assert_declined(merged_by(body, "export"), MERGE, "alpha=sym_size.* is no number that is known")


def test_a_weight_that_is_written_declines() -> None:
    model = Network(
        lambda m, x: (F.conv2d(x, m.first) + F.conv2d(x, m.second), m.first.add_(1))[0],
        **{name: torch.randn(4, 4, 1, 1) for name in ("first", "second")},
    )
    compiled = fxopt.compile(model.eval(), passes=PASSES)
    assert_declined(compiled, MERGE, "may write to first")


def test_weights_that_eager_would_refuse_decline() -> None:
    model = Network(lambda m, x: m.one(x) + m.three(x), **parts()).eval()
    model.one.double()
    assert_declined(fxopt.compile(model, passes=PASSES), MERGE, "the weights are torch.float32 and torch.float64")


def test_channels_that_eager_would_refuse_decline() -> None:
    model = Network(lambda m, x: m.one(x) + m.other(x), **parts(other=nn.BatchNorm2d(6))).eval()
    assert_declined(fxopt.compile(model, passes=PASSES), MERGE, "batch_norm has 6 channels, the layer 4")


def test_a_divisor_that_is_computed_waits_until_it_is_a_number() -> None:
    model = model_of(lambda m, x: m.three(x) + F.avg_pool2d(x, 3, 1, 1, False, True, x.shape[0]))
    compiled = fxopt.compile(model, passes=PASSES)
    assert_declined(compiled, MERGE, "the window of avg_pool2d is computed at run time")
    compiled(torch.randn(IMAGE))
    assert fired(compiled) == [MERGE]


BAD: list[tuple[str, Callable[[Any], Any], str]] = [
    ("a weight that is NaN", lambda m: m.one.weight.fill_(float("nan")), "conv2d: the weight holds NaN"),
    ("a bias that is infinite", lambda m: m.three.bias.fill_(float("inf")), "conv2d_1: the bias holds NaN or infinity"),
    (
        "a norm that divides by zero",
        lambda m: m.norm.running_var.fill_(-1),
        "scale or shift of batch_norm is not finite",
    ),
    (
        "a sum of weights beyond float32",
        lambda m: (m.one.weight.fill_(3e38), m.three.weight.fill_(3e38)),
        "leave the range",
    ),
    ("a sum of biases beyond float32", lambda m: (m.one.bias.fill_(3e38), m.three.bias.fill_(3e38)), "leave the range"),
    (
        "weights too small to tell",
        lambda m: (m.one.weight.fill_(1e-42), m.three.weight.fill_(1e-42), m.norm.weight.fill_(0)),
        "would vanish",
    ),
]


@pytest.mark.parametrize(("spoil", "reason"), [pytest.param(*row[1:], id=row[0]) for row in BAD])
def test_numbers_that_decline(spoil: Callable[[Any], Any], reason: str) -> None:
    model = model_of(lambda m, x: m.one(x) + m.three(x) + m.norm(x))
    with torch.no_grad():
        spoil(model)
    compiled = fxopt.compile(model, (torch.randn(IMAGE),), passes=PASSES, verify=False, strict=True)
    assert_declined_somewhere(compiled, MERGE, reason)
    assert "leave" not in reason or fired(compiled) == []


def test_a_norm_along_another_dim_declines() -> None:
    """A norm's channels are dim 1, a linear layer's the last; of an unbatched image dim 1 is its rows."""
    linear = randomised(Network(lambda m, x: m.layer(x) + m.norm(x), layer=nn.Linear(6, 6), norm=nn.BatchNorm1d(6)))
    compiled = compiled_by(PASSES, linear, (torch.randn(2, 6, 6),), "export")
    assert_declined(compiled, MERGE, "batch_norm has 3 dimensions")
    unbatched = Network(
        lambda m, x: m.layer(x) + F.batch_norm(x, m.mean, m.variance),
        layer=nn.Conv2d(4, 4, 1),
        mean=torch.randn(4),
        variance=torch.rand(4) + 1,
    )
    compiled = compiled_by(PASSES, unbatched.eval(), (torch.randn(4, 4, 4),), "export")
    assert_declined(compiled, MERGE, "batch_norm has 3 dimensions")


def test_a_norm_of_unknown_rank_waits_for_the_first_call() -> None:
    model = Network(
        lambda m, x: m.layer(x) + F.batch_norm(x, m.mean, m.variance),
        layer=nn.Conv2d(4, 4, 1),
        mean=torch.randn(4),
        variance=torch.rand(4) + 1,
    ).eval()
    compiled = fxopt.compile(model, passes=PASSES)
    assert [decline.reason for decline in compiled.report.pending] == [
        "the rank of batch_norm says where its channels are"
    ]
    compiled(torch.randn(IMAGE))
    assert fired(compiled) == [MERGE]


def test_a_residual_waits_for_the_first_call() -> None:
    compiled = fxopt.compile(model_of(lambda m, x: m.one(x) + x.relu() + m.three(x)), passes=PASSES)
    assert [decline.reason for decline in compiled.report.pending] == ["whether relu has the dtype of conv2d_1"]
    compiled(torch.randn(IMAGE))
    assert fired(compiled) == [MERGE]


def test_a_pooling_of_other_dimensions_declines() -> None:
    """Three dimensions are an unbatched image to avg_pool2d, and a batch of signals to conv1d."""
    model = Network(lambda m, x: m.layer(x) + F.avg_pool2d(x, (1, 3), 1, (0, 1)), layer=nn.Conv1d(4, 4, 3, padding=1))
    compiled = compiled_by(PASSES, model.eval(), (torch.randn(2, 4, 9),), "export")
    assert_declined(compiled, MERGE, "pools over other dimensions than conv1d")
    model = Network(lambda m, x: m.layer(x) + F.avg_pool3d(x, (1, 1, 3), 1, (0, 0, 1)), layer=nn.Linear(6, 6))
    compiled = compiled_by(PASSES, model.eval(), (torch.randn(1, 1, 6, 6),), "export")
    assert_declined(compiled, MERGE, "pools over other dimensions than linear")
