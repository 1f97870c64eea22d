"""What the tests of merge-siblings share: layers, and exact numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

ALONE = ("merge-siblings",)
FUSED = ("fuse-conv-activation", "fuse-linear-activation", "merge-siblings")
CONVS, LINEARS = "convolutions", "linears"
IMAGE, ROWS = (2, 4, 6, 5), (2, 3, 4)
Body = Callable[[Any, Any], Any]


def dyadic(*shape: int) -> torch.Tensor:
    """Small multiples of 1/8 in float64, whose sums and products do not round."""
    return torch.randint(-8, 9, shape).double() / 8


def exact(model: nn.Module) -> nn.Module:
    """The model in eval mode with dyadic float64 weights."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(dyadic(*parameter.shape))
    return model


def conv(out: int, kernel: Any = 1, channels: int = 4, **options: Any) -> nn.Module:
    return nn.Conv2d(channels, out, kernel, **options)


def linear(out: int, **options: Any) -> nn.Module:
    return nn.Linear(4, out, **options)


def joined(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([m.a(x), m.b(x)], 1)


def joined_rows(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([m.a(x), m.b(x)], -1)


def results(found: Any) -> list[torch.Tensor]:
    """The tensors that a call gives."""
    return [found] if isinstance(found, torch.Tensor) else list(found)
