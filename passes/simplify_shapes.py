"""simplify-shapes

    reshape(reshape(x))          ->  reshape(x)          and flatten, unflatten, contiguous, clone in front, squeeze ...
    squeeze(unsqueeze(x))        ->  x                   whatever comes back to the shape it came from
    squeeze(x), no size of 1     ->  x
    expand(expand(x))            ->  expand(x)
    slice(slice(x))              ->  slice(x)            select(slice(x)) -> select(x)
    slice(concat(a, b))          ->  slice(a)            where it falls into one part; select, pieces of a split
    concat(x), stack(x)          ->  x, unsqueeze(x)     of one tensor
    split(x)[0], one piece       ->  x
    contiguous(contiguous(x))    ->  contiguous(x)

Legal when: the sizes that decide it are plain numbers; nothing writes to a value in between. What shares memory with
what may change only where nobody can tell: a view that becomes the very tensor that it views is not the model's
result, and no opaque node takes it; where a copy may become a view, or a view a copy, neither it nor an alias
is the model's result, and nothing writes to either. Strides stay as they were.
Numerics: the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx

from fxopt import UNKNOWN, NoMatch, Pass, Rewriter, ir

from . import _memory, _parts, _shapes

aten = torch.ops.aten

#: How the result shares memory with what is read instead: the first always did, as a view, and still does; the second
#: did, and becomes that very tensor; of the third it is not known, or it changes.
Memory = Literal["view", "same", "changes"]


@dataclass(frozen=True)
class Step:
    """What is to be read instead of a node: `build` makes it of `source`, past the nodes that the old one reads
    `through`."""

    source: fx.Node
    through: tuple[fx.Node, ...]
    build: Callable[[Rewriter], fx.Node]
    memory: Memory


_SQUEEZES = (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
#: These keep the elements in row-major order, and are views whatever the strides.
_ROW_MAJOR_VIEWS = (*_SQUEEZES, aten.unsqueeze.default, aten.unflatten.int)
#: So do these, but may copy.
_RESHAPES = (aten.reshape.default, aten.flatten.using_ints)
_ROW_MAJOR = (*_RESHAPES, *_ROW_MAJOR_VIEWS)
#: These copy, or may, and change no shape.
_COPIES = (aten.contiguous.default, aten.clone.default)


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _unknown(what: str, node: fx.Node) -> NoMatch:
    return NoMatch(f"{UNKNOWN}{what}", node)


def _asked(squeeze: fx.Node) -> list[Any] | None:
    """The sizes that a squeeze asks whether they are 1; None where they are not known."""
    shape = ir.shape(_input(squeeze))
    if shape is None:
        return None
    dims = ir.arguments(squeeze).get("dim", range(len(shape)))
    dims = [dims] if isinstance(dims, int) else dims
    return [shape[dim] for dim in dims] if shape else []


def _open_squeeze(nodes: tuple[fx.Node, ...]) -> NoMatch | None:
    """What a squeeze does must not depend on sizes that are open: at a batch of 1 it takes that dimension, too."""
    for node in nodes:
        if node.target in _SQUEEZES and any(ir.static(size) is None for size in _asked(node) or []):
            return NoMatch(f"what {node.name} takes away depends on a size that is known only at run time", node)
    return None


# -- row-major chains ------------------------------------------------------------------------------------------------


def _reshape_of_reshape(node: fx.Node) -> Step | NoMatch | None:
    inner = _input(node)
    both_reshape = inner.target in _ROW_MAJOR and (node.target in _RESHAPES or inner.target in _RESHAPES)
    unflattened = aten.unflatten.int in (node.target, inner.target) and inner.target in _ROW_MAJOR
    copied = inner.target in _COPIES and node.target in _RESHAPES
    if not (both_reshape or unflattened or copied):
        return None
    source = _input(inner)
    before, after = ir.fake(source), ir.fake(node)
    if before is None or after is None:
        return _unknown("the sizes and strides", node)
    if ir.same_sizes(before.shape, after.shape):
        return None  # back-to-shape has its say
    sizes = _sizes(node)
    if isinstance(sizes, NoMatch):
        return sizes
    certain = inner.target in _ROW_MAJOR_VIEWS or (inner.target in _RESHAPES and _memory.is_contiguous(before))
    others = [user for user in inner.users if user is not node]
    if others and not certain:
        return NoMatch(f"{inner.name}, which may copy, is also read by {others[0].name}", inner)
    view = certain and _memory.is_contiguous(before)
    return _open_squeeze((node, inner)) or Step(
        source,
        (inner,),
        lambda rewriter: rewriter.call(aten.reshape.default, source, sizes),
        "view" if view else "changes",
    )


def _sizes(node: fx.Node) -> list[Any] | NoMatch:
    """The shape of a row-major operation as the argument of a reshape."""
    if node.target is aten.reshape.default:
        return list(ir.argument(node, "shape"))
    shape = ir.shape(node)
    assert shape is not None
    return _shapes.as_argument(shape, node)


def _back_to_shape(node: fx.Node) -> Step | NoMatch | None:
    inner = _input(node)
    if inner.target not in _ROW_MAJOR:
        return None
    source = _input(inner)
    before, after = ir.fake(source), ir.fake(node)
    if before is None or after is None:
        return _unknown("whether the shape and strides come back", node)
    if not ir.same_sizes(before.shape, after.shape):
        return None
    # Where one of the two copies, the strides come back only if there was nothing to copy.
    return _open_squeeze((node, inner)) or Step(source, (inner,), lambda _: source, "same")


def _squeeze_nothing(node: fx.Node) -> Step | NoMatch | None:
    asked = _asked(node)
    if asked is None:
        return _unknown("whether a size is 1", node)
    if any(ir.static(size) == 1 for size in asked):
        return None
    source = _input(node)
    return _open_squeeze((node,)) or Step(source, (), lambda _: source, "same")


def _expand_of_expand(node: fx.Node) -> Step | NoMatch | None:
    inner = _input(node)
    if inner.target is not aten.expand.default:
        return None
    sizes, first = list(ir.argument(node, "size")), ir.argument(inner, "size")
    if ir.fake(node) is None:
        return _unknown("the strides", node)
    # -1 keeps a size: what the inner expansion says of it.
    for place in range(1, len(first) + 1):
        if type(sizes[-place]) is int and sizes[-place] == -1:
            sizes[-place] = first[-place]
    source = _input(inner)
    return Step(source, (inner,), lambda rewriter: rewriter.call(aten.expand.default, source, sizes), "view")


# -- parts -----------------------------------------------------------------------------------------------------------


def _part_of_part(node: fx.Node) -> Step | NoMatch | None:
    inner = _input(node)
    if inner.target not in _parts.SLICES:
        return None
    outer, first = _parts.part_of(node), _parts.part_of(inner)
    if isinstance(outer, NoMatch):
        return outer
    if isinstance(first, NoMatch):
        return first
    if outer.dim != first.dim:
        return None
    return _read_part(first.source, first.dim, _parts.inside(first, outer), (inner,), "view")


def _part_of_concat(node: fx.Node) -> Step | NoMatch | None:
    whole = _parts.whole_of(node)
    if whole is None or whole.target not in _parts.CONCATS:
        return None
    part = _parts.part_of(node)
    if isinstance(part, NoMatch):
        return part
    found = _parts.within(whole, part)
    if found is None or isinstance(found, NoMatch):
        return found
    through = (whole,) if node.args[0] is whole else (whole, _input(node))
    source, taken = found
    return _read_part(source, part.dim, taken, through, "changes")


def _read_part(
    source: fx.Node, dim: int, taken: range | int | None, through: tuple[fx.Node, ...], memory: Memory
) -> Step | NoMatch:
    if taken is None:
        return Step(source, through, lambda _: source, memory)
    if isinstance(taken, int):
        return Step(source, through, lambda rewriter: rewriter.call(aten.select.int, source, dim, taken), memory)
    if not taken:
        return NoMatch("it takes nothing", source)
    numbers = (taken.start, taken[-1] + 1, taken.step)
    return Step(source, through, lambda rewriter: rewriter.call(aten.slice.Tensor, source, dim, *numbers), memory)


def _one_piece(node: fx.Node) -> Step | NoMatch | None:
    pieces = node.args[0]
    if not isinstance(pieces, fx.Node) or pieces.target not in _parts.SPLITS:
        return None
    part = _parts.part_of(node)
    if isinstance(part, NoMatch):
        return part
    shape = ir.shape(part.source)
    assert shape is not None
    if part.taken != range(ir.static(shape[part.dim]) or 0):
        return None
    return Step(part.source, (pieces,), lambda _: part.source, "same")


def _concat_of_one(node: fx.Node) -> Step | NoMatch | None:
    tensors = node.args[0]
    if not isinstance(tensors, (list, tuple)) or len(tensors) != 1:
        return None
    (source,) = tensors
    if ir.fake(node) is None or not isinstance(source, fx.Node):
        return _unknown("the strides", node)
    if node.target is aten.stack.default:
        dim = ir.argument(node, "dim")
        return Step(source, (), lambda rewriter: rewriter.call(aten.unsqueeze.default, source, dim), "changes")
    return Step(source, (), lambda _: source, "changes")


def _contiguous_of_contiguous(node: fx.Node) -> Step | NoMatch | None:
    inner = _input(node)
    if inner.target is not aten.contiguous.default:
        return None
    source, order = _input(inner), ir.argument(node, "memory_format")
    if ir.fake(node) is None:
        return _unknown("the strides", node)
    others = [user for user in inner.users if user is not node]
    if others:
        return NoMatch(f"{inner.name}, which may copy, is also read by {others[0].name}", inner)
    return Step(
        source,
        (inner,),
        lambda rewriter: rewriter.call(aten.contiguous.default, source, memory_format=order),
        "changes",
    )


# -- the pass --------------------------------------------------------------------------------------------------------

Simplify = Callable[[fx.Node], "Step | NoMatch | None"]
_PARTS = (*_parts.SLICES, aten.select.int, _parts.ITEM)
#: rule -> the operations at whose place it applies, and what it would read there
RULES: dict[str, tuple[tuple[Any, ...], Simplify]] = {
    "back-to-shape": (_ROW_MAJOR, _back_to_shape),
    "squeeze-nothing": (_SQUEEZES, _squeeze_nothing),
    "reshape-of-reshape": (_ROW_MAJOR, _reshape_of_reshape),
    "expand-of-expand": ((aten.expand.default,), _expand_of_expand),
    "part-of-part": ((*_parts.SLICES, aten.select.int), _part_of_part),
    "part-of-concat": (_PARTS, _part_of_concat),
    "one-piece": ((_parts.ITEM,), _one_piece),
    "concat-of-one": (_parts.CONCATS, _concat_of_one),
    "contiguous-of-contiguous": ((aten.contiguous.default,), _contiguous_of_contiguous),
}


def _told(node: fx.Node, step: Step, rewriter: Rewriter) -> str | None:
    """Who writes in between, or could tell the new result from the old."""
    matched = (node, *step.through)
    values = {operand for inside in matched for operand in (inside, *inside.all_input_nodes)}
    writer = rewriter.aliases.writer_between(min(matched), node, values)
    if writer is not None:
        return f"{writer.name} may write to a value of the match in between"
    if step.memory == "same":
        return _memory.told_from_the_very_tensor(node, rewriter)
    return _memory.told_from_other_memory(node, step.source, rewriter) if step.memory == "changes" else None


def _simplify(node: fx.Node, rewriter: Rewriter) -> fx.Node | None:
    """The node that is read instead after the first rule that applies; None where none does."""
    for rule, (targets, simplify) in RULES.items():
        step = simplify(node) if node.target in targets else None
        if step is None:
            continue
        found = _apply(step, node, rule, rewriter) if isinstance(step, Step) else step
        if isinstance(found, fx.Node):
            return found
        rewriter.decline(node, found.reason, rule=rule)
    return None


def _apply(step: Step, node: fx.Node, rule: str, rewriter: Rewriter) -> fx.Node | NoMatch:
    told = _told(node, step, rewriter)
    if told is not None:
        return NoMatch(told, node)
    return rewriter.substitute(node, lambda: step.build(rewriter), rule=rule, nodes=step.through)


def _run(rewriter: Rewriter) -> None:
    targets = {target for targets, _ in RULES.values() for target in targets}
    changed = True
    while changed:  # a reader that is gone can leave what it read to another
        changed = False
        for node in list(rewriter.graph.nodes):
            current: fx.Node | None = node
            while current is not None and current.op == "call_function" and current.target in targets:
                current = None if current._erased else _simplify(current, rewriter)
                changed |= current is not None


PASS = Pass("simplify-shapes", run=_run, numerics="bitwise", doc=__doc__)
