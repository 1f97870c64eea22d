"""drop-identities

    dropout(x), inference              ->  x       and feature, alpha, feature-alpha dropout
    x.to(its own dtype and device)     ->  x       contiguous() of what is contiguous
    reshape, expand, permute, slice    ->  x       to the same shape, in the same order, of everything
    pad by zeros, pool of one element  ->  x
    x * 1, x / 1, x - 0, x + -0.0, clone(x)  ->  x   unless the copy itself matters

Legal when: the operation gives back its input's values with the same shape, dtype, device and strides. Where it hands
out the very same memory (dropout), so does its input. Where it makes a fresh tensor (x * 1), the result must not be the
model's, nor an alias of one, and nothing may write to either. x + 0 is not x for x = -0.0.
Numerics: the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from fxopt import Pass, Rewriter, ir
from fxopt.rewrite import UNKNOWN
from torch import fx

aten = torch.ops.aten

_DROPOUTS = (
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
)
_VIEWS = (
    aten.reshape.default,
    aten.expand.default,
    aten.permute.default,
    aten.slice.Tensor,
    aten.flatten.using_ints,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.contiguous.default,
    aten.type_as.default,
)
_FRESH = (aten.mul.Tensor, aten.div.Tensor, aten.sub.Tensor, aten.add.Tensor, aten.clone.default, aten.pad.default)
_POOLS = (aten.max_pool2d.default, aten.avg_pool2d.default)
TARGETS: tuple[Any, ...] = (*_DROPOUTS, *_VIEWS, *_FRESH, *_POOLS)


def _is_negative_zero(number: object) -> bool:
    return isinstance(number, float) and number == 0 and str(number) == "-0.0"


def _keeps_values(node: fx.Node) -> str | None:
    """None where the operator gives back its first argument's values; else why it may not."""
    given = ir.arguments(node)
    match node.target:
        case target if target in _DROPOUTS:
            return None if given["train"] is False or given["p"] == 0 else "dropout is in training mode"
        case aten.mul.Tensor | aten.div.Tensor:
            plain = type(given["other"]) in (int, float) and given["other"] == 1
            return None if plain else "it multiplies by something else than 1"
        case aten.sub.Tensor:
            zero = type(given["other"]) in (int, float) and given["other"] == 0 and not _is_negative_zero(given["other"])
            return None if zero else "it subtracts something else than 0"
        case aten.add.Tensor:
            return None if _is_negative_zero(given["other"]) else "it adds something; x + 0 is not x for x = -0.0"
        case aten.pad.default:
            return None if all(pad == 0 for pad in given["pad"]) else "it pads"
        case aten.max_pool2d.default | aten.avg_pool2d.default:
            one = all(size == 1 for key in ("kernel_size", "stride") for size in given[key])
            return None if one and all(pad == 0 for pad in given["padding"]) else "it pools"
        case aten.permute.default:
            rank = ir.rank(given["self"])
            same = rank is not None and [dim % rank for dim in given["dims"]] == list(range(rank))
            return None if same else "it permutes"
        case aten.slice.Tensor:
            first = given["start"] in (None, 0) and given["step"] == 1
            return None if first else "it takes a part"
        case aten.to.dtype | aten.to.device | aten.to.dtype_layout:
            return None if not given.get("copy") else "it asks for a copy"
        case _:
            return None


def _run(rewriter: Rewriter) -> None:
    for node in list(rewriter.graph.nodes):
        if node.op != "call_function" or node.target not in TARGETS or node._erased:
            continue
        reason = _keeps_values(node)
        if reason is None:
            reason = _observable(node, rewriter)
        if reason is not None:
            rewriter.decline(node, reason, rule="identity")
            continue
        source = node.args[0]
        assert isinstance(source, fx.Node)
        rewriter.substitute(node, lambda source=source: source, rule="identity")  # type: ignore[misc]


def _observable(node: fx.Node, rewriter: Rewriter) -> str | None:
    """None where nobody can tell the result from the first argument; else how somebody could."""
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return "its input is no value of the graph"
    if node.target in _DROPOUTS:
        return None
    before, after = ir.fake(source), ir.fake(node)
    if before is None or after is None:
        return f"{UNKNOWN}whether the shape, dtype and strides are its input's"
    if (before.dtype, before.device) != (after.dtype, after.device):
        return f"it changes {before.dtype} to {after.dtype}"
    if not ir.same_sizes(before.shape, after.shape):
        return "it changes the shape"
    if not ir.same_sizes(before.stride(), after.stride()):
        return "it changes the strides"
    if node.target in _VIEWS:
        return None
    if _is_result(node, rewriter):
        return "the model hands out the copy, which must stay distinct from its input"
    written = rewriter.aliases.written_after(source, (source, node))
    return f"{written.name} writes to the copy or to its input" if written is not None else None


def _is_result(node: fx.Node, rewriter: Rewriter) -> bool:
    """Whether a result of the model is the node or may share memory with it."""
    aliases = rewriter.aliases
    output = next(iter(reversed(rewriter.graph.nodes)))
    roots = {aliases.root(result) for result in output.all_input_nodes}
    return aliases.root(node) in roots


PASS = Pass("drop-identities", run=_run, numerics="bitwise", doc=__doc__)

