"""What somebody can tell of a value beside its numbers: shape, dtype, device, strides, and whose memory it is.

The driver holds every rewrite to these. Strides may change where nobody can tell: `settle` infers again what is
computed from the value, reader by reader, until the strides are as they were, and refuses where one that changed is
handed out, or read by something whose meaning depends on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt import effects, ir
from fxopt.edit import Editor
from fxopt.errors import RewriteError
from fxopt.pattern import NoMatch

aten = torch.ops.aten

#: A node, and what is to be read instead of it.
Pair = tuple[fx.Node, fx.Node]


# -- shape, dtype, device --------------------------------------------------------------------------------------------


def difference(root: fx.Node, result: fx.Node, *, pass_name: str) -> NoMatch | None:
    """None where `result` has the shape, dtype and device of `root`; NoMatch where its sizes might differ.

    Raises RewriteError where they do differ.
    """
    before, after = ir.value(root), ir.value(result)
    if not isinstance(before, torch.Tensor):
        return None
    if not isinstance(after, torch.Tensor):
        raise RewriteError(
            f"the rewrite's result is {ir.describe_value(after)}, not {ir.describe_value(before)}",
            pass_name=pass_name,
            node=root,
        )
    same = (before.dtype, before.device, before.dim()) == (after.dtype, after.device, after.dim())
    plain = all(type(size) is int for size in (*before.shape, *after.shape))
    if not same or (plain and before.shape != after.shape):
        raise RewriteError(
            f"the rewrite changes {ir.describe_value(before)} on {before.device} "
            f"to {ir.describe_value(after)} on {after.device}",
            pass_name=pass_name,
            node=root,
        )
    if not ir.same_sizes(before.shape, after.shape):
        # Inference may settle for one batch size where the operator's own code asks for a number.
        sizes = f"from {ir.describe_value(before)} to {ir.describe_value(after)}"
        return NoMatch(f"the sizes might change {sizes}, by what is known of them", root)
    return None


# -- strides ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Change:
    """The strides that a reader finds in one of its operands, where it found others before."""

    operand: fx.Node
    before: torch.Tensor
    after: torch.Tensor

    @property
    def shows(self) -> bool:
        """Whether layouts differ: in a dimension that is longer than one."""
        return not ir.same_sizes(_strides(self.before), _strides(self.after))

    def __str__(self) -> str:
        return f"the strides would change from {tuple(self.before.stride())} to {tuple(self.after.stride())}"


def _strides(value: torch.Tensor) -> list[Any]:
    """The strides that tell layouts apart: those of dimensions longer than one."""
    return [stride for stride, size in zip(value.stride(), value.shape, strict=True) if ir.static(size) != 1]


def _change(operand: fx.Node, before: Any, after: Any) -> _Change | None:
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    if before.layout is not torch.strided or ir.same_sizes(before.stride(), after.stride()):
        return None
    return _Change(operand, before, after)


def strides_kept(pairs: Sequence[Pair]) -> NoMatch | None:
    """None where every result has the strides of what it replaces."""
    for root, result in pairs:
        found = _change(result, ir.value(root), ir.value(result))
        if found is not None and found.shows:
            return NoMatch(str(found), root)
    return None


def settle(
    editor: Editor, pairs: Sequence[Pair], readers: dict[fx.Node, list[fx.Node]], aliases: effects.Aliases
) -> NoMatch | None:
    """Infers again what is computed from values whose strides a rewrite has changed; NoMatch where somebody can tell.

    `readers` has those who read each root before it was replaced; `aliases` are those of the graph at that time.
    """
    waiting: dict[fx.Node, list[_Change]] = {}
    queue: list[tuple[Any, fx.Node]] = []

    def tell(users: Iterable[fx.Node], change: _Change | None) -> None:
        for user in users if change is not None else ():
            assert change is not None
            if user._erased:
                continue
            if user not in waiting:
                heapq.heappush(queue, (cast(Any, user)._sort_key, user))
            waiting.setdefault(user, []).append(change)

    for root, result in pairs:
        tell(readers[root], _change(result, ir.value(root), ir.value(result)))
    # The model hands out results in place of roots by now; the aliases know the roots.
    twins = {result: root for root, result in pairs if result not in aliases.group}
    leaves = editor.graph.output_node().all_input_nodes
    handed_out = {aliases.root(twins.get(leaf, leaf)) for leaf in leaves}
    while queue:
        _, node = heapq.heappop(queue)
        changes = waiting.pop(node)
        shown = next((change for change in changes if change.shows), None)
        refusal = None if shown is None else _told(node, shown, aliases, handed_out)
        if refusal is not None:
            return refusal
        if node.op == "output":
            continue
        before, after = ir.value(node), _infer(node)
        if isinstance(after, NoMatch):
            return after
        unlike = _unlike(before, after)
        if unlike is not None:
            if shown is not None:
                return NoMatch(f"{shown}, and {node.name} {unlike}", node)
            continue
        lefts, rights = pytree.tree_leaves(before), pytree.tree_leaves(after)
        found = [_change(node, left, right) for left, right in zip(lefts, rights, strict=True)]
        moved = [change for change in found if change is not None]
        if moved:
            editor.set_meta(node, "val", after)
        for change in moved:
            tell(node.users, change)
    return None


def _told(node: fx.Node, change: _Change, aliases: effects.Aliases, handed_out: set[fx.Node]) -> NoMatch | None:
    """How `node` would show that an operand has other strides, whatever it computes from it.

    `handed_out` has the roots of what the model hands out.
    """
    if node.op == "output":
        return NoMatch(f"{change}, and the model hands out {change.operand.name}", change.operand)
    why = effects.strides_matter(node)
    if why is not None:
        return NoMatch(f"{change}, and {node.name} {why}", node)
    if effects.may_view(node):
        # It views or copies, as the strides have it. That shows where results share memory, and in a write.
        root = aliases.root(node)
        if root in handed_out or aliases.written_after(node, (node,)) is not None:
            return NoMatch(f"{change}, and {node.name} might then be a copy, or no copy any more", node)
    return None


def _infer(node: fx.Node) -> Any:
    try:
        return ir.infer(node)
    except Exception as error:
        said = str(error).partition("\n")[0]
        return NoMatch(f"{node.name} would not take the strides: {type(error).__name__}: {said}", node)


def _unlike(before: Any, after: Any) -> str | None:
    """None where two results are alike in all but strides."""
    if before is None or after is None:
        return "gives nobody knows what of them"
    lefts, left_spec = pytree.tree_flatten(before)
    rights, right_spec = pytree.tree_flatten(after)
    if left_spec != right_spec:
        return "would give another structure"
    for left, right in zip(lefts, rights, strict=True):
        if isinstance(left, torch.Tensor) != isinstance(right, torch.Tensor):
            return "would give another type"
        if isinstance(left, torch.Tensor):
            kinds = (left.dtype, left.device, left.layout) == (right.dtype, right.device, right.layout)
            if not kinds or not ir.same_sizes(left.shape, right.shape):
                return f"would give {ir.describe_value(right)} instead of {ir.describe_value(left)}"
    return None


# -- memory ----------------------------------------------------------------------------------------------------------


def memory_shared(pairs: Sequence[Pair], new: set[fx.Node], aliases: effects.Aliases) -> NoMatch | None:
    """None unless a fresh value would be replaced by one that shares memory with others, and somebody could tell.

    `new` are the nodes that the rewrite made; `aliases` those of the graph before it.
    """
    memories = [_memory(result, new) for _, result in pairs]
    outputs: set[fx.Node] | None = None
    for (root, result), memory in zip(pairs, memories, strict=True):
        if effects.of(root).aliases or root is result:
            continue
        others = [other for (twin, _), other in zip(pairs, memories, strict=True) if twin is not root]
        together = [base for base in memory if base not in new or any(base in other for other in others)]
        if not together or {base if base in new else aliases.root(base) for base in memory} == {aliases.root(root)}:
            continue
        held = [base for base in together if base not in new]
        writer = aliases.written_after(min(root, *held), (root, *held)) if held else _written(root, aliases)
        if writer is not None:
            return NoMatch(f"{writer.name} may write to {root.name}, or to memory that it would share", writer)
        if outputs is None:
            outputs = {aliases.root(found) for found in root.graph.output_node().all_input_nodes}
        if aliases.root(root) in outputs and any(_seen(base, new, aliases, outputs) for base in together):
            return NoMatch(f"the model hands out {root.name}, which must not share memory with others", root)
        for reader in root.graph.find_nodes(op="call_function", target=aten.as_strided.default):
            if aliases.root(reader) is aliases.root(root):
                return NoMatch(f"{reader.name} looks at the memory behind {root.name}", reader)
    return None


def _written(root: fx.Node, aliases: effects.Aliases) -> fx.Node | None:
    return aliases.written_after(root, (root,))


def _seen(base: fx.Node, new: set[fx.Node], aliases: effects.Aliases, outputs: set[fx.Node]) -> bool:
    """Whether the caller may hold memory already."""
    if base in new:
        return True
    root = aliases.root(base)
    return root in outputs or any(aliases.root(foreign) is root for foreign in aliases.foreign)


def _memory(node: fx.Node, new: set[fx.Node]) -> set[fx.Node]:
    """The values whose memory `node` may share: among `new` those that are computed, else what is there already."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        viewed = effects.of(node).aliases if node in new and node.op == "call_function" else ()
        if viewed:
            stack += viewed
        else:
            found.add(node)
    return found
