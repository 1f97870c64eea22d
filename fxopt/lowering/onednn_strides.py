"""What a lowered model hands out has the strides that it has without lowering, and so has what opaque nodes read."""

from __future__ import annotations

import torch
from torch import fx

from fxopt import effects, ir
from fxopt.rewrite import Rewriter

aten = torch.ops.aten


def restore_strides(rewriter: Rewriter) -> None:
    """What the model hands out, and what opaque or stride-reading nodes take, has the strides it has without lowering.

    `meta["operand_strides"]` holds those, set before the passes. Where a view is handed out, it is the value that it
    views whose strides are restored, so that results which share memory go on sharing it.
    """
    restored: dict[fx.Node, fx.Node] = {}
    for node in list(rewriter.graph.nodes):
        opaque = effects.of(node).opaque or node.op == "call_module" or node.target in effects.STRIDED
        if node.op == "output" or opaque:
            for operand in node.all_input_nodes:
                _restore(rewriter, node, operand, restored)


def _restore(rewriter: Rewriter, reader: fx.Node, operand: fx.Node, restored: dict[fx.Node, fx.Node]) -> None:
    """Gives `reader` its operand in the strides that it expects, restored where the operand is computed, not viewed."""
    views = [reader]
    viewed = effects.of(operand).aliases
    while viewed and "operand_strides" in operand.meta:  # else it is an input, or a view that lowering itself made
        if ir.fake(viewed[0]) is None and not effects.of(viewed[0]).aliases:
            break  # one of several results (of a sort), which is computed and no view
        views.append(operand)
        reader, operand = operand, viewed[0]
        viewed = effects.of(operand).aliases
    found = ir.fake(operand)
    wanted = dict(zip(reader.all_input_nodes, reader.meta.get("operand_strides", ()), strict=False)).get(operand)
    if found is None or wanted is None or operand.op != "call_function" or not _needs_copy(found, wanted):
        return
    if operand in restored:
        rewriter.editor.replace_uses(operand, restored[operand], [reader])
    else:
        restored[operand] = _restride(rewriter, reader, operand, wanted)
        restored[restored[operand]] = restored[operand]
    for view in reversed(views):
        after = None if view.op == "output" else ir.infer(view)
        if after is not None:
            rewriter.editor.set_meta(view, "val", after)


def _needs_copy(found: torch.Tensor, wanted: tuple[int, ...]) -> bool:
    return any(
        have != want for have, want, size in zip(found.stride(), wanted, found.shape, strict=True) if size != 1
    )


def _restride(rewriter: Rewriter, reader: fx.Node, operand: fx.Node, strides: tuple[int, ...]) -> fx.Node:
    order = sorted(range(len(strides)), key=lambda dim: (strides[dim], -dim), reverse=True)
    back = [order.index(dim) for dim in range(len(order))]

    def build() -> fx.Node:
        if order == sorted(order):
            return rewriter.call(aten.clone.default, operand, memory_format=torch.contiguous_format)
        permuted = rewriter.call(aten.permute.default, operand, order)
        dense = rewriter.call(aten.clone.default, permuted, memory_format=torch.contiguous_format)
        return rewriter.call(aten.permute.default, dense, back)

    return rewriter.insert_between(operand, reader, build, rule="restore-strides")


