"""What the lowering to oneDNN has in common: activations, layouts, what a layer must be, weights packed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt import ir, ops
from fxopt.pattern import NoMatch
from fxopt.rewrite import Rewriter

aten = torch.ops.aten

#: fxopt's activation -> oneDNN's (attr, scalars, algorithm). What is not here stays an ATen operator behind the call.
UNARY: dict[str, tuple[str, str]] = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "relu6": ("hardtanh", ""),
    "clamp": ("hardtanh", ""),
    "hardtanh": ("hardtanh", ""),
    "leaky_relu": ("leaky_relu", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "hardswish": ("hardswish", ""),
    "hardsigmoid": ("hardsigmoid", ""),
    "sigmoid": ("sigmoid", ""),
    "tanh": ("tanh", ""),
}


def fuses(name: str, numbers: list[float]) -> bool:
    """Whether oneDNN has an activation; it refuses bounds of which the lower is not below the upper when it runs."""
    if name in ("clamp", "hardtanh"):
        return numbers[0] <= numbers[1]
    return name in UNARY


def epilogue(name: str, numbers: list[float]) -> tuple[str, list[float], str]:
    """An activation as oneDNN's operators take it: attr, scalars, algorithm."""
    attr, algorithm = UNARY[name]
    return attr, [0.0, 6.0] if name == "relu6" else list(numbers), algorithm


def activation(rewriter: Rewriter, node: fx.Node, name: str, numbers: list[float]) -> fx.Node:
    """An activation that oneDNN does not fuse, as ATen's operator."""
    if name == "none":
        return node
    if name == "relu6":  # the same, and it has a kernel that overwrites
        name, numbers = "hardtanh", [0.0, 6.0]
    target, extra = ops.ACTIVATIONS[name]
    if name == "gelu_tanh":
        return rewriter.call(target, node, approximate="tanh")
    return rewriter.call(target, node, *extra(numbers))


def channels_last(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """The value of `node` in channels-last order: itself where it is so already."""
    found = ir.fake(node)
    assert found is not None
    order = torch.channels_last if found.dim() == 4 else torch.channels_last_3d
    if found.is_contiguous(memory_format=order):
        return node
    for user in node.users:
        if user.target is aten.contiguous.default and user.kwargs.get("memory_format") == order:
            if rewriter.aliases.writer_of(node) is None:  # else the copy may be older than what is read here
                return user
            break
    return rewriter.call(aten.contiguous.default, node, memory_format=order)


def _dense(node: Any) -> bool:
    found = ir.fake(node)
    return found is not None and found.dtype == torch.float32 and found.device.type == "cpu"


def layer_refusal(given: dict[str, Any]) -> str | None:
    """None where oneDNN takes the layer's operands; else why not."""
    if not _dense(given["input"]):
        return "oneDNN takes float32 on the CPU here"
    weight = ir.tensor(given["weight"])
    if weight is None:
        return "its weight is computed at run time, and could not be prepacked"
    if given["bias"] is not None and ir.tensor(given["bias"]) is None:
        return "its bias is computed at run time"
    if any(size == 0 for size in ir.shape(given["input"]) or ()):
        return "it is empty"
    return None


def reason(result: fx.Node | NoMatch) -> str | None:
    """Why a rewrite was refused; None where it was done."""
    return result.reason if isinstance(result, NoMatch) else None

