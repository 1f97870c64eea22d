"""merge-parallel-branches

    conv(x, W1, b1) + conv(x, W2, b2)  ->  conv(x, W1 + W2, b1 + b2)       kernels in zeros, up to the largest
    conv(x, W, b) + x                  ->  conv(x, W + 1, b)               1: a unit kernel
    conv(x, W, b) + batch_norm(x)      ->  conv(x, W + diag(s), b + t)     the norm as s*x + t
    conv(x, W, b) + avg_pool(x)        ->  conv(x, W + 1/n, b)
    linear(x, W1, b1) + linear(x, W2)  ->  linear(x, W1 + W2, b1)          also linear(x, W) + x

The re-parameterisation of RepVGG, ACNet, MobileOne and FastViT. A sum is a chain of `+` and `-`, in any order and with
`alpha=`; in what stays of it the merged layer comes first. What then stands beside the merged layer, a constant or a
norm, folds into it.

Legal when: the branches read one value, nobody else reads their results, and nothing is written in between; weights are
constant and finite; operator, stride, groups and dtype agree, and channels, so that nothing is broadcast; smaller
kernels have the largest one's centre, at every position (transposed: equal kernels); a value or norm beside a layer has
the channels and the size of its result.
Profit: where no branch has the merged kernel, at most half as many multiply-adds more than the branches have.
Numerics: reassociates (exact in exact arithmetic, for finite values; an infinity spreads over the kernel). Added up in
float64, rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import fx

from fxopt import UNKNOWN, Match, NoMatch, Pass, Rewriter, Rule, ir
from fxopt.pattern import Pattern

from . import _affine, _branches, fold_affine, fold_batchnorm

aten = torch.ops.aten

SUMS: tuple[Any, ...] = (aten.add.Tensor, aten.sub.Tensor)


@dataclass
class _Terms:
    """A sum written out: each operand with its factor, the numbers, and the nodes that only add."""

    factors: dict[fx.Node, float] = field(default_factory=dict)
    numbers: list[Any] = field(default_factory=list)
    sums: list[fx.Node] = field(default_factory=list)


def _factor(node: fx.Node) -> float | None:
    """What a sum multiplies its second operand by; None where that is computed, or the node is no sum."""
    if node.op != "call_function" or node.target not in SUMS:
        return None
    alpha = ir.argument(node, "alpha")
    if type(alpha) not in (int, float) or not isfinite(alpha):
        return None
    return float(-alpha if node.target is aten.sub.Tensor else alpha)


def _is_inner(node: fx.Node) -> bool:
    """Whether a sum is only an operand, once, of another sum."""
    if _factor(node) is None or len(node.users) != 1:
        return False
    (reader,) = node.users
    return _factor(reader) is not None and [ir.argument(reader, key) for key in ("self", "other")].count(node) == 1


def _terms(root: fx.Node) -> _Terms:
    found = _Terms()
    waiting: list[tuple[Any, float]] = [(root, 1.0)]
    while waiting:
        value, factor = waiting.pop()
        if not isinstance(value, fx.Node):
            found.numbers.append(value * factor if type(value) in (int, float) else value)
        elif value is root or _is_inner(value):
            found.sums.append(value)
            behind = _factor(value)
            assert behind is not None
            waiting += [(ir.argument(value, "other"), factor * behind), (ir.argument(value, "self"), factor)]
        else:
            found.factors[value] = found.factors.get(value, 0.0) + factor
    return found


class _Sum(Pattern):
    """A whole sum in which several addends are branches of one value."""

    def roots(self) -> frozenset[Any]:
        """Sums."""
        return frozenset(SUMS)

    def match(self, node: fx.Node) -> Match | NoMatch:
        """The branches that merge, with the numbers: `group`; the other addends with their factors: `rest`."""
        if _factor(node) is None:
            return NoMatch(f"alpha={ir.argument(node, 'alpha')!r} is no number that is known", node, fits=False)
        if _is_inner(node):
            return NoMatch(f"it is part of the sum {next(iter(node.users)).name}", node, fits=False)
        terms = _terms(node)
        found = _first_group(terms)
        if isinstance(found, NoMatch):
            return found
        for number in terms.numbers:
            if type(number) not in (int, float) or not isfinite(number):
                return NoMatch(f"{number!r} is added, no finite number", node)
        found.number = float(sum(terms.numbers))
        inside = [branch.node for branch in found.branches]
        rest = {addend: factor for addend, factor in terms.factors.items() if addend not in inside}
        nodes = (*terms.sums, *(member for member in inside if member is not found.first.source))
        return Match(node, nodes, {"group": found, "rest": rest})


def _first_group(terms: _Terms) -> _branches.Group | NoMatch:
    """The first branches that can merge, or the first reason why none can."""
    refusals: list[NoMatch] = []
    layers = [addend for addend in terms.factors if addend.target in _branches.LAYERS]
    for source in dict.fromkeys(ir.argument(layer, "input") for layer in layers):
        for found in _groups(source, terms):
            if isinstance(found, _branches.Group):
                return found
            refusals.append(found)
    return refusals[0] if refusals else NoMatch("no two addends are branches of one value", fits=False)


def _groups(source: fx.Node, terms: _Terms) -> Sequence[_branches.Group | NoMatch]:
    """The addends that are branches of `source`, as groups that can merge, and what keeps others apart."""
    layers: list[_branches.Branch] = []
    beside: list[tuple[fx.Node, float]] = []
    refusals: list[NoMatch] = []
    for addend, factor in terms.factors.items():
        if addend is source:
            beside.append((addend, factor))
            continue
        is_layer = addend.target in _branches.LAYERS and ir.argument(addend, "input") is source
        if not is_layer and not (addend.target in _branches.COMPANIONS and addend.args[0] is source):
            continue
        other = next((user for user in addend.users if user not in terms.sums), None)
        if other is not None:
            where = "is a result of the model" if other.op == "output" else f"is also read by {other.name}"
            refusals.append(NoMatch(f"{addend.name} {where}", addend))
        elif is_layer:
            found = _branches.layer(addend, factor)
            if isinstance(found, NoMatch):
                refusals.append(found)
            else:
                layers.append(found)
        else:
            beside.append((addend, factor))
    if len(layers) + len(beside) + len(refusals) < 2:
        return ()
    return (*_branches.groups(layers, beside), *refusals)


def _guard(match: Match) -> NoMatch | None:
    group: _branches.Group = match["group"]
    first = group.first.node
    beside = [branch.node for branch in group.branches if not branch.is_layer]
    for addend in (*beside, *match["rest"]):
        if ir.value(addend) is None or ir.dtype(first) is None:
            return NoMatch(f"{UNKNOWN}whether {addend.name} has the dtype of {first.name}", addend)
        if ir.dtype(addend) != ir.dtype(first):  # under autocast layers are narrower than what stands beside them
            return NoMatch(f"{addend.name} is {ir.dtype(addend)}, {first.name} {ir.dtype(first)}", addend)
    weight, bias = group.merged
    largest = weight.abs().flatten(1).amax(1)
    return _affine.range_guard(first, _affine.weight_of(first).dtype, largest, largest if bias is None else bias.abs())


def _merge(match: Match, rewriter: Rewriter) -> fx.Node:
    group: _branches.Group = match["group"]
    total = group.build(rewriter)
    for addend, factor in match["rest"].items():
        alpha = int(abs(factor)) if factor.is_integer() else abs(factor)
        total = rewriter.call(aten.sub.Tensor if factor < 0 else aten.add.Tensor, total, addend, alpha=alpha)
    return total


MERGE = Rule("parallel-branches", _Sum(), _merge, _guard)
_FOLDS = {rule.name: rule for rule in (*fold_affine.PASS.rules, *fold_batchnorm.PASS.rules)}
#: What a merged layer can take that its branches could not, at its reader and at itself.
_BEHIND = [_FOLDS[name] for name in ("constant-after-layer", "norm-after-layer")]
_IN_FRONT = [_FOLDS[name] for name in ("constant-before-layer", "norm-before-layer", "norm-and-relu-before-layer")]


def _run(rewriter: Rewriter) -> None:
    changed = True
    while changed:  # a merged layer can be a branch of a larger sum
        changed = False
        for node in list(rewriter.graph.nodes):
            if node._erased or node.op != "call_function" or node.target not in SUMS:
                continue
            total = rewriter.attempt(MERGE, node)
            if isinstance(total, fx.Node):
                changed = True
                while total.target in SUMS:
                    total = ir.argument(total, "self")
                _fold_around(total, rewriter)


def _fold_around(layer: fx.Node, rewriter: Rewriter) -> None:
    """Folds constants and norms beside a merged layer into it, until there are none."""
    while True:
        sites = [(rule, reader) for rule in _BEHIND for reader in layer.users if len(layer.users) == 1]
        sites += [(rule, layer) for rule in _IN_FRONT]
        folded = _first_fold(sites, rewriter)
        if folded is None:
            return
        layer = folded


def _first_fold(sites: list[tuple[Rule, fx.Node]], rewriter: Rewriter) -> fx.Node | None:
    for rule, root in sites:
        if root.target in rule.pattern.roots():
            found = rewriter.attempt(rule, root)
            if isinstance(found, fx.Node):
                return found
    return None


PASS = Pass("merge-parallel-branches", run=_run, numerics="reassociate", doc=__doc__)
