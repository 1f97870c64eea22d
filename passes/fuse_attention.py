"""fuse-attention

    softmax(q k^T * scale + mask) v  ->  scaled_dot_product_attention(q, k, v, mask, scale=scale)

Products are matmul, bmm, baddbmm or einsum. The scale is a number on q, on k, or on the scores, or a tensor with one
number per query. Masks are added, or put in the place of scores (masked_fill, where); a constant one that hides
the future becomes is_causal. Casts to a wider dtype and back, dropout in inference, and reshapes of the batch do not
matter.

Legal when: the scores and the weights have no other reader; nothing is broadcast between q, k and v; no row is masked
as a whole, which is NaN in the model and 0 in the operator: each mask holds finite numbers only, or is a constant that
leaves each row a key; the result keeps its strides, by a reshape behind it or by a copy.
Profitable when: on the CPU, q, k and v have one head dimension and contiguous rows; else its fused kernel does not run.
Numerics: reassociates (exact in exact arithmetic, for finite values): the operator divides by the sum of exponentials
behind the product with v, not in front of it, and keeps scores of half precision in float32.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from fxopt import UNKNOWN, NoMatch, Pass, Rewriter, ir

from . import _attention, _mask
from ._attention import Attention, Operand, Sizes
from ._contraction import permutation

aten = torch.ops.aten

#: From so many keys on, copies of q, k and v cost little beside the scores that are not written.
_MANY_KEYS = 512
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: What may follow the result behind transposes, and gives strides that do not depend on the result's.
_SETTLES: tuple[Any, ...] = (aten.reshape.default, aten.flatten.using_ints, aten.contiguous.default, aten.clone.default)


def _widened(dtype: torch.dtype) -> torch.dtype:
    """What the operator computes in."""
    return torch.promote_types(dtype, torch.float32)


# -- guards ----------------------------------------------------------------------------------------------------------


def _dtype_guard(found: Attention) -> NoMatch | None:
    """q, k, v and the result have one floating dtype; between them, scores of half precision may be float32."""
    dtypes = [ir.dtype(part.node) for part in (found.q, found.k, found.v)]
    dtype = dtypes[0]
    if dtype is None or None in dtypes:
        return NoMatch(f"{UNKNOWN}the dtypes of q, k and v", found.root)
    if dtype not in _FLOATS or set(dtypes) != {dtype} or ir.dtype(found.root) != dtype:
        return NoMatch(f"q, k, v and the result have the dtypes {[*dtypes, ir.dtype(found.root)]}", found.root)
    wide = _widened(dtype)
    for node in found.nodes:
        if ir.dtype(node) not in (dtype, wide):
            return NoMatch(f"{node.name} is {ir.dtype(node)}, where the operator computes in {wide}", node)
    for _, value in found.rows:
        if ir.dtype(value) != dtype:
            return NoMatch(f"the scale {value.name} is {ir.dtype(value)}, not {dtype}", value)
    return None


def _shape_guard(found: Attention, target: Sizes) -> NoMatch | None:
    """The batch has at most two dimensions; where it is regrouped, its sizes are known well enough to say how."""
    if not math.isfinite(found.scale):
        return NoMatch(f"the scale is {found.scale}", found.root)
    if len(target) > 2:
        return NoMatch(f"the batch has {len(target)} dimensions, and the operator's kernels take two", found.root)
    parts = (found.q, found.k, found.v)
    if any(ir.static(size) == 0 for part in parts for size in part.sizes):
        return NoMatch("the scores are empty", found.root)
    for part in parts:
        lead = part.sizes[:-2]
        moved = not ir.same_sizes(lead, target)
        if moved and None in (_mask.reshaped(part.sizes), _mask.reshaped([*target, *part.sizes[-2:]])):
            return NoMatch("more than one size is open, where the batch has to be regrouped", found.root)
    return None


def _profit_guard(found: Attention) -> NoMatch | None:
    """The CPU's fused kernel runs; the other one computes the scores as before, and checks each row."""
    value = ir.fake(found.root)
    if value is None or value.device.type != "cpu":
        return None
    if not ir.same_sizes(found.q.sizes[-1:], found.v.sizes[-1:]):
        sizes = f"{found.q.sizes[-1]} and {found.v.sizes[-1]}"
        return NoMatch(f"the head dimensions {sizes} of q and v differ: the CPU's kernel would not run", found.root)
    keys = ir.static(found.k.sizes[-2])
    for part in (found.q, found.k, found.v):
        if not part.dense and (keys is None or keys < _MANY_KEYS):
            name = part.node.name
            return NoMatch(f"the rows of {name} are not contiguous: a copy costs more than is gained", part.node)
    return None


