"""fuse-linear-activation

    activation(linear(x, W, b))        ->  fxopt.linear(x, W, b, activation)
    linear(x, W, b) + r                ->  fxopt.linear(x, W, b, residual=r)
    activation(linear(x, W, b) + r)    ->  fxopt.linear(x, W, b, residual=r, activation)      the two in turn

Vertical fusion for linear layers, with the activations of fuse-conv-activation.

Legal when: the layer's result has no other reader; the residual has the same shape and dtype, and alpha is 1; of two
layers that are added the later one takes the sum.
Numerics: the same bits (the fused operation's meaning is these same operators, in this order).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt import Match, NoMatch, Pass, Rewriter, Rule, call, ops, var

from . import _epilogue

aten = torch.ops.aten

TARGETS: tuple[Any, ...] = (aten.linear.default, ops.linear)
LINEAR = call(TARGETS, name="layer")


def _rebuild(layer: fx.Node, rewriter: Rewriter, **changed: Any) -> fx.Node:
    return rewriter.call(ops.linear, **(ops.linear_arguments(layer) | changed))


def _activation_guard(match: Match) -> NoMatch | None:
    return _epilogue.activation_guard(match, ops.linear_arguments(match.node("layer")))


def _fuse_activation(match: Match, rewriter: Rewriter) -> fx.Node:
    return _rebuild(match.node("layer"), rewriter, **_epilogue.activation(match))


def _residual_guard(match: Match) -> NoMatch | None:
    return _epilogue.residual_guard(match, ops.linear_arguments, TARGETS)


def _fuse_residual(match: Match, rewriter: Rewriter) -> fx.Node:
    return _rebuild(match.node("layer"), rewriter, residual=match["residual"])


ACTIVATION = call(ops.ACTIVATION_TARGETS, LINEAR, name="activation")
SUM_LEFT = call(aten.add.Tensor, LINEAR, var("residual"), name="sum")
SUM_RIGHT = call(aten.add.Tensor, var("residual"), LINEAR, name="sum")

PASS = Pass(
    "fuse-linear-activation",
    rules=(
        Rule("activation", ACTIVATION, _fuse_activation, _activation_guard),
        Rule("residual-right", SUM_LEFT, _fuse_residual, _residual_guard),
        Rule("residual-left", SUM_RIGHT, _fuse_residual, _residual_guard),
    ),
    numerics="bitwise",
    doc=__doc__,
)
