"""drop-identities

    dropout(x), inference              ->  x       and feature, alpha, feature-alpha dropout
    x.to(its own dtype and device)     ->  x       contiguous() of what is contiguous
    reshape, expand, permute, slice    ->  x       to the same shape, in the same order, of everything
    pad by zeros, max pool of one element  ->  x
    x * 1, x / 1, x - 0, x + -0.0, clone(x)  ->  x   unless the copy itself matters

Legal when: the operation gives back its input's values with the same shape, dtype, device and strides. Where it hands
out the very same tensor (dropout), so does its input. Where it makes another view of it (reshape), the view is not the
model's result, and no opaque node takes either. Where it makes a fresh tensor (x * 1), the result must
not be the model's, nor an alias of one, and nothing may write to either. x + 0 is not x for x = -0.0, and neither is an
average of one element.
Numerics: the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt import UNKNOWN, NoMatch, Pass, Rewriter, ir

from . import _memory

aten = torch.ops.aten

#: These give back the very tensor that they were given.
_SAME = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.contiguous.default,
    aten.type_as.default,
)
_DROPOUTS = _SAME[:4]
#: So do these, unless a memory format makes them copy.
_CASTS = (aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.prim_Device)
#: These make another tensor of the same memory.
_VIEWS = (
    aten.alias.default,
    aten.reshape.default,
    aten.expand.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten.flatten.using_ints,
)
#: These copy.
_FRESH = (
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.sub.Tensor,
    aten.add.Tensor,
    aten.clone.default,
    aten.pad.default,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
)
TARGETS: tuple[Any, ...] = (*_SAME, *_CASTS, *_VIEWS, *_FRESH)


def _is_negative_zero(number: object) -> bool:
    return isinstance(number, float) and number == 0 and str(number) == "-0.0"


def _is_one(number: object) -> bool:
    return type(number) in (int, float) and number == 1


def _each(value: object, wanted: int) -> bool:
    """Whether a number, or every number of a list, is `wanted`."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return all(type(number) is int and number == wanted for number in numbers)


def _keeps_values(node: fx.Node) -> str | None:
    """None where the operator gives back its first argument's values; else why it may not."""
    given = ir.arguments(node)
    match node.target:
        case target if target in _DROPOUTS:
            return None if given["train"] is False or given["p"] == 0 else "dropout is in training mode"
        case aten.mul.Tensor | aten.div.Tensor:
            return None if _is_one(given["other"]) else "it multiplies or divides by something else than 1"
        case aten.sub.Tensor | aten.add.Tensor if not _is_one(given["alpha"]):
            return f"the other operand is scaled by alpha={given['alpha']!r}"
        case aten.sub.Tensor:
            zero = type(given["other"]) in (int, float) and given["other"] == 0
            zero = zero and not _is_negative_zero(given["other"])
            return None if zero else "it subtracts something else than 0"
        case aten.add.Tensor:
            return None if _is_negative_zero(given["other"]) else "it adds something; x + 0 is not x for x = -0.0"
        case aten.pad.default:
            return None if _each(given["pad"], 0) else "it pads"
        case aten.max_pool1d.default | aten.max_pool2d.default | aten.max_pool3d.default:
            # No stride means the kernel's size; of a kernel of one, torch takes no padding.
            one = _each(given["kernel_size"], 1) and _each(given["stride"], 1)
            return None if one else "it pools"
        case aten.permute.default:
            rank = ir.rank(node)
            same = rank is not None and [dim % rank for dim in given["dims"]] == list(range(rank))
            return None if same else "it permutes"
        case aten.slice.Tensor:
            first = given["start"] in (None, 0) and given["step"] == 1
            return None if first else "it takes a part"
        case target if target in _CASTS:
            copies = given["copy"] or given.get("memory_format") not in (None, torch.preserve_format)
            return "it asks for a copy, or for a memory format" if copies else None
        case _:
            return None


def _run(rewriter: Rewriter) -> None:
    # Readers first: dropout hands its input on, so who reads a dropout reads what is in front of it.
    for node in reversed(list(rewriter.graph.nodes)):
        if node.op != "call_function" or node.target not in TARGETS or node._erased:
            continue
        changes = _keeps_values(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        reason = changes or _observable(node, source, rewriter)
        if reason is not None:
            rewriter.decline(node, reason, rule="identity", fits=changes is None)
            continue
        result = rewriter.substitute(node, lambda source=source: source, rule="identity")  # type: ignore[misc]
        if isinstance(result, NoMatch):
            rewriter.decline(node, result.reason, rule="identity")


def _observable(node: fx.Node, source: fx.Node, rewriter: Rewriter) -> str | None:
    """None where nobody can tell the result from `source`, the first argument; else how somebody could."""
    if node.target in _DROPOUTS:
        return None
    before, after = ir.fake(source), ir.fake(node)
    if before is None or after is None:
        return f"{UNKNOWN}whether the shape, dtype and strides are its input's"
    if (before.dtype, before.device) != (after.dtype, after.device):
        return f"it changes {before.dtype} on {before.device} to {after.dtype} on {after.device}"
    if not ir.same_sizes(before.shape, after.shape):
        return "it changes the shape"
    if not ir.same_sizes(before.stride(), after.stride()):
        return "it changes the strides"
    if node.target in _VIEWS:
        return _memory.told_from_the_very_tensor(node, rewriter)
    return _memory.told_from_other_memory(node, source, rewriter) if node.target in _FRESH else None


PASS = Pass("drop-identities", run=_run, numerics="bitwise", doc=__doc__)
