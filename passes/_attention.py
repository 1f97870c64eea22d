"""Finding attention around a softmax: what it reads, down to q and k, and who reads it, up to the product with v.

    softmax(q k^T * scale + masks) v

Axes have names: "0", "1", ... are the batch, "n" the queries, "m" the keys, "d" what q and k are contracted over, and
"e" the features of v. The scores are (batch, n, m).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxopt import UNKNOWN, NoMatch, ir

from ._contraction import PRODUCTS, Constant, Contraction, contraction, is_number, permutation, scaling

aten = torch.ops.aten

Sizes = tuple[Any, ...]
Axes = tuple[str, ...]

SOFTMAX: tuple[Any, ...] = (aten.softmax.int, aten.special_softmax.default)
#: Operations that give their first argument's values, perhaps in another dtype.
_KEEPING = (aten.to.dtype, aten.type_as.default, aten.clone.default, aten.contiguous.default)
_MASKED_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_FILLS = (*_MASKED_FILLS, aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther)
_SCALES = (aten.mul.Tensor, aten.div.Tensor)
_STEPS = (aten.reshape.default, aten.add.Tensor, *_SCALES, *_FILLS)
#: Each sum may go on with either operand, so that a chain of them is not followed forever.
_MOST_STEPS = 8


@dataclass(frozen=True)
class Mask:
    """What is done to the scores at `node`, whose batch sizes are `lead`; `scale` multiplies the result afterwards.

    `value` is added. Or, if `fill` is a number, it is put where `value` is `drop`.
    """

    node: fx.Node
    value: fx.Node
    lead: Sizes
    scale: float
    fill: float | None = None
    drop: bool = True


@dataclass(frozen=True)
class Operand:
    """q, k or v: a node, and the order of its axes that gives (batch, rows, features)."""

    node: fx.Node
    order: list[int]

    @property
    def sizes(self) -> Sizes:
        """(batch, rows, features)."""
        shape = ir.shape(self.node)
        assert shape is not None
        return tuple(shape[axis] for axis in self.order)

    @property
    def dense(self) -> bool:
        """Whether the features of a row stand side by side in memory."""
        found = ir.fake(self.node)
        assert found is not None
        return ir.static(self.sizes[-1]) == 1 or ir.static(found.stride(self.order[-1])) == 1


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T * scale + masks) v as it stands in a graph.

    `rows` are tensors that the scores of each query are multiplied or divided by. The batch sizes of q and k are those
    of `q`, the result's those of `v`. `order` gives the axes of `root`, the product with v, among (batch, n, e).
    `nodes` are all that the attention is made of, `shared` those of them that others may read.
    """

    root: fx.Node
    nodes: tuple[fx.Node, ...]
    shared: frozenset[fx.Node]
    q: Operand
    k: Operand
    v: Operand
    scale: float
    rows: tuple[tuple[Any, fx.Node], ...]
    masks: tuple[Mask, ...]
    order: list[int]

    @property
    def lead(self) -> Sizes:
        """The batch sizes of q, k and the product of both."""
        return self.q.sizes[:-2]

    @property
    def spaces(self) -> list[Sizes]:
        """The batch sizes that the scores have on their way, where something is done to them."""
        return [self.lead, *(mask.lead for mask in reversed(self.masks)), self.v.sizes[:-2]]


