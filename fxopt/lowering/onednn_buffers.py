"""Buffers in oneDNN's backend: concats that grow have one memory, to which each step adds what is new.

    y = buffer([a, b]); z = buffer([y, c])   ->   m = empty; m[:, :k] = a, b; y = m[:, :k]; m[:, k:] = c; z = m
    y = buffer([act(x @ W.T + b)])   ->   m = empty; addmm(b, x, W.T, out=m[:, :k]); y = act_(m[:, :k])

A product over channels writes into its slice. oneDNN's operators within torch give tensors of their own, so that what
they make is copied once, into its slice: a dense block copies as much as it computes, not its whole past in each layer.
A buffer that holds neither a product nor another buffer would be copied part by part, and is left to `cat`, which does
that in one call.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial

import torch
from torch import fx

from fxopt import buffers, ir, ops
from fxopt.lowering.in_place import WRITTEN
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
    written = {node: _written_parts(node, new[node], rewriter) for node in found}
    tops = {_top(node, owner) for node in owner} | {_top(node, owner) for node in found if written[node]}
    for node in found:
        _decline_copies(rewriter, node, new[node], written[node])
        if _top(node, owner) in tops:
            build = partial(_place, rewriter, node, owner, new[node], written[node], memory)
            parts = buffers.parts(node)
            gone = [step for number, chain in written[node].items() for step in (*chain, parts[number])]
            result = rewriter.substitute(node, build, rule="buffer", nodes=gone)
            assert not isinstance(result, NoMatch), result


def _top(node: fx.Node, owner: dict[fx.Node, fx.Node]) -> fx.Node:
    while node in owner:
        node = owner[node]
    return node


def _new_parts(node: fx.Node) -> list[bool]:
    """For each part of a buffer, whether it is copied in: all are but for the buffers that lie in this one."""
    left = buffers.copied(node)
    return [number in left or part.target is not ops.buffer for number, part in enumerate(buffers.parts(node))]


def _written_parts(node: fx.Node, new: list[bool], rewriter: Rewriter) -> dict[int, list[fx.Node]]:
    """The parts that a product writes into their slices: by number its product and what is computed of that alone."""
    parts = buffers.parts(node)
    chains = {number: _product(part) for number, part in enumerate(parts) if new[number] and parts.count(part) == 1}
    return {
        number: chain
        for number, chain in chains.items()
        # The product moves to where the concat stands: what it reads must be the same there.
        if chain and all(rewriter.aliases.writer_of(read) is None for step in chain for read in step.all_input_nodes)
    }


def _product(part: fx.Node) -> list[fx.Node]:
    """A pointwise convolution that is ATen's product, and the elementwise operators behind it; [] for what is none."""
    if part.target is not aten.permute.default or ir.argument(part, "dims") != [0, 3, 1, 2] or len(part.users) != 1:
        return []
    chain = [part.all_input_nodes[0]]
    while chain[0].target in WRITTEN and len(chain[0].users) == 1 and isinstance(chain[0].args[0], fx.Node):
        chain.insert(0, chain[0].args[0])
    product = chain[0]
    if product.target is not aten.linear.default or len(product.users) != 1:
        return []
    bias, shapes = ir.argument(product, "bias"), {ir.shape(step) for step in chain}
    # Rows are multiplied as one matrix: a bias of more dimensions, or a step that broadcasts, would not fit it.
    return chain if len(shapes) == 1 and (bias is None or ir.rank(bias) == 1) else []


def _decline_copies(rewriter: Rewriter, node: fx.Node, new: list[bool], written: Collection[int]) -> None:
    for number, part in enumerate(buffers.parts(node)):
        if new[number] and number not in written:
            reason = f"{part.name} is copied: {ir.target_name(part)} gives a tensor of its own here"
            rewriter.decline(node, reason, rule=f"part {number}")


def _place(
    rewriter: Rewriter,
    node: fx.Node,
    owner: dict[fx.Node, fx.Node],
    new: list[bool],
    written: dict[int, list[fx.Node]],
    memory: dict[fx.Node, fx.Node],
) -> fx.Node:
    """The memory of a buffer, behind the products and copies of those parts that are `new` in it."""
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
            place = rewriter.call(aten.slice.Tensor, view, dim, start, start + size)
            if number in written and _is_matrix(place):
                _write(rewriter, written[number], place)
            else:
                rewriter.call(aten.copy_.default, place, part)
        start += size
    return view


def _is_matrix(place: fx.Node) -> bool:
    """Whether the pixels of a slice lie at equal distances in memory, each pixel's channels next to each other."""
    found = ir.fake(place)
    assert found is not None
    rows = found.permute(0, 2, 3, 1)
    *outer, inner = zip(rows.shape, rows.stride(), strict=True)
    expected = outer[-1][1]
    for size, stride in reversed(outer):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return inner[1] == 1


def _write(rewriter: Rewriter, chain: list[fx.Node], place: fx.Node) -> None:
    """Computes a product, and what is computed of it alone, in a slice of channels-last memory."""
    product, *behind = chain
    given = ir.arguments(product)
    rows = rewriter.call(aten.permute.default, place, [0, 2, 3, 1])
    sizes = ir.shape(rows)
    assert sizes is not None
    matrix = rewriter.call(aten.reshape.default, rows, [math.prod(sizes[:-1]), sizes[-1]])
    source = rewriter.call(aten.reshape.default, given["input"], [math.prod(sizes[:-1]), -1])
    weight = rewriter.call(aten.permute.default, given["weight"], [1, 0])
    if given["bias"] is None:
        rewriter.call(aten.mm.out, source, weight, out=matrix)
    else:
        rewriter.call(aten.addmm.out, given["bias"], source, weight, out=matrix)
    for step in behind:
        rewriter.call(WRITTEN[step.target], rows, *step.args[1:], **step.kwargs)


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
