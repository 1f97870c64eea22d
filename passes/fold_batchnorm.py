"""fold-batchnorm

    batch_norm(layer(x, W, b))      ->  layer(x, W*s, (b - m)*s + h)                 s = g / sqrt(v + eps)
    layer(batch_norm(x), W, b)      ->  layer(x, W*s, b + sum(W*t))                  t = h - m*s
    layer(relu(batch_norm(x)), W)   ->  layer(relu(x + t/s), W*s)                    every s > 0
    batch_norm(batch_norm(x))       ->  batch_norm(x) of the product of both maps

A layer is a convolution (any rank, groups, padding), a transposed convolution, or a linear one; g, h, m, v are the
norm's weight, bias, running mean and running variance (a missing weight is 1, a missing bias 0).

Legal when: the norm is in inference mode with running statistics; what it reads (or what reads it) has no other reader;
channels agree and run along dim 1 (a linear layer: rank 2, or a norm of one channel); in front of a layer, the shift
enters the bias only where no zero padding mixes in; weights are constant, floating point and finite, and stay so.
Numerics: reassociates (exact in exact arithmetic, for finite values). Folded in float64, rounded once.
"""

from __future__ import annotations

import torch
from torch import fx

from fxopt import UNKNOWN, Match, NoMatch, Pass, Rewriter, Rule, call, const, ir, var
from fxopt.pattern import Pattern

from . import _affine, _norm

aten = torch.ops.aten


def _layer(source: Pattern, targets: object) -> Pattern:
    return call(targets, source, const("weight"), const("bias", optional=True), name="layer")


X = var("x")
LAYER = _layer(X, _affine.LAYERS)


def _channels_guard(layer: fx.Node, value: fx.Node, have: int, norm: fx.Node) -> NoMatch | None:
    """The norm's channels, dim 1 of `value` (the layer's input or result), are the `have` channels of the layer."""
    rank, channels = ir.rank(value), _norm.channels(norm)
    if rank is None:
        return NoMatch(f"{UNKNOWN}the rank of {value.name} says where its channels are", value)
    if rank == _affine.weight_of(layer).dim():
        if channels == have:
            return None
        return NoMatch(f"the norm has {channels} channels, {layer.name} {have}", layer)
    if not _affine.is_linear(layer):
        return NoMatch(f"the convolution is unbatched: {value.name} has {rank} dimensions, dim 0 its channels", value)
    if rank > 2 and channels == 1:
        return None
    return NoMatch(f"{value.name} has {rank} dimensions: the norm runs along dim 1, the features are last", value)


def _after_guard(match: Match) -> NoMatch | None:
    norm, layer = match.node("norm"), match.node("layer")
    return (
        _norm.guard(norm)
        or _affine.layer_guard(layer)
        or _channels_guard(layer, layer, _affine.output_channels(layer), norm)
        or _affine.fold_after_guard(layer, _norm.as_map(norm))
    )


def _fold_after(match: Match, rewriter: Rewriter) -> fx.Node:
    return _affine.fold_after(match.node("layer"), _norm.as_map(match.node("norm")), rewriter)


def _before_guard(match: Match) -> NoMatch | None:
    norm, layer = match.node("norm"), match.node("layer")
    return (
        _norm.guard(norm)
        or _affine.layer_guard(layer)
        or _channels_guard(layer, norm, _affine.input_channels(layer), norm)
        or _affine.fold_before_guard(layer, _norm.as_map(norm))
    )


def _fold_before(match: Match, rewriter: Rewriter) -> fx.Node:
    return _affine.fold_before(match.node("layer"), match.node("x"), _norm.as_map(match.node("norm")), rewriter)


def _crossed(norm: fx.Node) -> tuple[torch.Tensor, _affine.Map]:
    """relu(s*x + t) = s * relu(x + t/s) for s > 0: what stays in front of the ReLU, and the map that goes behind it."""
    whole = _norm.as_map(norm)
    return whole.shift / whole.scale, _affine.Map(whole.scale, torch.zeros_like(whole.shift))


def _crossing_guard(match: Match) -> NoMatch | None:
    norm, layer, x = match.node("norm"), match.node("layer"), match.node("x")
    refusal = (
        _norm.guard(norm)
        or _affine.layer_guard(layer)
        or _channels_guard(layer, norm, _affine.input_channels(layer), norm)
    )
    if refusal is not None:
        return refusal
    left, scale = _crossed(norm)
    if not bool((scale.scale > 0).all()):
        return NoMatch("a scale of the norm is not positive, and only positive ones cross a ReLU", norm)
    dtype = ir.dtype(x)
    if dtype is None:
        return NoMatch(f"{UNKNOWN}the dtype of {x.name}", norm)
    if not float(left.detach().abs().max()) <= torch.finfo(dtype).max:
        return NoMatch(f"the shift that stays in front of the ReLU would leave the range of {dtype}", norm)
    return _affine.fold_before_guard(layer, scale)


def _cross_relu(match: Match, rewriter: Rewriter) -> fx.Node:
    norm, layer, source = match.node("norm"), match.node("layer"), match.node("x")
    left, scale = _crossed(norm)
    rank, dtype = ir.rank(norm), ir.dtype(source)
    assert rank is not None
    assert dtype is not None
    if left.requires_grad or bool((left != 0).any()):
        path = str(ir.argument(norm, "running_mean").target)
        held = rewriter.constant(left.to(dtype).reshape(-1, *[1] * (rank - 2)), path.replace("running_mean", "shift"))
        source = rewriter.call(aten.add.Tensor, source, held)
    return _affine.fold_before(layer, rewriter.call(aten.relu.default, source), scale, rewriter)


def _chain_guard(match: Match) -> NoMatch | None:
    first, second = match.node("first"), match.node("norm")
    refusal = _norm.guard(first) or _norm.guard(second)
    if refusal is not None:
        return refusal
    if _norm.channels(first) != _norm.channels(second):
        return NoMatch(f"the norms have {_norm.channels(first)} and {_norm.channels(second)} channels", second)
    if _norm.dtype(first) != _norm.dtype(second):
        return NoMatch(f"the norms hold {_norm.dtype(first)} and {_norm.dtype(second)}", second)
    return _norm.rebuild_guard(second, _norm.as_map(second).after(_norm.as_map(first)))


def _compose(match: Match, rewriter: Rewriter) -> fx.Node:
    first, second = match.node("first"), match.node("norm")
    return _norm.rebuild(second, match.node("x"), _norm.as_map(second).after(_norm.as_map(first)), rewriter)


NORM = _norm.pattern(X)

PASS = Pass(
    "fold-batchnorm",
    rules=(
        Rule("norm-after-layer", _norm.pattern(LAYER), _fold_after, _after_guard),
        Rule("norm-after-norm", _norm.pattern(_norm.pattern(X, "first")), _compose, _chain_guard),
        Rule("norm-before-layer", _layer(NORM, _affine.LAYERS_AND_FUSED), _fold_before, _before_guard),
        Rule(
            "norm-and-relu-before-layer",
            _layer(call(aten.relu.default, NORM, name="relu"), _affine.LAYERS_AND_FUSED),
            _cross_relu,
            _crossing_guard,
        ),
    ),
    numerics="reassociate",
    doc=__doc__,
)
