"""What moves of shape do: transposes as orders of dimensions, shapes as arguments of a reshape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt import NoMatch, ir

aten = torch.ops.aten

TRANSPOSES: tuple[Any, ...] = (
    aten.permute.default,
    aten.transpose.int,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.moveaxis.int,
    aten.moveaxis.intlist,
)


def order_of(node: fx.Node) -> tuple[int, ...] | None:
    """For each dim of a transpose's result the dim of its input; None where the rank, or a dim, is not known."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank = _rank(source)
    if rank is None or len(node.all_input_nodes) > 1:
        return None
    probe = torch.empty_strided([1] * rank, list(range(rank)), device="meta")  # its strides are the names of its dims
    moved = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return tuple(moved.stride())


def _rank(node: fx.Node) -> int | None:
    """The rank of a value; of a constant it is known, and of a transpose it is its input's."""
    held = ir.tensor(node)
    if held is not None:
        return held.dim()
    known, source = ir.rank(node), node.args[0] if node.args else None
    return _rank(source) if known is None and node.target in TRANSPOSES and isinstance(source, fx.Node) else known


def as_argument(shape: Sequence[int | torch.SymInt], node: fx.Node) -> list[int] | NoMatch:
    """A shape as the argument of a reshape, which can leave out one size."""
    sizes = [ir.static(size) for size in shape]
    if sizes.count(None) > 1 or (None in sizes and 0 in sizes):
        return NoMatch("more than one size is known only at run time", node)
    return [-1 if size is None else size for size in sizes]
