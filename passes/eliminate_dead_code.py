"""eliminate-dead-code

    a node that nobody reads  ->  nothing

Legal when: the node has no effect: it writes nothing (and so no alias of anything), draws nothing at random, asserts
nothing, and is known. An unread `x.mul_(2)`, dropout in training mode, or opaque module stays.
Numerics: the same bits.
"""

from __future__ import annotations

from fxopt import Pass, Rewriter, effects


def _run(rewriter: Rewriter) -> None:
    for node in reversed(list(rewriter.graph.nodes)):
        if node.users or node.op in ("placeholder", "output") or node._erased:
            continue
        found = effects.of(node)
        if found.pure:
            rewriter.remove(node, rule="unread")
        elif found.opaque:
            rewriter.decline(node, "nobody reads it, but what it does is not known", rule="unread")
        elif found.writes:
            rewriter.decline(node, f"nobody reads it, but it writes to {found.writes[0].name}", rule="unread")
        elif found.random:
            rewriter.decline(node, "nobody reads it, but later draws depend on its own", rule="unread")
        else:
            rewriter.decline(node, "nobody reads it, but it may raise", rule="unread")


PASS = Pass("eliminate-dead-code", run=_run, numerics="bitwise", doc=__doc__)
