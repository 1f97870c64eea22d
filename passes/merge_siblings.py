"""merge-siblings

    conv(x, W1, b1), conv(x, W2, b2)      ->  y[:, :n], y[:, n:]        y = conv(x, [W1; W2], [b1; b2])
    linear(x, W1, b1), linear(x, W2, b2)  ->  y[..., :n], y[..., n:]    y = linear(x, [W1; W2], [b1; b2])
    act(s1), act(s2)                      ->  slices of act(y)          elementwise steps that all siblings have

TensorRT's horizontal fusion. The three 1x1 convolutions of an Inception module are one, and so are the queries, keys
and values of attention. A layer has its activation with it; a convolution is any of 1d to 3d, transposed or not.

Legal when: the layers read one value, and nothing writes to it between them; their weights are constant, finite and of
one dtype and device; stride, dilation and output padding agree; kernel and padding agree, or zeros around the smaller
kernel make them so; there is one group, and no residual. A layer without a bias gets zeros. A result that the model
hands out is a copy of its slice.
Done where an estimate says that it pays: a layer saves a kernel and a read of its input, and costs a copy where a
reader needs its slice in one piece, or an activation where the siblings' differ.
Numerics: reassociates (exact in exact arithmetic, for finite values; a padded kernel multiplies infinities by zero).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxopt import UNKNOWN, NoMatch, Pass, Rewriter, effects, ir, ops

from . import _affine, _siblings
from ._siblings import Layer

aten = torch.ops.aten


def _run(rewriter: Rewriter) -> None:
    # Inputs first: what a slice of a wide layer is read by has not been looked at yet, and stands behind it.
    source = next(iter(rewriter.graph.nodes))
    while source.op != "output":
        layers = (user for user in source.users if user.target in _siblings.LAYERS)
        readers = sorted(user for user in layers if ir.argument(user, "input") is source)
        if len(readers) > 1:
            _merge_readers(rewriter, source, readers)
        source = source.next


def _merge_readers(rewriter: Rewriter, source: fx.Node, readers: Sequence[fx.Node]) -> None:
    by_key: dict[Any, list[Layer]] = {}
    for reader in readers:
        found = _siblings.layer(reader, source)
        if isinstance(found, NoMatch):
            rewriter.decline(reader, found.reason, rule=_rule(reader))
        elif ir.rank(source) is not None and _siblings.is_wide(reader, found.dim):
            rewriter.decline(reader, "it is several layers in one already", rule=found.rule, fits=False)
        else:
            by_key.setdefault(found.key, []).append(found)
    firsts = [siblings[0] for siblings in by_key.values()]
    for siblings in by_key.values():
        if len(siblings) > 1:
            _merge(rewriter, siblings)
            continue
        (alone,) = siblings
        other = next((first for first in firsts if first is not alone), None)
        reason = f"no other layer that could join it reads {source.name}"
        rewriter.decline(
            alone.node, reason if other is None else _siblings.unlike(alone, other), rule=alone.rule, fits=False
        )


def _rule(node: fx.Node) -> str:
    return "linears" if _affine.is_linear(node) else "convolutions"


def _merge(rewriter: Rewriter, siblings: list[Layer]) -> None:
    names = " and ".join(found.node.name for found in siblings)
    split = _siblings.plans(siblings, _handed_out(rewriter, [found.node for found in siblings]))
    if split is None:
        for found in siblings:
            rewriter.decline(found.node, f"{UNKNOWN}whether it pays to merge {names}", rule=found.rule)
        return
    for plan in split:
        for found, reason in plan.reasons.items():
            rewriter.decline(found.node, reason, rule=found.rule)
        if not plan.layers:
            continue
        refusal = _substitute(rewriter, sorted(plan.layers, key=_place), mixed=plan.mixed)
        for found in plan.layers if refusal is not None else ():
            assert refusal is not None
            rewriter.decline(found.node, refusal.reason, rule=found.rule)


def _handed_out(rewriter: Rewriter, nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Those of `nodes` whose memory is a result of the model, or of a view of it."""
    aliases = rewriter.aliases
    results = {aliases.root(result) for result in rewriter.graph.output_node().all_input_nodes}
    return {node for node in nodes if aliases.root(node) in results}


def _place(found: Layer) -> tuple[Any, ...]:
    """The order of the slices: what a concat reads comes last, in the concat's order, so that it can take one piece."""
    for user in found.node.users:
        if user.target is aten.cat.default:
            parts = ir.argument(user, "tensors")
            return 1, user, parts.index(found.node), found.node
    return 0, found.node


