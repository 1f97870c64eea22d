"""What the tests of compiled modules share: a network in which a norm folds and a residual fuses, and its inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from graphs import FRONT_ENDS, Network, randomised

front_ends = pytest.mark.parametrize("front_end", FRONT_ENDS)


def convnet() -> nn.Module:
    """A norm that is folded, a residual that is fused, and a head whose weights stay shared."""
    return randomised(
        Network(
            lambda m, x: m.head(m.pool((m.norm(m.conv(x)) + m.skip(x)).relu()).flatten(1)),
            conv=nn.Conv2d(3, 4, 3, padding=1),
            norm=nn.BatchNorm2d(4),
            skip=nn.Conv2d(3, 4, 1),
            pool=nn.AdaptiveAvgPool2d(1),
            head=nn.Linear(4, 5),
        )
    )


def image(batch: int = 2, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def compiled_by(front_end: str, model: nn.Module, **options: Any) -> fxopt.CompiledModule:
    return fxopt.compile(model, (image(),), **options) if front_end == "export" else fxopt.compile(model, **options)


def assert_close(result: Any, expected: Any) -> None:
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=1e-5)
