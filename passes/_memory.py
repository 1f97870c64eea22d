"""Who could tell one tensor from another that has the same values: by the memory behind it, or by being that very one.

A view shares its input's memory, a copy has its own, and some operations hand out the very tensor that they were given.
Replacing one by another is legal where each function here that asks about it gives None.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from fxopt import Rewriter, effects, ir

aten = torch.ops.aten

#: These always make another tensor, whether or not it shares memory with what they read.
_NEW_TENSORS = frozenset(
    {
        aten.alias.default,
        aten.expand.default,
        aten.movedim.int,
        aten.movedim.intlist,
        aten.mT.default,
        aten.narrow.default,
        aten.numpy_T.default,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unbind.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
    }
)


def is_contiguous(value: torch.Tensor) -> bool:
    """Whether a value is provably contiguous for every input. A size of one has no stride that matters."""
    expected: int | torch.SymInt = 1
    for size, stride in reversed(list(zip(value.shape, value.stride(), strict=True))):
        if ir.static(size) == 1:
            continue
        if not ir.same_sizes((stride,), (expected,)):
            return False
        expected = expected * size
    return True


def is_dense(value: torch.Tensor) -> bool:
    """Whether a value provably fills its memory without gaps and without overlap, in whatever order."""
    left = [pair for pair in zip(value.shape, value.stride(), strict=True) if ir.static(pair[0]) != 1]
    expected: int | torch.SymInt = 1
    while left:
        found = [place for place, (_, stride) in enumerate(left) if ir.same_sizes((stride,), (expected,))]
        if not found:
            return False
        expected = expected * left.pop(found[0])[0]
    return True


def told_from_the_very_tensor(node: fx.Node, rewriter: Rewriter) -> str | None:
    """How somebody could tell a view from the very tensor that it views: by handing it out, or in an opaque node, which
    may change the shape of either in place (no other node of the normal form does)."""
    for reader in _readers(node):
        if reader.op == "output":
            return "the model hands out the view, which must stay another tensor than its input"
    aliases = rewriter.aliases
    for writer, found in aliases.writers.items():
        if writer._erased or not node < writer or not found.opaque:
            continue
        if any(aliases.root(written) is aliases.root(node) for written in found.writes):
            return f"{writer.name} may change the view or its input in place"
    return None


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads `node`, be it through operations that may hand it on as it is."""
    seen = {node}
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            yield user
            if user not in seen and user.target not in _NEW_TENSORS and effects.of(user).aliases:
                seen.add(user)
                waiting.append(user)


def told_from_other_memory(node: fx.Node, source: fx.Node, rewriter: Rewriter) -> str | None:
    """How somebody could tell whether `node` shares memory with `source`: by handing it out, by a write to either, by
    looking at the memory behind it."""
    aliases = rewriter.aliases
    root = aliases.root(node)
    if root in {aliases.root(result) for result in rewriter.graph.output_node().all_input_nodes}:
        return "the model hands out the copy, which must stay distinct from its input"
    written = aliases.written_after(source, (source, node))
    if written is not None:
        return f"{written.name} may write to the copy or to its input"
    for reader in rewriter.graph.find_nodes(op="call_function", target=aten.as_strided.default):
        if aliases.root(reader) is root:
            return f"{reader.name} looks at the memory behind the copy"
    return None
