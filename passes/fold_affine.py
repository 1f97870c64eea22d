"""fold-affine

    layer(x, W, b) * c    ->  layer(x, W*c, b*c)              also c * layer, layer / c
    layer(x, W, b) + c    ->  layer(x, W, b + c)              also c + layer, layer - c, c - layer
    layer(x * c, W, b)    ->  layer(x, W*c, b)
    layer(x + c, W, b)    ->  layer(x, W, b + sum(W*c))       without zero padding
    batch_norm(x) * c + d, batch_norm(x * c + d)  ->  batch_norm(x)

A layer is a convolution (any rank, groups, padding), a transposed convolution, or a linear one; c is a number, or a
constant tensor with one entry per channel (input channels in front of the layer, output channels behind it). LayerScale
and the 1/sqrt(d) of attention are such constants.

Legal when: what the constant meets has no other reader; c aligns from the right with the channels (dim 1; a linear
layer: the last) and changes neither shape nor dtype; alpha counts; everything is finite; in front of a layer, a sum
enters the bias only where no zero padding mixes in; a norm is in inference mode with running statistics.
Numerics: reassociates (exact in exact arithmetic, for finite values). Folded in float64, rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt import UNKNOWN, Match, NoMatch, Pass, Rewriter, Rule, call, const, ir, var
from fxopt.pattern import Pattern

from . import _affine, _norm
from ._affine import Map

aten = torch.ops.aten

#: Steps that are an affine map of one operand where the other is constant.
TARGETS: tuple[Any, ...] = (
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Tensor,
    aten.rsub.Scalar,
)


# -- the constant ----------------------------------------------------------------------------------------------------


def _operands(step: fx.Node) -> tuple[Any, Any]:
    """The step's two operands in the order of its schema."""
    given = ir.arguments(step)
    return given["self"], given["other"]


def _is_constant(operand: Any) -> bool:
    return type(operand) in (int, float) or ir.tensor(operand) is not None


def _input_of(step: fx.Node) -> Any:
    """The operand that a step in front of something maps: the one that is no constant."""
    left, right = _operands(step)
    return left if _is_constant(right) else right


def _map_of(step: fx.Node, value: fx.Node, device: torch.device) -> Map | NoMatch:
    """The step as a map of its operand `value`, for weights on `device`; or why it is none."""
    left, right = _operands(step)
    constant = right if left is value else left
    if not _is_constant(constant):
        what = constant.name if isinstance(constant, fx.Node) else repr(constant)
        return NoMatch(f"the other operand, {what}, is computed at run time or is no number", step)
    alpha = ir.arguments(step).get("alpha", 1)
    if type(alpha) not in (int, float):
        return NoMatch(f"alpha={alpha!r} is no number that is known", step)
    held = ir.tensor(constant)
    refusal = _affine.plain_guard(held, "the constant", step)
    if refusal is not None:
        return refusal
    entries = torch.tensor([constant], dtype=torch.float64) if held is None else held.double().reshape(-1)
    entries = entries.to(device)
    one, none = torch.ones_like(entries), torch.zeros_like(entries)
    match step.target:
        case aten.mul.Tensor | aten.mul.Scalar:
            return Map(entries, none)
        case aten.div.Tensor | aten.div.Scalar:
            if left is not value:
                return NoMatch("the constant is divided by the value: that is no affine map", step)
            return Map(1 / entries, none)
        case aten.add.Tensor | aten.add.Scalar:
            return Map(one, alpha * entries) if left is value else Map(alpha * one, entries)
        case aten.sub.Tensor | aten.sub.Scalar:
            return Map(one, -alpha * entries) if left is value else Map(-alpha * one, entries)
        case _:  # rsub(x, y) = y - alpha*x
            return Map(-alpha * one, entries) if left is value else Map(one, -alpha * entries)


def _alignment_guard(
    step: fx.Node, value: fx.Node, dtype: torch.dtype | None, axis: int, channels: int
) -> NoMatch | None:
    """A constant tensor runs along dim `axis` of `value`, and changes neither its shape nor its dtype."""
    left, right = _operands(step)
    held = ir.tensor(right if left is value else left)
    if held is None or held.dim() == 0:
        return None  # a number takes the dtype of the tensor that it meets
    if dtype is None:
        return NoMatch(f"{UNKNOWN}the dtype of {value.name}", step)
    if torch.promote_types(dtype, held.dtype) != dtype:
        return NoMatch(f"the constant is {held.dtype} and makes {dtype} wider", step)
    rank = ir.rank(value)
    if rank is None and axis == -1 and held.dim() == 1:
        rank = 1
    if rank is None:
        return NoMatch(f"{UNKNOWN}the rank of {value.name} says where its channels are", value)
    sizes = [1] * (rank - held.dim()) + list(held.shape)
    axis %= rank
    along = len(sizes) == rank and all(
        size == 1 or (place == axis and size == channels) for place, size in enumerate(sizes)
    )
    if along:
        return None
    return NoMatch(
        f"the constant has the shape {tuple(held.shape)}, which does not run along the channels (dim {axis} of {rank})",
        step,
    )


