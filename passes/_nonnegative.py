"""Proof that a value has no negative number in it, by the operators that it comes from. NaN is not ruled out."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt import effects, ir, ops

aten = torch.ops.aten

#: These give no negative number, whatever they are given.
_SOURCES = frozenset(
    {
        aten.relu.default,
        aten.relu6.default,
        aten.sigmoid.default,
        aten.hardsigmoid.default,
        aten.softmax.int,
        aten.exp.default,
        aten.sqrt.default,
    }
)
#: These do not either, of floating-point numbers: the smallest integer has no absolute value, and products wrap.
_FLOAT_SOURCES = frozenset({aten.abs.default, aten.square.default})
#: These give none unless their first operand, or one of the list that it is, has one.
_CARRIERS = frozenset(
    {
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten.avg_pool1d.default,
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
        aten.upsample_nearest2d.vec,
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.cat.default,
        aten.stack.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.permute.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.slice.Tensor,
        aten.select.int,
        aten.contiguous.default,
        aten.clone.default,
    }
)
#: What activations that an operation of fxopt's ends in do the same.
_ENDINGS = frozenset({"relu", "relu6", "sigmoid", "hardsigmoid"})
#: How many operators a proof may go through.
_MOST = 64


def is_nonnegative(value: fx.Node) -> bool:
    """Whether no element of a value is below zero, for every input of the model."""
    aliases = effects.Aliases.scan(value.graph)
    seen: set[fx.Node] = set()
    waiting = [value]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        needed = _needed(node)
        # A proof is about what an operator gave, not about what was written over it.
        if needed is None or len(seen) > _MOST or aliases.writer_of(node) is not None:
            return False
        waiting += needed
    return True


def _needed(node: fx.Node) -> list[fx.Node] | None:
    """The values that must have no negative number so that a node has none; None where that is not known."""
    target: Any = node.target
    if node.op != "call_function" or ir.schema(target) is None:
        return None
    given = ir.arguments(node)
    first: Any = next(iter(given.values()), None)
    dtype = ir.dtype(node)
    match target:
        case _ if target in _SOURCES:
            return []
        case _ if target in _FLOAT_SOURCES:
            return [] if dtype is not None and dtype.is_floating_point else None
        case aten.clamp.default | aten.clamp_min.default:
            return [] if _at_least_zero(given["min"]) and _at_least_zero(given.get("max"), missing=True) else None
        case aten.hardtanh.default:
            return [] if _at_least_zero(given["min_val"]) and _at_least_zero(given["max_val"]) else None
        case ops.convolution | ops.linear:
            bounds = given["activation_arguments"]
            bounded = given["activation"] in ("clamp", "hardtanh") and all(map(_at_least_zero, bounds))
            return [] if bounded or given["activation"] in _ENDINGS else None
        case aten.avg_pool2d.default | aten.avg_pool3d.default:
            return [first] if given["divisor_override"] is None else None
        case aten.add.Tensor | aten.mul.Tensor if dtype is not None and dtype.is_floating_point:
            if not _at_least_zero(given.get("alpha", 1)):
                return None
            operands = [first, given["other"]]
            numbers = [operand for operand in operands if not isinstance(operand, fx.Node)]
            return [n for n in operands if isinstance(n, fx.Node)] if all(map(_at_least_zero, numbers)) else None
        case _ if target in _CARRIERS:
            return list(first) if isinstance(first, (list, tuple)) else [first]
        case _:
            return None


def _at_least_zero(number: object, *, missing: bool = False) -> bool:
    if number is None:
        return missing
    return type(number) in (int, float) and number >= 0  # type: ignore[operator]
