"""merge-parallel-branches, by the rules of its page: which sums of layers become one layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from branches import IMAGE, MERGE, PASSES, Body, both, merged_by, model_of, parts
from fxopt import ir
from graphs import FRONT_ENDS, Network, TwoInputs, assert_declined, compiled_by, fired, only, operations, randomised

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
    (
        "a branch that something else reads stays, the others merge",
        lambda m, x: ((y := m.one(x)) + m.three(x) + m.bare(x)) * y,
        {"conv2d": 2, "add": 1, "mul": 1},
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
    long = Network(lambda m, x: sum([m.one(x), *[0.5] * 2000, m.three(x)]), **parts()).eval()
    compiled = fxopt.compile(long, passes=PASSES, verify=False, strict=True)
    assert operations(compiled.fused_graph) == ONE

    def doubling(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.one(x) + m.three(x)
        for _ in range(60):
            y = y + y
        return y

    compiled = fxopt.compile(Network(doubling, **parts()).eval(), passes=PASSES, verify=False, strict=True)
    assert operations(compiled.fused_graph) == {"conv2d": 1, "add": 60}
