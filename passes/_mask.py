"""The mask of an attention as the operator takes it, or why it cannot be one.

A row of scores that a mask empties gives NaN where the softmax stands, and 0 in the operator. So each row must be known
to keep a key: no score of it is minus infinity (`Facts.bounds`), or the mask is a constant that can be looked at
(`Facts.constant`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt import UNKNOWN, NoMatch, Rewriter, effects, ir

from ._attention import Attention, Mask, Sizes

aten = torch.ops.aten

#: Constants of more elements are not computed.
_LARGEST = 1 << 24
#: Operators that give values of their first argument, in whatever order and number.
_PICKING: tuple[Any, ...] = (
    *(aten.reshape.default, aten.expand.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.slice.Tensor, aten.select.int, aten.clone.default, aten.contiguous.default),
    *(aten.detach.default, aten.alias.default, aten.index.Tensor, aten.embedding.default, aten.index_select.default),
    *(aten.to.dtype, aten.type_as.default, aten.repeat.default),
)
_WHERE: tuple[Any, ...] = (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
_SUMS: tuple[Any, ...] = (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar)
_MASKED_FILLS: tuple[Any, ...] = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)


class Facts:
    """What is known of values before a call: those of constants, and the range of others."""

    def __init__(self, rewriter: Rewriter) -> None:
        self.rewriter = rewriter
        self._constants: dict[fx.Node, torch.Tensor | None] = {}
        self._bounds: dict[fx.Node, tuple[float, float] | None] = {}

    def constant(self, node: Any) -> torch.Tensor | None:
        """The value of what depends on no input and is never written; None for anything else."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._constants:
            self._constants[node] = None if self._written(node) else self._evaluate(node)
        return self._constants[node]

    def _written(self, node: fx.Node) -> bool:
        return self.rewriter.aliases.writer_of(node) is not None

    def _evaluate(self, node: fx.Node) -> torch.Tensor | None:
        if node.op == "get_attr":
            found = ir.tensor(node)
            plain = found is not None and type(found) is torch.Tensor and found.layout is torch.strided
            return found if plain and not (found.is_meta or found.requires_grad) else None  # type: ignore[union-attr]
        known, target = ir.fake(node), node.target
        if known is None or not isinstance(target, OpOverload) or target.namespace != "aten":
            return None
        if not effects.of(node).pure or "empty" in target._opname:
            return None
        if any(ir.static(size) is None for size in known.shape) or math.prod(known.shape) > _LARGEST:
            return None
        operands = {operand: self.constant(operand) for operand in node.all_input_nodes}
        if any(operand is None for operand in operands.values()):
            return None
        args, kwargs = fx.map_arg((node.args, node.kwargs), operands.__getitem__)
        found = target(*args, **kwargs)
        return found if isinstance(found, torch.Tensor) else None

    def bounds(self, value: Any) -> tuple[float, float] | None:
        """The smallest and largest number that a value can hold, both finite; None where it may hold others."""
        if type(value) in (int, float):
            return (float(value), float(value)) if math.isfinite(value) else None
        if not isinstance(value, fx.Node) or ir.dtype(value) is None:
            return None
        if value not in self._bounds:
            found = None if self._written(value) else self._bounds_of(value)
            limit = _limit(ir.dtype(value))
            self._bounds[value] = found if found is not None and max(-found[0], found[1]) <= limit else None
        return self._bounds[value]

    def _bounds_of(self, node: fx.Node) -> tuple[float, float] | None:
        if ir.dtype(node) is torch.bool:
            return 0.0, 1.0
        found = self.constant(node)
        if found is not None:
            if found.numel() == 0 or found.is_complex() or not bool(torch.isfinite(found).all()):
                return None
            return float(found.min()), float(found.max())
        if node.op != "call_function":
            return None
        if node.target in _PICKING:
            return self.bounds(node.args[0])
        if node.target not in (*_WHERE, *_MASKED_FILLS, *_SUMS, aten.mul.Tensor):
            return None
        given = ir.arguments(node)
        left, right = self.bounds(given["self"]), self.bounds(given.get("other", given.get("value")))
        if left is None or right is None or given.get("alpha", 1) != 1:
            return None
        if node.target in (*_WHERE, *_MASKED_FILLS):
            return min(left[0], right[0]), max(left[1], right[1])
        if node.target is aten.mul.Tensor:
            corners = [x * y for x in left for y in right]
            return min(corners), max(corners)
        if node.target is aten.rsub.Scalar:
            left, right = right, left
        if node.target is not aten.add.Tensor:
            right = (-right[1], -right[0])
        return left[0] + right[0], left[1] + right[1]


def _limit(dtype: torch.dtype | None) -> float:
    return torch.finfo(dtype).max if dtype is not None and dtype.is_floating_point else 2.0**63


