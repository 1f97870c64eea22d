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
from concats import captured, dyadic, everything_pays, exact, networks, results_of, rewritten, sharing, strides
from fxopt import ir, ops
from graphs import (
    FRONT_ENDS,
    Network,
    assert_declined_somewhere,
    compiled_by,
    fired,
    operations,
    randomised,
)

PASSES = ("eliminate-concat",)
NESTED, PIECES, COMMUTE, CONSUMER = "nested", "pieces", "commute", "consumer"
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
cat, relu = torch.cat, torch.relu
Body = Callable[[Any, Any], Any]
IMAGE = (2, 16, 6, 6)


def parts() -> dict[str, Any]:
    """Layers of 16 channels, and of twice as many for what joins two."""
    return {
        "a": nn.Conv2d(16, 16, 1),
        "b": nn.Conv2d(16, 16, 3, padding=1, bias=False),
        "c": nn.Linear(6, 6),
        "d": nn.Linear(6, 6),
        "conv": nn.Conv2d(32, 8, 1),
        "padded": nn.Conv2d(32, 8, 3, stride=2, padding=1, dilation=2),
        "bare": nn.Conv2d(32, 8, 3, bias=False),
        "same": nn.Conv2d(32, 8, 3, padding="same"),
        "grouped": nn.Conv2d(32, 8, 1, groups=2),
        "transposed": nn.ConvTranspose2d(32, 8, 1),
        "circular": nn.Conv2d(32, 8, 3, padding=1, padding_mode="circular"),
        "four": nn.Conv2d(64, 8, 1),
        "thin": nn.Conv2d(20, 8, 1),
        "three": nn.Conv2d(48, 4, 1),
        "line": nn.Conv1d(32, 8, 3, padding=2),
        "volume": nn.Conv3d(32, 4, (1, 3, 3), padding=(0, 1, 1)),
        "linear": nn.Linear(32, 4),
        "plain": nn.Linear(32, 4, bias=False),
        "norm": nn.BatchNorm2d(32),
        "bare_norm": nn.BatchNorm2d(32, affine=False),
        "norm12": nn.BatchNorm2d(16),
        "free": nn.BatchNorm2d(32, track_running_stats=False),
    }


def model_of(body: Body) -> nn.Module:
    return randomised(Network(body, **parts()))


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


