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
    """Whether a node's first operand is computed for it alone, with its result's dtype, sizes and strides."""
    operand = node.args[0]
    if not isinstance(operand, fx.Node) or not isinstance(operand.target, OpOverload) or len(operand.users) != 1:
        return False
    before, after = ir.fake(operand), ir.fake(node)
    return (
        _fresh(operand)
        and before is not None
        and after is not None
        and sum(argument is operand for argument in (*node.args, *node.kwargs.values())) == 1
        and (before.dtype, before.shape, before.stride()) == (after.dtype, after.shape, after.stride())
    )


def _fresh(node: fx.Node) -> bool:
    """Whether a value lies in memory that the graph computed, and that only a chain of in-place operators has seen."""
    while found := effects.of(node).writes:
        if found != node.args[:1] or effects.of(node).opaque:
            return False  # `out=`, say: what it gives lies in another operand's memory
        node = found[0]
        if len(node.users) != 1:
            return False
    return isinstance(node.target, OpOverload) and not effects.of(node).aliases
