"""Moving a per-channel affine map y = s*x + t into the weight and bias of a convolution or linear layer beside it.

    s*conv(x, W, b) + t  =  conv(x, W*s, b*s + t)              s along the output channels of W
    conv(s*x + t, W, b)  =  conv(x, W*s, b + sum(W*t))         s along the input channels of W; t only without padding

Folded in float64 and rounded once to the weight's dtype. Channels are dim 1 of an image and the last dim of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt import NoMatch, Rewriter, ir, ops

aten = torch.ops.aten

LINEARS: tuple[Any, ...] = (aten.linear.default, ops.linear)
#: Layers whose result a map can scale.
LAYERS: tuple[Any, ...] = (*ops.CONVOLUTION_TARGETS, *ops.STRING_PADDED_TARGETS, aten.linear.default)
#: Layers whose input a map can scale: an epilogue behind the layer is out of its way.
LAYERS_AND_FUSED: tuple[Any, ...] = (*LAYERS, ops.convolution, ops.linear)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Map:
    """y = scale*x + shift: float64 vectors of one length, one entry per channel or one for all."""

    scale: torch.Tensor
    shift: torch.Tensor

    @property
    def entries(self) -> int:
        """How many channels the map tells apart."""
        return self.scale.numel()

    @property
    def shifts(self) -> bool:
        """Whether the shift is anything but zero, or will be."""
        return self.shift.requires_grad or bool((self.shift != 0).any())

    def after(self, first: Map) -> Map:
        """The map that does `first` and then this one."""
        return Map(self.scale * first.scale, self.scale * first.shift + self.shift)


# -- layers ----------------------------------------------------------------------------------------------------------


def is_linear(layer: fx.Node) -> bool:
    """Whether a layer is a linear one, not a convolution."""
    return layer.target in LINEARS


def is_transposed(layer: fx.Node) -> bool:
    """Whether a layer is a transposed convolution, whose weight is (in, out/groups, k...)."""
    if layer.target is ops.convolution:
        return bool(ir.argument(layer, "transposed"))
    return layer.target in ops.TRANSPOSED_TARGETS


def is_padded(layer: fx.Node) -> bool:
    """Whether zeros from padding enter the sums of a layer."""
    if is_linear(layer):
        return False
    padding = ir.argument(layer, "padding")
    if isinstance(padding, str):
        return padding != "valid"
    return any(pad != 0 for pad in (padding if isinstance(padding, (list, tuple)) else [padding]))


def groups_of(layer: fx.Node) -> int:
    """The number of groups of a layer; 1 for a linear one."""
    return 1 if is_linear(layer) else int(ir.argument(layer, "groups"))


def weight_of(layer: fx.Node) -> torch.Tensor:
    """The constant weight of a layer."""
    weight = ir.tensor(ir.argument(layer, "weight"))
    assert weight is not None
    return weight


def bias_of(layer: fx.Node) -> torch.Tensor | None:
    """The constant bias of a layer, if it has one."""
    return ir.tensor(ir.argument(layer, "bias"))


def output_channels(layer: fx.Node) -> int:
    """How many channels a layer gives."""
    weight = weight_of(layer)
    return weight.shape[1] * groups_of(layer) if is_transposed(layer) else weight.shape[0]


def input_channels(layer: fx.Node) -> int:
    """How many channels a layer takes."""
    weight = weight_of(layer)
    return weight.shape[0] if is_transposed(layer) else weight.shape[1] * groups_of(layer)


# -- guards ----------------------------------------------------------------------------------------------------------


def plain_guard(value: torch.Tensor | None, what: str, node: fx.Node) -> NoMatch | None:
    """A constant is a dense floating-point tensor whose numbers are there and finite."""
    if value is None:
        return None
    if type(value) is not torch.Tensor or value.layout is not torch.strided:
        return NoMatch(f"{what} is a {type(value).__name__} of layout {value.layout}, not a plain dense tensor", node)
    if value.dtype not in _FLOATS:
        return NoMatch(f"{what} is {value.dtype}, not floating point", node)
    if value.is_meta:
        return NoMatch(f"{what} is on the meta device and has no values", node)
    if not bool(torch.isfinite(value).all()):
        return NoMatch(f"{what} holds NaN or infinity", node)
    return None


def layer_guard(layer: fx.Node) -> NoMatch | None:
    """A layer's weight and bias are plain, finite, and of the usual shapes, and its result is of the weight's dtype."""
    weight, bias = weight_of(layer), bias_of(layer)
    refusal = plain_guard(weight, "the weight", layer) or plain_guard(bias, "the bias", layer)
    if refusal is not None:
        return refusal
    if weight.numel() == 0:
        return NoMatch("the layer has no channels", layer)
    if ir.dtype(layer) not in (None, weight.dtype):
        return NoMatch(f"the layer gives {ir.dtype(layer)} of {weight.dtype} weights: autocast is on", layer)
    if is_linear(layer) and weight.dim() != 2:
        return NoMatch(f"the linear layer's weight has {weight.dim()} dimensions, not 2", layer)
    if bias is not None and tuple(bias.shape) != (output_channels(layer),):
        return NoMatch(f"the bias has the shape {tuple(bias.shape)}, not one number per channel", layer)
    return None


def fold_after_guard(layer: fx.Node, outer: Map) -> NoMatch | None:
    """The folded weight and bias of `fold_after` are finite and within the weight's dtype."""
    refusal = _finite(layer, outer)
    if refusal is not None:
        return refusal
    bias = bias_of(layer)
    folded = outer.shift if bias is None else bias.double() * outer.scale + outer.shift
    return range_guard(layer, weight_of(layer).dtype, _sizes(layer, output=True) * outer.scale.abs(), folded.abs())


