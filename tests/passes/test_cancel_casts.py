"""cancel-casts: what widens and narrows again is nothing; what rounds stays."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxopt
from fxopt import ir
from fxopt_passes import cancel_casts
from graphs import FRONT_ENDS, Network, assert_declined, bits, compiled_by, fired, operations, reasons

PASSES = ("cancel-casts",)
BACK, SHORT = "cast-and-back", "cast-of-cast"
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]
aten = torch.ops.aten
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
i8, u8, i16, i32, i64 = torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """All of a small dtype's numbers, and of a large one's the ends, the special ones, and random ones."""
    if dtype is torch.bool:
        return torch.tensor([True, False])
    if dtype.itemsize <= 2:
        return torch.arange(2 ** (8 * dtype.itemsize), dtype=i64).to({1: u8, 2: i16}[dtype.itemsize]).view(dtype)
    words = {4: i32, 8: i64}[dtype.itemsize]
    random = torch.randint(torch.iinfo(words).min, torch.iinfo(words).max, (4096,), dtype=words)
    around = torch.tensor([2**24, 2**11, 65504, 65520, 2**8, 0, 1], dtype=words)
    special = torch.cat([around + offset for offset in (-1, 0, 1)])
    if dtype.is_floating_point:
        odd = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 6e-8, 1e-7, 65519.9, 1 / 3])
        return torch.cat([random.view(dtype), special.to(dtype), odd.to(dtype), torch.randn(4096, dtype=dtype)])
    return torch.cat([random, random % 70000, special, -special])


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """The same bits, and NaN where there was NaN."""
    assert left.dtype is right.dtype
    if not left.is_floating_point():
        return bits(left) == bits(right)
    assert torch.equal(left.isnan(), right.isnan())
    return bits(left.nan_to_num(0.0, float("inf"), -float("inf"))) == bits(
        right.nan_to_num(0.0, float("inf"), -float("inf"))
    )


def same_all(left: Any, right: Any) -> bool:
    return all(map(same, *(found if isinstance(found, tuple) else (found,) for found in (left, right))))


def mid(body: Body) -> Body:
    """Between two operations, so that neither input nor result is the cast's own."""
    return lambda m, x: torch.neg(body(m, torch.neg(x)))


