"""Elementwise operators overwrite their operand where nobody else reads it: no new memory, half the traffic.

    y = relu(x)   ->   y = relu_(x)        x computed by the graph, read by nothing else, as large and as laid out as y

For lowered graphs only: in the IR what can be pure is pure.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt import effects, ir
from fxopt.rewrite import Rewriter

aten = torch.ops.aten

#: Elementwise operators, and what writes their result to their first operand.
WRITTEN: dict[Any, OpOverload] = {
    pure: getattr(getattr(aten, f"{pure._opname}_"), pure._overloadname)
    for pure in (
        aten.relu.default, aten.clamp.default, aten.hardtanh.default, aten.leaky_relu.default, aten.elu.default,
        aten.silu.default, aten.gelu.default, aten.hardswish.default, aten.hardsigmoid.default, aten.sigmoid.default,
        aten.tanh.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor,
    )
}  # fmt: skip


def overwrite_operands(rewriter: Rewriter) -> None:
    """Lets elementwise operators write to a first operand that nobody else could miss."""
    for node in list(rewriter.graph.nodes):
        written = WRITTEN.get(node.target)
        if written is not None and _own(node):
            rewriter.substitute(node, partial(rewriter.call, written, *node.args, **node.kwargs), rule="overwrite")


def _own(node: fx.Node) -> bool:
    """Whether a node's first operand is computed for it alone, with its result's dtype and sizes.

    Strides are the driver's to compare: it does so in each pass that keeps all bits.
    """
    operand = node.args[0]
    if not isinstance(operand, fx.Node) or len(operand.users) != 1 or operand in node.args[1:]:
        return False
    kind = _kind(operand)
    return kind is not None and kind == _kind(node) and _fresh(operand)


def _kind(node: fx.Node) -> tuple[object, ...] | None:
    """The dtype and sizes of what a node gives; None where only running it tells."""
    found = ir.fake(node)
    return None if found is None else (found.dtype, found.shape)


def _fresh(node: fx.Node) -> bool:
    """Whether a value lies in memory that the graph computed, and that only a chain of in-place operators has seen."""
    while (found := effects.of(node)).writes:
        if found.opaque or not found.writes == found.aliases == node.args[:1]:
            return False  # what it gives may lie in another operand's memory (`out=`), or anywhere
        node = found.writes[0]
        if len(node.users) != 1:
            return False
    return isinstance(node.target, OpOverload) and not found.aliases
