"""eliminate-concat

    cat([cat([a, b]), c])               ->  cat([a, b, c])
    cat([x[:, :n], x[:, n:m], c])       ->  cat([x[:, :m], c])             x itself where the pieces are all of it
    act(cat([conv(a), conv(b)]))        ->  cat([act(conv(a)), act(conv(b))])              norms, pools and relu alike
    conv(cat([a, b]), W)                ->  conv(b, Wb) + conv(a, Wa)      the sum is made by the kernel; linear too

Concat elimination by algebra; what is left over, allocate-buffers eliminates by memory.

Legal when: the concat has no other reader (of pieces: whoever reads them goes on to); all parts are of one dtype;
nested concats and pieces run along the same dimension; a norm has its channels there, and a pool does not run along it;
a layer that is split has constant weights, one group, takes its channels from the concat, and its sums are no narrower
than float32.
Done where an estimate says that it pays: an activation or norm where layers take it up, a pool where what is copied
behind it is less, a layer where the concat's bytes are more than those of the sums, and no part is thinner than a
kernel's vectors.
Numerics: reassociates (exact in exact arithmetic).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fxopt import UNKNOWN, NoMatch, Pass, Rewriter, cost, ir, ops

from . import _affine, _concat, _norm
from ._concat import Concat

aten = torch.ops.aten

#: Fewer channels leave a kernel's vectors half empty (16 floats).
FEWEST_CHANNELS = 16

_POOLS: tuple[Any, ...] = (
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
)


def _run(rewriter: Rewriter) -> None:
    for node in list(rewriter.graph.nodes):
        current: fx.Node | None = node
        while current is not None and current.target is aten.cat.default and not current._erased:
            current = _step(current, rewriter)


def _step(node: fx.Node, rewriter: Rewriter) -> fx.Node | None:
    """What the first rule that applies makes of a concat; None where none does."""
    found = _concat.concat(node)
    if isinstance(found, NoMatch):
        rewriter.decline(node, found.reason, rule="concat")
        return None
    for name, rule in _RULES:
        result = rule(found, rewriter)
        if not isinstance(result, NoMatch):
            return result
        rewriter.decline(node, result.reason, rule=name, fits=result.fits)
    return None


def _nothing(reason: str, node: fx.Node) -> NoMatch:
    return NoMatch(reason, node, fits=False)


def _sole_reader(found: Concat) -> fx.Node | None:
    (reader, *others) = found.node.users or [None]
    return None if others or reader is None or reader.op == "output" else reader


# -- nothing to do ---------------------------------------------------------------------------------------------------


def _nested(found: Concat, rewriter: Rewriter) -> fx.Node | NoMatch:
    parts: list[fx.Node] = []
    inner: list[fx.Node] = []
    reason = _nothing("no part is a concat", found.node)
    for part in found.parts:
        nested = _flat(found, part)
        if isinstance(nested, NoMatch):
            reason = max(reason, nested, key=lambda found: found.fits)
            parts.append(part)
        else:
            parts += nested.parts
            inner.append(part)
    if not inner:
        return reason
    return rewriter.refusal(inner, found.node) or rewriter.substitute(
        found.node, lambda: rewriter.call(aten.cat.default, parts, found.dim), rule="nested", nodes=inner
    )


def _flat(found: Concat, part: fx.Node) -> Concat | NoMatch:
    """A part as a concat whose parts may stand for it."""
    if part.target is not aten.cat.default:
        return _nothing(f"{part.name} is no concat", part)
    nested = _concat.concat(part)
    if isinstance(nested, NoMatch):
        return nested
    if nested.dim != found.dim:
        return NoMatch(f"{part.name} joins dim {nested.dim}, not dim {found.dim}", part)
    if len(part.users) > 1 or found.parts.count(part) > 1:
        return NoMatch(f"{part.name} has other readers, and stays", part)
    return nested


def _pieces(found: Concat, rewriter: Rewriter) -> fx.Node | NoMatch:
    runs: list[list[fx.Node]] = []
    pieces = [_concat.piece(part, found.dim) for part in found.parts]
    for number, (part, piece) in enumerate(zip(found.parts, pieces, strict=True)):
        before = pieces[number - 1] if number else None
        if piece is not None and before is not None and (before.source, before.stop) == (piece.source, piece.start):
            runs[-1].append(part)
        else:
            runs.append([part])
    if len(runs) == len(found.parts):
        return _nothing("no two parts are neighbouring pieces of one value", found.node)

    def joined(run: list[fx.Node]) -> fx.Node:
        first, last = _concat.piece(run[0], found.dim), _concat.piece(run[-1], found.dim)
        if len(run) == 1 or first is None or last is None:
            return run[0]
        if (first.start, last.stop) == (0, _concat.length(first.source, found.dim)):
            return first.source
        return rewriter.call(aten.slice.Tensor, first.source, found.dim, first.start, last.stop)

    def build() -> fx.Node:
        parts = [joined(run) for run in runs]
        return parts[0] if len(parts) == 1 else rewriter.call(aten.cat.default, parts, found.dim)

    gone = [part for run in runs for part in run if len(run) > 1]
    return rewriter.refusal(gone, found.node, shared=gone) or rewriter.substitute(
        found.node, build, rule="pieces", nodes=gone
    )


# -- steps that commute with a concat --------------------------------------------------------------------------------


def _commute(found: Concat, rewriter: Rewriter) -> fx.Node | NoMatch:
    step = _sole_reader(found)
    if step is None or step.op != "call_function" or step.args[:1] != (found.node,):
        return _nothing("the concat has not one reader", found.node)
    if step.target in ops.ACTIVATION_TARGETS and ops.activation_of(step) is not None:
        return _commute_by(found, step, rewriter, lambda part, place: _again(rewriter, step, part), _takes_activation)
    if step.target is aten.batch_norm.default:
        refusal = _norm_guard(found, step)
        return refusal or _commute_by(
            found, step, rewriter, lambda part, start: _norm_of(rewriter, step, part, start), _takes_norm
        )
    if step.target in _POOLS:
        return _commute_pool(found, step, rewriter)
    return _nothing(f"{ir.target_name(step)} does not commute with a concat", found.node)


def _commute_by(
    found: Concat,
    step: fx.Node,
    rewriter: Rewriter,
    on_part: Callable[[fx.Node, int], fx.Node],
    takes: Callable[[fx.Node], bool],
) -> fx.Node | NoMatch:
    """act(cat([a, b])) -> cat([act(a), act(b)]), where every part is a layer that takes the step up."""
    for part in found.parts:
        if not takes(part):
            return NoMatch(f"{part.name} would not take {ir.target_name(step)} up: it would run for each part", step)
        if set(part.users) != {found.node}:
            return NoMatch(f"{part.name}, which would take {ir.target_name(step)} up, has other readers", step)
    if len(set(found.parts)) != len(found.parts):
        return NoMatch("one part is in the concat twice", found.node)
    return _moved(found, step, rewriter, on_part)


def _moved(
    found: Concat, step: fx.Node, rewriter: Rewriter, on_part: Callable[[fx.Node, int], fx.Node]
) -> fx.Node | NoMatch:
    sizes = found.sizes() or (0,) * len(found.parts)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]

    def build() -> fx.Node:
        parts = [on_part(part, start) for part, start in zip(found.parts, starts, strict=True)]
        return rewriter.call(aten.cat.default, parts, found.dim)

    return rewriter.refusal((found.node,), step) or rewriter.substitute(
        step, build, rule="commute", nodes=(found.node,)
    )


def _again(rewriter: Rewriter, step: fx.Node, part: fx.Node) -> fx.Node:
    return rewriter.call(step.target, part, *step.args[1:], **step.kwargs)


def _takes_activation(part: fx.Node) -> bool:
    if part.target not in (*ops.CONVOLUTION_TARGETS, ops.convolution, *_affine.LINEARS):
        return False
    return bool(_concat.arguments(part)["activation"] == "none")


def _takes_norm(part: fx.Node) -> bool:
    """Whether fold-batchnorm would fold a norm into a part."""
    if part.target not in _affine.LAYERS or ir.tensor(ir.argument(part, "weight")) is None:
        return False
    if _affine.is_linear(part):
        return False
    constant = ir.argument(part, "bias") is None or ir.tensor(ir.argument(part, "bias")) is not None
    return constant and _affine.layer_guard(part) is None and ir.rank(part) == _affine.weight_of(part).dim()


def _norm_guard(found: Concat, norm: fx.Node) -> NoMatch | None:
    """The norm is a map of each channel, and the concat joins channels of known numbers."""
    if any(ir.argument(norm, key) is not None and ir.tensor(ir.argument(norm, key)) is None for key in _NORM_TENSORS):
        return NoMatch("a parameter of the norm is computed at run time", norm)
    if found.dim != 1:
        return NoMatch(f"the concat joins dim {found.dim}, not channels", norm)
    if found.sizes() is None:
        return NoMatch("how many channels a part has is not a known number", norm)
    return _norm.guard(norm)


_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def _norm_of(rewriter: Rewriter, norm: fx.Node, part: fx.Node, start: int) -> fx.Node:
    """The norm of a part: its channels of the norm's parameters."""
    given = dict(ir.arguments(norm))
    stop = start + (_concat.length(part, 1) or 0)
    for key in _NORM_TENSORS:
        held = ir.tensor(given[key])
        if held is not None:
            given[key] = rewriter.constant(held[start:stop].clone(), f"{given[key].target}_part")
    return rewriter.call(norm.target, **{**given, "input": part})


