"""Norms, layers beside them, and statistics that a fold can get wrong: what the tests of folding share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphs import FRONT_ENDS, Network, randomised

both = pytest.mark.parametrize("front_end", FRONT_ENDS)
#: The rules of fold-batchnorm.
AFTER, BEFORE, CHAIN, CROSS = "norm-after-layer", "norm-before-layer", "norm-after-norm", "norm-and-relu-before-layer"
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
Case = tuple[str, Callable[[], nn.Module], tuple[int, ...]]


def table(cases: list[Any]) -> pytest.MarkDecorator:
    """Parametrises by rows whose first entry is the id."""
    names = ("model", "shape", "rule", "reason")[: len(cases[0]) - 1]
    return pytest.mark.parametrize(names, [pytest.param(*row[1:], id=row[0]) for row in cases])


def sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def image(rank: int, channels: int = 4, size: int = 6) -> tuple[int, ...]:
    return (2, channels, *[size] * rank)


def functional(norm: Callable[..., Any], layer: nn.Module, channels: int = 4) -> Callable[[], nn.Module]:
    """A layer and a functional norm with statistics of its own."""
    return lambda: Network(
        norm,
        layer=layer,
        mean=torch.randn(channels),
        variance=torch.rand(channels) + 0.5,
        gain=torch.randn(channels),
        shift=torch.randn(channels),
    )


def f_batch_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(m.layer(x), m.mean, m.variance, m.gain, m.shift)


def torch_batch_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.batch_norm(m.layer(x), m.gain, m.shift, m.mean, m.variance, False, 0.1, 1e-5, True)


def stateless_batch_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._native_batch_norm_legit_no_training(
        m.layer(x), m.gain, m.shift, m.mean, m.variance, 0.1, 1e-5
    )[0]


def frozen(norm: Any, **statistics: float) -> Any:
    """A norm of given statistics: weight, bias, running_mean, running_var, each one number for all channels."""
    with torch.no_grad():
        for name, value in statistics.items():
            getattr(norm, name).fill_(value)
    return norm


def filled(conv: Any, weight: float) -> Any:
    """A conv whose weights are one number."""
    with torch.no_grad():
        conv.weight.fill_(weight)
    return conv


def between(body: Callable[[Any, torch.Tensor], Any], **parts: Any) -> Callable[[], nn.Module]:
    return lambda: Network(body, **({"conv": nn.Conv2d(4, 6, 3), "norm": nn.BatchNorm2d(6)} | parts))


def holding(index: int, name: str, value: float, *layers: nn.Module) -> Callable[[], nn.Module]:
    """A sequence, one entry of one tensor of which is `value` (after randomising)."""

    def build() -> nn.Module:
        model = randomised(nn.Sequential(*layers))
        tensor = getattr(model[index], name)
        with torch.no_grad():
            tensor.view(-1)[-1] = value
        return model

    return build


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(4, 6, 3, **options), nn.BatchNorm2d(6)
