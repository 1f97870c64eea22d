"""One node in words, and in what two nodes that are the same one differ: operator, arguments, inputs, weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt import ir
from fxopt.align import Alignment

#: (argument, path, dtype and shape) of a tensor that a node reads.
ParameterText = tuple[str, str, str]

_LONGEST = 120


def operator_name(node: fx.Node) -> str:
    """What a node does, as a person reads it; inputs and results by what they are."""
    if node.op == "placeholder":
        return "input"
    if node.op == "output":
        return "output"
    if node.op == "call_module" and _held(node) is None:
        return str(node.target)
    return ir.target_name(node)


def is_size(node: fx.Node) -> bool:
    """Whether a node is a size or arithmetic on sizes."""
    if node.op != "call_function" or ir.is_compute(node):
        return False
    number = isinstance(ir.value(node), (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))
    return number or node.target is torch.ops.aten.sym_size.int


def module_paths(node: fx.Node) -> tuple[str, ...]:
    """The modules that a node comes from, the earliest first; in a graph of another tracer's, the one that it calls."""
    found = tuple(dict.fromkeys(origin.module for origin in reversed(ir.origins(node)) if origin.module))
    return found or ((str(node.target),) if node.op == "call_module" else ())


def lines(node: fx.Node) -> tuple[str, ...]:
    """The user's source lines that a node comes from, once each, the earliest first."""
    return tuple(dict.fromkeys(origin.line for origin in reversed(ir.origins(node)) if origin.line))


def _held(node: fx.Node) -> Any:
    """The tensor or module that a node reads from its graph's module; None where there is none."""
    owner = node.graph.owning_module
    if owner is None or not ir.has_attribute(owner, str(node.target)):
        return None
    return ir.get_attribute(owner, str(node.target))


# -- arguments -------------------------------------------------------------------------------------------------------


def _named_arguments(node: fx.Node) -> dict[str, Any]:
    """A node's arguments by name, or else position; those that are the operator's defaults are left out."""
    found = ir.schema(node.target)
    if found is None:
        return {**{str(place): value for place, value in enumerate(node.args)}, **node.kwargs}
    defaults = {entry.name: entry.default_value for entry in found.arguments if entry.has_default_value()}
    return {
        name: value
        for name, value in ir.arguments(node).items()
        if name not in defaults or not ir.same_literal(value, defaults[name])
    }


def argument_texts(
    node: fx.Node,
) -> tuple[tuple[tuple[str, str], ...], tuple[ParameterText, ...], tuple[tuple[str, str], ...]]:
    """A node's literal arguments as (name, text), the tensors that it reads, and the nodes, by argument."""
    literals: list[tuple[str, str]] = []
    parameters: list[ParameterText] = []
    inputs: list[tuple[str, str]] = []
    for name, value in _named_arguments(node).items() if node.op != "placeholder" else ():
        operands = list(_operands(value))
        for operand in operands:
            if operand.op == "get_attr":
                held = _held(operand)
                text = ir.describe_value(held) if isinstance(held, torch.Tensor) else type(held).__name__
                parameters.append((name, str(operand.target), text if held is not None else ""))
            else:
                inputs.append((name, operand.name))
        if node.op != "output" and (not operands or not isinstance(value, fx.Node)):
            literals.append((name, _text(value)))
    held = _held(node) if node.op == "call_module" else None
    if isinstance(held, torch.nn.Module):
        for path, tensor in (*held.named_parameters(), *held.named_buffers()):
            parameters.append((path, f"{node.target}.{path}", ir.describe_value(tensor)))
    return tuple(literals), tuple(parameters), tuple(dict.fromkeys(inputs))


def _operands(value: Any) -> Iterator[fx.Node]:
    return (leaf for leaf in pytree.tree_leaves(_unsliced(value)) if isinstance(leaf, fx.Node))