def find(softmax: fx.Node, constant: Constant) -> Attention | NoMatch:
    """The attention that a softmax is part of, or why there is none."""
    below = _scores(softmax.args[0], _Below(), constant)
    if isinstance(below, NoMatch):
        return below
    scores = _name_scores(softmax, below)
    if isinstance(scores, NoMatch):
        return scores
    above = _weights(softmax, scores.axes)
    if isinstance(above, NoMatch):
        return above
    batch: Axes = tuple(str(index) for index in range(len(above.axes) - 2))
    names = dict(zip(above.product.axes[above.weights], above.axes, strict=True))
    other = above.product.axes[1 - above.weights]
    new = [letter for letter in other if letter not in names]
    kept = {names[letter] for letter in other if letter in names}
    summed = [name for letter, name in names.items() if letter not in above.product.result]
    if summed != ["m"] or len(new) != 1 or new[0] not in above.product.result or kept != {*batch, "m"}:
        return NoMatch(f"{above.product.node.name} does not multiply each query's weights with v", softmax)
    names[new[0]] = "e"
    lead: Axes = tuple(str(index) for index in range(len(scores.q_axes) - 2))
    q, k = below.product.operands if scores.query == 0 else below.product.operands[::-1]
    taken = [
        _operand(q, scores.q_axes, (*lead, "n", "d"), constant),
        _operand(k, scores.k_axes, (*lead, "m", "d"), constant),
        _operand(
            above.product.operands[1 - above.weights], tuple(map(names.__getitem__, other)), (*batch, "m", "e"), None
        ),
    ]
    inside = [*below.nodes, softmax, *above.nodes, above.product.node, *(node for part in taken for node in part.nodes)]
    return Attention(
        root=above.product.node,
        nodes=tuple(dict.fromkeys(inside)),
        shared=frozenset(node for part in taken for node in part.nodes if permutation(node) is not None),
        q=taken[0].operand,
        k=taken[1].operand,
        v=taken[2].operand,
        scale=below.scale * taken[0].scale * taken[1].scale,
        rows=below.rows,
        masks=below.masks,
        order=[(*batch, "n", "e").index(names[letter]) for letter in above.product.result],
    )


# -- from the softmax down to the product of q and k -----------------------------------------------------------------


@dataclass(frozen=True)
class _Below:
    """What lies between the softmax and the product of q and k, collected on the way down."""

    nodes: tuple[fx.Node, ...] = ()
    scale: float = 1.0
    rows: tuple[tuple[Any, fx.Node], ...] = ()
    masks: tuple[Mask, ...] = ()
    regrouped: bool = False
    found: Contraction | None = None

    @property
    def product(self) -> Contraction:
        assert self.found is not None
        return self.found

    def through(self, node: fx.Node, **changes: Any) -> _Below:
        """The way one node further."""
        return replace(self, nodes=(*self.nodes, node), **changes)


