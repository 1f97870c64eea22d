"""eliminate-concat: what stays as it is, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from concats import SIXTEEN as IMAGE
from concats import Body, both_convs, captured, joined, model_of, rewritten
from graphs import FRONT_ENDS, assert_declined, assert_declined_somewhere, compiled_by, fired

PASSES = ("eliminate-concat",)
NESTED, PIECES, COMMUTE, CONSUMER = "nested", "pieces", "commute", "consumer"
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
cat, relu = torch.cat, torch.relu


# -- nothing to do ---------------------------------------------------------------------------------------------------


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


# -- steps that commute ----------------------------------------------------------------------------------------------


def handed_out_too(m: Any, x: torch.Tensor) -> Any:
    return relu(cat([y := m.a(x), m.b(x)], 1)), y


def clamped_by_a_size(m: Any, x: torch.Tensor) -> torch.Tensor:
    return both_convs(m, x).clamp(0, x.shape[0])


def unbatched_convs(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.norm(cat([m.a(x[0])[None], m.b(x[0])[None]], 1))


def run_time_statistics(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(both_convs(m, x), m.norm.running_mean, m.norm.running_var * x.abs().sum())


def run_time_layer_bias(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.norm(cat([F.conv2d(x, m.a.weight, m.a.bias * x.sum()), m.a(x)], 1))


def unbatched_rows(m: Any, x: torch.Tensor) -> torch.Tensor:
    """(16, 12, 6), of which the norm takes the rows for channels."""
    return F.batch_norm(cat([m.a(x), m.b(x)], 1), m.rows.running_mean, m.rows.running_var)


def written_before_the_pool(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = relu(x)
    z = cat([x, y], 1)
    y[:, 0].mul_(2)
    return F.max_pool2d(z, 3, 2, 1).sum() + y


def activated_already(m: Any, x: torch.Tensor) -> torch.Tensor:
    given = (m.a.weight, m.a.bias, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    return relu(cat([torch.ops.fxopt.convolution(x, *given, "tanh", []), m.b(x)], 1))


NO_COMMUTE: list[tuple[str, Body, tuple[int, ...], str]] = [
    ("a part that is no layer", lambda m, x: relu(cat([m.a(x), x], 1)), IMAGE, r"^\w+ would not take relu up"),
    ("a layer with an activation", lambda m, x: relu(cat([m.a(x), torch.tanh(m.b(x))], 1)), IMAGE, "tanh would not"),
    ("a layer that has one in it", activated_already, IMAGE, r"^convolution\w* would not take relu up"),
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
    ("statistics computed at run time", run_time_statistics, IMAGE, "a parameter of the norm is computed at run time"),
    ("a layer whose bias is computed", run_time_layer_bias, IMAGE, "^conv2d would not take batch_norm up"),
    ("a norm of unbatched rows", unbatched_rows, IMAGE[1:], "^conv2d would not take batch_norm up"),
    ("a write to a part before the pool", written_before_the_pool, (2, 16, 64, 64), "may write to a value of"),
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


def test_a_norm_stays_in_front_of_a_layer_with_nan() -> None:
    model = model_of(lambda m, x: m.norm(cat([m.nan(x), m.b(x)], 1)))
    compiled = compiled_by(PASSES, model, (torch.randn(IMAGE),), "symbolic", verify=False)
    assert_declined(compiled, COMMUTE, "^conv2d would not take batch_norm up")


def test_an_activation_whose_bounds_are_computed_stays() -> None:
    compiled = compiled_by(PASSES, model_of(clamped_by_a_size), (torch.randn(IMAGE),), "export")
    assert not fired(compiled)


# -- layers that are split -------------------------------------------------------------------------------------------


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
    ("a weight that is NaN", lambda m, x: F.linear(joined(x), m.nan_rows), (2, 16), "the weight holds NaN"),
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
    compiled = compiled_by(PASSES, model_of(body), (torch.randn(shape),), front_end, verify="NaN" not in reason)
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


def test_channels_that_are_not_known_are_not_divided() -> None:
    """export leaves the first dimension open, which here has the channels."""
    compiled = compiled_by(PASSES, model_of(lambda m, x: m.linear(joined(x, 0))), (torch.randn(16),), "export")
    assert_declined(compiled, CONSUMER, "how many channels a part has is not a known number")