def _layer_alignment_guard(step: fx.Node, value: fx.Node, layer: fx.Node, channels: int) -> NoMatch | None:
    weight = _affine.weight_of(layer)
    if _affine.is_linear(layer):
        return _alignment_guard(step, value, weight.dtype, -1, channels)
    rank = ir.rank(value)
    refusal = _alignment_guard(step, value, weight.dtype, 1, channels)
    tensor = any((ir.rank(operand) or 0) > 0 for operand in _operands(step) if ir.tensor(operand) is not None)
    if refusal is None and tensor and rank != weight.dim():
        return NoMatch(f"the convolution is unbatched: {value.name} has {rank} dimensions, dim 0 its channels", value)
    return refusal


def _front_guard(step: fx.Node) -> NoMatch | None:
    """What a step in front maps is a value of the step's own shape and dtype."""
    x = _input_of(step)
    if not isinstance(x, fx.Node):
        return NoMatch("both operands are numbers", step)
    before, after = ir.fake(x), ir.fake(step)
    if before is None or after is None:
        return NoMatch(f"{UNKNOWN}whether {x.name} has the shape and dtype of {step.name}", step)
    if before.dtype != after.dtype:
        return NoMatch(f"the constant makes {before.dtype} {after.dtype}", step)
    if not ir.same_sizes(before.shape, after.shape):
        return NoMatch(f"{x.name} is broadcast over the constant", step)
    return None


# -- beside a layer --------------------------------------------------------------------------------------------------


def _after_layer_guard(match: Match) -> NoMatch | None:
    step, layer = match.node("step"), match.node("layer")
    found = _map_of(step, layer, _affine.weight_of(layer).device)
    if isinstance(found, NoMatch):
        return found
    return (
        _affine.layer_guard(layer)
        or _layer_alignment_guard(step, layer, layer, _affine.output_channels(layer))
        or _affine.fold_after_guard(layer, found)
    )


def _known_map(step: fx.Node, value: fx.Node, device: torch.device) -> Map:
    found = _map_of(step, value, device)
    assert isinstance(found, Map)
    return found


def _fold_after_layer(match: Match, rewriter: Rewriter) -> fx.Node:
    step, layer = match.node("step"), match.node("layer")
    return _affine.fold_after(layer, _known_map(step, layer, _affine.weight_of(layer).device), rewriter)


def _before_layer_guard(match: Match) -> NoMatch | None:
    step, layer = match.node("step"), match.node("layer")
    found = _front_guard(step) or _map_of(step, _input_of(step), _affine.weight_of(layer).device)
    if isinstance(found, NoMatch):
        return found
    return (
        _affine.layer_guard(layer)
        or _layer_alignment_guard(step, _input_of(step), layer, _affine.input_channels(layer))
        or _affine.fold_before_guard(layer, found)
    )


def _fold_before_layer(match: Match, rewriter: Rewriter) -> fx.Node:
    step, layer = match.node("step"), match.node("layer")
    x = _input_of(step)
    return _affine.fold_before(layer, x, _known_map(step, x, _affine.weight_of(layer).device), rewriter)


# -- beside a norm ---------------------------------------------------------------------------------------------------


def _after_norm_guard(match: Match) -> NoMatch | None:
    step, norm = match.node("step"), match.node("norm")
    found = _norm.guard(norm) or _map_of(step, norm, _norm.device(norm))
    if isinstance(found, NoMatch):
        return found
    return (
        _alignment_guard(step, norm, ir.dtype(norm), 1, _norm.channels(norm))
        or _norm.rebuild_guard(norm, found.after(_norm.as_map(norm)))
    )


def _fold_after_norm(match: Match, rewriter: Rewriter) -> fx.Node:
    step, norm = match.node("step"), match.node("norm")
    whole = _known_map(step, norm, _norm.device(norm)).after(_norm.as_map(norm))
    return _norm.rebuild(norm, ir.argument(norm, "input"), whole, rewriter)


def _before_norm_guard(match: Match) -> NoMatch | None:
    step, norm = match.node("step"), match.node("norm")
    found = _norm.guard(norm) or _front_guard(step) or _map_of(step, _input_of(step), _norm.device(norm))
    if isinstance(found, NoMatch):
        return found
    x = _input_of(step)
    return (
        _alignment_guard(step, x, ir.dtype(x), 1, _norm.channels(norm))
        or _norm.rebuild_guard(norm, _norm.as_map(norm).after(found))
    )


def _fold_before_norm(match: Match, rewriter: Rewriter) -> fx.Node:
    step, norm = match.node("step"), match.node("norm")
    x = _input_of(step)
    whole = _norm.as_map(norm).after(_known_map(step, x, _norm.device(norm)))
    return _norm.rebuild(norm, x, whole, rewriter)


X = var("x")
LAYER = call(_affine.LAYERS, X, const("weight"), const("bias", optional=True), name="layer")
STEP = call(TARGETS, var("left"), var("right"), name="step")


def _behind(value: Pattern) -> Pattern:
    return call(TARGETS, value, var("constant"), name="step", commutative=True)


PASS = Pass(
    "fold-affine",
    rules=(
        Rule("constant-after-layer", _behind(LAYER), _fold_after_layer, _after_layer_guard),
        Rule("constant-after-norm", _behind(_norm.pattern(X)), _fold_after_norm, _after_norm_guard),
        Rule(
            "constant-before-layer",
            call(_affine.LAYERS_AND_FUSED, STEP, const("weight"), const("bias", optional=True), name="layer"),
            _fold_before_layer,
            _before_layer_guard,
        ),
        Rule("constant-before-norm", _norm.pattern(STEP), _fold_before_norm, _before_norm_guard),
    ),
    numerics="reassociate",
    doc=__doc__,
)