def fold_before_guard(layer: fx.Node, inner: Map) -> NoMatch | None:
    """The folded weight and bias of `fold_before` are finite and within the weight's dtype; zero padding stays zero."""
    refusal = _finite(layer, inner)
    if refusal is not None:
        return refusal
    given = ir.arguments(layer)
    if given.get("residual") is not None and given["residual"] is given["input"]:
        return NoMatch(f"{layer.name} also adds {given['input'].name} to its result", layer)
    if inner.shifts:
        if is_transposed(layer):
            return NoMatch("the shift cannot enter a transposed convolution, whose taps vary by position", layer)
        if is_padded(layer):
            return NoMatch("the convolution pads with zeros, which the shift does not reach", layer)
    bias, sizes = bias_of(layer), _sizes(layer, output=False)
    reach = (sizes * inner.shift.abs()).sum() * weight_of(layer)[0, 0].numel()
    largest = reach if bias is None else reach + bias.double().abs()
    return range_guard(layer, weight_of(layer).dtype, sizes * inner.scale.abs(), largest)


def _finite(layer: fx.Node, moved: Map) -> NoMatch | None:
    if bool(torch.isfinite(moved.scale).all() and torch.isfinite(moved.shift).all()):
        return None
    return NoMatch("the folded scale or shift is not finite", layer)


def range_guard(node: fx.Node, dtype: torch.dtype, scales: torch.Tensor, shifts: torch.Tensor) -> NoMatch | None:
    """The largest folded weight of each channel, and the largest biases, neither overflow `dtype` nor vanish in it."""
    limits = torch.finfo(dtype)
    if not float(torch.maximum(scales.max(), shifts.max()).detach()) <= limits.max:
        return NoMatch(f"the folded weight or bias would leave the range of {dtype}", node)
    # Dead channels of trained networks have weights of 1e-40, which matter nowhere. float16 ends so much earlier
    # (6e-5) that each of its channels is asked.
    asked = scales if dtype is torch.float16 else scales.max()
    if bool(((asked > 0) & (asked < limits.smallest_normal)).any()):
        return NoMatch(f"the folded weight would vanish among the subnormal numbers of {dtype}", node)
    return None


def _sizes(layer: fx.Node, *, output: bool) -> torch.Tensor:
    """The largest |weight| of each output (or input) channel, in float64."""
    weight = weight_of(layer).abs()
    if output is not is_transposed(layer):
        return weight.flatten(1).amax(1).double()
    # (a, b/groups, k...) by its second channels: a = groups x a/groups.
    grouped = weight.reshape(groups_of(layer), -1, weight.shape[1], weight[0, 0].numel())
    return grouped.amax((1, 3)).reshape(-1).double()


# -- folding ---------------------------------------------------------------------------------------------------------


def _first_view(layer: fx.Node, entries: torch.Tensor) -> torch.Tensor:
    """One entry per first channel of the weight (or one for all), in the shape that multiplies the weight."""
    weight = weight_of(layer)
    return entries.expand(weight.shape[0]).reshape(-1, *[1] * (weight.dim() - 1))


def _second_view(layer: fx.Node, entries: torch.Tensor) -> torch.Tensor:
    """One entry per second channel (each group has its own), in the shape that multiplies (a, b/groups, k...)."""
    weight, groups = weight_of(layer), groups_of(layer)
    per_group = entries.expand(weight.shape[1] * groups).reshape(groups, 1, -1)
    rows = per_group.expand(groups, weight.shape[0] // groups, -1)
    return rows.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))


def fold_after(layer: fx.Node, outer: Map, rewriter: Rewriter) -> fx.Node:
    """The layer that gives scale*layer + shift; the map is per output channel."""
    view = _second_view if is_transposed(layer) else _first_view
    weight, bias = weight_of(layer).double(), bias_of(layer)
    folded = None
    if bias is not None or outer.shifts:
        folded = outer.shift if bias is None else bias.double() * outer.scale + outer.shift
        folded = folded.expand(output_channels(layer))
    return rebuild(layer, weight * view(layer, outer.scale), folded, rewriter)


def fold_before(layer: fx.Node, source: fx.Node, inner: Map, rewriter: Rewriter) -> fx.Node:
    """The layer of `source` that gives layer(scale*source + shift); the map is per input channel."""
    view = _first_view if is_transposed(layer) else _second_view
    weight, bias = weight_of(layer).double(), bias_of(layer)
    folded = ir.argument(layer, "bias")
    if inner.shifts:
        added = (weight * view(layer, inner.shift)).flatten(1).sum(1)
        folded = added if bias is None else bias.double() + added
    return rebuild(layer, weight * view(layer, inner.scale), folded, rewriter, source)


def rebuild(
    layer: fx.Node,
    weight: torch.Tensor,
    bias: torch.Tensor | fx.Node | None,
    rewriter: Rewriter,
    source: fx.Node | None = None,
) -> fx.Node:
    """The layer with another weight and bias (rounded once to the old weight's dtype; a node stays what it is), and
    another input if given."""
    given = dict(ir.arguments(layer))
    old = weight_of(layer)
    path = str(given["weight"].target)
    home = path.rpartition(".")[0]
    given["weight"] = rewriter.constant(weight.to(old.dtype), f"{path}_folded")
    given["bias"] = bias
    if isinstance(bias, torch.Tensor):
        # A copy: the bias can be the model's own constant, which has a name already.
        given["bias"] = rewriter.constant(
            bias.to(old.dtype, copy=True), f"{home}.bias_folded" if home else "bias_folded"
        )
    if source is not None:
        given["input"] = source
    return rewriter.call(layer.target, **given)