def written_source(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = relu(x)
    left, right = y[:, :8], y[:, 8:]
    y.mul_(2)
    return cat([left, right], 1) + y


def written_joined(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = relu(x)
    z = cat([y[:, :8], y[:, 8:]], 1)
    z[:, 0].mul_(2)
    return z + y


def written_part(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = relu(x)
    inner = cat([x, y], 1)
    y[:, 0].mul_(2)
    return cat([inner, x], 1) + y.sum()


def inner_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    inner = cat([x, relu(x)], 1)
    return cat([inner, x, inner], 1)


def wider(m: Any, x: torch.Tensor) -> torch.Tensor:
    """2**24 + 1, which float32 does not have: joined with x first it is rounded."""
    number = torch.full_like(x, 2**24, dtype=torch.float64) + 1
    return cat([cat([x, x.long()], 1), number], 1)


NO_NOTHING: list[tuple[str, Body, str, str]] = [
    ("a concat with another reader", lambda m, x: cat([y := cat([x, x], 1), x], 1).sum() + y, NESTED, "other readers"),
    ("the same concat twice", inner_twice, NESTED, "cat has other readers, and stays"),
    ("a concat along another dim", lambda m, x: cat([cat([x, x], 2), cat([x, x], 2)], 1), NESTED, "joins dim 2, not"),
    ("a concat that is a result", lambda m, x: (y := cat([x, x], 1), cat([y, x], 1)), NESTED, "other readers"),
    ("a concat that promotes its parts", wider, "concat", "which the concat makes torch.float64"),
    (
        "a concat in front that promotes its parts",
        lambda m, x: cat([cat([x.long(), x], 1), x], 1),
        NESTED,
        "is torch.int64, which the concat makes torch.float32",
    ),
    ("an empty vector", lambda m, x: cat([x.new_zeros(0), x, relu(x)], 1), "concat", "empty vector"),
    ("an empty vector in front", lambda m, x: cat([cat([x, x.new_zeros(0)], 1), x], 1), NESTED, "empty vector"),
    ("a write to a part in between", written_part, NESTED, "may write to a value of the match"),
    ("pieces in another order", lambda m, x: cat([x[:, 8:], x[:, :8]], 1), PIECES, "no two parts"),
    ("a gap", lambda m, x: cat([x[:, :7], x[:, 8:]], 1), PIECES, "no two parts"),
    ("an overlap", lambda m, x: cat([x[:, :9], x[:, 8:]], 1), PIECES, "no two parts"),
    ("every other channel", lambda m, x: cat([x[:, :8:2], x[:, 4:]], 1), PIECES, "no two parts"),
    ("pieces along another dim", lambda m, x: cat([x[:, :6], x[:, 6:12]], 3), PIECES, "no two parts"),
    ("a split along another dim", lambda m, x: cat(x.chunk(2, 3), 1), PIECES, "no two parts"),
    ("pieces of two values", lambda m, x: cat([x[:, :8], relu(x)[:, 8:]], 1), PIECES, "no two parts"),
    ("all of the input, handed out", lambda m, x: cat([x[:, :8], x[:, 8:]], 1), PIECES, "must not share memory"),
    (
        "all of a value that is handed out too",
        lambda m, x: (y := relu(x), cat([y[:, :8], y[:, 8:]], 1)),
        PIECES,
        "must not share memory",
    ),
    (
        "a part of a value, both handed out",
        lambda m, x: (y := relu(x), cat([y[:, :4], y[:, 4:8]], 1)),
        PIECES,
        "must not share memory",
    ),
    ("a write to the source in between", written_source, PIECES, "may write to a value of the match"),
    ("a write to what was joined", written_joined, PIECES, "may write to"),
]


@both
@pytest.mark.parametrize(("body", "rule", "reason"), [pytest.param(*row[1:], id=row[0]) for row in NO_NOTHING])
def test_what_is_not_there_is_joined(body: Body, rule: str, reason: str, front_end: str) -> None:
    compiled = compiled_by(PASSES, model_of(body), (10 * torch.randn(IMAGE),), front_end)
    assert not {NESTED, PIECES} & set(fired(compiled))
    assert_declined_somewhere(compiled, rule, reason)


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


def both_convs(m: Any, x: torch.Tensor) -> torch.Tensor:
    return cat([m.a(x), m.b(x)], 1)


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


def handed_out_too(m: Any, x: torch.Tensor) -> Any:
    return relu(cat([y := m.a(x), m.b(x)], 1)), y


def clamped_by_a_size(m: Any, x: torch.Tensor) -> torch.Tensor:
    return both_convs(m, x).clamp(0, x.shape[0])


def unbatched_convs(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.norm(cat([m.a(x[0])[None], m.b(x[0])[None]], 1))


NO_COMMUTE: list[tuple[str, Body, tuple[int, ...], str]] = [
    ("a part that is no layer", lambda m, x: relu(cat([m.a(x), x], 1)), IMAGE, r"^\w+ would not take relu up"),
    ("a layer with an activation", lambda m, x: relu(cat([m.a(x), torch.tanh(m.b(x))], 1)), IMAGE, "tanh would not"),
    ("a layer with another reader", lambda m, x: relu(cat([y := m.a(x), m.b(x)], 1)).sum() + y, IMAGE, "has other re"),
    ("a layer that is a result", handed_out_too, IMAGE, "conv2d, which would take relu up, has other readers"),
    ("one layer twice", lambda m, x: relu(cat([y := m.a(x), y], 1)), IMAGE, "one part is in the concat twice"),
    ("another reader of the concat", lambda m, x: relu(y := both_convs(m, x)) + y, IMAGE, "has not one reader"),
    ("no elementwise step", lambda m, x: torch.softmax(both_convs(m, x), 1), IMAGE, "softmax does not commute"),
    ("a step of two operands", lambda m, x: both_convs(m, x) * 2, IMAGE, "mul does not commute"),
    ("a norm over another dim", lambda m, x: m.norm12(cat([m.a(x), m.b(x)], 2)), IMAGE, "joins dim 2, not channels"),
    ("a norm by the batch", lambda m, x: m.free(both_convs(m, x)), IMAGE, "training mode"),
    ("a norm that no layer takes", lambda m, x: m.norm(cat([m.a(x), x], 1)), IMAGE, r"^\w+ would not take batch_norm"),
    ("a norm behind relu", lambda m, x: m.norm(cat([m.a(x), relu(m.b(x))], 1)), IMAGE, "relu would not take batch_n"),
    ("a norm behind an unbatched conv", unbatched_convs, IMAGE, "unsqueeze would not take batch_norm"),
    ("a pool along the concat", lambda m, x: F.max_pool2d(cat([x, relu(x)], 2), 2), (2, 16, 64, 64), "along which"),
    ("along it, unbatched", lambda m, x: F.max_pool2d(cat([x, relu(x)], 1), 2), (16, 64, 64), "along which"),
    ("a pool that copies no less", lambda m, x: F.max_pool2d(cat([x, relu(x)], 1), 3, 1, 1), (2, 16, 64, 64),
     r"does not pay: an estimated [\d.]+ µs instead of [\d.]+ on"),
    ("a pool of little", lambda m, x: F.max_pool2d(cat([x, relu(x)], 1), 2), IMAGE, "to pool each part does not pay"),
]  # fmt: skip


@both
@pytest.mark.parametrize(("body", "shape", "reason"), [pytest.param(*row[1:], id=row[0]) for row in NO_COMMUTE])
def test_does_not_commute(body: Body, shape: tuple[int, ...], reason: str, front_end: str) -> None:
    compiled = compiled_by(PASSES, model_of(body), (torch.randn(shape),), front_end)
    assert not fired(compiled)
    assert_declined_somewhere(compiled, COMMUTE, reason)


def test_an_activation_whose_bounds_are_computed_stays() -> None:
    compiled = compiled_by(PASSES, model_of(clamped_by_a_size), (torch.randn(IMAGE),), "export")
    assert not fired(compiled)


# -- layers that are split -------------------------------------------------------------------------------------------


def joined(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    return cat([relu(x), x], dim)


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


def run_time_weight(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(joined(x), m.conv.weight * x.sum())


def run_time_bias(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.conv2d(joined(x), m.conv.weight, m.conv.bias * x.sum())


def also_added(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = joined(x)
    return torch.ops.fxopt.linear(y, m.square, None, y, "none", [])


def written_weight(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.linear(joined(x, -1))
    m.linear.weight.mul_(1)
    return y


NO_SPLIT: list[tuple[str, Body, tuple[int, ...], str]] = [
    ("another reader", lambda m, x: m.conv(y := joined(x)).sum() + y, IMAGE, "no layer is its only reader"),
    ("a concat that is a result", lambda m, x: (m.conv(y := joined(x)), y), IMAGE, "no layer is its only reader"),
    ("it is the weight", lambda m, x: F.linear(x, joined(x, 0)), (4, 16), "no layer is its only reader"),
    ("a weight computed at run time", run_time_weight, IMAGE, "weight is computed at run time"),
    ("a bias computed at run time", run_time_bias, IMAGE, "bias is computed at run time"),
    ("a weight that is NaN", lambda m, x: F.linear(joined(x), m.nan), (2, 16), "the weight holds NaN"),
    ("a transposed convolution", lambda m, x: m.transposed(joined(x)), IMAGE, "transposed"),
    ("groups", lambda m, x: m.grouped(joined(x)), IMAGE, "the layer has 2 groups"),
    ("the layer adds it too", also_added, (2, 16), "also adds cat to its result"),
    ("an unbatched convolution", lambda m, x: m.conv(joined(x, 0)), IMAGE[1:], "input is unbatched"),
    ("along the height", lambda m, x: m.conv(cat([joined(x), joined(x)], 2)), IMAGE, "joins dim 2, not the channels"),
    ("along the rows of a linear layer", lambda m, x: m.linear(cat([x, x], 1)), (2, 4, 32), "joins dim 1, not the"),
    ("thin parts", lambda m, x: m.thin(cat([x, x[:, :4]], 1)), IMAGE, "a part has 4 channels, too few"),
    ("more layers than are worth it", lambda m, x: m.four(cat([x, relu(x)] * 2, 1)), IMAGE,
     r"to split the layer does not pay: an estimated [\d.]+ µs instead of [\d.]+ on cpu"),
    ("circular padding in between", lambda m, x: m.circular(joined(x)), IMAGE, "no layer is its only reader"),
]  # fmt: skip


@both
@pytest.mark.parametrize(("body", "shape", "reason"), [pytest.param(*row[1:], id=row[0]) for row in NO_SPLIT])
def test_a_layer_is_not_split(body: Body, shape: tuple[int, ...], reason: str, front_end: str) -> None:
    extra = {"square": torch.randn(32, 32), "nan": torch.full((3, 32), float("nan"))}
    model = randomised(Network(body, **parts(), **extra))
    compiled = compiled_by(PASSES, model, (torch.randn(shape),), front_end, verify="NaN" not in reason)
    assert CONSUMER not in fired(compiled)
    assert_declined_somewhere(compiled, CONSUMER, reason)


def test_a_weight_that_is_written_stays_in_one() -> None:
    module = captured(model_of(written_weight), torch.randn(2, 16))
    declines = rewritten(module, PASSES).journal.declines.values()
    assert any("may write to linear.weight" in entry.reason for entry in declines if entry.rule == CONSUMER)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_not_rounded_to_half_precision_between_the_parts(dtype: torch.dtype) -> None:
    module = captured(model_of(lambda m, x: m.linear(joined(x))).to(dtype), torch.randn(2, 16).to(dtype))
    declines = rewritten(module, PASSES).journal.declines.values()
    assert [entry.reason for entry in declines if entry.rule == CONSUMER] == [
        f"the sums would be rounded to {dtype} between the parts"
    ]


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
