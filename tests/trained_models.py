"""Small models whose compiled graphs are trained, by what is rewritten in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxopt.models import randomize_fresh_norms

X = torch.Generator().manual_seed(1)
IMAGE = torch.randn(3, 4, 8, 8, generator=X)
ROWS = torch.randn(3, 6, 8, generator=X)


class Model(nn.Module):
    """Layers by name, and a forward that a table gives."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **options)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4)


def parameter(*sizes: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*sizes, generator=X))


def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    return (q @ k.transpose(-1, -2) / math.sqrt(8) + m.table[m.places]).softmax(-1) @ v


def partly(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = m.norm(m.conv(x))
    return m.last(x)


#: What is rewritten, and by which passes.
TABLE: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, set[str]]] = {
    "norm behind a convolution": (
        lambda: Model(lambda m, x: m.norm(m.conv(x)).relu(), conv=conv(), norm=norm()),
        IMAGE,
        {"fold-batchnorm", "fuse-conv-activation"},
    ),
    "norm in front of a linear layer": (
        lambda: Model(lambda m, x: m.fc(m.norm(x)), fc=nn.Linear(6, 5), norm=nn.BatchNorm1d(6)),
        ROWS[:, :, 0],
        {"fold-batchnorm"},
    ),
    "norm across a ReLU": (
        lambda: Model(
            lambda m, x: m.conv(m.norm(x).relu()), conv=conv(), norm=norm(),
        ),
        IMAGE,
        {"fold-batchnorm"},
    ),
    "transposed, grouped": (
        lambda: Model(
            lambda m, x: m.norm(m.up(x)), up=nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2), norm=norm()
        ),
        IMAGE,
        {"fold-batchnorm"},
    ),
    "a scale and a shift": (
        lambda: Model(
            lambda m, x: m.conv(x) * m.scale + m.shift, conv=conv(), scale=parameter(4, 1, 1), shift=parameter(4, 1, 1)
        ),
        IMAGE,
        {"fold-affine"},
    ),
    "parallel branches": (
        lambda: Model(
            lambda m, x: (m.a(m.wide(x)) + m.b(m.point(x)) + m.c(x)).relu(),
            wide=conv(bias=False), point=nn.Conv2d(4, 4, 1), a=norm(), b=norm(), c=norm(),
        ),
        IMAGE,
        {"fold-batchnorm", "merge-parallel-branches"},
    ),
    "concat in front of a convolution": (
        lambda: Model(
            lambda m, x: m.last(torch.cat([m.a(x), m.b(x)], 1)),
            a=conv(), b=nn.Conv2d(4, 4, 1), last=nn.Conv2d(8, 3, 3),
        ),
        IMAGE,
        set(),
    ),
    "attention with a trained bias": (
        lambda: Model(
            attention, q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8),
            table=parameter(11), places=torch.arange(6)[:, None] - torch.arange(6) + 5,
        ),
        ROWS,
        set(),
    ),
    "products written by hand": (
        lambda: Model(lambda m, x: x @ m.weight + m.bias, weight=parameter(8, 5), bias=parameter(5)),
        ROWS,
        {"spell-linear", "fold-affine"},
    ),
    "a weight that is computed": (
        lambda: Model(lambda m, x: m.norm(nn.functional.conv2d(x, m.weight * m.mask)),
                      weight=parameter(4, 4, 3, 3), mask=(torch.rand(4, 4, 3, 3, generator=X) > 0.5), norm=norm()),
        IMAGE,
        set(),
    ),
    "detached": (
        lambda: Model(lambda m, x: m.norm(m.conv(x).detach()) + m.norm(x), conv=conv(), norm=norm()),
        IMAGE,
        set(),
    ),
    "a part without gradients": (
        lambda: Model(partly, conv=conv(), norm=norm(), last=conv()),
        IMAGE,
        set(),
    ),
    "several results": (
        lambda: Model(lambda m, x: {"a": m.norm(m.conv(x)), "b": [x.sum((2, 3)), m.conv(x).relu()]},
                      conv=conv(), norm=norm()),
        IMAGE,
        set(),
    ),
}  # fmt: skip


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    randomize_fresh_norms(model)
    return model


def leaves(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def loss(result: Any) -> torch.Tensor:
    return sum((leaf.double() * torch.arange(leaf.numel()).reshape(leaf.shape).cos()).sum() for leaf in leaves(result))
