"""Memory that a graph makes of literals and fills with constants: `mask = zeros(h, w); mask[:3] = 1`.

The operators are run in their order on a tensor of their own. What they leave behind the last write is the constant.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx

from fxopt import NoMatch, Rewriter, effects, ir

aten = torch.ops.aten

#: What these give depends on sizes that stand there and on the dtype and device of their operand, not on its values.
NEW = frozenset({aten.new_zeros.default, aten.new_ones.default, aten.new_full.default})
_MAKES = NEW | {aten.zeros.default, aten.ones.default, aten.full.default, aten.arange.default}

Run = Callable[[fx.Node, dict[fx.Node, Any]], Any]


def without_values(node: fx.Node) -> dict[fx.Node, torch.Tensor]:
    """Operands that a factory reads no values of, each as an empty tensor of its dtype and device."""
    if node.target not in NEW:
        return {}
    found = ir.fake(node.args[0])
    return {} if found is None else {node.all_input_nodes[0]: torch.empty(0, dtype=found.dtype, device=found.device)}


def fold(rewriter: Rewriter, run: Run, small: int, rule: str) -> int:
    """Replaces such memory by what is in it behind the last write; declines, with the reason, what is not constant.

    Gives how often it did.
    """
    done = 0
    aliases = rewriter.aliases
    written = {aliases.root(value) for found in aliases.writers.values() for value in found.writes}
    for base in [node for node in rewriter.graph.nodes if node.target in _MAKES]:
        if base._erased or aliases.root(base) not in written:
            continue
        values = _run_all(base, rewriter, run, small)
        if isinstance(values, str):
            rewriter.decline(base, values, rule=rule)
            continue
        outcome = rewriter.substitute_memory(base, partial(_constant, rewriter, values), rule=rule)
        if isinstance(outcome, NoMatch):
            rewriter.decline(base, outcome.reason, rule=rule)
        else:
            done += 1
    return done


def _constant(rewriter: Rewriter, values: dict[fx.Node, Any], member: fx.Node) -> fx.Node:
    return rewriter.constant(values[member].clone(), f"{member.name}_folded", keep_strides=True)


def _run_all(base: fx.Node, rewriter: Rewriter, run: Run, small: int) -> dict[fx.Node, Any] | str:
    """What the memory's values are behind the last write; a string says why that is not known."""
    aliases = rewriter.aliases
    found = ir.fake(base)
    if found is None or not all(type(size) is int for size in found.shape):
        return "its size is not known before it runs"
    if found.numel() * found.element_size() > small:
        return f"it has {found.numel() * found.element_size()} bytes, more than {small}"
    root = aliases.root(base)
    values: dict[fx.Node, Any] = {}
    for node in rewriter.graph.nodes:
        if node.op == "output" or aliases.root(node) is not root:
            continue
        if effects.of(node).random:
            return f"{node.name} fills it with random numbers"
        stand_in = without_values(node) if node is base else {}
        for operand in node.all_input_nodes:
            if operand in stand_in or operand in values:
                continue
            held = ir.tensor(operand)
            if held is None or aliases.writer_of(operand) is not None:
                return f"{node.name} reads {operand.name}, which is no constant"
            values[operand] = held
        result = run(node, {**values, **stand_in})
        if isinstance(result, str):
            return result
        values[node] = result
    return values
