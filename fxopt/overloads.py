"""Which overload of an ATen operator takes given arguments, by the kinds of its schema, as the dispatcher does it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

aten = torch.ops.aten

#: An ATen call: operator, positional and keyword arguments.
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
IsNumber = Callable[[fx.Node], bool]

#: For these PyTorch wraps a number as a tensor instead of taking a `Scalar` overload.
_NUMBER_AS_TENSOR = frozenset(
    {"add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_", "floor_divide"}
    | {"subtract", "multiply", "divide", "true_divide"}
)


def resolve(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], is_number: IsNumber) -> Call | None:
    """The first ATen overload of `name` that takes these arguments, by the kinds of its schema."""
    packet = getattr(aten, name, None)
    if not isinstance(packet, OpOverloadPacket):
        return None
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    # Some overloads are TorchScript's only: they have no kernel, and the dispatcher does not know them.
    overloads = [op for op in overloads if torch._C._dispatch_has_kernel(op.name())]
    overloads = [op for op in overloads if not any(a.is_out for a in op._schema.arguments)]
    if name in _NUMBER_AS_TENSOR:
        overloads.sort(key=lambda op: op._overloadname != "Tensor")
    for op in overloads:
        for candidate in (args, _packed(args)):
            if candidate is not None and _takes(op, candidate, kwargs, is_number, name in _NUMBER_AS_TENSOR):
                return op, *_expanded(op, candidate, kwargs)
    return None


def _packed(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """`x.view(2, -1)` is `view(x, [2, -1])`."""
    if len(args) < 2 or isinstance(args[1], (list, tuple)):
        return None
    return (args[0], list(args[1:]))


def _expanded(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """One number for a list of known length stands for that many: `stride=2` is `[2, 2]`."""

    def expand(parameter: Any, value: Any) -> Any:
        if _element(str(parameter.real_type)) and isinstance(value, (int, float, fx.Node)):
            return [value] * (_length(parameter) or 1)
        return value

    parameters = op._schema.arguments
    by_name = {parameter.name: parameter for parameter in parameters}
    return (
        tuple(expand(parameter, value) for parameter, value in zip(parameters, args, strict=False)),
        {name: expand(by_name[name], value) for name, value in kwargs.items()},
    )


def _length(parameter: Any) -> int | None:
    """How many numbers a schema's list has, where it says so: `int[2]`."""
    length: int | None = parameter.N
    return length


def _element(kind: str) -> str:
    """The kind of a list's elements, where numbers; empty for what is no list of numbers."""
    match = re.fullmatch(r"(?:Optional\[)?List\[(int|SymInt|float)\]\]?", kind)
    return match[1] if match else ""


def _takes(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], is_number: IsNumber, wrap: bool) -> bool:
    rest = dict(kwargs)
    for position, parameter in enumerate(op._schema.arguments):
        if not parameter.kwarg_only and position < len(args):
            value = args[position]
        elif parameter.name in rest:
            value = rest.pop(parameter.name)
        elif parameter.has_default_value():
            continue
        else:
            return False
        kind = str(parameter.real_type)
        if _length(parameter) and not isinstance(value, (list, tuple)) and _element(kind):
            kind = _element(kind)
        if not _fits(kind, value, is_number, wrap and position > 0):
            return False
    positional = [parameter for parameter in op._schema.arguments if not parameter.kwarg_only]
    return not rest and len(args) <= len(positional)


def _is_property(node: fx.Node) -> bool:
    """Whether a node reads what describes a tensor, not another tensor (as `x.T` does)."""
    return node.target is getattr and node.args[1:] in (("device",), ("dtype",), ("layout",), ("shape",))


def _fits(kind: str, value: Any, is_number: IsNumber, number_as_tensor: bool) -> bool:
    if kind.startswith("Optional["):
        return value is None or _fits(kind[len("Optional[") : -1], value, is_number, number_as_tensor)
    if kind.startswith("List["):
        inner = kind[len("List[") : -1]
        return isinstance(value, (list, tuple)) and all(_fits(inner, part, is_number, False) for part in value)
    if isinstance(value, fx.Node):
        if kind == "Tensor":
            return not _is_property(value) and (number_as_tensor or not is_number(value))
        if kind in ("int", "SymInt", "number", "Scalar", "float"):
            return is_number(value)
        wanted = {"Device": "device", "ScalarType": "dtype"}.get(kind)
        return wanted is not None and value.target is getattr and value.args[1:] == (wanted,)
    match kind:
        case "Tensor":
            return isinstance(value, torch.Tensor) or (number_as_tensor and isinstance(value, (int, float)))
        case "int" | "SymInt":
            return type(value) is int
        case "float":
            return type(value) in (int, float)
        case "number" | "Scalar":
            return type(value) in (int, float, bool, complex)
        case "bool":
            return type(value) is bool
        case "str":
            return isinstance(value, str)
        case "ScalarType":
            return isinstance(value, torch.dtype)
        case "Device":
            return isinstance(value, (torch.device, str))
        case "MemoryFormat":
            return isinstance(value, torch.memory_format)
        case "Layout":
            return isinstance(value, torch.layout)
        case _:
            return False