# -- what the operator is given --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """`causal`, or what is added to the scores: a `constant` with the batch sizes `lead`, and masks of the graph.

    A constant of booleans says what is kept.
    """

    causal: bool = False
    constant: torch.Tensor | None = None
    lead: Sizes = ()
    added: tuple[Mask, ...] = ()

    @property
    def shapes(self) -> list[tuple[Sizes, Sizes]]:
        """The shape of each mask, with the batch sizes of the scores that it is added to."""
        found = [(tuple(ir.shape(mask.value) or ()), mask.lead) for mask in self.added]
        return found if self.constant is None else [*found, (tuple(self.constant.shape), self.lead)]


def plan(attention: Attention, facts: Facts) -> Plan | NoMatch:
    """All masks of an attention as one, with no row that it empties."""
    held = [(mask, facts.constant(mask.value)) for mask in attention.masks]
    for mask, value in held:
        refusal = _guard(mask, value, facts)
        if refusal is not None:
            return refusal
    added = tuple(mask for mask, value in held if value is None)
    constants = [(mask, _as_sum(mask, value)) for mask, value in held if value is not None]
    lows = [_lowest(mask, facts) for mask in added]
    lows += [float(part[part.isfinite()].min()) for _, part in constants if bool(part.isfinite().any())]
    if lows and not -sum(lows) <= _limit(ir.dtype(attention.masks[0].node)):
        return NoMatch("the masks together may leave the range of the scores' dtype, and empty a row", attention.root)
    return _combined(attention, constants, added) if constants else Plan(added=added)


def _guard(mask: Mask, held: torch.Tensor | None, facts: Facts) -> NoMatch | None:
    dtype, node = ir.dtype(mask.value), mask.node
    scores = ir.dtype(node)
    if dtype is None or scores is None:
        return NoMatch(f"{UNKNOWN}the dtype of {mask.value.name}", node)
    if ir.rank(mask.value) == 0:
        # It could also be on another device than the scores.
        return NoMatch(f"{mask.value.name} has no dimensions: it is for all scores alike", node)
    if mask.fill is None and not dtype.is_floating_point:
        return NoMatch(f"{mask.value.name} is {dtype}, not floating point", node)
    if mask.fill is None and held is not None:
        scaled = held.double() * mask.scale
        broken = bool((scaled.isnan() | (scaled == math.inf)).any())
        return NoMatch(f"{mask.value.name} holds NaN or infinity", node) if broken else None
    if mask.fill is None:
        if facts.bounds(mask.value) is not None and -_lowest(mask, facts) <= _limit(scores):
            return None
        return NoMatch(f"{mask.value.name} may be -inf in a whole row, which is NaN here and 0 in the operator", node)
    fill = mask.fill * mask.scale
    if not fill * torch.finfo(scores).eps <= -64:
        return NoMatch(f"{fill} in the place of a score is no minus infinity: a score may be as low", node)
    if held is not None:
        return None
    if fill == -math.inf:
        return NoMatch(f"{mask.value.name} may mask a whole row, which is NaN here and 0 in the operator", node)
    if not _swallows(fill, scores):
        return NoMatch(f"{mask.value.name} may mask a whole row, and {fill} plus a score is not {fill}", node)
    return None


def _swallows(fill: float, scores: torch.dtype) -> bool:
    """Whether a fill plus a score is the fill, in float32 or float64: then adding it is putting it in place."""
    return -_limit(scores) <= fill <= -1e30 and scores is not torch.float16


def _lowest(mask: Mask, facts: Facts) -> float:
    if mask.fill is not None:
        return mask.fill * mask.scale
    return min(bound * mask.scale for bound in facts.bounds(mask.value) or (-math.inf,))


def _as_sum(mask: Mask, held: torch.Tensor) -> torch.Tensor:
    """A constant mask as what is added to the scores, in float64."""
    if mask.fill is None:
        return held.double() * mask.scale
    zeros = torch.zeros(held.shape, dtype=torch.float64, device=held.device)
    return zeros.masked_fill(held == mask.drop, mask.fill * mask.scale)


def _combined(
    attention: Attention, constants: Sequence[tuple[Mask, torch.Tensor]], added: tuple[Mask, ...]
) -> Plan | NoMatch:
    """The sum of the constant masks, which leaves each row a key; a single one of numbers stays as it is."""
    masks = [mask for mask, _ in constants]
    scores, node = ir.dtype(masks[0].node), masks[0].node
    assert scores is not None
    lead = max((mask.lead for mask in masks), key=len)
    lifted = [part for mask, given in constants if (part := _lift(given, mask.lead, lead)) is not None]
    if len(lifted) < len(constants):
        return NoMatch("the masks are added to scores of different batch sizes", node)
    total = lifted[0]
    for part in lifted[1:]:
        if math.prod(torch.broadcast_shapes(total.shape, part.shape)) > _LARGEST:
            return NoMatch("the masks together are too large to be computed now", node)
        total = total + part
    if not bool((total > -math.inf).any(-1).all()):
        return NoMatch("the mask empties a whole row, which is NaN here and 0 in the operator", node)
    hard = total.masked_fill(total * torch.finfo(scores).eps <= -64, -math.inf)
    fills = [mask.fill * mask.scale for mask in masks if mask.fill is not None]
    if bool((hard > -math.inf).any(-1).all()):
        if not added and bool(((hard == 0) | (hard == -math.inf)).all()):
            return _kept(attention, hard == 0, lead)
        total = hard if fills else total
    elif not all(_swallows(fill, scores) for fill in fills):
        return NoMatch(f"the mask fills a whole row, and {max(fills)} plus a score is not {max(fills)}", node)
    if len(masks) == 1 and not fills:
        return Plan(added=(*added, *masks))
    return Plan(constant=total, lead=lead, added=added)


def _kept(attention: Attention, keep: torch.Tensor, lead: Sizes) -> Plan:
    """A mask of booleans, or what takes less: none at all, or the causal one."""
    if bool(keep.all()):
        return Plan()
    rows, columns = keep.shape[-2:]
    whole = (ir.static(attention.q.sizes[-2]), ir.static(attention.k.sizes[-2])) == (rows, columns)
    if whole and rows == columns and keep.numel() == rows * columns and torch.equal(keep, torch.ones_like(keep).tril()):
        return Plan(causal=True)
    return Plan(constant=keep, lead=lead)


# -- batch sizes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """The number of rows of scores over all the batch, divided by `by`: a size that only the call knows."""

    by: int


Moves = list[tuple[Any, tuple[Any, ...]]]


def _common(left: Sizes, right: Sizes) -> int:
    """How many last sizes two shapes have in common."""
    count = 0
    while count < min(len(left), len(right)) and ir.same_sizes([left[-1 - count]], [right[-1 - count]]):
        count += 1
    return count


def _lift(part: torch.Tensor, lead: Sizes, widest: Sizes) -> torch.Tensor | None:
    """A mask of scores with the batch sizes `lead` as one of scores with the batch sizes `widest`."""
    part = part[(None,) * (2 - part.dim())] if part.dim() < 2 else part
    if part.dim() == 2 or ir.same_sizes(lead, widest):
        return part
    batch = (1,) * (len(lead) + 2 - part.dim()) + tuple(part.shape[:-2])
    common = _common(lead, widest)
    front = len(lead) - common
    if any(size != 1 for size in batch[:front]):
        return None
    return part.reshape(*(1,) * (len(widest) - common), *batch[front:], *part.shape[-2:])


def moves(shape: Sizes, lead: Sizes, target: Sizes, rows: Sizes) -> Moves | NoMatch:
    """What makes a mask of scores with the batch sizes `lead` one of scores with the batch sizes `target`.

    Its result has two dimensions, or four: it fits (batch, heads, queries, keys). `rows` are the batch sizes of q.
    """
    found: Moves = [(aten.unsqueeze.default, (0,))] * (2 - len(shape))
    batch = shape[:-2]
    if not batch:
        return found
    found += [(aten.unsqueeze.default, (0,))] * (len(lead) - len(batch))
    batch = (1,) * (len(lead) - len(batch)) + tuple(batch)
    if not ir.same_sizes(lead, target):
        common = _common(lead, target)
        front = len(lead) - common
        if all(ir.static(size) == 1 for size in batch[:front]):
            found += [(aten.squeeze.dim, (0,))] * front + [(aten.unsqueeze.default, (0,))] * (len(target) - common)
        else:
            sizes = _share(lead, rows)
            whole = reshaped([*target[: len(target) - common], *batch[front:], *shape[-2:]])
            if sizes is None or whole is None:
                return NoMatch("the mask is for scores whose batch sizes are not known well enough")
            found.append((aten.expand.default, ([*sizes[:front], *[-1] * (common + 2)],)))
            found.append((aten.reshape.default, (whole,)))
    return [*found, (aten.unsqueeze.default, (1,))] if len(target) == 1 else found


def _share(lead: Sizes, rows: Sizes) -> list[int | Share] | None:
    """Batch sizes as numbers, of which one may be known as a share of q's."""
    known, given = ([size for size in sizes if ir.static(size) is not None] for sizes in (lead, rows))
    by, rest = divmod(math.prod(known), max(math.prod(given), 1))
    if len(known) < len(lead) and (len(lead) - len(known) > 1 or len(rows) - len(given) != 1 or rest):
        return None
    return [Share(by) if ir.static(size) is None else int(size) for size in lead]


def reshaped(sizes: Sequence[Any]) -> list[int] | None:
    """Sizes as a reshape takes them, where at most one is not known."""
    found = [-1 if (size := ir.static(each)) is None else size for each in sizes]
    return found if found.count(-1) <= 1 and 0 not in found else None