def _scores(node: Any, way: _Below, constant: Constant) -> _Below | NoMatch:
    """Follows what the softmax reads, through scales, masks, casts and views, to a product."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return NoMatch("the softmax does not read a product of two tensors", fits=False)
    if node.target in PRODUCTS:
        return _reached(node, way)
    if node.target in _KEEPING:
        return _scores(node.args[0], way.through(node), constant)
    scaled = scaling(node, constant)
    if scaled is not None:
        return _scores(scaled[0], way.through(node, scale=way.scale * scaled[1]), constant)
    other = NoMatch(f"{node.name} is {ir.target_name(node)}, no product of two tensors", node, fits=False)
    if node.target not in _STEPS or len(way.masks) + len(way.rows) > _MOST_STEPS:
        return other
    shape = ir.shape(node)
    if shape is None:
        return NoMatch(f"{UNKNOWN}whether {node.name} has the shape of the scores", node)
    if way.rows and node.target not in _SCALES:
        return NoMatch(f"{node.name} stands in front of a scale per query", node)
    if node.target is aten.reshape.default:
        before = ir.shape(node.args[0])  # type: ignore[arg-type]
        if before is None or not ir.same_sizes(before[-2:], shape[-2:]):
            return NoMatch(f"{node.name} reshapes the queries or keys of the scores", node, fits=False)
        return _scores(node.args[0], way.through(node, regrouped=True), constant)
    misses: list[NoMatch] = []
    for source, further in _steps(node, way, constant):
        if isinstance(source, fx.Node) and ir.same_sizes(ir.shape(source), shape):
            found = _scores(source, further, constant)
            if isinstance(found, _Below):
                return found
            misses.append(found)
    return next((miss for miss in misses if miss.fits), misses[0] if misses else other)


def _reached(node: fx.Node, way: _Below) -> _Below | NoMatch:
    found = contraction(node)
    if isinstance(found, NoMatch):
        return found
    masks = way.masks
    if found.addend is not None:
        if way.rows:
            return NoMatch(f"{node.name} stands in front of a scale per query", node)
        masks = (*masks, Mask(node, found.addend, _lead(node), way.scale * found.share))
    return way.through(node, found=found, scale=way.scale * found.scale, masks=masks)


def _steps(node: fx.Node, way: _Below, constant: Constant) -> Iterator[tuple[Any, _Below]]:
    """The operands of a node that may be the scores, each with the way that tells what is done to it."""
    given = ir.arguments(node)
    if node.target in _MASKED_FILLS:
        choices = [(given["self"], given["value"], True)]
        where = given["mask"]
    else:
        choices = [(given["self"], given["other"], False), (given["other"], given["self"], True)]
        where = given.get("condition")
    for source, value, drop in choices:
        if node.target in _FILLS:
            fill = _fill(value, constant)
            if fill is not None and ir.dtype(where) is torch.bool:
                mask = Mask(node, where, _lead(node), way.scale, fill, drop)
                yield source, way.through(node, masks=(*way.masks, mask))
        elif not isinstance(value, fx.Node) or ir.shape(value) is None:
            continue
        elif node.target is aten.add.Tensor and given["alpha"] == 1:
            yield source, way.through(node, masks=(*way.masks, Mask(node, value, _lead(node), way.scale)))
        elif node.target is aten.mul.Tensor or (node.target is aten.div.Tensor and not drop):
            per_query = all(ir.static(size) == 1 for size in (ir.shape(value) or ())[-1:])
            if per_query:
                yield source, way.through(node, rows=(*way.rows, (node.target, value)))


def _fill(value: Any, constant: Constant) -> float | None:
    """The number that scores are replaced by: a Python one, or a constant that is the same everywhere."""
    if isinstance(value, fx.Node):
        found = constant(value)
        if found is None or found.numel() == 0 or not found.is_floating_point() or bool((found != found.max()).any()):
            return None
        value = float(found.max())
    return float(value) if is_number(value) and value == value else None


def _lead(node: fx.Node) -> Sizes:
    return tuple((ir.shape(node) or ())[:-2])


@dataclass(frozen=True)
class _Scores:
    """The names of axes: which operand of the product q is, q's and k's axes, and those of the softmax's result."""

    query: int
    q_axes: Axes
    k_axes: Axes
    axes: Axes


def _name_scores(softmax: fx.Node, below: _Below) -> _Scores | NoMatch:
    product, rank = below.product, ir.rank(softmax)
    if rank is None:
        return NoMatch(f"{UNKNOWN}the shape of {softmax.name}", softmax)
    dim = ir.argument(softmax, "dim")
    last = dim - rank if dim >= 0 else dim
    keys = product.result[last] if -len(product.result) <= last else ""
    sides = (set(product.axes[0]), set(product.axes[1]))
    query = 0 if keys in sides[1] else 1
    both, result = sides[0] & sides[1], set(product.result)
    summed, rows, columns = both - result, sides[query] - both, sides[1 - query] - both
    fine = columns == {keys} and (len(summed), len(rows)) == (1, 1) and rows <= result
    if not fine or (below.regrouped and last != -1):
        return NoMatch(f"{softmax.name} does not run over the keys of each query", softmax)
    batch = [letter for letter in product.result if letter in both]
    names = {letter: str(index) for index, letter in enumerate(batch)}
    names |= {rows.pop(): "n", keys: "m", summed.pop(): "d"}
    axes = tuple(names[letter] for letter in product.result)
    if axes[-2:] != ("n", "m") and (below.masks or below.rows or below.regrouped):
        return NoMatch(f"the scores of {product.node.name} are not in the order (batch, queries, keys)", softmax)
    if below.regrouped:
        axes = (*(str(index) for index in range(rank - 2)), "n", "m")
    q_axes, k_axes = (tuple(names[letter] for letter in product.axes[side]) for side in (query, 1 - query))
    return _Scores(query, q_axes, k_axes, axes)


