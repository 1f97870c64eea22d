"""The only code that changes a graph. Every edit is recorded with what undoes it, so that any suffix can be taken back.

Undoing restores the same `Node` objects in the same places, last edit first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt import ir


@dataclass(frozen=True)
class Edit:
    """One change: `kind` is insert, erase, update, tensor or meta; `node` the node (or attribute) it changed."""

    kind: str
    node: fx.Node | str
    undo: Callable[[], None]


class Editor:
    """Changes one IR module, recording each step in `log`."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.graph = module.graph
        self.log: list[Edit] = []

    def insert(
        self,
        op: str,
        target: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        before: fx.Node,
        origin: tuple[ir.Origin, ...] = (),
        name: str | None = None,
        infer: bool = True,
    ) -> fx.Node:
        """A new node in front of `before`, its arguments put where the schema has them, its value inferred.

        Raises whatever the operator raises on operands that do not fit.
        """
        kwargs = kwargs or {}
        if ir.schema(target) is not None:
            args, kwargs = ir.canonical_arguments(target, args, kwargs)
        with self.graph.inserting_before(before):
            node = self.graph.create_node(op, target, args, kwargs, name)
        node.meta["origin"] = origin
        self.log.append(Edit("insert", node, lambda: self.graph.erase_node(node)))
        if infer:
            ir.update_value(node)
        return node

    def update(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Gives a node other arguments."""
        old_args, old_kwargs = node.args, node.kwargs

        def undo() -> None:
            node.args, node.kwargs = old_args, old_kwargs

        node.args, node.kwargs = args, dict(kwargs or {})
        self.log.append(Edit("update", node, undo))

    def set_meta(self, node: fx.Node, key: str, value: Any) -> None:
        """Sets one entry of a node's `meta`."""
        missing = object()
        old = node.meta.get(key, missing)

        def undo() -> None:
            if old is missing:
                node.meta.pop(key, None)
            else:
                node.meta[key] = old

        node.meta[key] = value
        self.log.append(Edit("meta", node, undo))

    def replace_uses(self, old: fx.Node, new: fx.Node, readers: Iterable[fx.Node] | None = None) -> None:
        """Lets every reader of `old` (or those given) read `new`; `new` itself goes on reading `old`."""
        for reader in list(old.users) if readers is None else list(readers):
            if reader is new:
                continue
            args, kwargs = fx.map_arg((reader.args, reader.kwargs), lambda n: new if n is old else n)
            self.update(reader, args, kwargs)

    def erase(self, node: fx.Node) -> None:
        """Removes a node that nobody reads."""
        args, kwargs, following = node.args, node.kwargs, node.next
        graph = self.graph

        def undo() -> None:
            node._erased = False
            following.prepend(node)
            graph._len += 1
            graph._find_nodes_lookup_table.insert(node)
            node.args, node.kwargs = args, kwargs

        graph.erase_node(node)
        self.log.append(Edit("erase", node, undo))

    def add_tensor(self, name: str, value: torch.Tensor) -> str:
        """Puts a new tensor under `name`, or `name_1`, ... where that is taken; returns the name."""
        free, count = name, 0
        while ir.has_attribute(self.module, free):
            count += 1
            free = f"{name}_{count}"
        ir.set_attribute(self.module, free, value)
        self.log.append(Edit("tensor", free, lambda: ir.delete_attribute(self.module, free)))
        return free

    def mark(self) -> int:
        """The place in the log to which `undo` can go back."""
        return len(self.log)

    def undo(self, mark: int = 0) -> None:
        """Takes back every edit behind `mark`, last first."""
        while len(self.log) > mark:
            self.log.pop().undo()