def _unsliced(value: Any) -> Any:
    """Slices, which pytree takes for leaves, as tuples."""
    if isinstance(value, slice):
        return (value.start, value.stop, value.step)
    if isinstance(value, (list, tuple)):
        return [_unsliced(part) for part in value]
    return {key: _unsliced(part) for key, part in value.items()} if isinstance(value, dict) else value


def _text(value: Any) -> str:
    """A literal in a few characters."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, (list, tuple)):
        text = "[" + ", ".join(map(_text, value)) + "]"
    else:
        text = str(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


# -- differences -----------------------------------------------------------------------------------------------------


def changes(before: fx.Node, after: fx.Node, alignment: Alignment) -> tuple[str, ...]:
    """In what a node differs from what it was, in words; empty where it is as it was.

    That it reads what a removed node became is no difference.
    """
    found: list[str] = []
    if before.op != after.op or before.target != after.target:
        if before.op != "placeholder" and before.op != "get_attr":
            names = operator_name(before), operator_name(after)
            same = names[0] == names[1]
            names = (str(before.target), str(after.target)) if same else names
            found.append(f"{'target' if same else 'operator'}: {names[0]} -> {names[1]}")
    elif before.op == "call_module":
        found += _module_changes(before, after)
    if before.op == "placeholder":
        return tuple(found)
    old_arguments, new_arguments = _named_arguments(before), _named_arguments(after)
    for name in dict.fromkeys((*old_arguments, *new_arguments)):
        old, new = old_arguments.get(name), new_arguments.get(name)
        if not _same(old, new, alignment):
            weights = isinstance(old, fx.Node) and isinstance(new, fx.Node) and "get_attr" in (old.op, new.op)
            found.append(f"{'weights' if weights else 'argument'} {name}: {_text(old)} -> {_text(new)}")
    return tuple(found)


def _same(old: Any, new: Any, alignment: Alignment) -> bool:
    """Whether two arguments are the same, read through what nodes became."""
    if isinstance(old, fx.Node) and isinstance(new, fx.Node):
        if old.op == new.op == "get_attr":
            return _same_held(_held(old), _held(new), str(old.target) == str(new.target))
        return new.name in alignment.became.get(old.name, ())
    if isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        return len(old) == len(new) and all(_same(a, b, alignment) for a, b in zip(old, new, strict=True))
    if isinstance(old, dict) and isinstance(new, dict):
        return list(old) == list(new) and all(_same(old[key], new[key], alignment) for key in old)
    if isinstance(old, slice) and isinstance(new, slice):
        parts = [(old.start, new.start), (old.stop, new.stop), (old.step, new.step)]
        return all(_same(a, b, alignment) for a, b in parts)
    return ir.same_literal(old, new)


def _same_held(old: Any, new: Any, same_path: bool) -> bool:
    """Whether two attributes are one tensor, or hold the same bits; by their path where there is nothing to see."""
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return old is new if old is not None and new is not None else same_path
    if old is new:
        return True
    if (old.dtype, old.shape, old.device, old.layout) != (new.dtype, new.shape, new.device, new.layout):
        return False
    if old.is_meta or ir.is_fake(old) or ir.is_fake(new) or old.layout is not torch.strided or old.is_quantized:
        return same_path
    if ir.identity(old) == ir.identity(new):
        return True
    bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (old, new)]
    return torch.equal(*bits)


def _module_changes(before: fx.Node, after: fx.Node) -> list[str]:
    """In what the modules that two nodes call differ."""
    old, new = _held(before), _held(after)
    if not isinstance(old, torch.nn.Module) or not isinstance(new, torch.nn.Module) or old is new:
        return []
    if repr(old) != repr(new):
        return [f"module: {_text(repr(old))} -> {_text(repr(new))}"]
    sides = [dict((*side.named_parameters(), *side.named_buffers())) for side in (old, new)]
    if sides[0].keys() != sides[1].keys():
        return ["weights: " + ", ".join(sorted(sides[0].keys() ^ sides[1].keys()))]
    other = [name for name in sides[0] if not _same_held(sides[0][name], sides[1][name], True)]
    return [f"weights: {', '.join(other)}"] if other else []