@dataclass(frozen=True)
class _Taken:
    """What is left of an operand, the scale that was taken off it, and the nodes that this went through."""

    operand: Operand
    scale: float
    nodes: list[fx.Node]


def _operand(node: fx.Node, axes: Axes, wanted: Axes, constant: Constant | None) -> _Taken:
    """Takes scales by a number and transposes off an operand, down to the first node that has the wanted order."""
    scale = 1.0
    passed, taken = list[fx.Node](), list[fx.Node]()
    choices = [(node, axes)]
    while True:
        order = permutation(node)
        scaled = None if constant is None else scaling(node, constant)
        if order is not None:
            passed.append(node)
            axes = tuple(axes[order.index(axis)] for axis in range(len(axes)))
            node = node.args[0]  # type: ignore[assignment]
            choices.append((node, axes))
        elif scaled is not None and len(node.users) == 1:
            taken += [*passed, node]
            passed = []
            node, scale = scaled[0], scale * scaled[1]
            choices = [(node, axes)]
        else:
            break
    index = next((index for index, choice in enumerate(choices) if choice[1] == wanted), len(choices) - 1)
    node, axes = choices[index]
    return _Taken(Operand(node, [axes.index(name) for name in wanted]), scale, [*taken, *passed[:index]])


# -- from the softmax up to the product with v -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Above:
    """The product with v, which of its operands the weights are, the nodes in between, and the weights' axes there."""

    product: Contraction
    weights: int
    nodes: tuple[fx.Node, ...]
    axes: Axes


def _weights(softmax: fx.Node, axes: Axes) -> _Above | NoMatch:
    """Follows who reads the weights, through casts, dropouts and views, to a product."""
    node, passed = softmax, list[fx.Node]()
    while True:
        if any(user.op == "output" for user in node.users):
            return NoMatch(f"{node.name} is a result of the model, and the operator does not give the weights", node)
        if len(node.users) != 1:
            readers = ", ".join(user.name for user in node.users)
            return NoMatch(f"the weights are read by {readers or 'nobody'}, not by one product alone", node)
        (reader,) = node.users
        if reader.target in PRODUCTS:
            found = contraction(reader)
            if isinstance(found, NoMatch):
                return found
            if found.addend is not None or found.scale != 1 or found.operands.count(node) != 1:
                return NoMatch(f"{reader.name} does more than multiply the weights with v", reader)
            return _Above(found, found.operands.index(node), tuple(passed), axes)
        if not reader.args or reader.args[0] is not node:
            return NoMatch(f"{reader.name} reads the weights, and is no product", reader)
        followed = _through(reader, node, axes)
        if isinstance(followed, NoMatch):
            return followed
        axes = followed
        passed.append(reader)
        node = reader


def _through(reader: fx.Node, node: fx.Node, axes: Axes) -> Axes | NoMatch:
    """The axes of what `reader` makes of the weights `node`."""
    order = permutation(reader)
    if order is not None:
        return tuple(axes[axis] for axis in order)
    if reader.target is aten.dropout.default:
        given = ir.arguments(reader)
        drops = given["train"] is not False and given["p"] != 0
        return NoMatch(f"{reader.name} is in training mode", reader) if drops else axes
    if reader.target in _KEEPING:
        return axes
    if reader.target not in (aten.reshape.default, aten.expand.default):
        return NoMatch(f"{reader.name} reads the weights, and is no product", reader)
    before, after = ir.shape(node), ir.shape(reader)
    if before is None or after is None:
        return NoMatch(f"{UNKNOWN}whether {reader.name} keeps the shape of the weights", reader)
    if ir.same_sizes(before, after):
        return axes
    plain = (*(str(index) for index in range(len(axes) - 2)), "n", "m")
    if reader.target is aten.expand.default or axes != plain or not ir.same_sizes(before[-2:], after[-2:]):
        return NoMatch(f"{reader.name} reshapes the queries or keys of the weights", reader)
    return (*(str(index) for index in range(len(after) - 2)), "n", "m")
