"""cancel-casts

    x.to(wide).to(dtype of x)   ->  x                 or a clone of it, where somebody could tell
    x.to(wide).to(narrow)       ->  x.to(narrow)

Legal when: the first cast is lossless, so that each number of x's dtype is one of the wide one (float16 in float32 in
float64, int32 in int64 and in float64, uint8 in float16), and the direct cast rounds as the two do: between
floating-point dtypes, between integers, to bool, or where it is lossless itself. The device stays, nobody asks for a
memory format, and nothing writes to x, or to its cast, between the two.
Numerics: the same bits, and NaN where there was NaN. Narrowing and then widening is a rounding, and stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt import UNKNOWN, NoMatch, Pass, Rewriter, ir

from . import _memory

aten = torch.ops.aten

TARGETS: tuple[Any, ...] = (
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ORDINARY = (torch.bool, *INTEGERS, *FLOATS)


def is_lossless(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every number of one dtype is one of the other."""
    if narrow is wide or narrow is torch.bool:
        return True
    if wide is torch.bool or (narrow in FLOATS and wide in INTEGERS):
        return False
    if wide in INTEGERS:
        inner, outer = torch.iinfo(narrow), torch.iinfo(wide)
        return outer.min <= inner.min and inner.max <= outer.max
    if narrow in INTEGERS:  # a float of p digits has all integers up to 2^p = 2 / eps
        inner = torch.iinfo(narrow)
        return max(-inner.min, inner.max) <= 2 / torch.finfo(wide).eps
    few, many = torch.finfo(narrow), torch.finfo(wide)
    return many.eps <= few.eps and few.max <= many.max


def _rounds_alike(narrow: torch.dtype, wide: torch.dtype, last: torch.dtype) -> bool:
    """Whether narrow -> wide -> last gives what narrow -> last does, narrow -> wide being lossless."""
    if last is torch.bool or is_lossless(narrow, last):
        return True
    if last in FLOATS:
        return narrow in FLOATS
    # What is out of an integer's range wraps around if it is an integer, and is undefined if it is a float.
    return wide in INTEGERS


def _guard(second: fx.Node, rewriter: Rewriter) -> str | None:
    """None where the two casts are one, or none; else why they may not be."""
    first = second.args[0]
    assert isinstance(first, fx.Node)
    x = first.args[0]
    assert isinstance(x, fx.Node)
    values = [ir.fake(node) for node in (x, first, second)]
    before, between, after = values
    if before is None or between is None or after is None:
        return f"{UNKNOWN}the dtypes of the casts"
    if len({value.device for value in (before, between, after)}) > 1:
        return f"it moves from {before.device} to {after.device}"
    odd = [value.dtype for value in (before, between, after) if value.dtype not in _ORDINARY]
    if odd:
        return f"{odd[0]} is no ordinary dtype"
    if before.dtype is between.dtype or between.dtype is after.dtype:
        return "one of the casts casts nothing"
    if not is_lossless(before.dtype, between.dtype):
        return f"{between.dtype} does not hold every {before.dtype}: the first cast rounds"
    if not _rounds_alike(before.dtype, between.dtype, after.dtype):
        return f"{before.dtype} to {after.dtype} differs where it goes through {between.dtype}"
    for cast in (first, second):
        if ir.arguments(cast).get("memory_format") not in (None, torch.preserve_format):
            return f"{cast.name} asks for a memory format"
    writer = rewriter.aliases.writer_between(first, second, (x, first))
    return None if writer is None else f"{writer.name} may write to {x.name} or to its cast in between"


def _shorten(second: fx.Node, rewriter: Rewriter) -> NoMatch | fx.Node:
    first = second.args[0]
    assert isinstance(first, fx.Node)
    x = first.args[0]
    assert isinstance(x, fx.Node)
    nodes = (first, second)
    if ir.dtype(x) != ir.dtype(second):
        direct = lambda: rewriter.call(aten.to.dtype, x, ir.dtype(second))  # noqa: E731
        return rewriter.substitute(second, direct, rule="cast-of-cast", nodes=nodes)
    if _memory.told_from_other_memory(second, x, rewriter) is None:
        found = rewriter.substitute(second, lambda: x, rule="cast-and-back", nodes=nodes)
        if not isinstance(found, NoMatch):
            return found
    # A fresh tensor, dense as a cast of x is.
    return rewriter.substitute(
        second, lambda: rewriter.call(aten.clone.default, x), rule="cast-and-back", nodes=nodes
    )


def _run(rewriter: Rewriter) -> None:
    for node in list(rewriter.graph.nodes):
        if node._erased or node.op != "call_function" or node.target not in TARGETS:
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_function" or source.target not in TARGETS:
            rewriter.decline(node, f"{source} is no cast", rule="cast-of-cast", fits=False)
            continue
        reason = _guard(node, rewriter)
        if reason is None:
            found = _shorten(node, rewriter)
            reason = found.reason if isinstance(found, NoMatch) else None
        if reason is not None:
            rewriter.decline(node, reason, rule="cast-of-cast")


PASS = Pass("cancel-casts", run=_run, numerics="bitwise", doc=__doc__)