def _substitute(rewriter: Rewriter, layers: list[Layer], *, mixed: bool) -> NoMatch | None:
    steps = [] if mixed else _followers([found.node for found in layers])
    matched = [node for step in ([found.node for found in layers], *steps) for node in step]
    roots = steps[-1] if steps else [found.node for found in layers]
    refusal = rewriter.refusal(matched, *roots)
    if refusal is not None:
        return refusal
    copied = _handed_out(rewriter, roots)

    def build() -> list[fx.Node]:
        wide = _wide(rewriter, layers, mixed=mixed)
        for step in steps:
            wide = rewriter.call(step[0].target, wide, *step[0].args[1:], **step[0].kwargs)
        results, start = [], 0
        for found, root in zip(layers, roots, strict=True):
            part = rewriter.call(aten.slice.Tensor, wide, found.dim, start, start + found.channels)
            if mixed and found.activation[0] != "none":
                part = _activate(rewriter, part, *found.activation)
            elif root in copied:
                part = rewriter.call(aten.clone.default, part)
            results.append(part)
            start += found.channels
        return results

    found = rewriter.substitute_all(roots, build, rule=layers[0].rule, nodes=matched)
    return found if isinstance(found, NoMatch) else None


def _followers(nodes: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Elementwise steps of one operand that follow on every one of `nodes`, the same on all."""
    steps: list[list[fx.Node]] = []
    while all(len(node.users) == 1 for node in nodes):
        step = [next(iter(node.users)) for node in nodes]
        first = step[0]
        if not isinstance(first.target, torch._ops.OpOverload) or torch.Tag.pointwise not in first.target.tags:
            break
        same = all(
            user.target is first.target
            and len(user.all_input_nodes) == 1
            and ir.same_literal(user.args[1:], first.args[1:])
            and ir.same_literal(sorted(user.kwargs.items()), sorted(first.kwargs.items()))
            for user in step
        )
        if not same or not all(effects.of(user).pure for user in step):
            break
        steps.append(step)
        nodes = step
    return steps


# -- building --------------------------------------------------------------------------------------------------------


def _wide(rewriter: Rewriter, layers: Sequence[Layer], *, mixed: bool) -> fx.Node:
    first = layers[0]
    activation = ("none", ()) if mixed else first.activation
    kernel = _siblings.largest(layers)
    axis = 1 if first.given.get("transposed") else 0
    weights = [_enlarged(_affine.weight_of(found.node), kernel) for found in layers]
    path = str(first.given["weight"].target)
    home = path.rpartition(".")[0]
    given = first.given | {
        "weight": rewriter.constant(torch.cat(weights, axis), f"{path}_merged"),
        "bias": None,
        "activation": activation[0],
        "activation_arguments": list(activation[1]),
    }
    biases = [_affine.bias_of(found.node) for found in layers]
    known = next((bias for bias in biases if bias is not None), None)
    if known is not None:
        filled = [
            known.new_zeros(found.channels) if bias is None else bias
            for found, bias in zip(layers, biases, strict=True)
        ]
        given["bias"] = rewriter.constant(torch.cat(filled), f"{home}.bias_merged" if home else "bias_merged")
    if first.linear:
        if activation[0] != "none":
            return rewriter.call(ops.linear, **given)
        return rewriter.call(aten.linear.default, given["input"], given["weight"], given["bias"])
    given["padding"] = [
        pad + dilation * (wide - own) // 2
        for pad, dilation, wide, own in zip(first.padding, given["dilation"], kernel, first.kernel, strict=True)
    ]
    if activation[0] != "none":
        return rewriter.call(ops.convolution, **given)
    names = ["input", "weight", "bias", "stride", "padding", "dilation", "groups"]
    names += ["output_padding"] if given["transposed"] else []
    target = ops.CONVOLUTIONS[len(kernel) + 2, given["transposed"]]
    return rewriter.call(target, **{name: given[name] for name in names})


def _enlarged(weight: torch.Tensor, kernel: tuple[int, ...]) -> torch.Tensor:
    """A kernel with zeros around it, as many on either side."""
    sides = [(wide - own) // 2 for wide, own in zip(kernel, weight.shape[2:], strict=True)]
    pads = [side for side in reversed(sides) for _ in range(2)]
    return torch.nn.functional.pad(weight, pads) if any(pads) else weight


def _activate(rewriter: Rewriter, node: fx.Node, name: str, numbers: Sequence[float]) -> fx.Node:
    target, extra = ops.ACTIVATIONS[name]
    if name == "gelu_tanh":
        return rewriter.call(target, node, approximate="tanh")
    return rewriter.call(target, node, *extra(numbers))


PASS = Pass("merge-siblings", run=_run, numerics="reassociate", doc=__doc__)
