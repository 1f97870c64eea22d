"""cancel-transposes

    transpose(transpose(x))                              ->  x, or one permute(x)
    transpose(f(transpose(x)))                           ->  f(x), or f(permute(x)) of both
    transpose(g(transpose(x), transpose(y)))             ->  g(x, y), the same

A transpose is permute, transpose, t, T, mT, movedim or swapaxes, under any of their names; f and g are operations on
single elements, or several of them in a row.

Legal when: nothing writes to a value in between; an x that is handed out, or that an opaque node takes, stays
another tensor than its transposes. Around elementwise operations: all operands are transposed alike, have one shape and
one order of strides without gaps, or are numbers; nobody else reads what is computed in between.
Numerics: the same bits. Kernels may round otherwise where memory has gaps; gelu's does in another order, so it is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxopt import UNKNOWN, NoMatch, Pass, Rewriter, ir

from . import _memory
from ._shapes import TRANSPOSES, order_of

aten = torch.ops.aten

#: Operations on single elements. Their kernels go through dense memory in its own order, so it decides every bit.
UNARY = frozenset(
    {
        aten.abs.default,
        aten.celu.default,
        aten.clamp.default,
        aten.cos.default,
        aten.elu.default,
        aten.erf.default,
        aten.exp.default,
        aten.expm1.default,
        aten.floor.default,
        aten.hardshrink.default,
        aten.hardsigmoid.default,
        aten.hardswish.default,
        aten.hardtanh.default,
        aten.leaky_relu.default,
        aten.log.default,
        aten.log1p.default,
        aten.mish.default,
        aten.neg.default,
        aten.pow.Tensor_Scalar,
        aten.reciprocal.default,
        aten.relu.default,
        aten.relu6.default,
        aten.rsqrt.default,
        aten.selu.default,
        aten.sigmoid.default,
        aten.sign.default,
        aten.silu.default,
        aten.sin.default,
        aten.softplus.default,
        aten.softshrink.default,
        aten.sqrt.default,
        aten.square.default,
        aten.tanh.default,
        aten.threshold.default,
    }
)
#: The same of two tensors, or of one and a number.
BINARY = frozenset(
    {
        aten.add.Tensor,
        aten.add.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.maximum.default,
        aten.minimum.default,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.rsub.Scalar,
        aten.sub.Tensor,
        aten.sub.Scalar,
    }
)
ELEMENTWISE = UNARY | BINARY
#: Matrix products, whose kernels take transposed operands as they are.
_PRODUCTS = (aten.matmul.default, aten.mm.default, aten.bmm.default, aten.baddbmm.default, aten.addmm.default)
CHAIN, AROUND = "transpose-of-transpose", "transposes-around-elementwise"


def _composed(second: Sequence[int], first: Sequence[int]) -> list[int] | None:
    """The order of both transposes in one; None where the second undoes the first."""
    order = [first[dim] for dim in second]
    return None if order == list(range(len(first))) else order


def _product_reads(node: fx.Node) -> str | None:
    """Kernels of matrix products take transposed operands as they are, and patterns look for that transpose."""
    readers = [user.name for user in node.users if user.target in _PRODUCTS]
    return f"{readers[0]} takes the last transpose as it is" if readers else None


# -- chains ----------------------------------------------------------------------------------------------------------


def _chain(node: fx.Node, inner: fx.Node, rewriter: Rewriter) -> fx.Node | NoMatch:
    first, second = order_of(inner), order_of(node)
    if first is None or second is None:
        return NoMatch(f"{UNKNOWN}the rank of {inner.name} and the dims say what moves", node)
    source, order = inner.args[0], _composed(second, first)
    assert isinstance(source, fx.Node)
    told = _written((node, inner), rewriter)
    told = told or (_memory.told_from_the_very_tensor(node, rewriter) if order is None else _product_reads(node))
    if told:
        return NoMatch(told, node)
    return rewriter.substitute(node, lambda: _transposed(source, order, rewriter), rule=CHAIN, nodes=(inner,))


def _transposed(source: fx.Node, order: list[int] | None, rewriter: Rewriter) -> fx.Node:
    return source if order is None else rewriter.call(aten.permute.default, source, order)


def _written(nodes: Sequence[fx.Node], rewriter: Rewriter) -> str | None:
    values = {operand for node in nodes for operand in (node, *node.all_input_nodes)}
    writer = rewriter.aliases.writer_between(min(nodes), max(nodes), values)
    return None if writer is None else f"{writer.name} may write to a value of the match in between"


# -- around elementwise operations -----------------------------------------------------------------------------------


class _Region:
    """The elementwise operations in front of a transpose, back to the transposes of what they read."""

    def __init__(self, root: fx.Node) -> None:
        self.root = root
        self.first: tuple[int, ...] | None = None
        self.steps: dict[fx.Node, None] = {}
        self.leaves: dict[fx.Node, fx.Node] = {}

    def take(self, node: fx.Node) -> NoMatch | None:
        """Takes in a value that the region computes from, or says why it cannot."""
        if node in self.steps or node in self.leaves or not _is_tensor(node):
            return None
        if node.target in TRANSPOSES:
            first = order_of(node)
            if first is None:
                return NoMatch(f"{UNKNOWN}the rank of what {node.name} transposes", node)
            if self.first not in (None, first):
                return NoMatch(f"{node.name} is transposed otherwise than {next(iter(self.leaves)).name}", node)
            source = node.args[0]
            assert isinstance(source, fx.Node)
            self.first, self.leaves[node] = first, source
            return None
        if node.target not in ELEMENTWISE:
            return NoMatch(f"{node.name} ({ir.target_name(node)}) is not transposed", node)
        alpha = ir.arguments(node).get("alpha", 1)
        if type(alpha) is not int or alpha != 1:
            return NoMatch(f"{node.name} scales an operand by alpha={alpha!r}", node)
        for operand in node.all_input_nodes:
            refusal = self.take(operand)
            if refusal is not None:
                return refusal
        self.steps[node] = None
        return None

    def guard(self) -> NoMatch | None:
        """Nobody else reads a step; the sources lie in memory alike, without gaps."""
        for step in self.steps:
            for user in step.users:
                if user is not self.root and user not in self.steps:
                    where = "is a result of the model" if user.op == "output" else f"is also read by {user.name}"
                    return NoMatch(f"{step.name} {where}", step)
        sources = list(self.leaves.values())
        first = ir.fake(sources[0])
        for source in sources:
            value = ir.fake(source)
            if value is None or first is None:
                return NoMatch(f"{UNKNOWN}the strides of {source.name}", source)
            if not _memory.is_dense(value):
                return NoMatch(f"{source.name} has gaps in memory", source)
            if not ir.same_sizes(value.shape, first.shape) or not ir.same_sizes(value.stride(), first.stride()):
                return NoMatch(f"{source.name} and {sources[0].name} differ in shape or strides", source)
        return None

    def build(self, order: list[int] | None, rewriter: Rewriter) -> fx.Node:
        """The same operations on what is transposed once, or not at all."""
        made = {leaf: _transposed(source, order, rewriter) for leaf, source in self.leaves.items()}
        for step in self.steps:
            args, kwargs = fx.map_arg((step.args, step.kwargs), lambda operand: made.get(operand, operand))
            made[step] = rewriter.call(step.target, *args, **kwargs)
        return made[next(reversed(self.steps))]


def _is_tensor(node: fx.Node) -> bool:
    """Whether a value has dimensions that a transpose could move, by what is known of it."""
    value = ir.value(node)
    return value is None or (isinstance(value, torch.Tensor) and value.dim() > 0)


def _around(node: fx.Node, inner: fx.Node, rewriter: Rewriter) -> fx.Node | NoMatch:
    region = _Region(node)
    refusal = region.take(inner)
    if refusal is not None:
        return refusal
    second = order_of(node)
    if region.first is None:
        return NoMatch("nothing is transposed", node)
    if second is None:
        return NoMatch(f"{UNKNOWN}the rank of {inner.name} and the dims say what moves", node)
    order = _composed(second, region.first)
    matched = (node, *region.steps, *region.leaves)
    told = region.guard() or _written(matched, rewriter) or (_product_reads(node) if order else None)
    if told:
        return told if isinstance(told, NoMatch) else NoMatch(told, node)
    return rewriter.substitute(node, lambda: region.build(order, rewriter), rule=AROUND, nodes=matched)


# -- the pass --------------------------------------------------------------------------------------------------------


def _cancel(node: fx.Node, rewriter: Rewriter) -> fx.Node | None:
    inner = node.args[0]
    assert isinstance(inner, fx.Node)
    if inner.target in TRANSPOSES:
        rule, found = CHAIN, _chain(node, inner, rewriter)
    elif inner.target in ELEMENTWISE:
        rule, found = AROUND, _around(node, inner, rewriter)
    else:
        return None
    if isinstance(found, fx.Node):
        return found
    rewriter.decline(node, found.reason, rule=rule)
    return None


def _run(rewriter: Rewriter) -> None:
    changed = True
    while changed:  # what is computed between two transposes can lose its other reader
        changed = False
        for node in list(rewriter.graph.nodes):
            current: fx.Node | None = node
            while current is not None and current.op == "call_function" and current.target in TRANSPOSES:
                current = None if current._erased else _cancel(current, rewriter)
                changed |= current is not None


PASS = Pass("cancel-transposes", run=_run, numerics="bitwise", doc=__doc__)
