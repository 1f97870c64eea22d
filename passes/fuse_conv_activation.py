"""fuse-conv-activation

    activation(conv(x, W, b))        ->  fxopt.convolution(x, W, b, activation)
    conv(x, W, b) + r                ->  fxopt.convolution(x, W, b, residual=r)
    activation(conv(x, W, b) + r)    ->  fxopt.convolution(x, W, b, residual=r, activation)      the two in turn

TensorRT's vertical fusion. An activation is relu, relu6, clamp, hardtanh, leaky_relu, silu, gelu (both forms),
hardswish, hardsigmoid, sigmoid, tanh, elu or mish; a convolution any of 1d to 3d, transposed or not.

Legal when: the convolution's result has no other reader; the residual has the same shape and dtype, and alpha is 1. Of
two convolutions that are added the later one takes the sum, so that nothing waits for what comes behind it.
Numerics: the same bits (the fused operation's meaning is these same operators, in this order).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt import Match, NoMatch, Pass, Rewriter, Rule, call, ops, var

from . import _epilogue

aten = torch.ops.aten

TARGETS: tuple[Any, ...] = (*ops.CONVOLUTION_TARGETS, ops.convolution)
CONV = call(TARGETS, name="layer")


def _rebuild(layer: fx.Node, rewriter: Rewriter, **changed: Any) -> fx.Node:
    given = ops.convolution_arguments(layer) | changed
    return rewriter.call(ops.convolution, **given)


def _activation_guard(match: Match) -> NoMatch | None:
    return _epilogue.activation_guard(match, ops.convolution_arguments(match.node("layer")))


def _fuse_activation(match: Match, rewriter: Rewriter) -> fx.Node:
    return _rebuild(match.node("layer"), rewriter, **_epilogue.activation(match))


def _residual_guard(match: Match) -> NoMatch | None:
    return _epilogue.residual_guard(match, ops.convolution_arguments, TARGETS)


def _fuse_residual(match: Match, rewriter: Rewriter) -> fx.Node:
    return _rebuild(match.node("layer"), rewriter, residual=match["residual"])


ACTIVATION = call(ops.ACTIVATION_TARGETS, CONV, name="activation")
SUM_LEFT = call(aten.add.Tensor, CONV, var("residual"), name="sum")
SUM_RIGHT = call(aten.add.Tensor, var("residual"), CONV, name="sum")

PASS = Pass(
    "fuse-conv-activation",
    rules=(
        Rule("activation", ACTIVATION, _fuse_activation, _activation_guard),
        Rule("residual-right", SUM_LEFT, _fuse_residual, _residual_guard),
        Rule("residual-left", SUM_RIGHT, _fuse_residual, _residual_guard),
    ),
    numerics="bitwise",
    doc=__doc__,
)
