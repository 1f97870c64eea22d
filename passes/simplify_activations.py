"""simplify-activations

    relu(y)                         ->  y                        y of relu, relu6, sigmoid, hardsigmoid, exp, softmax
    clamp(clamp(x, a, b), c, d)     ->  clamp(x, max(a, c), min(b, d))       relu, relu6 and hardtanh are clamps
    clamp(x, 0)                     ->  relu(x)

Legal when: the first activation has no other reader; bounds are known numbers, no NaN and no -0.0, the lower one not
above the upper one, in the tensor's dtype; the two ranges meet; the dtype is floating point (a bound of 0.5 makes an
integer a float). A ReLU behind a clamp whose lower bound is not negative goes whatever the dtype.
Numerics: the same bits, -0.0 too, and NaN where there was NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt import UNKNOWN, Match, NoMatch, Pass, Rewriter, Rule, call, ir, var

aten = torch.ops.aten

#: Activations that give no negative number, and NaN only for NaN. (abs and square do, of the integers that overflow.)
NONNEGATIVE = (
    aten.relu.default,
    aten.relu6.default,
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.exp.default,
    aten.softmax.int,
)
CLAMPS = (aten.relu.default, aten.relu6.default, aten.clamp.default, aten.hardtanh.default)
Bound = int | float | None


@dataclass(frozen=True)
class Range:
    """The closed range of a clamp: its bounds as they are written, and as the tensor's dtype rounds them."""

    low: Bound
    high: Bound
    lowest: float
    highest: float

    @property
    def bounds(self) -> tuple[float, float]:
        """The bounds that count."""
        return self.lowest, self.highest

    def meet(self, other: Range) -> Range:
        """What lies in both ranges."""
        below = other if other.lowest > self.lowest else self
        above = other if other.highest < self.highest else self
        return Range(below.low, above.high, below.lowest, above.highest)


def _written(clamp: fx.Node) -> tuple[Any, Any]:
    """The bounds of a clamp as its arguments say them."""
    given = ir.arguments(clamp)
    match clamp.target:
        case aten.relu.default:
            return 0, None
        case aten.relu6.default:
            return 0, 6
        case aten.hardtanh.default:
            return given["min_val"], given["max_val"]
        case _:
            return given["min"], given["max"]


def _numbers_guard(clamp: fx.Node) -> NoMatch | None:
    """Bounds are known numbers in their order."""
    low, high = _written(clamp)
    for bound in (low, high):
        if isinstance(bound, fx.Node) or type(bound) not in (int, float, type(None)):
            return NoMatch(f"the bound {bound} of {clamp.name} is no number that is known", clamp)
        if bound is not None and math.isnan(bound):
            return NoMatch(f"a bound of {clamp.name} is NaN", clamp)
    if low is not None and high is not None and low > high:
        return NoMatch(f"the lower bound {low} of {clamp.name} is above the upper one, {high}, which wins", clamp)
    return None


def _range(clamp: fx.Node) -> Range | NoMatch:
    """The range of a clamp whose dtype is known to be floating point."""
    refusal = _numbers_guard(clamp)
    if refusal is not None:
        return refusal
    dtype = ir.dtype(clamp.args[0]) if isinstance(clamp.args[0], fx.Node) else None
    if dtype is None:
        return NoMatch(f"{UNKNOWN}the dtype of {clamp.args[0]}", clamp)
    if not dtype.is_floating_point:
        return NoMatch(f"{clamp.name} clamps {dtype}, which its bounds may promote", clamp)
    rounded = []
    for bound, missing in zip(_written(clamp), (-math.inf, math.inf), strict=True):
        number = missing if bound is None else torch.tensor(float(bound), dtype=torch.float64).to(dtype).item()
        if number == 0 and math.copysign(1, number) < 0:
            return NoMatch(f"the bound {bound} of {clamp.name} is -0.0 in {dtype}, and 0.0 is another number", clamp)
        rounded.append(number)
    return Range(*_written(clamp), *rounded)


def _ranges(match: Match) -> tuple[Range, Range] | NoMatch:
    inner, outer = _range(match.node("inner")), _range(match.node("outer"))
    if isinstance(inner, NoMatch):
        return inner
    return outer if isinstance(outer, NoMatch) else (inner, outer)


def _is_relu_of_nonnegative(match: Match) -> bool:
    inner, outer = match.node("inner"), match.node("outer")
    low, _ = _written(inner)
    if outer.target is not aten.relu.default or low is None or _numbers_guard(inner) is not None:
        return False
    return bool(low > 0 or (low == 0 and math.copysign(1, low) > 0))


def _compose_guard(match: Match) -> NoMatch | None:
    if _is_relu_of_nonnegative(match):
        return None
    found = _ranges(match)
    if isinstance(found, NoMatch):
        return found
    inner, outer = found
    if max(inner.lowest, outer.lowest) > min(inner.highest, outer.highest):
        return NoMatch("the two ranges do not meet: the result is one number", match.root)
    return None


def _compose(match: Match, rewriter: Rewriter) -> fx.Node:
    if _is_relu_of_nonnegative(match):
        return match.node("inner")
    found = _ranges(match)
    assert not isinstance(found, NoMatch)
    inner, outer = found
    both = inner.meet(outer)
    if both.bounds == inner.bounds:
        return match.node("inner")
    if both.bounds == outer.bounds:  # in its own spelling: a relu6 stays one
        rest = match.node("outer").args[1:]
        return rewriter.call(match.node("outer").target, match["x"], *rest)
    return rewriter.call(aten.clamp.default, match["x"], both.low, both.high)


def _relu_guard(match: Match) -> NoMatch | None:
    clamp = match.node("clamp")
    low, high = _written(clamp)
    if isinstance(low, fx.Node) or low != 0 or high not in (None, math.inf):
        return NoMatch(f"{clamp.name} clamps to {low} and {high}, not to what is positive", clamp, fits=False)
    found = _range(clamp)
    return found if isinstance(found, NoMatch) else None


PASS = Pass(
    "simplify-activations",
    rules=(
        Rule(
            "relu-of-nonnegative",
            call(aten.relu.default, call(NONNEGATIVE, name="inner"), name="outer"),
            lambda match, rewriter: match.node("inner"),
        ),
        Rule(
            "clamp-of-clamp", call(CLAMPS, call(CLAMPS, var("x"), name="inner"), name="outer"), _compose, _compose_guard
        ),
        Rule(
            "clamp-is-relu",
            call((aten.clamp.default, aten.hardtanh.default), var("x"), name="clamp"),
            lambda match, rewriter: rewriter.call(aten.relu.default, match["x"]),
            _relu_guard,
        ),
    ),
    numerics="bitwise",
    doc=__doc__,
)
