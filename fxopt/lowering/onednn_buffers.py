"""Buffers in oneDNN's backend: concats that grow have one memory, to which each step adds what is new.

    y = buffer([a, b]); z = buffer([y, c])   ->   m = empty; m[:, :k] = a, b; y = m[:, :k]; m[:, k:] = c; z = m

oneDNN's operators within torch give tensors of their own, so that what they make is copied once, into its slice: a
dense block copies as much as it computes, not its whole past in each layer. A buffer that holds no other one would be
copied part by part, and is left to `cat`, which does that in one call.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import fx

from fxopt import buffers, ir, ops
from fxopt.pattern import NoMatch
from fxopt.rewrite import Rewriter

aten = torch.ops.aten


def lower_buffers(rewriter: Rewriter) -> None:
    """Gives each tree of nested buffers one memory; leaves the others, with the reason."""
    found = sorted(rewriter.graph.find_nodes(op="call_function", target=ops.buffer))
    # Asked now: once a buffer has become a slice, it is no part of another any more.
    new = {node: _new_parts(node) for node in found}
    owner = {
        part: node
        for node in found
        for part, is_new in zip(buffers.parts(node), new[node], strict=True)
        if not is_new
    }
    memory: dict[fx.Node, fx.Node] = {}
    tops = {_top(node, owner) for node in owner}
    for node in found:
        _decline_copies(rewriter, node, new[node])
        if _top(node, owner) in tops:
            result = rewriter.substitute(node, partial(_place, rewriter, node, owner, new[node], memory), rule="buffer")
            assert not isinstance(result, NoMatch), result


def _top(node: fx.Node, owner: dict[fx.Node, fx.Node]) -> fx.Node:
    while node in owner:
        node = owner[node]
    return node


def _new_parts(node: fx.Node) -> list[bool]:
    """For each part of a buffer, whether it is copied in: all are but for the buffers that lie in this one."""
    left = buffers.copied(node)
    return [number in left or part.target is not ops.buffer for number, part in enumerate(buffers.parts(node))]


def _decline_copies(rewriter: Rewriter, node: fx.Node, new: list[bool]) -> None:
    for number, part in enumerate(buffers.parts(node)):
        if new[number]:
            reason = f"{part.name} is copied: {ir.target_name(part)} gives a tensor of its own here"
            rewriter.decline(node, reason, rule=f"part {number}")


def _place(
    rewriter: Rewriter,
    node: fx.Node,
    owner: dict[fx.Node, fx.Node],
    new: list[bool],
    memory: dict[fx.Node, fx.Node],
) -> fx.Node:
    """The memory of a buffer, behind the copies of those parts that are `new` in it."""
    top = _top(node, owner)
    if top not in memory:
        found = ir.fake(top)
        assert found is not None
        memory[top] = rewriter.call(
            aten.empty_strided.default, list(found.shape), list(found.stride()), dtype=found.dtype, device=found.device
        )
    view = _view(rewriter, node, owner, memory[top])
    start, dim = 0, ir.argument(node, "dim")
    for number, part in enumerate(buffers.parts(node)):
        size = _length(part, dim)
        if new[number]:
            rewriter.call(aten.copy_.default, rewriter.call(aten.slice.Tensor, view, dim, start, start + size), part)
        start += size
    return view


def _view(rewriter: Rewriter, node: fx.Node, owner: dict[fx.Node, fx.Node], memory: fx.Node) -> fx.Node:
    """The slice of the memory that is a buffer's: one step for each dimension along which buffers are nested."""
    if node not in owner:
        return memory
    above = owner[node]
    dim, start, inner = ir.argument(above, "dim"), _start(node, above), _length(node, ir.argument(above, "dim"))
    while above in owner and ir.argument(owner[above], "dim") == dim:
        start += _start(above, owner[above])
        above = owner[above]
    return rewriter.call(aten.slice.Tensor, _view(rewriter, above, owner, memory), dim, start, start + inner)


def _start(part: fx.Node, buffer: fx.Node) -> int:
    """Where in a buffer a part begins that lies in it; the same value may also be copied in elsewhere."""
    dim, parts, left = ir.argument(buffer, "dim"), buffers.parts(buffer), buffers.copied(buffer)
    place = next(number for number, other in enumerate(parts) if other is part and number not in left)
    return sum(_length(before, dim) for before in parts[:place])


def _length(part: fx.Node, dim: int) -> int:
    sizes = ir.shape(part)
    assert sizes is not None
    return int(sizes[dim])
