"""fuse-normalisation

    (x - mean(x)) / sqrt(var(x) + eps)      ->  layer_norm(x, eps)          var(x) also as mean((x - mean(x))^2)
    x / sqrt(mean(x^2) + eps)               ->  rms_norm(x, eps)
    layer_norm(x) * w + b                   ->  layer_norm(x, w, b)         rms_norm(x) * w

Division by the root, multiplication by rsqrt, by the power -1/2, or by the inverse of the root; products in any order,
with w already among them.

Legal when: nothing inside has another reader; mean and variance run along the same last dimensions, of known sizes, and
keep them; the variance is biased; eps is a number within the root; w and b are constants of exactly these dimensions
and of x's dtype; x is float32 or float64, so that the operator accumulates in the dtype that the formula does.
Numerics: reassociates (the same in exact arithmetic, for finite values).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxopt import UNKNOWN, Match, NoMatch, Pass, Rewriter, Rule, any_of, call, const, ir, var
from fxopt.pattern import Pattern

from ._product import number, numbers_guard, plus, product

aten = torch.ops.aten
#: The operators accumulate these as they are; float16 and bfloat16 they would accumulate in float32.
_FLOATS = (torch.float32, torch.float64)
_REDUCTIONS = ("mean", "inner", "variance")


def _dims(reduction: fx.Node, rank: int) -> tuple[int, ...] | None:
    """The dimensions that a mean or variance runs along, in order; None where it runs along all, or is not known to."""
    dims = ir.argument(reduction, "dim")
    if not isinstance(dims, (list, tuple)) or not dims or any(type(dim) is not int for dim in dims):
        return None
    return tuple(sorted(dim % rank for dim in dims))


def _reductions(match: Match) -> list[fx.Node]:
    return [match.node(name) for name in _REDUCTIONS if match.get(name) is not None]


def _shape(match: Match) -> list[int] | NoMatch:
    """The sizes of the last dimensions that every mean and variance of a match runs along."""
    x = match.node("x")
    sizes = ir.shape(x)
    if sizes is None:
        return NoMatch(f"{UNKNOWN}the shape of {x.name}", match.root)
    if not sizes:
        return NoMatch(f"{x.name} has no dimensions", match.root)
    found = {node: _dims(node, len(sizes)) for node in _reductions(match)}
    first = next(iter(found.values()))
    if first is None or len(set(found.values())) > 1:
        names = " and ".join(node.name for node in found)
        return NoMatch(f"{names}: these do not run along the same known dimensions", match.root)
    rank = len(sizes)
    if first != tuple(range(rank - len(first), rank)):
        return NoMatch(f"{x.name} is normalised along {list(first)} of {rank} dimensions, not the last", match.root)
    shape = [ir.static(size) for size in sizes[-len(first) :]]
    if None in shape:
        return NoMatch(f"the sizes {shape} of what is normalised are not all fixed", match.root)
    return [size for size in shape if size is not None]


def _variance_guard(match: Match) -> NoMatch | None:
    """Reductions of x's own dtype; a variance that is biased."""
    for node in _reductions(match):
        given = ir.arguments(node)
        if given.get("dtype") is not None:
            return NoMatch(f"{node.name} accumulates in {given['dtype']}", node)
        if given.get("unbiased", False) is not False:
            return NoMatch(f"{node.name} is the unbiased variance", node)
        if "correction" in given and given["correction"] not in (0, 0.0):
            return NoMatch(f"{node.name} is not the biased variance: its correction is {given['correction']}", node)
    return None


def _constant_guard(constant: fx.Node | None, what: str, shape: list[int], dtype: torch.dtype | None) -> NoMatch | None:
    """A weight or bias has exactly the normalised dimensions, and the dtype of what is normalised."""
    held = ir.tensor(constant)
    if held is None:
        return None
    if list(held.shape) != shape:
        return NoMatch(f"the {what} has the shape {list(held.shape)}, not {shape}", constant)
    if held.dtype is not dtype:
        return NoMatch(f"the {what} is {held.dtype}, what is normalised {dtype}", constant)
    return None


