"""Moving a per-channel affine map y = s*x + t into the weight and bias of a convolution or linear layer beside it.

    s*conv(x, W, b) + t  =  conv(x, W*s, b*s + t)              s along the output channels of W
    conv(s*x + t, W, b)  =  conv(x, W*s, b + sum(W*t))         s along the input channels of W; t only without padding

Folded in float64 and rounded once to the weight's dtype. Channels are dim 1 of an image and the last dim of a matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from fxopt import NoMatch, Rewriter, ir, ops
from fxopt.rewrite import UNKNOWN
from torch import fx

aten = torch.ops.aten

CONVOLUTIONS: tuple[Any, ...] = (*ops.CONVOLUTION_TARGETS, *ops.STRING_PADDED_TARGETS)
LAYERS: tuple[Any, ...] = (*CONVOLUTIONS, aten.linear.default)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_linear(layer: fx.Node) -> bool:
    """Whether a layer is a linear one, not a convolution."""
    return layer.target is aten.linear.default


def is_transposed(layer: fx.Node) -> bool:
    """Whether a layer is a transposed convolution, whose weight is (in, out/groups, k...)."""
    return layer.target in ops.TRANSPOSED_TARGETS


def groups_of(layer: fx.Node) -> int:
    """The number of groups of a layer; 1 for a linear one."""
    return 1 if is_linear(layer) else int(ir.argument(layer, "groups"))


def weight_of(layer: fx.Node) -> torch.Tensor:
    """The constant weight of a layer."""
    weight = ir.tensor(ir.argument(layer, "weight"))
    assert weight is not None
    return weight


def output_channels(layer: fx.Node) -> int:
    """How many channels a layer gives."""
    weight = weight_of(layer)
    return weight.shape[1] * groups_of(layer) if is_transposed(layer) else weight.shape[0]


def input_channels(layer: fx.Node) -> int:
    """How many channels a layer takes."""
    weight = weight_of(layer)
    return weight.shape[0] if is_transposed(layer) else weight.shape[1] * groups_of(layer)


def weights_guard(layer: fx.Node) -> NoMatch | None:
    """The weight is of a plain floating dtype, finite, and not known to change."""
    weight = weight_of(layer)
    if weight.dtype not in _FLOATS or weight.is_quantized:
        return NoMatch(f"the weight is {weight.dtype}, not floating point", layer)
    if weight.is_meta:
        return NoMatch("the weight is on the meta device and has no values", layer)
    if not bool(torch.isfinite(weight).all()):
        return NoMatch("the weight holds NaN or infinity", layer)
    bias = ir.tensor(ir.argument(layer, "bias"))
    if bias is not None and not bool(torch.isfinite(bias).all()):
        return NoMatch("the bias holds NaN or infinity", layer)
    return None


def channels_guard(layer: fx.Node, value: fx.Node, have: int, channels: int) -> NoMatch | None:
    """A map of `channels` entries along dim 1 of `value` (input or result of `layer`) runs along its `have` channels."""
    rank = ir.rank(value)
    if rank is None:
        return NoMatch(f"{UNKNOWN}the rank of {value.name} says where its channels are", value)
    wanted = 2 if is_linear(layer) else weight_of(layer).dim()
    if rank != wanted and not (is_linear(layer) and channels == 1):
        where = (
            f"{value.name} has {rank} dimensions: dim 1 is not the features, which are last"
            if is_linear(layer)
            else f"{value.name} has {rank} dimensions: the convolution is unbatched, and dim 1 is not its channels"
        )
        return NoMatch(where, value)
    if channels != have and channels != 1:
        return NoMatch(f"the norm has {channels} channels, {layer.name} {have}", layer)
    return None


def finite_guard(scale: torch.Tensor, shift: torch.Tensor, layer: fx.Node) -> NoMatch | None:
    """The map is finite, and stays so in the weight's dtype."""
    if not bool(torch.isfinite(scale).all() and torch.isfinite(shift).all()):
        return NoMatch("the folded scale or shift is not finite", layer)
    weight = weight_of(layer)
    widest = torch.finfo(weight.dtype).max
    size = float(weight.abs().max()) if weight.numel() else 0.0
    if float(scale.abs().max()) * max(size, 1.0) > widest or float(shift.abs().max()) > widest:
        return NoMatch(f"the folded weight would leave the range of {weight.dtype}", layer)
    return None


def output_view(layer: fx.Node, scale: torch.Tensor) -> torch.Tensor:
    """`scale` (one per output channel, or one) in the shape that multiplies the weight."""
    weight = weight_of(layer)
    scale = scale.expand(output_channels(layer))
    if not is_transposed(layer):
        return scale.reshape(-1, *[1] * (weight.dim() - 1))
    # (in, out/groups, k...): input channel i belongs to group i // (in/groups).
    groups = groups_of(layer)
    per_group = scale.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return per_group.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def input_view(layer: fx.Node, scale: torch.Tensor) -> torch.Tensor:
    """`scale` (one per input channel, or one) in the shape that multiplies the weight."""
    weight = weight_of(layer)
    scale = scale.expand(input_channels(layer))
    if is_transposed(layer):
        return scale.reshape(-1, *[1] * (weight.dim() - 1))
    groups = groups_of(layer)
    per_group = scale.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
    return per_group.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))


def is_padded(layer: fx.Node) -> bool:
    """Whether zeros from padding enter the sums of a layer."""
    if is_linear(layer):
        return False
    padding = ir.argument(layer, "padding")
    return isinstance(padding, str) or any(pad != 0 for pad in padding)


def fold_after(layer: fx.Node, scale: torch.Tensor, shift: torch.Tensor, rewriter: Rewriter) -> fx.Node:
    """The layer that gives scale*layer + shift (float64, one per output channel or one)."""
    weight = weight_of(layer).double()
    bias = ir.tensor(ir.argument(layer, "bias"))
    bias = weight.new_zeros(output_channels(layer)) if bias is None else bias.double()
    return rebuild(layer, weight * output_view(layer, scale), bias * scale + shift, rewriter)


def fold_before(
    layer: fx.Node, source: fx.Node, scale: torch.Tensor, shift: torch.Tensor, rewriter: Rewriter
) -> fx.Node:
    """The layer of `source` that gives layer(scale*source + shift) (float64, one per input channel or one)."""
    weight = weight_of(layer).double()
    bias = ir.tensor(ir.argument(layer, "bias"))
    folded: torch.Tensor | None = None if bias is None else bias.double()
    if bool((shift != 0).any()):
        added = weight * input_view(layer, shift)
        added = added.sum(dim=tuple(range(1, added.dim())))
        folded = added if folded is None else folded + added
    return rebuild(layer, weight * input_view(layer, scale), folded, rewriter, source)


def rebuild(
    layer: fx.Node,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rewriter: Rewriter,
    source: fx.Node | None = None,
) -> fx.Node:
    """The layer with another weight and bias (rounded once to the old weight's dtype), and another input if given."""
    given = dict(ir.arguments(layer))
    old = weight_of(layer)
    path = str(given["weight"].target)
    home = path.rpartition(".")[0]
    given["weight"] = rewriter.constant(weight.to(old.dtype), f"{path}_folded")
    given["bias"] = (
        None
        if bias is None
        else rewriter.constant(bias.to(old.dtype), f"{home}.bias_folded" if home else "bias_folded")
    )
    if source is not None:
        given["input"] = source
    return rewriter.call(layer.target, **given)
