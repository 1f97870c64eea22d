"""allocate-buffers

    cat([a, b], dim)                         ->  fxopt.buffer([a, b], dim)                  a and b are written into it
    y = cat([a, b]), z = cat([a, b, c])      ->  y = buffer([a, b]), z = buffer([y, c])     one memory that grows

Concat elimination by memory: what makes a part writes it into its slice of the buffer, so that nothing is copied. A
concat that has the parts of an earlier one beside each other takes that one's buffer as a part: in a dense block, where
each layer reads all that came before it, every value is in memory once.

Legal when: a part is computed, fresh, of the concat's dtype and device, and has its dimensions in memory in the
concat's order; what makes it can write with strides; the model does not hand it out, nothing writes to it in place, and
nobody reads its memory by strides; no other buffer has it, and this one not twice. A part of which that does not hold
is copied, as `cat` copies it; the reason is recorded. Where all would be, the concat stays.
Numerics: the same bits (a buffer's meaning is `cat`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxopt import UNKNOWN, NoMatch, Pass, Rewriter, buffers, ir, ops

aten = torch.ops.aten


def _run(rewriter: Rewriter) -> None:
    made: list[fx.Node] = []
    there = rewriter.graph.find_nodes(op="call_function", target=ops.buffer)
    owner = {part: buffer for buffer in there for part in buffers.in_place(buffer)}
    for node in list(rewriter.graph.nodes):
        if node.target is ops.buffer:
            made.append(node)
        if node.target is not aten.cat.default:
            continue
        result = _unknown(node) or _allocate(rewriter, node, made, owner)
        if isinstance(result, NoMatch):
            rewriter.decline(node, result.reason, rule="buffer")
            continue
        made.append(result)


def _unknown(node: fx.Node) -> NoMatch | None:
    """The concat's parts are known, of one rank, so that none is the empty vector that `cat` skips."""
    parts = ir.argument(node, "tensors")
    unknown = next((part for part in parts if ir.fake(part) is None), None)
    if unknown is not None or ir.fake(node) is None:
        name = node.name if unknown is None else unknown.name
        return NoMatch(f"{UNKNOWN}the shape and dtype of {name}", node)
    other = next((part for part in parts if ir.rank(part) != ir.rank(node)), None)
    return None if other is None else NoMatch(f"{other.name} is an empty vector, which a concat skips", node)


def _allocate(
    rewriter: Rewriter, node: fx.Node, made: Sequence[fx.Node], owner: dict[fx.Node, fx.Node]
) -> fx.Node | NoMatch:
    owners = buffers.Owners(rewriter.graph, rewriter.aliases)
    owners.owner = owner
    dim = ir.argument(node, "dim") % (ir.rank(node) or 1)
    parts = _grown(list(ir.argument(node, "tensors")), dim, made, owners, node)
    copied: dict[int, str] = {}
    for number, part in enumerate(parts):
        why = owners.refusal(part, node)
        if why is None and (part in owner or part in parts[:number]):
            why = f"{part.name} is in {owner[part].name if part in owner else 'this concat'} already"
        if why is not None:
            copied[number] = why
    if len(copied) == len(parts):
        return NoMatch("every part would be copied: " + "; ".join(dict.fromkeys(copied.values())), node)
    result = rewriter.substitute(node, lambda: rewriter.call(ops.buffer, parts, dim, sorted(copied)), rule="buffer")
    if isinstance(result, NoMatch):
        return result
    for number, part in enumerate(parts):
        if number in copied:
            rewriter.decline(result, buffers.report(part, copied[number]), rule=f"part {number}")
        else:
            owner[part] = result
    return result


def _grown(
    parts: list[fx.Node], dim: int, made: Sequence[fx.Node], owners: buffers.Owners, node: fx.Node
) -> list[fx.Node]:
    """The parts, where earlier buffers that hold several of them in a row stand for these, the longest first."""
    runs = [
        (buffers.leaves(buffer), buffer)
        for buffer in made
        if ir.argument(buffer, "dim") == dim and ir.rank(buffer) == ir.rank(node)
        if buffer not in owners.owner and owners.refusal(buffer, node) is None
    ]
    found: list[fx.Node] = []
    place = 0
    while place < len(parts):
        here = [(run, buffer) for run, buffer in runs if parts[place : place + len(run)] == run]
        if here:
            run, buffer = max(here, key=lambda entry: len(entry[0]))
            found.append(buffer)
            place += len(run)
        else:
            found.append(parts[place])
            place += 1
    return found


PASS = Pass("allocate-buffers", run=_run, numerics="bitwise", doc=__doc__)