# -- building --------------------------------------------------------------------------------------------------------


@dataclass
class _Builder:
    """Builds the operator in the place of one attention."""

    rewriter: Rewriter
    found: Attention
    target: Sizes
    plan: _mask.Plan
    made: list[tuple[torch.Tensor, fx.Node]] = field(default_factory=list)

    def result(self, *, copied: bool) -> fx.Node:
        """What the root gives, with its axes in order; a copy of it, if its strides count."""
        call = self.rewriter.call
        q = self._arranged(self.found.q, self.found.rows)
        k, v = self._arranged(self.found.k), self._arranged(self.found.v)
        node = call(
            aten.scaled_dot_product_attention.default,
            q,
            k,
            v,
            self._masks(),
            0.0,
            self.plan.causal,
            scale=self.found.scale,
        )
        if copied:
            node = call(aten.contiguous.default, node)
        for dim in {2: (), 1: (1,), 0: (0, 0)}[len(self.target)]:
            node = call(aten.squeeze.dim, node, dim)
        lead = self.found.v.sizes[:-2]
        if not ir.same_sizes(lead, self.target):
            node = call(aten.reshape.default, node, _mask.reshaped([*lead, *self._shape(node)[-2:]]))
        if self.found.order != sorted(self.found.order):
            node = call(aten.permute.default, node, self.found.order)
        return node

    def _shape(self, node: fx.Node) -> Sizes:
        shape = ir.shape(node)
        assert shape is not None
        return shape

    def _arranged(self, part: Operand, rows: tuple[tuple[Any, fx.Node], ...] = ()) -> fx.Node:
        """q, k or v as (batch, heads, rows, features), a row's features side by side."""
        call, node = self.rewriter.call, part.node
        if part.order != sorted(part.order):
            node = call(aten.permute.default, node, part.order)
        for scale, value in rows:
            node = call(scale, node, value)
        if not ir.same_sizes(part.sizes[:-2], self.target):
            node = call(aten.reshape.default, node, _mask.reshaped([*self.target, *part.sizes[-2:]]))
        for dim in {2: (), 1: (1,), 0: (0, 0)}[len(self.target)]:
            node = call(aten.unsqueeze.default, node, dim)
        return node if Operand(node, [0, 1, 2, 3]).dense else call(aten.contiguous.default, node)

    def _masks(self) -> fx.Node | None:
        """All masks as one tensor of two or four dimensions."""
        call, dtype = self.rewriter.call, ir.dtype(self.found.q.node)
        assert dtype is not None
        parts = []
        constant = self.plan.constant
        if constant is not None:
            constant = constant if constant.dtype is torch.bool else constant.to(_widened(dtype))
            parts.append(self._moved(self._constant(constant), self.plan.lead))
        for mask in self.plan.added:
            value, scale = mask.value, mask.scale
            if mask.fill is not None:
                scale *= mask.fill
                if not mask.drop:
                    value = call(aten.logical_not.default, value)
            if scale != 1:
                # In half precision it might be infinite.
                if ir.dtype(value) is not _widened(dtype):
                    value = call(aten.to.dtype, value, _widened(dtype))
                value = call(aten.mul.Tensor, value, scale)
            parts.append(self._moved(value, mask.lead))
        whole = parts[0] if parts else None
        for part in parts[1:]:
            whole = call(aten.add.Tensor, whole, part)
        # The CPU's kernel takes a float32 mask beside float64, and reads it as float64 (torch 2.13).
        if whole is not None and ir.dtype(whole) not in (torch.bool, dtype, _widened(dtype)):
            whole = call(aten.to.dtype, whole, dtype)
        return whole

    def _moved(self, value: fx.Node, lead: Sizes) -> fx.Node:
        moved = _mask.moves(self._shape(value), lead, self.target, self.found.lead)
        assert not isinstance(moved, NoMatch)
        for move, arguments in moved:
            value = self.rewriter.call(move, value, *fx.node.map_aggregate(arguments, self._size))
        return value

    def _size(self, size: Any) -> Any:
        """A size that only the call knows, as a node."""
        if not isinstance(size, _mask.Share):
            return size
        q = self.found.q
        axis = next(axis for axis, known in zip(q.order, q.sizes, strict=True) if ir.static(known) is None)
        whole = self.rewriter.call(aten.sym_size.int, q.node, axis)
        return whole if size.by == 1 else self.rewriter.call(operator.floordiv, whole, size.by)

    def _constant(self, value: torch.Tensor) -> fx.Node:
        """A constant mask, the one of a layer in front where it is the same."""
        for tensor, node in self.made:
            if not node._erased and tensor.dtype == value.dtype and torch.equal(tensor, value):
                return node
        node = self.rewriter.constant(value, "attention_mask")
        self.made.append((value, node))
        return node