def written(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = torch.neg(x)
    wide = x.double()
    x.view(-1).add_(1)
    return wide.float() + x


def written_cast(m: Any, x: torch.Tensor) -> torch.Tensor:
    wide = aten._to_copy.default(torch.neg(x), dtype=f64)
    flat = wide.view(-1)
    flat.add_(1)
    return wide.float() + flat.float().sum()


def written_later(m: Any, x: torch.Tensor) -> Any:
    y = torch.neg(x)
    z = y.double().float()
    z.view(-1).add_(1)
    return z + y


def kinds(compiled: fxopt.CompiledModule) -> list[str]:
    """The operators of a graph, casts with their dtype."""
    found = [node for node in compiled.fused_graph.graph.nodes if ir.is_compute(node)]
    name = {f16: "f16", bf16: "bf16", f32: "f32", f64: "f64", i64: "i64", i32: "i32", i8: "i8", torch.bool: "bool"}
    casts = {node: f"to {name[ir.fake(node).dtype]}" for node in found if node.target in cancel_casts.TARGETS}
    return [casts.get(node, ir.target_name(node)) for node in found]


SHORTER: list[tuple[str, Body, list[str]]] = [
    ("float32 to float64 and back", mid(lambda m, x: x.double().float()), ["neg", "neg"]),
    ("by any spelling", mid(lambda m, x: x.to(f64).to(x.dtype)), ["neg", "neg"]),
    ("by the dtype of a like", mid(lambda m, x: x.double().type_as(x)), ["neg", "neg"]),
    ("by the dtype and device of a like", mid(lambda m, x: x.double().to(m.like)), ["neg", "neg"]),
    ("by a device and a dtype", mid(lambda m, x: x.to("cpu", f64).to("cpu", f32)), ["neg", "neg"]),
    ("by copies", mid(lambda m, x: x.to(f64, copy=True).to(f32, copy=True)), ["neg", "neg"]),
    ("by what export calls a copy", mid(lambda m, x: aten._to_copy.default(x.double(), dtype=f32)), ["neg", "neg"]),
    ("a mask to float32 and back", lambda m, x: torch.logical_not((x > 0).float().bool()), ["gt", "logical_not"]),
    ("int32 to int64 and back", mid(lambda m, x: (x * 9).int().long().int()), ["neg", "mul", "to i32", "neg"]),
    ("int32 to float64 and back", mid(lambda m, x: (x * 9).int().double().int()), ["neg", "mul", "to i32", "neg"]),
    ("float16 to float64 by float32", lambda m, x: x.half().float().double() * 2, ["to f16", "to f64", "mul"]),
    ("bfloat16 to float16 by float32", lambda m, x: x.bfloat16().float().half() * 2, ["to bf16", "to f16", "mul"]),
    ("float32 to float16 by float64", lambda m, x: x.double().half() * 2, ["to f16", "mul"]),
    ("float32 to bool by float64", lambda m, x: x.double().bool() & m.true, ["to bool", "__and__"]),
    ("int32 to int8 by int64", lambda m, x: x.int().long().char() * 2, ["to i32", "to i8", "mul"]),
    ("four in a row", mid(lambda m, x: x.half().float().double().float().half().float()), [
        "neg", "to f16", "to f32", "neg"]),
    ("the wide value has other readers", lambda m, x: ((y := x.double()) * 2, y.float() * 2), ["to f64", "mul", "mul"]),
    ("the result of the model is a copy", lambda m, x: x.double().float(), ["clone"]),
    ("so is one that is written", written_later, ["neg", "clone", "reshape", "add_", "add"]),
    ("and one of x that is not dense", mid(lambda m, x: x[:, ::2].double().float()), ["neg", "slice", "clone", "neg"]),
]  # fmt: skip


@both
@pytest.mark.parametrize(("body", "after"), [pytest.param(*row[1:], id=row[0]) for row in SHORTER])
def test_shortens(body: Body, after: list[str], front_end: str) -> None:
    model = Network(body, like=torch.zeros(1), true=torch.tensor([True])).eval()
    x = torch.cat([torch.randn(40), torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])]).reshape(4, 11)
    if "int" in str(after) or "i32" in str(after):
        x = x.nan_to_num(0.0, 1.0)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert set(fired(compiled)) <= {BACK, SHORT}
    assert kinds(compiled) == after
    assert same_all(compiled(x), model(x))


DECLINES: list[tuple[str, Body, str]] = [
    ("float32 to float16 and back rounds", mid(lambda m, x: x.half().float()), "float16 does not hold every"),
    ("float16 to bfloat16 and back rounds", lambda m, x: x.half().bfloat16().half() * 2, "does not hold every"),
    ("int64 to float64 and back rounds", lambda m, x: x.long().double().long() * 2, "float64 does not hold every"),
    ("int32 to float32 and back rounds", lambda m, x: x.int().float().int() * 2, "float32 does not hold every"),
    ("float32 to int64 and back truncates", mid(lambda m, x: x.long().float()), "int64 does not hold every"),
    ("int64 to int32 and back wraps", lambda m, x: x.long().int().long() * 2, "int32 does not hold every"),
    ("float32 to bool and back", mid(lambda m, x: x.bool().float()), "bool does not hold every"),
    ("float32 to an integer", lambda m, x: x.double().int() * 2, "differs where it goes through torch.float64"),
    ("int16 to int8 through float32", lambda m, x: x.short().float().char() * 2, "differs where it goes through"),
    ("int32 to float16 through float64", lambda m, x: x.int().double().half() * 2, "differs where it goes through"),
    ("complex numbers", lambda m, x: x.to(torch.complex64).to(torch.complex128).real, "no ordinary dtype"),
    (
        "a memory format",
        lambda m, x: x.reshape(2, 1, 2, 11).to(f64, memory_format=torch.channels_last).float() * 2,
        "asks for a memory format",
    ),
    ("x is written in between", written, "add_ may write to neg"),
    ("the cast is written in between", written_cast, "add_ may write to neg"),
    ("there is one cast only", lambda m, x: x.double() * 2, "is no cast"),
    ("casts to the dtype that is there", lambda m, x: x.to(f32).to(f32) * 2, "casts nothing"),
]  # fmt: skip


