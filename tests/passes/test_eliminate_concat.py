"""eliminate-concat: nested concats, pieces of one value, steps that commute, layers that are split; and what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import event, given
from torch import nn
from torch.nn import functional as F

import fxopt
from concats import SIXTEEN as IMAGE
from concats import (
    Body,
    both_convs,
    captured,
    dyadic,
    everything_pays,
    exact,
    joined,
    model_of,
    networks,
    results_of,
    rewritten,
    sharing,
    strides,
)
from fxopt import ir, ops
from graphs import (
    FRONT_ENDS,
    Network,
    compiled_by,
    fired,
    operations,
)

PASSES = ("eliminate-concat",)
NESTED, PIECES, COMMUTE, CONSUMER = "nested", "pieces", "commute", "consumer"
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
cat, relu = torch.cat, torch.relu


def counts(compiled: fxopt.CompiledModule, expected: dict[str, int]) -> None:
    found = operations(compiled.fused_graph)
    assert {name: found[name] for name in expected} == expected


# -- nothing to do ---------------------------------------------------------------------------------------------------


def shared_in_one_place(m: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = cat([x, relu(x)], 1), cat([x.abs(), x.neg()], 1)
    return cat([first, second], 1).sum() + first


NOTHING: list[tuple[str, Body, list[str], dict[str, int]]] = [
    ("a concat in front", lambda m, x: cat([cat([x, relu(x)], 1), x.neg()], 1), [NESTED], {"cat": 1}),
    ("a concat behind, and dims from the right", lambda m, x: cat([x, cat([x, relu(x)], -3)], 1), [NESTED], {"cat": 1}),
    ("two of them", lambda m, x: cat([cat([x, relu(x)], 1), x, cat([x.neg(), x], 1)], 1), [NESTED], {"cat": 1}),
    ("three deep", lambda m, x: cat([cat([cat([x, x.neg()], 2), x], 2), x], 2), [NESTED, NESTED], {"cat": 1}),
    ("along an open batch", lambda m, x: cat([x, cat([relu(x), x])]), [NESTED], {"cat": 1}),
    ("only that without other readers", shared_in_one_place, [NESTED], {"cat": 2}),
    ("all of a value in two slices", lambda m, x: cat([x[:, :5], x[:, 5:]], 1) + 1, [PIECES], {"cat": 0, "slice": 0}),
    ("a start from the right", lambda m, x: cat([x[:, :-5], x[:, -5:]], 1) + 1, [PIECES], {"cat": 0, "slice": 0}),
    ("a start beyond the left end", lambda m, x: cat([x[:, -99:3], x[:, 3:99]], 1) + 1, [PIECES], {"cat": 0}),
    ("along another dim", lambda m, x: cat([x[..., :2], x[..., 2:]], -1) + 1, [PIECES], {"cat": 0, "slice": 0}),
    ("chunks", lambda m, x: cat(x.chunk(4, 1), 1) + 1, [PIECES], {"cat": 0}),
    ("a split", lambda m, x: cat(x.split(6, 1), 1) + 1, [PIECES], {"cat": 0}),
    ("a split by sizes", lambda m, x: cat(x.split([3, 9, 4], 1), 1) + 1, [PIECES], {"cat": 0}),
    ("a split by a number", lambda m, x: cat(x.tensor_split(3, 1), 1) + 1, [PIECES], {"cat": 0}),
    ("items from the right", lambda m, x: cat([(y := x.chunk(2, 1))[-2], y[-1]], 1) + 1, [PIECES], {"cat": 0}),
    ("a part of a value", lambda m, x: cat([x[:, 2:5], x[:, 5:9]], 1) + 1, [PIECES], {"cat": 0, "slice": 1}),
    (
        "pieces beside other parts",
        lambda m, x: cat([relu(x), x[:, 2:5], x[:, 5:9], x.neg()], 1),
        [PIECES],
        {"cat": 1, "slice": 1},
    ),
    (
        "runs of two values",
        lambda m, x: cat([x[:, :5], x[:, 5:], (y := relu(x))[:, 1:3], y[:, 3:4]], 1),
        [PIECES],
        {"cat": 1, "slice": 1},
    ),
    ("an empty piece", lambda m, x: cat([x[:, :0], x[:, 0:5]], 1) + 1, [PIECES], {"cat": 0, "slice": 1}),
    ("a slice beside an item", lambda m, x: cat([x.chunk(2, 1)[0], x[:, 8:]], 1) + 1, [PIECES], {"cat": 0}),
    ("pieces that others read", lambda m, x: cat([y := x[:, :5], x[:, 5:]], 1) * y.sum(), [PIECES], {"slice": 1}),
    (
        "pieces of a concat, which is then nested",
        lambda m, x: cat([(y := cat([x, relu(x)], 1))[:, :20], y[:, 20:], x.neg()], 1),
        [PIECES, NESTED],
        {"cat": 1, "slice": 0},
    ),
]


def check(body: Body, rules: list[str], expected: dict[str, int], front_end: str, shape: tuple[int, ...]) -> None:
    compiled = compiled_by(PASSES, model_of(body), (torch.randn(shape),), front_end)
    assert fired(compiled) == rules
    counts(compiled, expected)


@both
@pytest.mark.parametrize(("body", "rules", "expected"), [pytest.param(*row[1:], id=row[0]) for row in NOTHING])
def test_what_there_is_already_is_not_joined_again(
    body: Body, rules: list[str], expected: dict[str, int], front_end: str
) -> None:
    check(body, rules, expected, front_end, IMAGE)


def test_pieces_along_an_open_batch_stay() -> None:
    compiled = compiled_by(PASSES, model_of(lambda m, x: cat([x[:1], x[1:]]) + 1), (torch.randn(IMAGE),), "export")
    assert not fired(compiled)
    x = torch.randn(5, *IMAGE[1:])
    assert torch.equal(compiled(x), x + 1)


def test_shapes_are_waited_for() -> None:
    compiled = fxopt.compile(model_of(lambda m, x: cat([cat([x, relu(x)], 1), x], 1)), passes=PASSES)
    assert [entry.reason for entry in compiled.report.pending] == ["the shape of cat", "the shape of cat_1"]
    compiled(torch.randn(IMAGE))
    assert fired(compiled) == [NESTED]


def test_the_parts_of_a_nested_concat_keep_their_layout() -> None:
    """Flat, a channels-last concat of two and a plain third would come out otherwise only if strides were not asked."""
    model = model_of(lambda m, x: cat([cat([x, relu(x)], 1), x.contiguous()], 1))
    image = torch.randn(IMAGE).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        compiled = compiled_by(PASSES, model, (image,), "symbolic")
        assert compiled(image).stride() == model(image).stride()


# -- steps that commute ----------------------------------------------------------------------------------------------


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "clamp": lambda y: y.clamp(-0.5, None),
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "tanh-gelu": lambda y: F.gelu(y, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": lambda y: F.elu(y, 0.5),
    "mish": F.mish,
}
FUSE = ("eliminate-concat", "fold-batchnorm", "fuse-conv-activation", "fuse-linear-activation")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_goes_to_the_layers_that_take_it_up(name: str) -> None:
    model = model_of(lambda m, x: ACTIVATIONS[name](both_convs(m, x)))
    compiled = compiled_by(FUSE, model, (torch.randn(IMAGE),), "symbolic")
    assert fired(compiled) == [COMMUTE, "activation", "activation"]
    counts(compiled, {"fxopt.convolution": 2, "cat": 1})


def test_each_activation_of_an_epilogue_is_in_this_table() -> None:
    modules = [captured(Network(lambda m, x, a=a: a(x)), torch.randn(2)) for a in ACTIVATIONS.values()]  # type: ignore[misc]
    found = {node.target for module in modules for node in module.graph.nodes}
    assert found >= set(ops.ACTIVATION_TARGETS)


COMMUTES: list[tuple[str, Body, list[str], dict[str, int]]] = [
    ("relu behind linear layers", lambda m, x: relu(cat([m.c(x), m.d(x)], 2)), [COMMUTE], {"relu": 2, "cat": 1}),
    ("relu behind linear layers, last dim", lambda m, x: relu(cat([m.c(x), m.d(x)], -1)), [COMMUTE], {"relu": 2}),
    ("a norm", lambda m, x: m.norm(both_convs(m, x)), [COMMUTE], {"batch_norm": 2, "cat": 1}),
    ("a norm without weight", lambda m, x: m.bare_norm(both_convs(m, x)), [COMMUTE], {"batch_norm": 2, "cat": 1}),
]


@both
@pytest.mark.parametrize(("body", "rules", "expected"), [pytest.param(*row[1:], id=row[0]) for row in COMMUTES])
def test_commutes(body: Body, rules: list[str], expected: dict[str, int], front_end: str) -> None:
    check(body, rules, expected, front_end, IMAGE)


def test_norm_and_activation_end_up_in_the_layers_in_a_loop_with_fusion() -> None:
    model = model_of(lambda m, x: relu(m.norm(both_convs(m, x))))
    loop = tuple(fxopt.plugins.named(name) for name in FUSE)
    compiled = compiled_by((loop,), model, (torch.randn(IMAGE),), "symbolic")
    assert operations(compiled.fused_graph) == {"fxopt.convolution": 2, "cat": 1}


POOLS: list[tuple[str, str, Body, tuple[int, ...]]] = [
    ("max pool, 2d", "max_pool2d", lambda m, x: F.max_pool2d(cat([x, relu(x)], 1), 3, 2, 1), (2, 16, 64, 64)),
    ("with ceil_mode", "max_pool2d", lambda m, x: F.max_pool2d(cat([x, x.neg()], 1), 3, 2, 1, 1, True), (2, 9, 80, 80)),
    ("average pool", "avg_pool2d", lambda m, x: F.avg_pool2d(cat([x, relu(x)], 1), 2), (2, 16, 64, 64)),
    ("along the batch", "avg_pool2d", lambda m, x: F.avg_pool2d(cat([x, relu(x)]), 2), (2, 16, 64, 64)),
    ("unbatched", "max_pool2d", lambda m, x: F.max_pool2d(cat([x, relu(x)]), 2), (16, 128, 128)),
    ("1d", "max_pool1d", lambda m, x: F.max_pool1d(cat([x, relu(x)], 1), 4), (2, 16, 9000)),
    ("3d", "avg_pool3d", lambda m, x: F.avg_pool3d(cat([x, relu(x)], 1), 2), (1, 8, 16, 32, 32)),
]  # fmt: skip


@both
@pytest.mark.parametrize(("name", "body", "shape"), [pytest.param(*row[1:4], id=row[0]) for row in POOLS])
def test_a_pool_goes_to_the_parts_where_less_is_copied_behind_it(
    name: str, body: Body, shape: tuple[int, ...], front_end: str
) -> None:
    check(body, [COMMUTE], {name: 2, "cat": 1}, front_end, shape)


# -- layers that are split -------------------------------------------------------------------------------------------


def fused(activation: str, *numbers: float) -> Body:
    """A layer with an epilogue as fusion leaves it: bias, a residual and an activation."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        residual = x[:, :8]
        return torch.ops.fxopt.convolution(
            joined(x), m.conv.weight, m.conv.bias, residual, [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
            activation, list(numbers),
        )  # fmt: skip

    return body


def fused_linear(m: Any, x: torch.Tensor) -> torch.Tensor:
    rows = x.transpose(1, 3)
    return torch.ops.fxopt.linear(joined(rows, -1), m.linear.weight, m.linear.bias, rows[..., :4], "clamp", [-1.0, 1.0])


SPLITS: list[tuple[str, Body, tuple[int, ...], str, int]] = [
    ("1x1", lambda m, x: m.conv(joined(x)), IMAGE, "fxopt.convolution", 2),
    ("3x3 with padding, stride and dilation", lambda m, x: m.padded(joined(x)), IMAGE, "fxopt.convolution", 2),
    ("without a bias", lambda m, x: m.bare(joined(x)), IMAGE, "fxopt.convolution", 2),
    ("padding='same'", lambda m, x: m.same(joined(x)), IMAGE, "fxopt.convolution", 2),
    ("one value twice", lambda m, x: m.conv(cat([x, x], 1)), IMAGE, "fxopt.convolution", 2),
    ("three parts", lambda m, x: m.three(cat([x, relu(x), x.neg()], 1)), (2, 16, 40, 40), "fxopt.convolution", 3),
    ("1d", lambda m, x: m.line(joined(x)), (2, 16, 50), "fxopt.convolution", 2),
    ("3d", lambda m, x: m.volume(joined(x)), (1, 16, 2, 9, 9), "fxopt.convolution", 2),
    ("a linear layer", lambda m, x: m.linear(joined(x.transpose(1, 3), -1)), IMAGE, "fxopt.linear", 2),
    ("a linear layer without bias", lambda m, x: m.plain(joined(x.transpose(1, 3), 3)), IMAGE, "fxopt.linear", 2),
    ("a linear layer of vectors", lambda m, x: m.linear(joined(x)), (2, 16), "fxopt.linear", 2),
    ("residual and relu", fused("relu"), IMAGE, "fxopt.convolution", 2),
    ("residual and clamp", fused("clamp", -1.0, 2.0), IMAGE, "fxopt.convolution", 2),
    ("residual alone", fused("none"), IMAGE, "fxopt.convolution", 2),
    ("a fused linear layer", fused_linear, IMAGE, "fxopt.linear", 2),
]


@both
@pytest.mark.parametrize(
    ("body", "shape", "name", "count"), [pytest.param(*row[1:], id=row[0]) for row in SPLITS]
)
def test_a_layer_is_the_sum_of_layers_of_the_parts(
    body: Body, shape: tuple[int, ...], name: str, count: int, front_end: str
) -> None:
    check(body, [CONSUMER], {"cat": 0, name: count, "conv2d": 0, "linear": 0, "add": 0}, front_end, shape)


@pytest.mark.parametrize(("body", "shape"), [pytest.param(*row[1:3], id=row[0]) for row in SPLITS])
def test_a_split_layer_is_exact_in_exact_arithmetic(body: Body, shape: tuple[int, ...]) -> None:
    model, x = exact(model_of(body)), dyadic(*shape)
    module = captured(model, x)
    (expected,) = results_of(module, x)
    with everything_pays():
        run = rewritten(module, PASSES)
    assert [rewrite.rule for rewrite in run.journal.rewrites] == [CONSUMER]
    (actual,) = results_of(module, x)
    assert torch.equal(actual, expected)
    assert strides(actual) == strides(expected)


def test_a_linear_layer_of_one_vector_is_split() -> None:
    model, x = exact(model_of(lambda m, x: m.linear(joined(x, 0)))), dyadic(16)
    compiled = compiled_by(PASSES, model, (x,), "symbolic")
    assert fired(compiled) == [CONSUMER]
    assert torch.equal(compiled(x), model(x))


def test_the_bias_is_counted_once_the_residual_comes_first_and_the_activation_last() -> None:
    module = captured(model_of(fused("relu")), torch.randn(IMAGE))
    rewritten(module, PASSES)
    first, last = (ops.convolution_arguments(node) for node in module.graph.nodes if node.target is ops.convolution)
    assert (first["bias"].target, last["bias"]) == ("conv.bias", None)
    assert (ir.target_name(first["residual"]), ir.target_name(last["residual"])) == ("slice", "fxopt.convolution")
    assert (first["activation"], last["activation"]) == ("none", "relu")
    assert [given["weight"].target for given in (first, last)] == ["conv.weight_part", "conv.weight_part_1"]


def test_a_split_layer_keeps_infinities_and_nan_apart() -> None:
    model = model_of(lambda m, x: m.linear(joined(x)))
    x = torch.randn(4, 16)
    x[0, 3], x[1, 5] = float("inf"), float("nan")
    compiled = compiled_by(PASSES, model, (torch.randn(4, 16),), "symbolic")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), equal_nan=True)


def test_open_sizes_are_counted_as_in_the_example() -> None:
    """Whether a split pays depends on the batch, which export leaves open."""
    model = model_of(lambda m, x: m.conv(joined(x)))
    compiled = compiled_by(PASSES, model, (torch.randn(IMAGE),), "export")
    assert fired(compiled) == [CONSUMER]
    x = torch.randn(7, *IMAGE[1:])
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


# -- at random -------------------------------------------------------------------------------------------------------


@given(networks())
def test_random_networks_keep_every_bit_and_come_to_rest(network: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = network
    module = captured(model, x)
    expected = results_of(module, x)
    with everything_pays():
        run = rewritten(module, PASSES)
        for rewrite in run.journal.rewrites:
            event(rewrite.rule)
        actual = results_of(module, x)
        for ours, theirs in zip(actual, expected, strict=True):
            assert torch.equal(ours, theirs)
            assert strides(ours) == strides(theirs)
        assert sharing(actual) == sharing(expected)
        before = str(module.graph)
        assert not rewritten(module, PASSES).journal.rewrites
        assert str(module.graph) == before
    run.editor.undo()
    assert all(torch.equal(*pair) for pair in zip(results_of(module, x), expected, strict=True))
