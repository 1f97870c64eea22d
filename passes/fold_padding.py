"""fold-padding

    conv(pad(x, p by 0), W, padding=q)          ->  conv(x, W, padding=p+q)
    avg_pool(pad(x, p by 0))                    ->  avg_pool(x, padding=p, count_include_pad=True)
    max_pool(pad(x, p by -inf), padding=q)      ->  max_pool(x, padding=p+q)        by 0: where x has no negative number

Legal when: the padding is constant, the same on both sides, of spatial dimensions only, and nowhere negative; nobody
else reads the padded value. A convolution is not transposed and its weight constant and finite (0 * inf is NaN). A pool
does not round its size up; an average pool has no padding of its own; a max pool is not dilated; the padding they end
up with is at most half the kernel, so that each window has something of x in it; x is not empty, nor for avg_pool3d
smaller than the kernel.
Numerics: reassociates (a convolution without the zeros may be summed in another order). Pools keep every number, but
for the sign of a zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxopt import UNKNOWN, Match, NoMatch, Pass, Rewriter, Rule, call, const, ir, ops, var

from . import _affine
from ._nonnegative import is_nonnegative

aten = torch.ops.aten

CONVOLUTIONS: tuple[Any, ...] = (
    *(target for target in ops.CONVOLUTION_TARGETS if target not in ops.TRANSPOSED_TARGETS),
    ops.convolution,
)
#: Pools, and how many of the last dimensions they run along.
_AVERAGE = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
_MAX = {aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.max_pool3d.default: 3}

PAD = call((aten.pad.default, aten.constant_pad_nd.default), var("x"), name="pad")


# -- the padding -----------------------------------------------------------------------------------------------------


def _padding(match: Match, spatial: int) -> list[int] | NoMatch:
    """What is put on both sides of each spatial dimension, first to last; or why that is not so simple."""
    pad, x = match.node("pad"), match.node("x")
    given = ir.arguments(pad)
    if given.get("mode", "constant") != "constant":
        return NoMatch(f"it pads by {given['mode']}, not by a constant", pad)
    if not all(type(size) is int for size in given["pad"]):
        return NoMatch("the padding is computed at run time", pad)
    sides = list(zip(given["pad"][::2], given["pad"][1::2], strict=True))  # of the last dimension first
    if any(size < 0 for pair in sides for size in pair):
        return NoMatch("a negative padding crops", pad)
    if any(pair != (0, 0) for pair in sides[spatial:]):
        return NoMatch("it pads a dimension that is not spatial", pad)
    if any(left != right for left, right in sides):
        return NoMatch("it pads one side more than the other", pad)
    sizes = ir.shape(x)
    if sizes is None:
        return NoMatch(f"{UNKNOWN}whether {x.name} is empty", pad)
    if any(ir.static(size) == 0 for size in sizes[-spatial:]):
        return NoMatch(f"{x.name} is empty, and only padding would be left", pad)
    found = [left for left, _ in reversed(sides[:spatial])]
    return [0] * (spatial - len(found)) + found


def _value(match: Match) -> float | None:
    """The number that is padded with; None where it is not known."""
    value = ir.argument(match.node("pad"), "value")
    if value is None:
        return 0.0
    return float(value) if type(value) in (int, float) else None


def _zeros_guard(match: Match) -> NoMatch | None:
    if _value(match) == 0:
        return None
    return NoMatch(f"it pads with {ir.argument(match.node('pad'), 'value')!r}, not with zeros", match.node("pad"))


def _each(value: Any, spatial: int) -> list[int]:
    """One number per spatial dimension, of a number or a list."""
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    return numbers * spatial if len(numbers) == 1 else numbers


def _sum(left: list[int], right: list[int]) -> list[int]:
    return [a + b for a, b in zip(left, right, strict=True)]


# -- convolutions ----------------------------------------------------------------------------------------------------


def _spatial(layer: fx.Node) -> int:
    return _affine.weight_of(layer).dim() - 2


def _conv_guard(match: Match) -> NoMatch | None:
    layer, pad = match.node("layer"), match.node("pad")
    given = ops.convolution_arguments(layer)
    if given["transposed"]:
        return NoMatch("the padding of a transposed convolution crops its result", layer)
    if given["residual"] is pad:
        return NoMatch(f"{layer.name} also adds {pad.name} to its result", layer)
    if not all(type(size) is int for size in given["padding"]):
        return NoMatch(f"the padding of {layer.name} is computed at run time", layer)
    found = _padding(match, _spatial(layer))
    if isinstance(found, NoMatch):
        return found
    return _zeros_guard(match) or _affine.plain_guard(_affine.weight_of(layer), "the weight", layer)


def _into_conv(match: Match, rewriter: Rewriter) -> fx.Node:
    layer = match.node("layer")
    padding = _padding(match, _spatial(layer))
    assert not isinstance(padding, NoMatch)
    padding = _sum(padding, ops.convolution_arguments(layer)["padding"])
    return rewriter.call(layer.target, **{**ir.arguments(layer), "input": match["x"], "padding": padding})


# -- pools -----------------------------------------------------------------------------------------------------------


def _pool_guard(match: Match, spatial: int) -> NoMatch | None:
    """The pool can have the padding of its own."""
    pool = match.node("pool")
    given = ir.arguments(pool)
    found = _padding(match, spatial)
    if isinstance(found, NoMatch):
        return found
    if given["ceil_mode"] is not False:
        return NoMatch("the pool rounds its size up, and may drop a window that begins in its own padding", pool)
    numbers = [_each(given[key], spatial) for key in ("kernel_size", "padding")]
    if not all(type(number) is int for part in numbers for number in part):
        return NoMatch("the kernel or the padding of the pool is computed at run time", pool)
    kernel, own = numbers
    if any(pad > size // 2 for pad, size in zip(_sum(found, own), kernel, strict=True)):
        return NoMatch("the padding is more than half the kernel, and a window might have nothing else", pool)
    return None


def _average_guard(match: Match) -> NoMatch | None:
    pool = match.node("pool")
    refusal = _pool_guard(match, _AVERAGE[pool.target]) or _zeros_guard(match)  # type: ignore[index]
    if refusal is not None:
        return refusal
    if any(_each(ir.argument(pool, "padding"), 1)):
        return NoMatch("the pool has padding of its own, which it may not count", pool)
    if pool.target is aten.avg_pool3d.default:
        kernel, sizes = _each(ir.argument(pool, "kernel_size"), 3), ir.shape(match.node("x"))
        assert sizes is not None
        for have, wanted in zip(map(ir.static, sizes[-3:]), kernel, strict=True):
            if have is None or have < wanted:
                return NoMatch("avg_pool3d takes no image smaller than its kernel, whatever its padding", pool)
    return None


def _into_average(match: Match, rewriter: Rewriter) -> fx.Node:
    pool = match.node("pool")
    padding = _padding(match, _AVERAGE[pool.target])  # type: ignore[index]
    # With no padding every window is full, so that the pool divides by the kernel's size (or its override).
    return _repadded(pool, match, rewriter, padding=padding, count_include_pad=True)


def _max_guard(match: Match) -> NoMatch | None:
    pool, pad = match.node("pool"), match.node("pad")
    refusal = _pool_guard(match, _MAX[pool.target])  # type: ignore[index]
    if refusal is not None:
        return refusal
    if not all(step == 1 for step in _each(ir.argument(pool, "dilation"), 1)):
        return NoMatch("the pool is dilated, and a window might have padding only", pool)
    value = _value(match)
    if value == -math.inf:
        return None
    refusal = _zeros_guard(match)
    if refusal is None and not is_nonnegative(match.node("x")):
        return NoMatch(f"it pads with zeros, and {match.node('x').name} may be negative", pad)
    return refusal


def _into_max(match: Match, rewriter: Rewriter) -> fx.Node:
    pool = match.node("pool")
    spatial = _MAX[pool.target]  # type: ignore[index]
    padding = _padding(match, spatial)
    assert not isinstance(padding, NoMatch)
    return _repadded(pool, match, rewriter, padding=_sum(padding, _each(ir.argument(pool, "padding"), spatial)))


def _repadded(pool: fx.Node, match: Match, rewriter: Rewriter, **changed: Any) -> fx.Node:
    """The pool of x itself, with other options."""
    _, *options = ir.arguments(pool).items()
    return rewriter.call(pool.target, match["x"], **{**dict(options), **changed})


PASS = Pass(
    "fold-padding",
    rules=(
        Rule("pad-before-conv", call(CONVOLUTIONS, PAD, const("weight"), name="layer"), _into_conv, _conv_guard),
        Rule("pad-before-average-pool", call(_AVERAGE, PAD, name="pool"), _into_average, _average_guard),
        Rule("pad-before-max-pool", call(_MAX, PAD, name="pool"), _into_max, _max_guard),
    ),
    numerics="reassociate",
    doc=__doc__,
)