@both
@pytest.mark.parametrize(("body", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, reason: str, front_end: str) -> None:
    model, x = Network(body).eval(), torch.randn(4, 11)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert_declined(compiled, SHORT, reason)
    assert not fired(compiled)
    assert same_all(compiled(x), model(x))


def test_a_result_of_the_model_stays_distinct() -> None:
    model, x = Network(lambda m, x: (y := x * 2, y.double().float())).eval(), torch.randn(4)
    compiled = compiled_by(PASSES, model, (x,), "export")
    first, second = compiled(x)
    assert fired(compiled) == [BACK]
    assert first.data_ptr() != second.data_ptr()


def test_another_device_declines() -> None:
    model, x = Network(lambda m, x: x.to("meta", f64).float() * 2).eval(), torch.randn(4)
    compiled = fxopt.compile(model, (x,), passes=PASSES, verify=False)
    assert reasons(compiled, SHORT)[-1] == "it moves from cpu to meta"


def test_waits_for_the_dtypes() -> None:
    compiled = fxopt.compile(Network(mid(lambda m, x: x.double().float())).eval(), passes=PASSES)
    assert [decline.reason for decline in compiled.report.pending] == ["the dtypes of the casts"]


DTYPES = (torch.bool, u8, i8, i16, i32, i64, f16, bf16, f32, f64)


def through(x: torch.Tensor, *dtypes: torch.dtype) -> torch.Tensor:
    for dtype in dtypes:
        x = x.to(dtype)
    return x


@pytest.mark.parametrize("narrow", DTYPES, ids=str)
def test_which_casts_are_lossless(narrow: torch.dtype) -> None:
    """On every number of the small dtypes: what is called lossless keeps each, what is not does not."""
    x = numbers(narrow)
    x = x[x == x]
    for wide in DTYPES:
        kept = x.to(wide).tolist() == x.tolist()  # as Python's numbers, which compare exactly
        if wide is torch.bool or not (narrow.is_floating_point and not wide.is_floating_point):
            assert cancel_casts.is_lossless(narrow, wide) is kept, wide
        assert not cancel_casts.is_lossless(narrow, wide) or same(through(x, wide, narrow), x)


@pytest.mark.parametrize("narrow", DTYPES, ids=str)
def test_every_chain_of_two_casts(narrow: torch.dtype) -> None:
    x = numbers(narrow)
    for wide, last in itertools.product(DTYPES, DTYPES):
        if cancel_casts.is_lossless(narrow, wide) and cancel_casts._rounds_alike(narrow, wide, last):
            assert same(through(x, wide, last), through(x, last)), (wide, last)


@given(st.sampled_from(DTYPES), st.lists(st.sampled_from(DTYPES), min_size=2, max_size=6))
def test_any_chain_keeps_its_bits_and_settles(first: torch.dtype, dtypes: list[torch.dtype]) -> None:
    x = numbers(first)
    kept, before = [], first
    for dtype in dtypes:  # what a float out of an integer's range becomes is undefined
        if not (before.is_floating_point and dtype in cancel_casts.INTEGERS):
            kept.append(dtype)
            before = dtype
    model = Network(lambda m, x: through(x, *kept)).eval()
    compiled = fxopt.compile(model, passes=PASSES, verify=False, strict=True, backend="aten")
    assert same(compiled(x), model(x))
    again = fxopt.compile(model, passes=PASSES * 2, verify=False, strict=True, backend="aten")
    again(x)
    assert operations(again.fused_graph) == operations(compiled.fused_graph)