def _tails(root: fx.Node) -> list[tuple[fx.Node, ...]]:
    """What follows the root and only looks at its values, up to each node whose strides do not depend on the root's."""
    found: list[tuple[fx.Node, ...]] = []
    chain: list[fx.Node] = []
    node = root
    while len(node.users) == 1:
        (node,) = node.users
        settles = node.target in _SETTLES
        if node.args[:1] != (chain[-1] if chain else root,) or not (settles or permutation(node)):
            break
        chain.append(node)
        if settles:
            found.append(tuple(chain))
    return found


def _replace(rewriter: Rewriter, build: _Builder, rule: str) -> NoMatch | None:
    """Puts the operator in the root's place: as it is, else with what follows it, else as a copy, by the strides."""
    found = build.found

    def rebuilt(tail: tuple[fx.Node, ...]) -> fx.Node:
        node, before = build.result(copied=False), found.root
        for step in tail:
            args, kwargs = fx.map_arg((step.args, step.kwargs), lambda n: node if n is before else n)  # noqa: B023
            node, before = rewriter.call(step.target, *args, **kwargs), step
        return node

    reason: NoMatch | None = None
    for tail in ((), *_tails(found.root)):
        root = tail[-1] if tail else found.root
        refusal = rewriter.refusal((*found.nodes, *tail), root, shared=found.shared)
        result = refusal or rewriter.substitute(root, partial(rebuilt, tail), rule=rule, nodes=(*found.nodes, *tail))
        if not isinstance(result, NoMatch):
            return None
        reason = reason or result
    keys, features = ir.static(found.k.sizes[-2]), ir.static(found.v.sizes[-1])
    if keys is None or features is None or keys < features:
        return reason
    refusal = rewriter.refusal(found.nodes, found.root, shared=found.shared)
    result = refusal or rewriter.substitute(
        found.root, partial(build.result, copied=True), rule=rule, nodes=found.nodes
    )
    return result if isinstance(result, NoMatch) else None


def _fuse(softmax: fx.Node, rewriter: Rewriter, facts: _mask.Facts, made: list[Any]) -> NoMatch | None:
    found = _attention.find(softmax, facts.constant)
    if isinstance(found, NoMatch):
        return found
    spaces = found.spaces
    target = next((lead for lead in spaces if len(lead) == 2), spaces[0])
    refusal = rewriter.refusal(found.nodes, found.root, shared=found.shared) or (
        _dtype_guard(found) or _shape_guard(found, target) or _profit_guard(found)
    )
    if refusal is not None:
        return refusal
    plan = _mask.plan(found, facts)
    if isinstance(plan, NoMatch):
        return plan
    for shape, lead in plan.shapes:
        moved = _mask.moves(shape, lead, target, found.lead)
        if isinstance(moved, NoMatch):
            return moved
    masked = plan.constant is not None or plan.added
    rule = "causal-attention" if plan.causal else "masked-attention" if masked else "attention"
    return _replace(rewriter, _Builder(rewriter, found, target, plan, made), rule)


def _run(rewriter: Rewriter) -> None:
    facts, made = _mask.Facts(rewriter), list[tuple[torch.Tensor, fx.Node]]()
    for node in list(rewriter.graph.nodes):
        if node.target not in _attention.SOFTMAX or node._erased:
            continue
        refusal = _fuse(node, rewriter, facts, made)
        if refusal is not None:
            rewriter.decline(node, refusal.reason, rule="attention", fits=refusal.fits)


PASS = Pass("fuse-attention", run=_run, numerics="reassociate", doc=__doc__)
