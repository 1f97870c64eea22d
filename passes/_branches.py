"""Addends of a sum as branches over one value: what each of them adds to the weight and bias of one layer.

    sum of f*conv(x, W, b)  =  conv(x, sum of f*W, sum of f*b)        kernels in zeros, up to the largest, same centre
    f*x                     =  conv(x, f*1, 0)                        a unit kernel: channel i reads channel i
    f*batch_norm(x)         =  conv(x, f*diag(s), f*t)                the norm as the map s*x + t
    f*avg_pool(x)           =  conv(x, f*1/n, 0)                      one number all over each channel's own kernel

A linear layer is a convolution without spatial dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import fx
from torch.nn.functional import pad

from fxopt import UNKNOWN, NoMatch, Rewriter, ir, ops

from . import _affine, _norm

aten = torch.ops.aten

#: Layers that can be a branch; one with an epilogue is more than its weight.
LAYERS: tuple[Any, ...] = (*ops.CONVOLUTION_TARGETS, aten.linear.default)
_POOLS: tuple[Any, ...] = (aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
#: What can stand beside a layer of the same value.
COMPANIONS: tuple[Any, ...] = (aten.batch_norm.default, *_POOLS)
#: Where no branch has the merged kernel, it may multiply this much more than they do: they are several calls.
MOST_WORK = 1.5

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """`factor` times `node`, an addend that is linear in `source`; its sizes have one entry for each spatial dimension.

    `work` is how many multiply-adds each pixel of the result takes.
    """

    node: fx.Node
    source: fx.Node
    factor: float
    kernel: Sizes = ()
    stride: Sizes = ()
    padding: Sizes = ()
    dilation: Sizes = ()
    work: int = 0

    @property
    def is_layer(self) -> bool:
        """Whether it has a weight of its own."""
        return self.node is not self.source and self.node.target in LAYERS

    def weight(self, first: fx.Node) -> torch.Tensor:
        """What it adds to the weight of the layer `first`, in float64, without the zeros around it."""
        if self.is_layer:
            return self.factor * _affine.weight_of(self.node).double()
        outs, ins = _affine.weight_of(first).shape[:2]
        device = _affine.weight_of(first).device
        entries = torch.full((outs,), self.factor, dtype=torch.float64, device=device)
        if self.node is not self.source:
            if self.node.target is aten.batch_norm.default:
                entries = entries * _norm.as_map(self.node).scale
            else:
                entries = entries / (ir.arguments(self.node).get("divisor_override") or prod(self.kernel))
        taps = torch.zeros(outs, ins, *self.kernel, dtype=torch.float64, device=device)
        rows = torch.arange(outs, device=device)
        taps[rows, rows % ins] = entries.reshape(-1, *[1] * len(self.kernel))
        return taps

    def bias(self) -> torch.Tensor | None:
        """What it adds to the bias, in float64."""
        if self.is_layer:
            own = _affine.bias_of(self.node)
            return None if own is None else self.factor * own.double()
        if self.node is not self.source and self.node.target is aten.batch_norm.default:
            return self.factor * _norm.as_map(self.node).shift
        return None


# -- one addend ------------------------------------------------------------------------------------------------------


def layer(node: fx.Node, factor: float) -> Branch | NoMatch:
    """A layer as a branch of its input."""
    given = ir.arguments(node)
    if ir.tensor(given["weight"]) is None or not (given["bias"] is None or ir.tensor(given["bias"]) is not None):
        return NoMatch(f"the weight or bias of {node.name} is computed at run time", node)
    refusal = _affine.layer_guard(node)
    if refusal is not None:
        return NoMatch(f"{node.name}: {refusal.reason}", node)
    rows, columns, *kernel = _affine.weight_of(node).shape
    if _affine.is_linear(node):
        return Branch(node, given["input"], factor, work=rows * columns)
    sizes = _sizes(ops.convolution_arguments(node), len(kernel))
    if sizes is None:
        return NoMatch(f"the stride, padding or dilation of {node.name} is computed at run time", node)
    return Branch(node, given["input"], factor, tuple(kernel), *sizes, work=rows * columns * prod(kernel))


def companion(node: fx.Node, factor: float, first: Branch) -> Branch | NoMatch:
    """What stands beside the layer `first`: the value that it reads, a norm of it, or an average pooling of it."""
    outs, spatial = _affine.output_channels(first.node), len(first.kernel)
    if _affine.is_transposed(first.node):
        return NoMatch(f"{first.node.name} is a transposed convolution, {node.name} none", node)
    if _affine.input_channels(first.node) != outs:
        ins = _affine.input_channels(first.node)
        return NoMatch(f"{node.name} has {ins} channels, {first.node.name} {outs}: one is broadcast", node)
    if node is not first.source and node.target in _POOLS:
        return _pool(node, factor, first, outs)
    if node is not first.source:
        refusal = _norm_guard(node, outs, spatial)
        if refusal is not None:
            return refusal
    ones = (1,) * spatial
    return Branch(node, first.source, factor, ones, ones, (0,) * spatial, ones)


def _norm_guard(norm: fx.Node, outs: int, spatial: int) -> NoMatch | None:
    """The norm is a map of the channels that the layer reads."""
    refusal = _norm.guard(norm)
    if refusal is not None:
        return refusal
    rank = ir.rank(norm)
    if rank is None:
        return NoMatch(f"{UNKNOWN}the rank of {norm.name} says where its channels are", norm)
    if rank != spatial + 2:
        return NoMatch(f"{norm.name} has {rank} dimensions, and its channels are not the layer's", norm)
    if _norm.channels(norm) != outs:
        return NoMatch(f"{norm.name} has {_norm.channels(norm)} channels, the layer {outs}", norm)
    whole = _norm.as_map(norm)
    if not bool(torch.isfinite(whole.scale).all() and torch.isfinite(whole.shift).all()):
        return NoMatch(f"the scale or shift of {norm.name} is not finite", norm)
    return None


def _pool(node: fx.Node, factor: float, first: Branch, outs: int) -> Branch | NoMatch:
    """An average pooling whose every sum is divided by one number, the zeros around the image among its terms."""
    given, spatial = ir.arguments(node), len(first.kernel)
    if _POOLS.index(node.target) + 1 != spatial:
        return NoMatch(f"{node.name} pools over other dimensions than {first.node.name}", node)
    given["stride"] = given["stride"] or given["kernel_size"]
    sizes = _sizes({**given, "dilation": [1]}, spatial)
    kernel = _each(given["kernel_size"], spatial)
    divisor = given.get("divisor_override")
    if sizes is None or kernel is None or not (divisor is None or type(divisor) is int):
        return NoMatch(f"the window of {node.name} is computed at run time", node)
    if given["ceil_mode"] is not False:
        return NoMatch(f"{node.name} rounds its size up (ceil_mode)", node)
    if divisor is None and given["count_include_pad"] is not True and any(sizes[1]):
        return NoMatch(f"{node.name} divides by less at the border (count_include_pad=False)", node)
    return Branch(node, first.source, factor, kernel, *sizes, work=outs * prod(kernel))


def _each(value: Any, spatial: int) -> Sizes | None:
    """One plain int for each spatial dimension; None where one is computed."""
    numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    numbers = numbers * spatial if len(numbers) == 1 else numbers
    return numbers if all(type(number) is int for number in numbers) else None


def _sizes(given: dict[str, Any], spatial: int) -> tuple[Sizes, Sizes, Sizes] | None:
    stride, padding, dilation = (_each(given[key], spatial) for key in ("stride", "padding", "dilation"))
    return None if stride is None or padding is None or dilation is None else (stride, padding, dilation)


# -- several of them -------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Branches that one layer can compute, and a number that it adds; the first is a layer, whose form it has."""

    branches: list[Branch]
    number: float = 0.0

    @property
    def first(self) -> Branch:
        """The layer with the largest kernel."""
        return self.branches[0]

    @property
    def kernel(self) -> Sizes:
        """The smallest kernel that holds all of theirs."""
        return _largest(self.branches)

    def guard(self, branch: Branch) -> NoMatch | None:
        """Whether `branch` can join."""
        refusal = _form_guard(self.first.node, branch.node) if branch.is_layer else None
        return refusal or self._geometry_guard(branch) or self._work_guard(branch) or self._trained_guard(branch)

    def _trained_guard(self, branch: Branch) -> NoMatch | None:
        """Zeros around a trained kernel would be trained, too."""
        merged, first = _largest([*self.branches, branch]), self.first
        if merged == first.kernel or not _affine.weight_of(first.node).requires_grad:
            return None
        said = f"trained kernels of {first.kernel} and {branch.kernel} would become one of {merged}"
        return NoMatch(said, branch.node)

    def _geometry_guard(self, branch: Branch) -> NoMatch | None:
        first, node = self.first, branch.node
        if branch.stride != first.stride:
            return NoMatch(f"the strides are {first.stride} and {branch.stride}", node)
        for axis in range(len(first.kernel)):
            for member in self.branches:
                spread = min(member.kernel[axis], branch.kernel[axis]) > 1
                if spread and member.dilation[axis] != branch.dilation[axis]:
                    return NoMatch(f"the dilations are {member.dilation} and {branch.dilation}", node)
            if (first.kernel[axis] - branch.kernel[axis]) % 2:
                return NoMatch(f"kernels of {first.kernel} and {branch.kernel} have no common centre", node)
            if _start(first, axis) != _start(branch, axis):
                sizes = f"kernels of {first.kernel} and {branch.kernel} with paddings of {first.padding} and"
                return NoMatch(f"{sizes} {branch.padding} have other centres", node)
        return None

    def _work_guard(self, branch: Branch) -> NoMatch | None:
        rows, columns = _affine.weight_of(self.first.node).shape[:2]
        merged = rows * columns * prod(_largest([*self.branches, branch]))
        separate = sum(member.work for member in (*self.branches, branch))
        if is_worthwhile(merged, separate):
            return None
        return NoMatch(
            f"one layer would take {merged} multiply-adds for each pixel, the branches take {separate}", branch.node
        )

    @cached_property
    def merged(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of the layer that gives the sum, in float64; asked for when all branches are there."""
        kernel, first = self.kernel, self.first.node
        weight = sum(
            (_in_zeros(branch.weight(first), branch.kernel, kernel) for branch in self.branches[1:]),
            _in_zeros(self.first.weight(first), self.first.kernel, kernel),
        )
        biases = [found for branch in self.branches if (found := branch.bias()) is not None]
        if self.number:
            outs = _affine.output_channels(first)
            biases.append(torch.full((outs,), self.number, dtype=torch.float64, device=weight.device))
        return weight, torch.stack(biases).sum(0) if biases else None

    def build(self, rewriter: Rewriter) -> fx.Node:
        """The merged layer."""
        first, (weight, bias) = self.first.node, self.merged
        old = _affine.weight_of(first)
        path = str(ir.argument(first, "weight").target)
        home = path.rpartition(".")[0]
        given = dict(ir.arguments(first))
        given["weight"] = rewriter.constant(weight.to(old.dtype), f"{path}_merged")
        given["bias"] = None
        if bias is not None:
            given["bias"] = rewriter.constant(bias.to(old.dtype), f"{home}.bias_merged" if home else "bias_merged")
        if not _affine.is_linear(first) and not _affine.is_transposed(first):
            given["dilation"] = [self._dilation(axis) for axis in range(len(self.kernel))]
            given["padding"] = [
                (d * (k - 1) - _start(self.first, axis)) // 2
                for axis, (d, k) in enumerate(zip(given["dilation"], self.kernel, strict=True))
            ]
        return rewriter.call(first.target, **given)

    def _dilation(self, axis: int) -> int:
        """The step between taps; a single tap has none."""
        return next((branch.dilation[axis] for branch in self.branches if branch.kernel[axis] > 1), 1)


def groups(layers: Sequence[Branch], companions: Sequence[tuple[fx.Node, float]]) -> list[Group | NoMatch]:
    """Branches of one value in groups that can be one layer each, and why not more of them are together."""
    made: list[Group] = []
    refusals: list[NoMatch] = []

    def join(branch: Branch, group: Group) -> bool:
        refusal = group.guard(branch)
        if refusal is None:
            group.branches.append(branch)
        else:
            refusals.append(refusal)
        return refusal is None

    for branch in sorted(layers, key=lambda branch: -prod(branch.kernel)):
        if not any(join(branch, group) for group in made):
            made.append(Group([branch]))
    for node, factor in companions:
        for group in made:
            found = companion(node, factor, group.first)
            if isinstance(found, NoMatch):
                refusals.append(found)
            elif join(found, group):
                break
    return [*(group for group in made if len(group.branches) > 1), *refusals]


def is_worthwhile(merged: int, separate: int) -> bool:
    """Whether one layer is taken to be quicker than the branches, by the multiply-adds of both for each pixel."""
    return merged <= MOST_WORK * separate


def _form_guard(first: fx.Node, other: fx.Node) -> NoMatch | None:
    """Two layers agree in operator, dtype, channels and groups; transposed ones in all that has a position, too."""
    if first.target is not other.target:
        return NoMatch(f"{first.name} is {ir.target_name(first)}, {other.name} {ir.target_name(other)}", other)
    weights = _affine.weight_of(first), _affine.weight_of(other)
    if weights[0].dtype != weights[1].dtype:
        return NoMatch(f"the weights are {weights[0].dtype} and {weights[1].dtype}", other)
    outs = _affine.output_channels(first), _affine.output_channels(other)
    if outs[0] != outs[1]:
        return NoMatch(f"the layers give {outs[0]} and {outs[1]} channels, of which one is broadcast", other)
    if _affine.groups_of(first) != _affine.groups_of(other):
        return NoMatch(f"{_affine.groups_of(first)} and {_affine.groups_of(other)} groups", other)
    if _affine.is_transposed(first):
        names = ("padding", "output_padding", "dilation")
        given = [ops.convolution_arguments(layer) for layer in (first, other)]
        if weights[0].shape != weights[1].shape or any(given[0][name] != given[1][name] for name in names):
            return NoMatch("transposed convolutions merge only with equal kernel, padding and dilation", other)
    return None


def _start(branch: Branch, axis: int) -> int:
    """Twice the distance from the image's border to the centre of the first window."""
    return branch.dilation[axis] * (branch.kernel[axis] - 1) - 2 * branch.padding[axis]


def _largest(branches: Sequence[Branch]) -> Sizes:
    return tuple(max(sizes) for sizes in zip(*(branch.kernel for branch in branches), strict=True))


def _in_zeros(weight: torch.Tensor, own: Sizes, kernel: Sizes) -> torch.Tensor:
    """A weight with zeros around its kernel."""
    margins = [(size - small) // 2 for size, small in zip(kernel, own, strict=True)]
    return pad(weight, [margin for margin in reversed(margins) for _ in (0, 1)]) if margins else weight
