"""An inference batch norm as the per-channel map that it is, and back.

    batch_norm(x) = s*x + t          s = g / sqrt(v + eps)          t = h - m*s
"""

from __future__ import annotations

import torch
from torch import fx

from fxopt import NoMatch, Rewriter, call, const, ir
from fxopt.pattern import Pattern

from ._affine import Map, plain_guard, range_guard

aten = torch.ops.aten


def pattern(source: Pattern, name: str = "norm") -> Pattern:
    """A batch norm of `source` with constant parameters and statistics."""
    return call(
        aten.batch_norm.default,
        source,
        const(f"{name}'s weight", optional=True),
        const(f"{name}'s bias", optional=True),
        const(f"{name}'s running mean", optional=True),
        const(f"{name}'s running variance", optional=True),
        name=name,
    )


def guard(norm: fx.Node) -> NoMatch | None:
    """The norm is a per-channel map: in inference mode, by running statistics, of plain constants."""
    given = ir.arguments(norm)
    if given["training"] is not False:
        return NoMatch("the norm is in training mode: it normalises by the batch's own statistics", norm)
    if given["running_mean"] is None or given["running_var"] is None:
        return NoMatch("the norm has no running statistics (track_running_stats=False)", norm)
    if type(given["eps"]) not in (int, float):
        return NoMatch("the norm's eps is computed at run time", norm)
    size = channels(norm)
    for key in ("running_mean", "running_var", "weight", "bias"):
        held = ir.tensor(given[key])
        refusal = plain_guard(held, f"the norm's {key}", norm)
        if refusal is not None:
            return refusal
        if held is not None and tuple(held.shape) != (size,):
            return NoMatch(f"the norm's {key} has the shape {tuple(held.shape)}, not one number per channel", norm)
    return None


def channels(norm: fx.Node) -> int:
    """How many channels a norm with running statistics has."""
    mean = ir.tensor(ir.argument(norm, "running_mean"))
    assert mean is not None
    return mean.numel()


def dtype(norm: fx.Node) -> torch.dtype:
    """The dtype that a norm with running statistics holds them in; its input may be narrower."""
    mean = ir.tensor(ir.argument(norm, "running_mean"))
    assert mean is not None
    return mean.dtype


def device(norm: fx.Node) -> torch.device:
    """Where a norm with running statistics holds them."""
    mean = ir.tensor(ir.argument(norm, "running_mean"))
    assert mean is not None
    return mean.device


def as_map(norm: fx.Node) -> Map:
    """The norm as y = s*x + t, one entry per channel; not finite where variance + eps is not positive."""
    given = ir.arguments(norm)
    mean, variance = ir.tensor(given["running_mean"]), ir.tensor(given["running_var"])
    assert mean is not None
    assert variance is not None
    weight, bias = ir.tensor(given["weight"]), ir.tensor(given["bias"])
    scale = 1.0 / torch.sqrt(variance.double() + given["eps"])
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    return Map(scale, shift if bias is None else shift + bias.double())


def rebuild_guard(norm: fx.Node, whole: Map) -> NoMatch | None:
    """A norm that does `whole` can hold it: finite, and within the dtype of its statistics."""
    if whole.entries == 0:
        return NoMatch("the norm has no channels", norm)
    return range_guard(norm, dtype(norm), whole.scale.abs(), whole.shift.abs())


def rebuild(norm: fx.Node, source: fx.Node, whole: Map, rewriter: Rewriter) -> fx.Node:
    """A norm of `source` that does `whole`: weight and bias alone, over a mean of 0 and a variance of 1."""
    given = dict(ir.arguments(norm))
    path = str(given["running_mean"].target)
    home = path.rpartition(".")[0] + "." if "." in path else ""
    size, kind = channels(norm), dtype(norm)
    for key, name, value in (
        ("weight", "weight_folded", whole.scale.expand(size)),
        ("bias", "bias_folded", whole.shift.expand(size)),
        ("running_mean", "mean_folded", torch.zeros(size, device=whole.scale.device)),
        ("running_var", "variance_folded", torch.ones(size, device=whole.scale.device)),
    ):
        given[key] = rewriter.constant(value.to(kind), home + name)
    return rewriter.call(norm.target, **{**given, "input": source, "eps": 0.0})
