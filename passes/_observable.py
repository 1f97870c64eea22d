"""Whether anybody could tell a copy from what it copies."""

from __future__ import annotations

import torch
from torch import fx

from fxopt import Rewriter

aten = torch.ops.aten


def observable_copy(node: fx.Node, source: fx.Node, rewriter: Rewriter) -> str | None:
    """How somebody could tell `node`, a copy, from what it copies: by handing it out, by a write to either, by looking
    at the memory behind it. None where nobody can."""
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
