"""What the tests of attention share: models that spell it, and how a compiled one is compared."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxopt
from graphs import Network, compiled_by

PASSES = ("fuse-attention",)
Body = Callable[[Any, Any], Any]
B, N, H, D = 2, 6, 3, 4
INF = math.inf
MIN = torch.finfo(torch.float32).min


def parts() -> dict[str, Any]:
    """Masks and scales, constant, in every shape that scores take."""
    causal = torch.ones(9, 9, dtype=torch.bool).tril()
    leaky = torch.rand(N, N) > 0.5
    leaky[:, 0] = True
    empty = leaky.clone()
    empty[2] = False
    window = torch.where(torch.rand(2, N, N) > 0.5, 0.0, -100.0)
    return {
        "causal": causal,
        "future": ~causal[:N, :N],
        "leaky": leaky,
        "empty": empty,
        "bias": torch.randn(1, H, N, N),
        "plane": torch.randn(N, N),
        "hard": torch.where(causal, 0.0, -INF)[:N, :N],
        "lowest": torch.where(leaky, 0.0, MIN),
        "emptied": torch.where(empty, 0.0, -INF),
        "emptied_low": torch.where(empty, 0.0, MIN),
        "nan": torch.full((N, N), math.nan),
        "window": window,
        "wide": torch.randn(N, N, dtype=torch.float64),
        "whole": torch.ones(N, N, dtype=torch.int64),
        "scale": torch.tensor(0.3),
        "one": nn.Parameter(torch.tensor([0.7])),
        "zero": torch.tensor(0.0),
        "per_head": nn.Parameter(torch.rand(H, 1, 1) + 0.5),
        "per_key": torch.rand(N) + 0.5,
        "table": nn.Parameter(torch.randn(20, H)),
        "index": torch.randint(0, 20, (N, N)),
        "minus": torch.tensor(-1e9),
    }


def model_of(body: Body) -> nn.Module:
    return Network(body, **parts()).eval()


def q(x: Any) -> Any:
    """Queries of x, a (batch, rows, 3, heads, features) tensor, as (batch, heads, rows, features)."""
    return x[:, :, 0].transpose(1, 2)


def k(x: Any) -> Any:
    """Keys."""
    return x[:, :, 1].transpose(1, 2)


def v(x: Any) -> Any:
    """Values."""
    return x[:, :, 2].transpose(1, 2)


def scores(x: Any) -> Any:
    """The scores, scaled as usual."""
    return q(x) @ k(x).transpose(-2, -1) / math.sqrt(D)


def joined(y: Any) -> Any:
    """Heads side by side: what most models do with the result."""
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def weighted(x: Any, values: Any) -> Any:
    """softmax(values) v, joined."""
    return joined(values.softmax(-1) @ v(x))


def flat(y: Any) -> Any:
    """(batch, heads, ...) as one dimension."""
    return y.reshape(-1, y.shape[2], y.shape[3])


def filled(x: Any) -> Any:
    """A mask that is made and then written."""
    mask = torch.zeros(N, N)
    mask[1].fill_(-INF)
    return mask


def weighted_over(x: Any, weights: Any) -> Any:
    """The weights times v."""
    return weights @ v(x)


def outcome(body: Body, front_end: str, dtype: torch.dtype = torch.float32) -> fxopt.CompiledModule:
    """Compiles, and compares with the model: within twice what it itself misses of float64, and units of rounding."""
    model = model_of(body)
    x = torch.randn(B, N, 3, H, D).to(dtype)
    if dtype is not torch.float32:
        model = model.to(dtype)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    with torch.no_grad():
        expected, actual, exact = model(x), compiled(x), model.double()(x.double())
    assert (actual.dtype, actual.shape, actual.stride()) == (expected.dtype, expected.shape, expected.stride())
    size = float(exact.abs().max())
    theirs, ours = (float((found.double() - exact).abs().max()) / size for found in (expected, actual))
    assert ours <= 2 * theirs + 4 * torch.finfo(dtype).eps
    return compiled


class Log(TorchDispatchMode):
    """The kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator."""
        self.names.add(op._opname)
        return op(*args, **(kwargs or {}))


def kernels(compiled: fxopt.CompiledModule, *inputs: torch.Tensor) -> set[str]:
    """The kernels that a compiled module runs."""
    with Log() as log, torch.no_grad():
        fx.Interpreter(compiled.graph_module).run(*inputs)
    return log.names