def _commute_pool(found: Concat, pool: fx.Node, rewriter: Rewriter) -> fx.Node | NoMatch:
    spatial = int(ir.target_name(pool)[-2])  # max_pool2d
    if found.dim >= (ir.rank(found.node) or 0) - spatial:
        return NoMatch(f"the concat joins dim {found.dim}, along which the pool runs", pool)
    whole, pooled = _nbytes(found.node), _nbytes(pool)
    parts = [_nbytes(part) for part in found.parts]
    if whole is None or pooled is None or None in parts:
        return NoMatch(f"{UNKNOWN}the sizes of {pool.name}", pool)
    before = [cost.Cost(read=whole, written=whole, launches=1), cost.Cost(read=whole, written=pooled, launches=1)]
    after = [cost.Cost(read=part or 0, written=pooled * (part or 0) // max(whole, 1), launches=1) for part in parts]
    after.append(cost.Cost(read=pooled, written=pooled, launches=1))
    estimate = cost.compare(before, after, cost.device_of(pool))
    if estimate is None or not estimate.pays:
        return NoMatch(f"to pool each part does not pay: {estimate}", pool)
    return _moved(found, pool, rewriter, lambda part, place: _again(rewriter, pool, part))


def _nbytes(node: fx.Node) -> int | None:
    found = cost.copy(ir.shape(node), dtype=ir.dtype(node))
    return None if found is None else found.written


# -- the weight of the layer that reads it ---------------------------------------------------------------------------


def _consumer(found: Concat, rewriter: Rewriter) -> fx.Node | NoMatch:
    layer = _sole_reader(found)
    if layer is None or layer.target not in _concat.CONSUMERS or ir.argument(layer, "input") is not found.node:
        return _nothing("no layer is its only reader", found.node)
    refusal = _consumer_guard(found, layer)
    if refusal is not None:
        return refusal
    sizes = found.sizes()
    assert sizes is not None
    return rewriter.refusal((found.node,), layer) or rewriter.substitute(
        layer, lambda: _split(found, layer, sizes, rewriter), rule="consumer", nodes=(found.node,)
    )


def _consumer_guard(found: Concat, layer: fx.Node) -> NoMatch | None:
    if ir.tensor(ir.argument(layer, "weight")) is None:
        return NoMatch("the layer's weight is computed at run time", layer)
    bias = ir.argument(layer, "bias")
    if bias is not None and ir.tensor(bias) is None:
        return NoMatch("the layer's bias is computed at run time", layer)
    refusal = _affine.layer_guard(layer)
    if refusal is not None:
        return refusal
    given = _concat.arguments(layer)
    if given.get("transposed"):
        return NoMatch("the layer is a transposed convolution", layer)
    if _affine.groups_of(layer) != 1:
        return NoMatch(f"the layer has {_affine.groups_of(layer)} groups", layer)
    if given["residual"] is found.node:
        return NoMatch(f"the layer also adds {found.node.name} to its result", layer)
    if ir.dtype(layer) not in (torch.float32, torch.float64):
        return NoMatch(f"the sums would be rounded to {ir.dtype(layer)} between the parts", layer)
    if _concat.channel_dim(layer) is None:
        return NoMatch("the layer's input is unbatched", layer)
    if _concat.channel_dim(layer) != found.dim:
        return NoMatch(f"the concat joins dim {found.dim}, not the channels that the layer takes", layer)
    sizes = found.sizes()
    if sizes is None:
        return NoMatch("how many channels a part has is not a known number", found.node)
    if min(sizes) < FEWEST_CHANNELS:
        return NoMatch(f"a part has {min(sizes)} channels, too few for a kernel of its own", found.node)
    return _profit_guard(found, layer, sizes)


def _profit_guard(found: Concat, layer: fx.Node, sizes: Sequence[int]) -> NoMatch | None:
    weight, result, dtype = _affine.weight_of(layer).shape, ir.shape(layer), ir.dtype(layer)
    summed: list[cost.Cost | None] = []
    for number, (part, size) in enumerate(zip(found.parts, sizes, strict=True)):
        own, adds = (weight[0], size, *weight[2:]), number or _concat.arguments(layer)["residual"] is not None
        summed.append(cost.layer(ir.shape(part), own, result, dtype=dtype, also_read=result if adds else ()))
    estimate = cost.compare([found.node, layer], summed, cost.device_of(layer))
    if estimate is None:
        return NoMatch(f"{UNKNOWN}whether sums of layers are quicker than the concat {found.node.name}", layer)
    return None if estimate.pays else NoMatch(f"to split the layer does not pay: {estimate}", layer)


def _split(found: Concat, layer: fx.Node, sizes: Sequence[int], rewriter: Rewriter) -> fx.Node:
    """The layer of the first part has bias and residual, that of the last the activation."""
    target = ops.linear if _affine.is_linear(layer) else ops.convolution
    given = _concat.arguments(layer)
    weight, path = _affine.weight_of(layer), str(given["weight"].target)
    start, total = 0, given["residual"]
    for number, (part, size) in enumerate(zip(found.parts, sizes, strict=True)):
        own = rewriter.constant(weight[:, start : start + size].clone(), f"{path}_part")
        changed: dict[str, Any] = {"input": part, "weight": own, "residual": total}
        if number:
            changed["bias"] = None
        if number < len(sizes) - 1:
            changed |= {"activation": "none", "activation_arguments": []}
        total = rewriter.call(target, **(given | changed))
        start += size
    assert isinstance(total, fx.Node)
    return total


_RULES: tuple[tuple[str, Callable[[Concat, Rewriter], fx.Node | NoMatch]], ...] = (
    ("nested", _nested),
    ("pieces", _pieces),
    ("commute", _commute),
    ("consumer", _consumer),
)

PASS = Pass("eliminate-concat", run=_run, numerics="reassociate", doc=__doc__)
