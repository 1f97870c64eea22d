"""eliminate-common-subexpressions

    op(x, ...) ... op(x, ...)  ->  one op(x, ...), the first, read by both's readers

Legal when: the two are the same operator of the same values and literals (1, 1.0 and True differ, so do 0.0 and -0.0,
and NaN is equal to nothing); the operator is pure, draws nothing, and does not own memory for others to fill; nothing
writes to an operand between the two, nor ever to either result; at most one of them is handed out, as it is or through
a view.
Numerics: the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt import NoMatch, Pass, Rewriter, effects, ir

from . import _sharing

_RULE = "same"
#: Literals that are equal where their type and value are.
_PLAIN = (type(None), bool, int, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def _run(rewriter: Rewriter) -> None:
    handed_out = _sharing.handed_out(rewriter.graph)
    first: dict[Any, fx.Node] = {}
    # In order: operands are merged before who reads them, so that one walk finds whole subgraphs.
    for node in list(rewriter.graph.nodes):
        key = _key(node)
        if key is None:
            continue
        earlier = first.setdefault(key, node)
        if earlier is node:
            continue
        reason = _told_apart(earlier, node, handed_out, rewriter)
        if reason is None:
            outcome = rewriter.substitute(node, lambda earlier=earlier: earlier, rule=_RULE)  # type: ignore[misc]
            reason = outcome.reason if isinstance(outcome, NoMatch) else None
        if reason is not None:
            rewriter.decline(node, reason, rule=_RULE)
            first[key] = node  # what comes behind a write can still be one with this
        elif node in handed_out:
            handed_out.add(earlier)


def _key(node: fx.Node) -> Any:
    """What two calls have in common that give the same; None for what is never merged."""
    if node.op != "call_function":
        return None
    if not _sharing.is_known(node.target) and node.target not in ir.SCALAR_FUNCTIONS:
        return None
    if not effects.of(node).pure or _sharing.owns_memory(node.target):
        return None
    try:
        return node.target, _literal(node.args), tuple((name, _literal(part)) for name, part in node.kwargs.items())
    except ValueError:
        return None


def _literal(value: Any) -> Any:
    """An argument as something to compare by type and value. Raises ValueError for what is equal to nothing."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return list, tuple(map(_literal, value))
    if isinstance(value, slice):
        return slice, tuple(map(_literal, (value.start, value.stop, value.step)))
    if type(value) in (float, complex) and value == value:
        return type(value), repr(value)  # 0.0 and -0.0 are spelled apart
    if isinstance(value, _PLAIN):
        return type(value), value
    raise ValueError


def _told_apart(earlier: fx.Node, node: fx.Node, handed_out: set[fx.Node], rewriter: Rewriter) -> str | None:
    """How somebody could tell two results from one; None where nobody could."""
    if earlier in handed_out and node in handed_out:
        return f"the model hands out both {earlier.name} and {node.name}, which must stay two tensors"
    aliases = rewriter.aliases
    writer = aliases.writer_between(earlier, node, node.all_input_nodes)
    if writer is not None:
        return f"{writer.name} may write to an operand between {earlier.name} and {node.name}"
    writer = aliases.writer_of(earlier) or aliases.writer_of(node)
    if writer is not None:
        return f"{writer.name} may write to {earlier.name} or {node.name}"
    return None


PASS = Pass("eliminate-common-subexpressions", run=_run, numerics="bitwise", doc=__doc__)
