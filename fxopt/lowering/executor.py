"""A graph as one Python function: straight-line code, every operator and constant bound, values freed at last use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt import ir

#: Gives the object that stands for a reader's tensor argument at run time, or None for the tensor itself.
Pack = Callable[[fx.Node, str, torch.Tensor], Any]


class _Namespace(dict[str, Any]):
    """The globals of the generated function; each object gets one name."""

    def name_of(self, prefix: str, value: Any) -> str:
        name = f"{prefix}{len(self)}"
        self[name] = value
        return name


def build(module: fx.GraphModule, pack: Pack | None = None) -> Callable[..., tuple[Any, ...]]:
    """The function of the flat tensors that runs the graph's nodes in order and returns its flat results.

    `pack(reader, argument, tensor)` may give another object for the weight that a reader takes as this argument, by the
    name that its schema has for it.
    """
    names = _Namespace()
    spelled: dict[fx.Node, str] = {}
    bound: dict[int, str] = {}
    lines: list[str] = []
    parameters: list[str] = []
    free = _last_uses(module.graph)

    def attribute(node: fx.Node) -> str:
        if node not in spelled:
            spelled[node] = names.name_of("c", held_by(node))
        return spelled[node]

    def held_by(node: fx.Node) -> Any:
        held = ir.get_attribute(module, str(node.target))
        frozen = isinstance(held, torch.nn.Parameter) and not held.requires_grad
        return held.detach() if frozen else held

    def argument(reader: fx.Node, name: str, value: Any) -> str:
        if pack is not None and isinstance(value, fx.Node) and value.op == "get_attr":
            held = held_by(value)
            special = pack(reader, name, held) if isinstance(held, torch.Tensor) else None
            if special is not None:
                return names.name_of("w", special)
        return spell(value)

    def spell(value: Any) -> str:
        if isinstance(value, fx.Node):
            return attribute(value) if value.op == "get_attr" else spelled[value]
        if isinstance(value, (list, tuple)) and _has_node(value):
            inner = ", ".join(spell(part) for part in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
        if isinstance(value, dict) and _has_node(list(value.values())):
            return "{" + ", ".join(f"{key!r}: {spell(part)}" for key, part in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({spell(value.start)}, {spell(value.stop)}, {spell(value.step)})"
        if value is None or type(value) in (bool, int):
            return repr(value)
        return names.name_of("k", list(value) if type(value) is fx.immutable_collections.immutable_list else value)

    def function(target: Any) -> str:
        if id(target) not in bound:
            bound[id(target)] = names.name_of("f", target._op if isinstance(target, OpOverload) else target)
        return bound[id(target)]

    for index, node in enumerate(module.graph.nodes):
        if node.op == "placeholder":
            spelled[node] = f"a{index}"
            parameters.append(spelled[node])
            continue
        if node.op == "get_attr":
            continue
        if node.op == "output":
            lines.append(f"return {spell(tuple(node.args[0])) if node.args[0] else '()'}")
            continue
        schema = ir.schema(node.target)
        given = [] if schema is None else [parameter.name for parameter in schema.arguments]
        given += [""] * (len(node.args) - len(given))
        arguments = [argument(node, name, value) for name, value in zip(given, node.args, strict=False)]
        arguments += [f"{name}={argument(node, name, value)}" for name, value in node.kwargs.items()]
        spelled[node] = f"v{index}"
        if node.op == "call_function":
            called = f"{function(node.target)}({', '.join(arguments)})"
        elif node.op == "call_method":
            called = f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
        else:
            leaf = names.name_of("m", ir.get_attribute(module, node.target))
            called = f"{leaf}({', '.join(arguments)})"
        lines.append(f"{spelled[node]} = {called}" if node.users else called)
        dead = [spelled[gone] for gone in free.get(node, ()) if gone in spelled]
        if dead:
            lines.append(f"del {', '.join(dead)}")
    if not lines or not lines[-1].startswith("return"):
        lines.append("return ()")
    source = f"def run({', '.join(parameters)}):\n    " + "\n    ".join(lines) + "\n"
    exec(compile(source, "<fxopt specialisation>", "exec"), names)
    run: Callable[..., tuple[Any, ...]] = names["run"]
    return run


def _has_node(values: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(tuple(values), found.append)
    return bool(found) or any(isinstance(value, slice) for value in values)


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nobody reads behind it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for operand in node.all_input_nodes:
            if operand.op != "get_attr":
                last[operand] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in last.items():
        if reader.op != "output":
            found.setdefault(reader, []).append(value)
    return found
