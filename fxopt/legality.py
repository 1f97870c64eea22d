"""What holds for every rewrite, whatever its rule: no reader is lost, nothing is written in between, order is kept.

Each function gives the reason why nodes may not be replaced, or None. What could be told from a result itself is
`fxopt.observe`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from torch import fx

from fxopt import effects
from fxopt.pattern import NoMatch


def of_readers(matched: Sequence[fx.Node], stays: Set[fx.Node]) -> NoMatch | None:
    """Why `matched` may not go, of which those in `stays` are replaced or kept: others read one, or one has effects."""
    inside = set(matched)
    for node in matched:
        for user in node.users if node not in stays else ():
            if user not in inside:
                where = "is a result of the model" if user.op == "output" else f"is also read by {user.name}"
                return NoMatch(f"{node.name} {where}", node)
    for node in matched:
        if not effects.of(node).pure:
            return NoMatch(f"{node.name} writes, draws at random, or is not known", node)
    return None


def of_writes(matched: Sequence[fx.Node], last: fx.Node, aliases: effects.Aliases) -> NoMatch | None:
    """Why `matched` may not be computed at once, in front of `last`: a value of theirs is written in between."""
    if not aliases.writers:
        return None
    values = {operand for node in matched for operand in (node, *node.all_input_nodes)}
    writer = aliases.writer_between(min(matched), last, values)
    if writer is not None:
        return NoMatch(f"{writer.name} may write to a value of the match in between", writer)
    # A constant is read once and for all: it must not be written at any time.
    for value in values:
        if value.op == "get_attr":
            written = aliases.writer_of(value)
            if written is not None:
                return NoMatch(f"{written.name} may write to {value.target}", written)
    return None


def of_memory(
    root: fx.Node,
    members: Sequence[fx.Node],
    reads: Mapping[fx.Node, Sequence[fx.Node]],
    last: fx.Node,
    aliases: effects.Aliases,
) -> NoMatch | None:
    """Why the memory of `root` may not be replaced: `members` are all that share it, `reads` who else reads each of
    them, `last` its last write."""
    inside = set(members)
    for writer, found in aliases.writers.items():
        if writer not in inside and any(aliases.root(written) is root for written in found.writes):
            return NoMatch(f"{writer.name} writes to it, and gives something else", writer)
    for node in members:
        if node in aliases.foreign:
            return NoMatch(f"{node.name} may be memory that others hold", node)
        if any(written not in inside for written in aliases.writers.get(node, effects.Effects()).writes):
            return NoMatch(f"{node.name} writes to other memory, too", node)
        for user in reads[node]:
            if user.op == "output":
                return NoMatch("the model hands it out, a new tensor in each call", node)
            if not last < user:
                return NoMatch(f"{user.name} reads it in front of the last write", user)
    return None


def of_order(new: Set[fx.Node], results: Iterable[fx.Node]) -> NoMatch | None:
    """Why `new` nodes and `results` may not stand where they do: a reader in front of one, or an operand behind it."""
    for node in (*new, *results):
        for user in node.users:
            if not node < user:
                return NoMatch(f"{user.name} reads it, and stands in front of where it would be", user)
    for node in new:
        for operand in node.all_input_nodes:
            if not operand < node:
                return NoMatch(f"{operand.name} is computed behind where it would be read", operand)
    return None
