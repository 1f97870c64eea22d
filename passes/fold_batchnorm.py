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
from fxopt import Match, NoMatch, Pass, Rewriter, Rule, call, const, ir, var
from fxopt.pattern import Pattern
from torch import fx

from . import _affine

aten = torch.ops.aten


def _norm(source: Pattern, name: str = "norm") -> Pattern:
    return call(
        aten.batch_norm.default,
        source,
        const(f"{name}'s weight", optional=True),
        const(f"{name}'s bias", optional=True),
        const(f"{name}'s running mean", optional=True),
        const(f"{name}'s running variance", optional=True),
        name=name,
    )


def _layer(source: Pattern) -> Pattern:
    return call(_affine.LAYERS, source, const("weight"), const("bias", optional=True), name="layer")


X = var("x")


def scale_and_shift(norm: fx.Node) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm as y = s*x + t: (s, t) in float64, one per channel. s = g / sqrt(v + eps), t = h - m*s."""
    given = ir.arguments(norm)
    mean, variance = ir.tensor(given["running_mean"]), ir.tensor(given["running_var"])
    assert mean is not None and variance is not None
    weight, bias = ir.tensor(given["weight"]), ir.tensor(given["bias"])
    scale = 1.0 / torch.sqrt(variance.double() + given["eps"])
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    return scale, shift


def _inference(norm: fx.Node) -> NoMatch | None:
    given = ir.arguments(norm)
    if given["training"] is not False:
        return NoMatch("the norm is in training mode: it normalises by the batch's own statistics", norm)
    if given["running_mean"] is None or given["running_var"] is None:
        return NoMatch("the norm has no running statistics (track_running_stats=False)", norm)
    statistics = [given["weight"], given["bias"], given["running_mean"], given["running_var"]]
    for operand in statistics:
        held = ir.tensor(operand)
        if held is not None and held.is_meta:
            return NoMatch("the norm's statistics are on the meta device and have no values", norm)
    return None


def _channels(norm: fx.Node) -> int:
    mean = ir.tensor(ir.argument(norm, "running_mean"))
    assert mean is not None
    return mean.numel()


def _after_guard(match: Match) -> NoMatch | None:
    norm, layer = match.node("norm"), match.node("layer")
    refusal = _inference(norm) or _affine.weights_guard(layer)
    if refusal is not None:
        return refusal
    return _affine.channels_guard(
        layer, layer, _affine.output_channels(layer), _channels(norm)
    ) or _affine.finite_guard(*scale_and_shift(norm), layer)


def _fold_after(match: Match, rewriter: Rewriter) -> fx.Node:
    return _affine.fold_after(match.node("layer"), *scale_and_shift(match.node("norm")), rewriter)


def _before_guard(match: Match) -> NoMatch | None:
    norm, layer = match.node("norm"), match.node("layer")
    refusal = _inference(norm) or _affine.weights_guard(layer)
    if refusal is not None:
        return refusal
    scale, shift = scale_and_shift(norm)
    refusal = _affine.channels_guard(
        layer, norm, _affine.input_channels(layer), _channels(norm)
    ) or _affine.finite_guard(scale, shift, layer)
    if refusal is not None:
        return refusal
    if bool((shift != 0).any()):
        if _affine.is_transposed(layer):
            return NoMatch("the norm's shift cannot enter a transposed convolution: its taps vary by position", layer)
        if _affine.is_padded(layer):
            return NoMatch("the convolution pads with zeros, which the norm's shift does not reach", layer)
    return None


def _fold_before(match: Match, rewriter: Rewriter) -> fx.Node:
    source = match.node("x")
    return _affine.fold_before(match.node("layer"), source, *scale_and_shift(match.node("norm")), rewriter)


def _crossing_guard(match: Match) -> NoMatch | None:
    norm, layer = match.node("norm"), match.node("layer")
    refusal = _inference(norm) or _affine.weights_guard(layer)
    if refusal is not None:
        return refusal
    scale, shift = scale_and_shift(norm)
    refusal = _affine.channels_guard(layer, norm, _affine.input_channels(layer), _channels(norm))
    if refusal is not None:
        return refusal
    if not bool((scale > 0).all()):
        return NoMatch("a scale of the norm is not positive, and only positive ones cross a ReLU", norm)
    if ir.dtype(match.node("x")) is None:
        return NoMatch(f"{_affine.UNKNOWN}the dtype of {match.node('x').name}", norm)
    if ir.dtype(match.node("x")) != _affine.weight_of(layer).dtype:
        return NoMatch("the norm's input and the layer's weight have different dtypes", norm)
    return _affine.finite_guard(scale, shift / scale, layer)


def _cross_relu(match: Match, rewriter: Rewriter) -> fx.Node:
    norm, layer, x = match.node("norm"), match.node("layer"), match.node("x")
    scale, shift = scale_and_shift(norm)
    rank = ir.rank(norm)
    assert rank is not None
    dtype = _affine.weight_of(layer).dtype
    moved = (shift / scale).to(dtype).reshape(-1, *[1] * (rank - 2))
    source = x
    if bool((moved != 0).any()):
        path = str(ir.argument(norm, "running_mean").target)
        source = rewriter.call(aten.add.Tensor, x, rewriter.constant(moved, path.replace("running_mean", "shift")))
    source = rewriter.call(aten.relu.default, source)
    return _affine.fold_before(layer, source, scale, torch.zeros_like(scale), rewriter)


def _chain_guard(match: Match) -> NoMatch | None:
    first, second = match.node("first"), match.node("norm")
    refusal = _inference(first) or _inference(second)
    if refusal is not None:
        return refusal
    if _channels(first) != _channels(second):
        return NoMatch(f"the norms have {_channels(first)} and {_channels(second)} channels", second)
    maps = (*scale_and_shift(first), *scale_and_shift(second))
    if not all(bool(torch.isfinite(part).all()) for part in maps):
        return NoMatch("a scale or shift is not finite", second)
    return None


def _compose(match: Match, rewriter: Rewriter) -> fx.Node:
    first, second = match.node("first"), match.node("norm")
    (s1, t1), (s2, t2) = scale_and_shift(first), scale_and_shift(second)
    given = dict(ir.arguments(second))
    held = ir.tensor(given["running_mean"])
    assert held is not None
    home = str(given["running_mean"].target).rpartition(".")[0]
    prefix = f"{home}." if home else ""
    for key, name, value in (
        ("weight", "weight_folded", s1 * s2),
        ("bias", "bias_folded", t1 * s2 + t2),
        ("running_mean", "mean_folded", torch.zeros_like(s1)),
        ("running_var", "variance_folded", torch.ones_like(s1)),
    ):
        given[key] = rewriter.constant(value.to(held.dtype), prefix + name)
    return rewriter.call(second.target, **{**given, "input": match["x"], "eps": 0.0})


PASS = Pass(
    "fold-batchnorm",
    rules=(
        Rule("norm-after-layer", _norm(_layer(X)), _fold_after, _after_guard),
        Rule("norm-after-norm", _norm(_norm(X, "first")), _compose, _chain_guard),
        Rule("norm-before-layer", _layer(_norm(X)), _fold_before, _before_guard),
        Rule(
            "norm-and-relu-before-layer",
            _layer(call(aten.relu.default, _norm(X), name="relu")),
            _cross_relu,
            _crossing_guard,
        ),
    ),
    numerics="reassociate",
    doc=__doc__,
)
