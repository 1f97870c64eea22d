"""The portable backend: the rewritten graph as it is, in plain ATen, on any device, with gradients and autocast.

Every other backend falls back on it node by node: what they do not take stays an ATen operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt import ops
from fxopt.lowering import executor
from fxopt.lowering.backend import Backend, Runner, Setting
from fxopt.lowering.weights import Weights


def _declines(module: fx.GraphModule, setting: Setting) -> str | None:
    return None


def _build(module: fx.GraphModule, packed: Weights) -> Runner:
    ops.decompose_all(module)
    run = executor.build(module)

    def call(*tensors: torch.Tensor) -> tuple[Any, ...]:
        return run(*tensors)

    return call


BACKEND = Backend("aten", numerics="bitwise", declines=_declines, build=_build)
