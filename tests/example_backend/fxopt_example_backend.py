"""addmm: linear layers on matrices as one call of addmm, with its relu, on weights that lie transposed in memory.

Takes: linear layers whose weight and bias are constants, on two-dimensional inputs, without gradients or autocast.
Numerics: reassociate. NaN stays NaN.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fxopt import Backend, Pass, Rewriter, Setting, ir, ops
from fxopt.lowering import Weights, executor

aten = torch.ops.aten


def declines(module: torch.fx.GraphModule, setting: Setting) -> str | None:
    if setting.needs_grad:
        return "an input requires grad, and addmm with an activation has no backward"
    if setting.autocast:
        return "autocast is on, and would cast the weights in each call"
    return None


def refusal(given: dict[str, Any]) -> str | None:
    if given["residual"] is not None:
        return "addmm adds a bias, and no residual"
    if given["activation"] not in ("none", "relu"):
        return f"addmm has no {given['activation']}"
    if ir.tensor(given["weight"]) is None or ir.tensor(given["bias"]) is None:
        return "its weight or bias is not a constant"
    if ir.rank(given["input"]) != 2:
        return "its input is no matrix"
    return None


def addmm(rewriter: Rewriter, given: dict[str, Any]) -> torch.fx.Node:
    transposed = rewriter.call(aten.t.default, given["weight"])
    target = aten._addmm_activation.default if given["activation"] == "relu" else aten.addmm.default
    return rewriter.call(target, given["bias"], given["input"], transposed)


def lower_linears(rewriter: Rewriter) -> None:
    for node in list(rewriter.graph.nodes):
        if node.target not in (ops.linear, aten.linear.default):
            continue
        given = ops.linear_arguments(node)
        reason = refusal(given)
        if reason is None:
            rewriter.substitute(node, partial(addmm, rewriter, given), rule="linear")
        else:
            rewriter.decline(node, reason, rule="linear")


def build(module: torch.fx.GraphModule, packed: Weights) -> Callable[..., tuple[Any, ...]]:
    ops.decompose_all(module)  # what no pass took becomes plain ATen

    def pack(reader: torch.fx.Node, attribute: torch.fx.Node, weight: torch.Tensor) -> torch.Tensor | None:
        if reader.target is not aten.t.default:
            return None
        found: torch.Tensor = packed.once(("addmm",), weight, lambda: weight.t().contiguous().t())
        return found

    run = executor.build(module, pack)

    def call(*tensors: torch.Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            return run(*tensors)

    return call


BACKEND = Backend(
    "addmm",
    numerics="reassociate",
    declines=declines,
    passes=(Pass("addmm-linear", run=lower_linears, doc="linear layers as one call of addmm"),),
    build=build,
)