def _guard(match: Match) -> NoMatch | None:
    x, eps = match.node("x"), number(match["eps"])
    shape = _shape(match)
    if isinstance(shape, NoMatch):
        return shape
    dtype = ir.dtype(x)
    if dtype is None or dtype not in _FLOATS:
        return NoMatch(f"the formula accumulates in {dtype}, the operator would in another dtype", match.root)
    if eps is None or not 0 <= eps < math.inf:
        return NoMatch(f"eps is {match['eps']}, not a number that is known and finite", match.root)
    return (
        _variance_guard(match)
        or _constant_guard(match.get("weight"), "weight", shape, dtype)
        or numbers_guard(match, dtype)
    )


def _normalise(target: Any) -> Any:
    """A rewrite that calls a norm on x."""

    def rewrite(match: Match, rewriter: Rewriter) -> fx.Node:
        shape, eps = _shape(match), number(match["eps"])
        assert not isinstance(shape, NoMatch)
        given = {"input": match["x"], "normalized_shape": shape, "weight": match.get("weight"), "eps": eps}
        return rewriter.call(target, **given)

    return rewrite


def _affine_guard(match: Match) -> NoMatch | None:
    norm = match.node("norm")
    dtype, shape = ir.dtype(norm), list(ir.argument(norm, "normalized_shape"))
    if dtype is None:
        return NoMatch(f"{UNKNOWN}the dtype of {norm.name}", match.root)
    return _constant_guard(match.get("weight"), "weight", shape, dtype) or _constant_guard(
        match.get("bias"), "bias", shape, dtype
    )


def _take(match: Match, rewriter: Rewriter) -> fx.Node:
    """The norm with the weight or bias that is behind it."""
    norm = match.node("norm")
    taken = {name: match[name] for name in ("weight", "bias") if match.get(name) is not None}
    return rewriter.call(norm.target, **(ir.arguments(norm) | taken))


X, WEIGHT = var("x"), const("weight")


def _centred(name: str) -> Pattern:
    return call(aten.sub.Tensor, X, call(aten.mean.dim, X, keepdim=True, name=name), alpha=1)


CENTRED = _centred("mean")
VARIANCE = any_of(
    call((aten.var.dim, aten.var.correction), X, keepdim=True, name="variance"),
    call(aten.mean.dim, product(_centred("inner"), _centred("inner")), keepdim=True, name="variance"),
)
MEAN_SQUARE = call(aten.mean.dim, product(X, X), keepdim=True, name="variance")


def _root(variance: Pattern) -> Pattern:
    inside = plus(variance, var("eps"))
    return any_of(call(aten.sqrt.default, inside), call(aten.pow.Tensor_Scalar, inside, 0.5))


def _inverse_root(variance: Pattern) -> Pattern:
    inside = plus(variance, var("eps"))
    return any_of(
        call(aten.rsqrt.default, inside),
        call(aten.pow.Tensor_Scalar, inside, -0.5),
        call(aten.reciprocal.default, _root(variance)),
    )


def _times(value: Pattern, variance: Pattern) -> Pattern:
    inverse = _inverse_root(variance)
    return any_of(product(inverse, value), product(inverse, value, WEIGHT))


def _over(value: Pattern, variance: Pattern) -> Pattern:
    root = _root(variance)
    return any_of(call(aten.div.Tensor, value, root), call(aten.div.Tensor, product(value, WEIGHT), root))


LAYER_NORM, RMS_NORM = _normalise(aten.layer_norm.default), _normalise(aten.rms_norm.default)
BARE = any_of(
    call(aten.layer_norm.default, weight=None, bias=None, name="norm"),
    call(aten.rms_norm.default, weight=None, name="norm"),
)

PASS = Pass(
    "fuse-normalisation",
    rules=(
        Rule("layer-norm-by-quotient", _over(CENTRED, VARIANCE), LAYER_NORM, _guard),
        Rule("layer-norm-by-product", _times(CENTRED, VARIANCE), LAYER_NORM, _guard),
        Rule("rms-norm-by-quotient", _over(X, MEAN_SQUARE), RMS_NORM, _guard),
        Rule("rms-norm-by-product", _times(X, MEAN_SQUARE), RMS_NORM, _guard),
        Rule("weight", call(aten.mul.Tensor, BARE, WEIGHT, commutative=True), _take, _affine_guard),
        Rule("bias", plus(call(aten.layer_norm.default, bias=None, name="norm"), const("bias")), _take, _affine_guard),
    ),
    numerics="reassociate",
    doc=__doc__,
)
