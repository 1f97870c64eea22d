"""Parts of a tensor along one dimension (slices, selections, pieces of a split), and what is put together of them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from fxopt import UNKNOWN, NoMatch, ir

aten = torch.ops.aten

SLICES: tuple[Any, ...] = (aten.slice.Tensor, aten.narrow.default)
SPLITS: tuple[Any, ...] = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
)
CONCATS: tuple[Any, ...] = (aten.cat.default, aten.stack.default)
#: Takes one of several results.
ITEM = operator.getitem


@dataclass(frozen=True)
class Part:
    """What is taken of `source` along `dim`: a range of it, or one entry, which takes the dimension away."""

    source: fx.Node
    dim: int
    taken: range | int


def whole_of(node: fx.Node) -> fx.Node | None:
    """What a part is a part of: behind an item, what is split; None for what is no part."""
    source = node.args[0]
    if isinstance(source, fx.Node) and node.target is ITEM:
        taken_apart = source.target in SPLITS or source.target is aten.unbind.int
        source = source.args[0] if taken_apart else None
    return source if isinstance(source, fx.Node) else None


def part_of(node: fx.Node) -> Part | NoMatch:
    """What a slice, a narrowing, a selection or an item of a split takes, by plain numbers; or why that is open."""
    source = whole_of(node)
    assert source is not None, f"{node.name} is no part of anything"
    shape = ir.shape(source)
    if shape is None:
        return NoMatch(f"{UNKNOWN}the size of {source.name}", node)
    split = node.args[0] if node.target is ITEM else None
    given = ir.arguments(split if isinstance(split, fx.Node) else node)
    dim = int(given["dim"]) % len(shape)
    size = ir.static(shape[dim])
    if size is None:
        return NoMatch(f"the size of {source.name} along dim {dim} is known only at run time", node)
    taken = _taken(node, given, dim, size)
    if taken is None:
        return NoMatch("what it takes is computed at run time", node)
    return Part(source, dim, taken)


def _taken(node: fx.Node, given: dict[str, Any], dim: int, size: int) -> range | int | None:
    whole = range(size)
    numbers: tuple[Any, ...]
    match node.target:
        case aten.slice.Tensor:
            numbers = (given["start"], given["end"], given["step"])
            return whole[slice(*numbers)] if _plain(*numbers) else None
        case aten.narrow.default:
            numbers = (given["start"], given["length"])
            if not _plain(*numbers):
                return None
            start = numbers[0] % size if size else 0
            return range(start, start + numbers[1])
        case aten.select.int:
            return whole[given["index"]] if _plain(given["index"]) else None
        case _:
            return _piece(node, dim)


def _plain(*numbers: Any) -> bool:
    return all(number is None or type(number) is int for number in numbers)


def _piece(item: fx.Node, dim: int) -> range | int | None:
    """What an item of a split takes, by the sizes of the pieces in front of it."""
    split, index = item.args
    assert isinstance(split, fx.Node)
    pieces = ir.value(split)
    if not isinstance(pieces, (list, tuple)) or type(index) is not int:
        return None
    index %= len(pieces)
    if split.target is aten.unbind.int:
        return index
    sizes = [ir.static(piece.shape[dim]) for piece in pieces[: index + 1]]
    *earlier, size = [-1 if found is None else found for found in sizes]
    if size < 0 or any(found < 0 for found in earlier):
        return None
    return range(sum(earlier), sum(earlier) + size)


def inside(first: Part, second: Part) -> range | int:
    """What the second part, of the first, takes of the first's source."""
    assert isinstance(first.taken, range)
    if isinstance(second.taken, int):
        return first.taken[second.taken]
    return first.taken[second.taken.start : second.taken.stop : second.taken.step]


def within(concat: fx.Node, part: Part) -> tuple[fx.Node, range | int | None] | NoMatch | None:
    """The one part of a concatenation that holds all of what is taken, and what is taken of it (None: everything).

    None where the two run along different dimensions; a reason where it cannot be told, or is no single part.
    """
    if not isinstance(concat.args[0], (list, tuple)):
        return NoMatch(f"{concat.name} takes its parts as one list", concat)
    tensors = cast("list[fx.Node]", concat.args[0])
    result = ir.fake(concat)
    assert result is not None, "a part of it has a value"
    if part.dim != int(ir.argument(concat, "dim")) % result.dim():
        return None
    if concat.target is aten.stack.default:
        if isinstance(part.taken, range):
            return None
        return _same_dtype(tensors[part.taken], concat) or (tensors[part.taken], None)
    taken = [part.taken] if isinstance(part.taken, int) else part.taken
    if not taken:
        return NoMatch("it takes nothing", concat)
    begin = 0
    for tensor in tensors:
        shape = ir.shape(tensor)
        # Of another rank are the empty vectors that a concatenation passes over.
        size = None if shape is None or len(shape) != result.dim() else ir.static(shape[part.dim])
        if size is None:
            return NoMatch(f"where {tensor.name} ends in {concat.name} is not known", concat)
        if begin <= taken[0] < begin + size:
            if taken[-1] >= begin + size:
                return NoMatch(f"it takes from more than one part of {concat.name}", concat)
            return _same_dtype(tensor, concat) or (tensor, _shifted(part.taken, begin, size))
        begin += size
    return NoMatch(f"it takes from no part of {concat.name}", concat)


def _same_dtype(tensor: fx.Node, concat: fx.Node) -> NoMatch | None:
    if ir.dtype(tensor) == ir.dtype(concat):
        return None
    return NoMatch(f"{concat.name} makes {ir.dtype(tensor)} {ir.dtype(concat)}", concat)


def _shifted(taken: range | int, begin: int, size: int) -> range | int | None:
    if isinstance(taken, int):
        return taken - begin
    found = range(taken.start - begin, taken[-1] - begin + 1, taken.step)
    return None if found == range(size) else found
