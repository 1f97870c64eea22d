"""fold-padding: constant padding in front of a convolution or a pool becomes padding of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt import ops, plugins
from fxopt.pipeline import PassManager
from graphs import FRONT_ENDS, Network, assert_declined, bits, compiled_by, fired, only, operations

PASSES = ("fold-padding",)
CONV, AVERAGE, MAX = "pad-before-conv", "pad-before-average-pool", "pad-before-max-pool"
SHAPE = (2, 4, 8, 7)
aten = torch.ops.aten
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]


def whole(*shape: int) -> torch.Tensor:
    """Small integers, of which every sum is exact."""
    return torch.randint(-4, 5, shape).double()


def parts() -> dict[str, Any]:
    found = {
        "conv": nn.Conv2d(4, 6, 3),
        "padded": nn.Conv2d(4, 6, (3, 5), stride=2, padding=(1, 2), groups=2),
        "one": nn.Conv2d(4, 6, 1),
        "same": nn.Conv2d(4, 6, 3, padding="same", dilation=2),
        "circular": nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"),
        "transposed": nn.ConvTranspose2d(4, 6, 3, padding=1),
        "conv1": nn.Conv1d(8, 3, 3),
        "conv3": nn.Conv3d(2, 3, 2),
        "infinite": nn.Conv2d(4, 6, 3),
        "infinity": torch.tensor([0.0, math.inf]).double(),
    }
    for module in found.values():
        if isinstance(module, nn.Module):
            module.double()
            for held in module.parameters():
                held.data.copy_(whole(*held.shape))
    found["infinite"].weight.data[0, 0, 0, 0] = math.inf  # type: ignore[union-attr]
    return found


def model_of(body: Body) -> nn.Module:
    return Network(body, **parts()).eval()


def pad(x: torch.Tensor, *sizes: int, value: float | None = 0.0) -> torch.Tensor:
    return F.pad(x, sizes, value=value)


def low(x: torch.Tensor, *sizes: int) -> torch.Tensor:
    return F.pad(x, sizes, value=-math.inf)


def uncounted(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(pad(x, 1, 1, 2, 2), (4, 3), 2, count_include_pad=False)


FOLDS: list[tuple[str, Body, list[str]]] = [
    ("a convolution", lambda m, x: m.conv(pad(x, 2, 2, 1, 1)), [CONV]),
    ("no value means zero", lambda m, x: m.conv(pad(x, 2, 2, 1, 1, value=None)), [CONV]),
    ("-0.0", lambda m, x: m.conv(pad(x, 1, 1, 1, 1, value=-0.0)), [CONV]),
    ("a module that pads", lambda m, x: m.conv(nn.ZeroPad2d(1)(x)), [CONV]),
    ("padding of the last dimension only", lambda m, x: m.conv(pad(x, 1, 1)), [CONV]),
    ("more padding than kernel", lambda m, x: m.one(pad(x, 3, 3, 2, 2)), [CONV]),
    ("zeros that are named for other dimensions", lambda m, x: m.conv(pad(x, 1, 1, 1, 1, 0, 0, 0, 0)), [CONV]),
    ("a convolution with stride, groups and padding", lambda m, x: m.padded(pad(x, 3, 3, 1, 1)), [CONV]),
    ("padding that keeps the size", lambda m, x: m.same(pad(x, 1, 1)), [CONV]),
    ("two paddings", lambda m, x: m.conv(pad(pad(x, 1, 1), 0, 0, 2, 2)), [CONV, CONV]),
    ("an unbatched convolution", lambda m, x: m.conv(pad(x[0], 1, 1, 1, 1)), [CONV]),
    ("conv1d", lambda m, x: m.conv1(pad(x.transpose(1, 2).flatten(2)[:, :, :9], 2, 2)), [CONV]),
    ("conv3d", lambda m, x: m.conv3(pad(x.unflatten(1, (2, 2)), 1, 1, 0, 0, 2, 2)), [CONV]),
    ("channels last", lambda m, x: m.conv(pad(x.to(memory_format=torch.channels_last), 1, 1, 1, 1)), [CONV]),
    ("a constant that ATen pads by", lambda m, x: m.conv(aten.constant_pad_nd.default(x, [1, 1, 1, 1])), [CONV]),
    ("an average pool", lambda m, x: F.avg_pool2d(pad(x, 1, 1, 1, 1), 3), [AVERAGE]),
    ("an average pool that does not count padding", uncounted, [AVERAGE]),
    ("an average pool with its own divisor", lambda m, x: F.avg_pool2d(pad(x, 1, 1), 2, divisor_override=8), [AVERAGE]),
    ("avg_pool1d", lambda m, x: F.avg_pool1d(pad(x[0], 2, 2), 4, 1), [AVERAGE]),
    ("avg_pool3d", lambda m, x: F.avg_pool3d(pad(x, 1, 1, 1, 1, 1, 1), 2), [AVERAGE]),
    ("a max pool padded with -inf", lambda m, x: F.max_pool2d(low(x, 1, 1, 1, 1), 3, 2), [MAX]),
    ("a max pool with padding of its own", lambda m, x: F.max_pool2d(low(x, 1, 1), 4, 2, padding=1), [MAX]),
    ("max_pool1d", lambda m, x: F.max_pool1d(low(x[0], 1, 1), 2), [MAX]),
    ("max_pool3d", lambda m, x: F.max_pool3d(low(x, 1, 1, 0, 0, 1, 1), 3), [MAX]),
    ("zeros in front of a max pool of what is not negative", lambda m, x: F.max_pool2d(pad(x.relu(), 1, 1), 2), [MAX]),
]


@both
@pytest.mark.parametrize(("body", "rules"), [pytest.param(*row[1:], id=row[0]) for row in FOLDS])
def test_folds(body: Body, rules: list[str], front_end: str) -> None:
    model, x = model_of(body), whole(*SHAPE)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert fired(compiled) == rules
    assert not {"pad", "constant_pad_nd"} & set(operations(compiled.fused_graph))
    with torch.no_grad():
        expected, actual = model(x), compiled(x)
    assert torch.equal(actual, expected)
    assert actual.stride() == expected.stride()
    assert not rewritten(compiled.fused_graph).journal.rewrites


def rewritten(module: torch.fx.GraphModule) -> Any:
    return PassManager((plugins.named("fold-padding"),), strict=True).run(module)


@both
def test_joins_a_layer_that_is_fused_already(front_end: str) -> None:
    model, x = model_of(lambda m, x: m.padded(pad(x, 1, 1, 1, 1)).relu()), whole(*SHAPE)
    compiled = compiled_by(("fuse-conv-activation", *PASSES), model, (x,), front_end)
    assert fired(compiled)[-1] == CONV
    assert ops.convolution_arguments(only(compiled.fused_graph, "fxopt.convolution"))["padding"] == [2, 3]
    assert torch.equal(compiled(x), model(x))


def test_a_norm_reaches_its_convolution_across_padding() -> None:
    model = Network(lambda m, x: m.conv(pad(m.norm(x), 1, 1, 1, 1)), conv=nn.Conv2d(4, 6, 3), norm=nn.BatchNorm2d(4))
    compiled = fxopt.compile(model.eval(), (torch.randn(SHAPE),), backend="aten", strict=True)
    assert operations(compiled.fused_graph) == {"conv2d": 1}


def test_what_needs_shapes_waits_for_the_first_call() -> None:
    compiled = fxopt.compile(model_of(lambda m, x: m.conv(pad(x, 1, 1, 1, 1))), passes=PASSES)
    assert [decline.reason for decline in compiled.report.pending] == ["whether x is empty"]


average = F.avg_pool2d
DECLINES: list[tuple[str, Body, str, str]] = [
    ("reflection", lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), mode="reflect")), CONV, "it pads by reflect"),
    ("a circular convolution", lambda m, x: m.circular(x), CONV, "it pads by circular"),
    ("ones", lambda m, x: m.conv(pad(x, 1, 1, value=1.0)), CONV, "it pads with 1.0, not with zeros"),
    ("NaN", lambda m, x: m.conv(pad(x, 1, 1, value=math.nan)), CONV, "it pads with nan"),
    ("-inf in front of a convolution", lambda m, x: m.conv(low(x, 1, 1)), CONV, "it pads with -inf"),
    ("one side more", lambda m, x: m.conv(pad(x, 0, 1, 0, 1)), CONV, "one side more"),
    ("a crop", lambda m, x: m.conv(pad(x, -1, -1)), CONV, "crops"),
    ("channels", lambda m, x: m.conv(pad(x[:, :2], 1, 1, 1, 1, 1, 1)), CONV, "not spatial"),
    ("the batch", lambda m, x: m.conv(pad(x, 1, 1, 1, 1, 0, 0, 1, 1)), CONV, "not spatial"),
    ("a weight of infinity", lambda m, x: m.infinite(pad(x, 1, 1)), CONV, "the weight holds NaN or infinity"),
    ("a weight that is computed", lambda m, x: F.conv2d(pad(x, 1, 1), m.conv.weight * x.sum()), CONV, "at run time"),
    ("another reader", lambda m, x: m.conv(y := pad(x, 1, 1)).sum() + y, CONV, "is also read by"),
    ("another reader of what a pool reads", lambda m, x: average(y := pad(x, 1, 1), 2).sum() + y, AVERAGE, "also read"),
    ("an average pool padded with ones", lambda m, x: average(pad(x, 1, 1, value=1.0), 3), AVERAGE, "not with zeros"),
    ("an average pool padded on one side", lambda m, x: average(pad(x, 1, 0), 3), AVERAGE, "one side more"),
    ("an average pool with its own padding", lambda m, x: average(pad(x, 1, 1), 4, padding=1), AVERAGE, "of its own"),
    (
        "an average pool that does not count its own padding",
        lambda m, x: average(pad(x, 1, 1), 4, padding=1, count_include_pad=False),
        AVERAGE,
        "of its own",
    ),
    ("an average pool that rounds up", lambda m, x: average(pad(x, 1, 1), 3, 2, ceil_mode=True), AVERAGE, "rounds"),
    ("more than half of an average", lambda m, x: average(pad(x, 2, 2), 3), AVERAGE, "more than half the kernel"),
    ("more than half of a max pool", lambda m, x: F.max_pool2d(low(x, 2, 2), 3), MAX, "more than half the kernel"),
    ("more than half in sum", lambda m, x: F.max_pool2d(low(x, 1, 1), 3, padding=1), MAX, "more than half the kernel"),
    ("a max pool that rounds up", lambda m, x: F.max_pool2d(low(x, 1, 1), 3, 2, ceil_mode=True), MAX, "rounds"),
    ("a max pool that is dilated", lambda m, x: F.max_pool2d(low(x, 1, 1), 2, dilation=3), MAX, "dilated"),
    ("a max pool padded on one side", lambda m, x: F.max_pool2d(low(x, 0, 1), 3), MAX, "one side more"),
    ("a max pool padded with a low number", lambda m, x: F.max_pool2d(pad(x, 1, 1, value=-9.0), 3), MAX, "with -9.0"),
    ("zeros in front of a max pool", lambda m, x: F.max_pool2d(pad(x, 1, 1), 3), MAX, "x may be negative|s_0 may be"),
    ("an empty image", lambda m, x: F.max_pool2d(low(x[:, :, :0], 1, 1, 1, 1), 2), MAX, "is empty"),
    (
        "avg_pool3d of an image smaller than its kernel",
        lambda m, x: F.avg_pool3d(pad(x[:, :, :1], 0, 0, 1, 1), (1, 3, 1)),
        AVERAGE,
        "takes no image smaller than its kernel",
    ),
]


@both
@pytest.mark.parametrize(("body", "rule", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, rule: str, reason: str, front_end: str) -> None:
    compiled = compiled_by(PASSES, model_of(body), (whole(*SHAPE),), front_end, verify="infinity" not in reason)
    assert_declined(compiled, rule, reason)


def written(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = pad(x, 1, 1)
    x.view(-1)[0].add_(1)
    return m.conv(y)


@both
def test_declines_where_the_image_is_written_in_between(front_end: str) -> None:
    compiled = compiled_by(PASSES, model_of(written), (whole(*SHAPE),), front_end)
    assert_declined(compiled, CONV, "add_ may write to a value of the match")


@pytest.mark.parametrize(
    ("body", "rule", "reason"),
    [
        pytest.param(lambda m, x: m.conv(pad(x, *[x.shape[0]] * 2)), CONV, "the padding is computed", id="padding"),
        pytest.param(
            lambda m, x: F.conv2d(pad(x, 1, 1), m.conv.weight, padding=x.shape[0]),
            CONV,
            "the padding of conv2d is computed",
            id="a layer's own padding",
        ),
    ],
)
def test_declines_where_the_batch_decides_on(body: Body, rule: str, reason: str) -> None:
    compiled = compiled_by(PASSES, model_of(body), (whole(*SHAPE),), "export")
    assert_declined(compiled, rule, reason)


def test_declines_a_kernel_that_is_computed() -> None:
    model = model_of(lambda m, x: F.max_pool2d(low(x, 1, 1), m.size.item(), 1))
    model.register_buffer("size", torch.tensor(3))
    compiled = compiled_by(PASSES, model, (whole(*SHAPE),), "symbolic")
    assert_declined(compiled, MAX, "the kernel or the padding of the pool is computed")


def test_declines_a_transposed_convolution() -> None:
    model = model_of(lambda m, x: m.transposed(pad(x, 1, 1)).relu())
    compiled = compiled_by(("fuse-conv-activation", *PASSES), model, (whole(*SHAPE),), "symbolic")
    assert_declined(compiled, CONV, "transposed convolution crops")


def test_declines_a_layer_that_also_adds_the_padded_image() -> None:
    model = Network(lambda m, x: m.conv(y := pad(x, 1, 1, 1, 1)) + y, conv=nn.Conv2d(4, 4, 3, padding=1)).eval()
    compiled = compiled_by(("fuse-conv-activation", *PASSES), model, (torch.randn(SHAPE),), "symbolic")
    assert operations(compiled.fused_graph) == {"pad": 1, "fxopt.convolution": 1}
    assert_declined(compiled, CONV, "also adds pad to its result")


# -- what is not negative --------------------------------------------------------------------------------------------

NOT_NEGATIVE: list[tuple[str, Body]] = [
    ("relu", lambda m, x: x.relu()),
    ("relu6", lambda m, x: F.relu6(x)),
    ("sigmoid", lambda m, x: x.sigmoid()),
    ("hardsigmoid", lambda m, x: F.hardsigmoid(x)),
    ("softmax", lambda m, x: x.softmax(1)),
    ("exp", lambda m, x: x.exp()),
    ("abs", lambda m, x: x.abs()),
    ("square", lambda m, x: x.square()),
    ("clamp from 0", lambda m, x: x.clamp(0)),
    ("clamp from 1 to 2", lambda m, x: x.clamp(1, 2)),
    ("clamp_min", lambda m, x: x.clamp_min(0.5)),
    ("hardtanh", lambda m, x: F.hardtanh(x, 0.0, 3.0)),
    ("pools, moves and parts", lambda m, x: F.max_pool2d(F.avg_pool2d(x.relu(), 3, 1).transpose(2, 3)[:, 1:], 2, 1)),
    ("a sum", lambda m, x: x.relu() + x.exp() + 1),
    ("a product", lambda m, x: x.relu() * x.sigmoid() * 2.0),
    ("a concatenation", lambda m, x: torch.cat([x.relu(), x.abs()], 1)),
]
MAYBE_NEGATIVE: list[tuple[str, Body]] = [
    ("an input", lambda m, x: x),
    ("leaky_relu", lambda m, x: F.leaky_relu(x)),
    ("clamp from -1", lambda m, x: x.clamp(-1, 4)),
    ("clamp up to 1", lambda m, x: x.clamp(max=1)),
    ("clamp whose upper bound is lower, and wins", lambda m, x: x.clamp(0, -2)),
    ("hardtanh from -1", lambda m, x: F.hardtanh(x)),
    ("a difference", lambda m, x: x.relu() - x.exp()),
    ("a sum that subtracts", lambda m, x: torch.add(x.relu(), x.exp(), alpha=-1)),
    ("a sum with a negative number", lambda m, x: x.relu() + -3),
    ("a product with a negative number", lambda m, x: x.relu() * -3),
    ("a product with what may be negative", lambda m, x: x.relu() * x),
    ("a concatenation with what may be negative", lambda m, x: torch.cat([x.relu(), x], 1)),
    ("an average that is divided by a negative number", lambda m, x: F.avg_pool2d(x.relu(), 2, divisor_override=-1)),
    ("what was written over", lambda m, x: lowered(x.relu())),
    ("what a part of was written over", lambda m, x: lowered(x.relu()) * 2),
]


def lowered(y: torch.Tensor) -> torch.Tensor:
    y.transpose(2, 3).sub_(5)
    return y


@both
@pytest.mark.parametrize("body", [pytest.param(row[1], id=row[0]) for row in NOT_NEGATIVE])
def test_zeros_join_a_max_pool_of(body: Body, front_end: str) -> None:
    model, x = model_of(lambda m, x: F.max_pool2d(pad(body(m, x), 1, 1, 1, 1), 2)), whole(*SHAPE)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert fired(compiled) == [MAX]
    assert torch.equal(compiled(x), model(x))


@both
@pytest.mark.parametrize("body", [pytest.param(row[1], id=row[0]) for row in MAYBE_NEGATIVE])
def test_zeros_stay_in_front_of_a_max_pool_of(body: Body, front_end: str) -> None:
    model, x = model_of(lambda m, x: F.max_pool2d(pad(body(m, x), 1, 1, 1, 1), 2)), whole(*SHAPE)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert_declined(compiled, MAX, "may be negative")


@pytest.mark.parametrize(
    ("ending", "folds"),
    [
        pytest.param(lambda y: y.relu(), True, id="relu"),
        pytest.param(lambda y: y.clamp(0, 2), True, id="clamp from 0"),
        pytest.param(lambda y: y.clamp(-1, 2), False, id="clamp from -1"),
        pytest.param(lambda y: F.silu(y), False, id="silu"),
    ],
)
def test_zeros_and_a_layer_that_ends_in(ending: Callable[[torch.Tensor], torch.Tensor], folds: bool) -> None:
    model, x = model_of(lambda m, x: F.max_pool2d(pad(ending(m.conv(x)), 1, 1, 1, 1), 2)), whole(*SHAPE)
    compiled = compiled_by(("fuse-conv-activation", *PASSES), model, (x,), "symbolic")
    assert (MAX in fired(compiled)) is folds
    assert torch.equal(compiled(x), model(x))


def test_the_smallest_integer_has_no_absolute_value() -> None:
    smallest = torch.full((1, 1, 4, 4), torch.iinfo(torch.int64).min)
    model = Network(lambda m, x: F.max_pool2d(pad(x.abs(), 1, 1, 1, 1, value=None), 2)).eval()
    compiled = compiled_by(PASSES, model, (smallest,), "symbolic")
    assert fired(compiled) == []
    assert torch.equal(compiled(smallest), model(smallest))


# -- everything at once ----------------------------------------------------------------------------------------------

POOLS = {
    "average": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    "max": (F.max_pool1d, F.max_pool2d, F.max_pool3d),
}


@st.composite
def problems(draw: Any) -> tuple[Body, tuple[int, ...], bool]:
    """A padded layer of random sizes, its input's shape, and whether its own rule must fire."""
    spatial, kind = draw(st.integers(1, 3)), draw(st.sampled_from(["conv", "average", "max", "max of relu"]))
    each = lambda low, high: draw(st.lists(st.integers(low, high), min_size=spatial, max_size=spatial))  # noqa: E731
    size, kernel, stride, pads, own = each(1, 5), each(1, 4), each(1, 3), each(0, 2), each(0, 1)
    if kind != "conv":
        own = [0] * spatial if kind == "average" else [min(o, k // 2) for o, k in zip(own, kernel, strict=True)]
    dilation = each(1, 2) if kind == "conv" else [1] * spatial
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    assume(all(s + 2 * (p + o) >= r for s, p, o, r in zip(size, pads, own, reach, strict=True)))
    weight = whole(2, 3, *kernel)
    sides = [side for p in reversed(pads) for side in (p, p)]

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        if kind == "conv":
            conv = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
            return conv(pad(x, *sides), m.weight, None, stride, own, dilation)
        if kind == "average":
            return POOLS["average"][spatial - 1](pad(x, *sides), kernel, stride, count_include_pad=count)
        source = pad(x.relu(), *sides) if kind == "max of relu" else low(x, *sides)
        return POOLS["max"][spatial - 1](source, kernel, stride, own)

    count = draw(st.booleans())
    fits = kind == "conv" or all(p + o <= k // 2 for p, o, k in zip(pads, own, kernel, strict=True))
    if kind == "average" and spatial == 3:
        fits = fits and all(s >= k for s, k in zip(size, kernel, strict=True))
    return (body, weight), (2, 3, *size), fits  # type: ignore[return-value]


@settings(max_examples=80)
@given(problems())
def test_random_layers_give_the_same_numbers(problem: Any) -> None:
    (body, weight), shape, fits = problem
    model, x = Network(body, weight=weight).eval(), whole(*shape) * 12  # averages of up to four each are exact, too
    compiled = compiled_by(PASSES, model, (x,), "symbolic", verify=False)
    assert bool(fired(compiled)) is fits
    expected, actual = model(x), compiled(x)
    assert torch.equal(actual, expected)
    assert actual.stride() == expected.stride()
    assert bits(actual + 0.0) == bits(expected + 0.0)
