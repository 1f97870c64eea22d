"""The narrow interface of a backend, and what is common to all: concrete values for one signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt import ir
from fxopt.lowering.weights import Weights
from fxopt.rewrite import Numerics, Pass

Runner = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True)
class Setting:
    """The state of torch in which a specialisation runs: gradients wanted, autocast dtype by device type, threads."""

    needs_grad: bool = False
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    threads: int = 1

    @classmethod
    def now(cls, tensors: Sequence[torch.Tensor]) -> Setting:
        """The state as it is, for a call on these tensors."""
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return cls(needs_grad, ir.autocast(), torch.get_num_threads())


@dataclass(frozen=True)
class Backend:
    """A way to run a rewritten graph.

    `declines(module, setting)` says why a specialisation cannot be taken, or None; `passes` lower the graph in place;
    `build(module, packed)` turns it into a function of the flat tensors. `packed` outlives the specialisation: weights
    in a kernel's own layout are shared through it (see `Weights`). `numerics` is what the kernels promise against
    ATen's.
    """

    name: str
    numerics: Numerics
    declines: Callable[[fx.GraphModule, Setting], str | None]
    build: Callable[[fx.GraphModule, Weights], Runner]
    passes: tuple[Pass, ...] = field(default=())


def set_concrete_values(module: fx.GraphModule, tensors: Sequence[torch.Tensor]) -> None:
    """Gives every node the value it has for inputs of exactly these shapes, strides, dtypes and devices."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module.meta["fake_mode"] = mode
    rest = iter(tensors)
    for node in module.graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = mode.from_tensor(next(rest).detach(), static_shapes=True)
        elif node.op != "output":
            ir.update_value(node)
