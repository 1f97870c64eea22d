"""Who can tell one tensor from another: what a model hands out, and which operators are known well enough to ask."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import OpOverload

from fxopt import effects

#: Whose operators do what their schema says and nothing else. A stranger's may keep state of its own.
_NAMESPACES = frozenset({"aten", "prims", "fxopt"})


def is_known(target: Any) -> bool:
    """Whether a call target is an operator of PyTorch's or fxopt's own."""
    return isinstance(target, OpOverload) and target.namespace in _NAMESPACES


def owns_memory(target: Any) -> bool:
    """Whether an operator gives memory of its own for others to fill: no two of its results are the same."""
    return isinstance(target, OpOverload) and target._opname.startswith(("empty", "new_empty"))


def handed_out(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose memory the caller may have in hand afterwards: results of the model, and what these are views of.

    `Aliases.root` says less: two views of one parameter have one root, and only one of them may be handed out.
    """
    found: set[fx.Node] = set()
    waiting = list(graph.output_node().all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += effects.of(node).aliases
    return found
