"""merge-parallel-branches, by the rules of its page: which sums of layers become one layer, which do not and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt import ir
from graphs import (
    FRONT_ENDS,
    Network,
    TwoInputs,
    assert_declined,
    assert_declined_somewhere,
    compiled_by,
    fired,
    only,
    operations,
    randomised,
)

PASSES = ("merge-parallel-branches",)
MERGE = "parallel-branches"
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]
IMAGE = (2, 4, 9, 9)
SAME = {"padding": 1}


def parts(**more: Any) -> dict[str, Any]:
    """Layers of four channels that can stand side by side, and some that cannot."""
    wide = nn.BatchNorm2d(4)
    return {
        "one": nn.Conv2d(4, 4, 1),
        "one_too": nn.Conv2d(4, 4, 1, bias=False),
        "bare": nn.Conv2d(4, 4, 3, padding=1, bias=False),
        "bare_too": nn.Conv2d(4, 4, 3, padding=1, bias=False),
        "three": nn.Conv2d(4, 4, 3, padding=1),
        "five": nn.Conv2d(4, 4, 5, padding=2),
        "row": nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
        "column": nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
        "long_row": nn.Conv2d(4, 4, (1, 5), padding=(0, 2)),
        "long_column": nn.Conv2d(4, 4, (5, 1), padding=(2, 0)),
        "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "depthwise_one": nn.Conv2d(4, 4, 1, groups=4),
        "grouped": nn.Conv2d(4, 4, 3, padding=1, groups=2),
        "dilated": nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        "dilated_row": nn.Conv2d(4, 4, (1, 3), padding=(0, 2), dilation=(1, 2)),
        "strided": nn.Conv2d(4, 4, 3, padding=1, stride=2),
        "strided_one": nn.Conv2d(4, 4, 1, stride=2),
        "unpadded": nn.Conv2d(4, 4, 3),
        "even": nn.Conv2d(4, 4, 2, padding=1, dilation=2),
        "more": nn.Conv2d(4, 6, 3, padding=1),
        "more_one": nn.Conv2d(4, 6, 1),
        "single": nn.Conv2d(4, 1, 3, padding=1),
        "around": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        "up": nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2),
        "up_too": nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2, bias=False),
        "up_larger": nn.ConvTranspose2d(4, 4, 5, stride=2, groups=2, padding=1),
        "up_same": nn.ConvTranspose2d(4, 4, 3, padding=1),
        "norm": wide,
        "norm_too": nn.BatchNorm2d(4, affine=False),
        "free": nn.BatchNorm2d(4, track_running_stats=False),
        "pool": nn.AvgPool2d(3, stride=1, padding=1),
        "c4": torch.randn(4, 1, 1),
    } | more


def model_of(body: Body, **more: Any) -> nn.Module:
    return randomised(Network(body, **parts(**more)))


def merged_by(body: Body, front_end: str, shape: tuple[int, ...] = IMAGE, **more: Any) -> fxopt.CompiledModule:
    return compiled_by(PASSES, model_of(body, **more), (torch.randn(shape),), front_end)


ONE = {"conv2d": 1}
MERGES: list[tuple[str, Body, dict[str, int]]] = [
    ("two convs of one kernel", lambda m, x: m.bare(x) + m.bare_too(x), ONE),
    ("a bias on one side", lambda m, x: m.bare(x) + m.three(x), ONE),
    ("3x3 and 1x1", lambda m, x: m.one(x) + m.three(x), ONE),
    ("three kernels", lambda m, x: m.one(x) + m.three(x) + m.five(x), ONE),
    ("ACNet: 3x3, 3x1 and 1x3", lambda m, x: m.three(x) + m.row(x) + m.column(x), ONE),
    ("3x1 and 1x3 alone: half as much work again", lambda m, x: m.row(x) + m.column(x), ONE),
    ("depthwise", lambda m, x: m.depthwise(x) + m.depthwise_one(x), ONE),
    ("depthwise and identity", lambda m, x: x + m.depthwise(x), ONE),
    ("two groups and identity", lambda m, x: m.grouped(x) + x, ONE),
    ("a conv and identity", lambda m, x: x + m.three(x), ONE),
    ("a conv and identity, more times than one", lambda m, x: x + (x + m.three(x) + x), ONE),
    ("1x1 and identity", lambda m, x: m.one(x) + x, ONE),
    ("a conv and an identity's norm", lambda m, x: m.three(x) + m.norm(x), ONE),
    ("a depthwise conv and an identity's norm", lambda m, x: m.depthwise(x) + m.norm(x), ONE),
    ("RepVGG", lambda m, x: (m.one(x) + m.three(x)) + m.norm(x), ONE),
    ("MobileOne", lambda m, x: sum([m.one(x), m.bare(x), m.three(x), m.bare_too(x), m.norm(x)]), ONE),
    ("several norms and identities", lambda m, x: m.norm(x) + m.three(x) - m.norm_too(x) + x, ONE),
    ("an average pooling", lambda m, x: m.three(x) + m.pool(x), ONE),
    (
        "an average pooling with its own divisor",
        lambda m, x: m.three(x) - F.avg_pool2d(x, 3, 1, 1, divisor_override=5),
        ONE,
    ),
    (
        "an unpadded average pooling, whatever the border counts",
        lambda m, x: m.unpadded(x) + F.avg_pool2d(x, 3, 1, count_include_pad=False),
        ONE,
    ),
    ("a pooling by columns", lambda m, x: m.three(x) + F.avg_pool2d(x, (1, 3), 1, (0, 1)), ONE),
    ("a strided conv and a strided pooling", lambda m, x: m.strided(x) + F.avg_pool2d(x, 3, 2, 1), ONE),
    ("strided convs", lambda m, x: m.strided(x) + m.strided_one(x), ONE),
    ("dilated, beside one tap", lambda m, x: m.dilated(x) + m.one(x) + x, ONE),
    ("dilated in one axis, one tap in the other", lambda m, x: m.dilated(x) + m.dilated_row(x), ONE),
    ("a difference", lambda m, x: m.one(x) - m.three(x), ONE),
    ("a difference of sums", lambda m, x: m.one(x) - (m.three(x) - (m.bare(x) - x)), ONE),
    ("alpha", lambda m, x: torch.sub(torch.add(m.one(x), m.three(x), alpha=3), x, alpha=0.5), ONE),
    ("in place", lambda m, x: m.one(x).add_(m.three(x)).sub_(m.bare(x)), ONE),
    ("numbers", lambda m, x: 0 + m.one(x) + 2.5 - (m.three(x) - 1), ONE),
    ("a layer without any bias, and a number", lambda m, x: m.bare(x) + m.bare_too(x) + 2.5, ONE),
    ("transposed convs of one kernel", lambda m, x: m.up(x) - m.up_too(x), {"conv_transpose2d": 1}),
    ("unbatched", lambda m, x: m.three(y := x[0]) + m.one(y) + y, {"conv2d": 1, "select": 1}),
    ("a residual stays", lambda m, x: m.one(x) + x.relu() + m.three(x), {"relu": 1, "add": 1, "conv2d": 1}),
    (
        "residuals keep their factors",
        lambda m, x: torch.sub(m.one(x), x.relu(), alpha=2) + torch.add(m.three(x), x.sigmoid(), alpha=0.5),
        {"relu": 1, "sigmoid": 1, "sub": 1, "add": 1, "conv2d": 1},
    ),
    (
        "a residual that is broadcast stays",
        lambda m, x: m.one(x) + x[:, :1].relu() + m.three(x),
        {"slice": 1, "relu": 1, "add": 1, "conv2d": 1},
    ),
    (
        "a residual wider than the layers stays",
        lambda m, x: m.one(y := x[:1]) + x.relu() + m.three(y),
        {"slice": 1, "relu": 1, "add": 1, "conv2d": 1},
    ),
    (
        "branches of two values",
        lambda m, x: m.one(x) + m.bare(y := x.relu()) + m.three(x) + m.bare_too(y),
        {"relu": 1, "add": 1, "conv2d": 2},
    ),
    (
        "two groups of branches, apart by their groups",
        lambda m, x: m.three(x) + m.depthwise(x) + m.one(x) + m.depthwise_one(x),
        {"conv2d": 2, "add": 1},
    ),
    ("5x1 and 1x5 beside 5x5", lambda m, x: m.long_row(x) + m.long_column(x) + m.five(x), ONE),
    ("what pays, of what does not", lambda m, x: m.long_row(x) + m.long_column(x) + m.one(x), {"conv2d": 2, "add": 1}),
    (
        "convs of different padding modes, apart",
        lambda m, x: m.three(x) + m.around(x) + m.one(x),
        {"conv2d": 2, "add": 1, "pad": 1},
    ),
    ("the merged layer is read twice", lambda m, x: (y := m.one(x) + m.three(x)) * y, {"conv2d": 1, "mul": 1}),
    (
        "a sum of sums that something else reads",
        lambda m, x: (y := m.one(x) + m.three(x)) + m.bare(x) + y.relu(),
        {"conv2d": 2, "add": 2, "relu": 1},
    ),
    ("one layer called twice", lambda m, x: m.three(x) + m.three(x), ONE),
    (
        "a value that is itself a norm",
        lambda m, x: (y := m.norm(x)) + m.three(y) + m.one(y),
        {"batch_norm": 1, "conv2d": 1},
    ),
    ("a value that is itself a layer", lambda m, x: (y := m.one(x)) + m.three(y), {"conv2d": 2}),
]


@both
@pytest.mark.parametrize(("body", "left"), [pytest.param(*row[1:], id=row[0]) for row in MERGES])
def test_merges(body: Body, left: dict[str, int], front_end: str) -> None:
    compiled = merged_by(body, front_end)
    assert MERGE in fired(compiled)
    assert operations(compiled.fused_graph) == left


def test_linear_layers_merge() -> None:
    layers = {"first": nn.Linear(6, 6), "second": nn.Linear(6, 6, bias=False), "norm": nn.BatchNorm1d(6)}
    bodies: list[tuple[Body, tuple[int, ...]]] = [
        (lambda m, x: m.first(x) - m.second(x), (2, 3, 6)),
        (lambda m, x: x + m.second(x), (6,)),
        (lambda m, x: m.first(x) + m.norm(x) + x, (5, 6)),
    ]
    for body, shape in bodies:
        for front_end in FRONT_ENDS:
            compiled = compiled_by(PASSES, randomised(Network(body, **layers)), (torch.randn(shape),), front_end)
            assert operations(compiled.fused_graph) == {"linear": 1}


@both
@pytest.mark.parametrize("spatial", [1, 3])
def test_other_numbers_of_dimensions(spatial: int, front_end: str) -> None:
    conv, norm = (nn.Conv1d, None, nn.Conv3d)[spatial - 1], (nn.BatchNorm1d, None, nn.BatchNorm3d)[spatial - 1]
    pool = (nn.AvgPool1d, None, nn.AvgPool3d)[spatial - 1]
    assert conv is not None
    assert norm is not None
    assert pool is not None
    layers = {"three": conv(2, 2, 3, padding=1), "one": conv(2, 2, 1), "norm": norm(2), "pool": pool(3, 1, 1)}
    model = randomised(Network(lambda m, x: m.one(x) + m.three(x) + m.norm(x) + m.pool(x) + x, **layers))
    compiled = compiled_by(PASSES, model, (torch.randn(2, 2, *[5] * spatial),), front_end)
    assert operations(compiled.fused_graph) == {f"conv{spatial}d": 1}


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


# -- what goes with it -----------------------------------------------------------------------------------------------


FOLLOWERS: list[tuple[str, Body, dict[str, int]]] = [
    ("a constant behind the sum", lambda m, x: (m.one(x) + m.three(x)) * m.c4 - 1, ONE),
    ("a constant among the addends", lambda m, x: m.one(x) + m.c4 + m.three(x), ONE),
    ("a norm behind the sum", lambda m, x: m.norm(m.one(x) + m.three(x)), ONE),
    ("a norm that only the branches read", lambda m, x: m.one(y := m.norm(x)) + m.one_too(y), ONE),
    ("a constant that only the branches read", lambda m, x: m.one(y := x * m.c4 + 1) + m.one_too(y), ONE),
    (
        "a norm and ReLU that only the branches read",
        lambda m, x: m.one(y := m.gain(x).relu()) + m.three(y),
        {"add": 1, "relu": 1, "conv2d": 1},
    ),
    ("RepMixer", lambda m, x: x + m.c4 * ((m.one(x) + m.norm(x) + m.bare(x)) - (0 + m.norm_too(x))), ONE),
    ("sums in sums", lambda m, x: ((m.one(x) + x) * 2 + m.three(x)) / 3 - m.bare(x) + m.norm(x), ONE),
]


@both
@pytest.mark.parametrize(("body", "left"), [pytest.param(*row[1:], id=row[0]) for row in FOLLOWERS])
def test_what_the_branches_could_not_take_folds_into_the_merged_layer(
    body: Body, left: dict[str, int], front_end: str
) -> None:
    model = model_of(body, gain=nn.BatchNorm2d(4))
    with torch.no_grad():
        model.gain.weight.abs_()
    compiled = compiled_by(("fold-affine", "fold-batchnorm", *PASSES), model, (torch.randn(IMAGE),), front_end)
    assert operations(compiled.fused_graph) == left


@both
def test_an_activation_joins_the_merged_layer(front_end: str) -> None:
    compiled = compiled_by(
        ("default",),
        model_of(lambda m, x: (m.one(x) + m.three(x) + m.norm(x) + x).relu_()),
        (torch.randn(IMAGE),),
        front_end,
    )
    assert operations(compiled.fused_graph) == {"fxopt.convolution": 1}


# -- form ------------------------------------------------------------------------------------------------------------


def test_the_merged_tensors_have_names_of_their_own() -> None:
    compiled = merged_by(lambda m, x: m.one(x) + m.bare(x), "symbolic")
    assert list(compiled.state_dict()) == ["bare.weight_merged", "bare.bias_merged"]


def test_layers_without_bias_give_a_layer_without_bias() -> None:
    compiled = merged_by(lambda m, x: m.bare(x) + m.one_too(x) + x, "symbolic")
    assert ir.argument(only(compiled.fused_graph, "conv2d"), "bias") is None


def test_tied_weights_merge_into_new_ones() -> None:
    tied = nn.Conv2d(4, 4, 1)
    model = Network(lambda m, x: m.first(x) + m.second(x) + m.three(x), **parts(first=tied, second=tied)).eval()
    compiled = compiled_by((*PASSES, "eliminate-dead-code"), model, (torch.randn(IMAGE),), "export")
    assert operations(compiled.fused_graph) == ONE


def test_two_inputs_that_are_equal_are_two_values() -> None:
    model = TwoInputs(lambda m, x, y: m.one(x) + m.three(y), **parts()).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(IMAGE), torch.randn(IMAGE)), "symbolic")
    assert_declined(compiled, MERGE, "no two addends are branches of one value")


def test_a_long_sum_and_one_that_doubles() -> None:
    long = Network(lambda m, x: sum([m.one(x), *[x] * 2000, m.three(x)]), **parts()).eval()
    compiled = fxopt.compile(long, passes=PASSES, verify=False, strict=True)
    assert operations(compiled.fused_graph) == ONE

    def doubling(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.one(x) + m.three(x)
        for _ in range(60):
            y = y + y
        return y

    compiled = fxopt.compile(Network(doubling, **parts()).eval(), passes=PASSES, verify=False, strict=True)
    assert operations(compiled.fused_graph) == {"conv2d": 1, "add": 60}
