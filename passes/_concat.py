"""What the rules of eliminate-concat share: a concat's parts, which of them are slices of one value, who takes them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt import UNKNOWN, NoMatch, ir, ops

from . import _affine

aten = torch.ops.aten

#: Layers whose weight has one column (of each tap) for each channel of the input; transposed ones decline.
CONSUMERS: tuple[Any, ...] = (*ops.CONVOLUTION_TARGETS, ops.convolution, *_affine.LINEARS)
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.sections)


@dataclass(frozen=True)
class Concat:
    """A concat: its parts, and the dimension that joins them, from the left."""

    node: fx.Node
    parts: tuple[fx.Node, ...]
    dim: int

    def sizes(self) -> tuple[int, ...] | None:
        """How long each part is; None where one is not a known number."""
        found = [length(part, self.dim) for part in self.parts]
        known = tuple(size for size in found if size is not None)
        return known if len(known) == len(found) else None


def concat(node: fx.Node) -> Concat | NoMatch:
    """A `cat` whose parts are known and of one rank (an empty vector among them is skipped by `cat`) and dtype."""
    parts, rank = tuple(ir.argument(node, "tensors")), ir.rank(node)
    if ir.fake(node) is None or rank is None:
        return NoMatch(f"{UNKNOWN}the shape of {node.name}", node)
    for part in parts:
        if ir.fake(part) is None:
            return NoMatch(f"{UNKNOWN}the shape of {part.name}", node)
        if ir.rank(part) != rank:
            return NoMatch(f"{part.name} is an empty vector, which a concat skips", node)
        if ir.dtype(part) != ir.dtype(node):
            return NoMatch(f"{part.name} is {ir.dtype(part)}, which the concat makes {ir.dtype(node)}", node)
    return Concat(node, parts, ir.argument(node, "dim") % rank)


def length(node: fx.Node, dim: int) -> int | None:
    """A value's size along a dimension, where it is a known number."""
    sizes = ir.shape(node)
    return None if sizes is None or not -len(sizes) <= dim < len(sizes) else ir.static(sizes[dim])


@dataclass(frozen=True)
class Piece:
    """The entries `start` to `stop` of a value along the dimension of the concat."""

    source: fx.Node
    start: int
    stop: int


def piece(part: fx.Node, dim: int) -> Piece | None:
    """A part as a piece of another value, where it is a slice or one of the results of a split."""
    size = length(part, dim)
    if size is None:
        return None
    if part.target is aten.slice.Tensor:
        return _slice(part, dim, size)
    if part.target is operator.getitem and isinstance(part.args[0], fx.Node) and part.args[0].target in _SPLITS:
        split, number = part.args[0], part.args[1]
        source = split.args[0]
        assert isinstance(source, fx.Node)
        along = ir.argument(split, "dim") % (ir.rank(source) or 1)
        values = split.meta.get("val")
        if along != dim or type(number) is not int or not isinstance(values, (tuple, list)):
            return None
        before = [ir.static(value.shape[dim]) for value in values[: number % len(values)]]
        known = [entry for entry in before if entry is not None]
        start = sum(known)
        return Piece(source, start, start + size) if len(known) == len(before) else None
    return None


def _slice(part: fx.Node, dim: int, size: int) -> Piece | None:
    given = ir.arguments(part)
    source = given["self"]
    whole, start = length(source, dim), given["start"]
    if whole is None or given["dim"] % (ir.rank(source) or 1) != dim or given["step"] != 1:
        return None
    start = 0 if start is None else start
    if type(start) is not int:
        return None
    start = min(max(start + whole if start < 0 else start, 0), whole)
    return Piece(source, start, start + size)


def arguments(layer: fx.Node) -> dict[str, Any]:
    """The arguments of a consumer under the fused operation's names."""
    return ops.linear_arguments(layer) if _affine.is_linear(layer) else ops.convolution_arguments(layer)


def channel_dim(layer: fx.Node) -> int | None:
    """The dimension of a layer's input that has its channels, from the left; None where it is unbatched or unknown."""
    rank = ir.rank(ir.argument(layer, "input"))
    if rank is None:
        return None
    if _affine.is_linear(layer):
        return rank - 1
    return 1 if rank == _affine.weight_of(layer).dim() else None
