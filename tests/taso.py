"""The benchmark graphs of TASO (Jia et al., SOSP 2019) and Tensat (Yang et al., MLSys 2021) as modules.

Written from the networks' papers and the sizes that the two name: inference graphs without norms, as theirs are
(batch norms are folded before they start). `BENCHMARKS` has each at its own size, and at a small one for tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional


class Conv(nn.Sequential):
    """A convolution that keeps the map's size at stride 1, and a ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, *, pad: bool = True):
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(side // 2 for side in sides) if pad else 0
        super().__init__(nn.Conv2d(inputs, outputs, sides, stride, padding), nn.ReLU())


# -- ResNeXt-50 (Xie et al., 2017) -----------------------------------------------------------------------------------


class ResNeXtBlock(nn.Module):
    """1x1, grouped 3x3, 1x1, and a shortcut, which is a 1x1 convolution where sizes change."""

    def __init__(self, inputs: int, width: int, groups: int, stride: int) -> None:
        super().__init__()
        self.reduce, self.grow = Conv(inputs, width, 1), nn.Conv2d(width, 2 * width, 1)
        self.grouped = nn.Conv2d(width, width, 3, stride, 1, groups=groups)
        changes = stride != 1 or inputs != 2 * width
        self.shortcut = nn.Conv2d(inputs, 2 * width, 1, stride) if changes else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.grow(functional.relu(self.grouped(self.reduce(x))))
        return functional.relu(y + self.shortcut(x))


class ResNeXtCell(nn.Sequential):
    """The first stage of ResNeXt-50: three blocks."""

    def __init__(self, inputs: int = 64, width: int = 128, groups: int = 32) -> None:
        blocks = [ResNeXtBlock(inputs if index == 0 else 2 * width, width, groups, 1) for index in range(3)]
        super().__init__(*blocks)


# -- NASNet-A (Zoph et al., 2018) ------------------------------------------------------------------------------------


class Separable(nn.Sequential):
    """ReLU, a depthwise and a 1x1 convolution."""

    def __init__(self, channels: int, kernel: int, stride: int = 1) -> None:
        depthwise = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels)
        super().__init__(nn.ReLU(), depthwise, nn.Conv2d(channels, channels, 1))


class NasNetCell(nn.Module):
    """The normal cell: five sums of two branches each, of this cell's input and the one's before it, joined."""

    def __init__(self, previous: int, current: int, channels: int) -> None:
        super().__init__()
        self.fit_previous, self.fit_current = Conv(previous, channels, 1), Conv(current, channels, 1)
        self.left = nn.ModuleList(Separable(channels, kernel) for kernel in (3, 5, 5))
        self.right = nn.ModuleList(Separable(channels, kernel) for kernel in (3, 3))
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, previous: torch.Tensor, current: torch.Tensor) -> torch.Tensor:
        previous, current = self.fit_previous(previous), self.fit_current(current)
        sums = [
            self.left[0](current) + current,
            self.right[0](previous) + self.left[1](current),
            self.pool(current) + previous,
            self.pool(previous) + self.pool(previous),
            self.left[2](previous) + self.right[1](previous),
        ]
        return torch.cat([previous, *sums], 1)


class NasNet(nn.Module):
    """Two normal cells, the second of which reads the first and what the first read."""

    def __init__(self, inputs: int = 128, channels: int = 128) -> None:
        super().__init__()
        self.first = NasNetCell(inputs, inputs, channels)
        self.second = NasNetCell(inputs, 6 * channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(x, self.first(x, x))


# -- NasRNN (Zoph and Le, 2017) --------------------------------------------------------------------------------------


class NasCell(nn.Module):
    """The recurrent cell that the search found: eight sums of two products each, then a tree."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.of_input = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(8))
        self.of_state = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(8))

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        a, b, c, d, e, f, g, h = (
            left(x) + right(state) for left, right in zip(self.of_input, self.of_state, strict=True)
        )
        first = torch.relu(a) + torch.sigmoid(d)
        second = torch.sigmoid(b) + torch.tanh(c)
        third = torch.sigmoid(e) * torch.tanh(f)
        fourth = torch.sigmoid(g) * torch.relu(h)
        upper = torch.sigmoid(second) + torch.tanh(third)
        lower = torch.tanh(first) * torch.tanh(fourth)
        return torch.tanh(torch.tanh(upper) * torch.tanh(lower))


class NasRnn(nn.Module):
    """Five steps of the cell, from a sequence of five inputs (steps, batch, size)."""

    def __init__(self, size: int = 512) -> None:
        super().__init__()
        self.cell = NasCell(size)
        self.start = nn.Parameter(torch.randn(1, size))

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        state = self.start.expand(sequence.shape[1], -1)
        for index in range(5):
            state = self.cell(sequence[index], state)
        return state


# -- Inception-v3 (Szegedy et al., 2016) -----------------------------------------------------------------------------


class Branches(nn.Module):
    """Branches of one input, joined along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Inception(nn.Sequential):
    """Inception-v3: stem, the five kinds of blocks, classifier. `scale` divides every number of channels."""

    def __init__(self, scale: int = 1, classes: int = 1000) -> None:
        def conv(inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, stride: int = 1) -> Conv:
            return Conv(inputs // scale, outputs // scale, kernel, stride, pad=stride == 1)

        def pooled(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(nn.AvgPool2d(3, 1, 1), conv(inputs, outputs))

        def small(inputs: int, last: int) -> Branches:  # 35x35
            return Branches(
                conv(inputs, 64),
                nn.Sequential(conv(inputs, 48), conv(48, 64, 5)),
                nn.Sequential(conv(inputs, 64), conv(64, 96, 3), conv(96, 96, 3)),
                pooled(inputs, last),
            )

        def factored(middle: int) -> Branches:  # 17x17: 7x7 as 1x7 and 7x1
            row, column = (1, 7), (7, 1)
            return Branches(
                conv(768, 192),
                nn.Sequential(conv(768, middle), conv(middle, middle, row), conv(middle, 192, column)),
                nn.Sequential(
                    conv(768, middle),
                    conv(middle, middle, column),
                    conv(middle, middle, row),
                    conv(middle, middle, column),
                    conv(middle, 192, row),
                ),
                pooled(768, 192),
            )

        def wide(inputs: int) -> Branches:  # 8x8: branches that part again
            def parted() -> Branches:
                return Branches(conv(384, 384, (1, 3)), conv(384, 384, (3, 1)))

            return Branches(
                conv(inputs, 320),
                nn.Sequential(conv(inputs, 384), parted()),
                nn.Sequential(conv(inputs, 448), conv(448, 384, 3), parted()),
                pooled(inputs, 192),
            )

        first = Conv(3, 32 // scale, 3, 2, pad=False)
        super().__init__(
            first,
            Conv(32 // scale, 32 // scale, 3, pad=False),
            conv(32, 64, 3),
            nn.MaxPool2d(3, 2),
            conv(64, 80),
            Conv(80 // scale, 192 // scale, 3, pad=False),
            nn.MaxPool2d(3, 2),
            small(192, 32),
            small(256, 64),
            small(288, 64),
            Branches(
                conv(288, 384, 3, 2),
                nn.Sequential(conv(288, 64), conv(64, 96, 3), conv(96, 96, 3, 2)),
                nn.MaxPool2d(3, 2),
            ),
            *(factored(middle) for middle in (128, 160, 160, 192)),
            Branches(
                nn.Sequential(conv(768, 192), conv(192, 320, 3, 2)),
                nn.Sequential(conv(768, 192), conv(192, 192, (1, 7)), conv(192, 192, (7, 1)), conv(192, 192, 3, 2)),
                nn.MaxPool2d(3, 2),
            ),
            wide(1280),
            wide(2048),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2048 // scale, classes),
        )


# -- SqueezeNet 1.1 (Iandola et al., 2016), VGG-19 (Simonyan and Zisserman, 2015) ------------------------------------


class Fire(nn.Sequential):
    """A 1x1 convolution, and of it a 1x1 and a 3x3 one, joined."""

    def __init__(self, inputs: int, middle: int, outputs: int) -> None:
        super().__init__(Conv(inputs, middle, 1), Branches(Conv(middle, outputs, 1), Conv(middle, outputs, 3)))


class SqueezeNet(nn.Sequential):
    """Eight fire modules. `scale` divides every number of channels."""

    def __init__(self, scale: int = 1, classes: int = 1000) -> None:
        def fire(inputs: int, middle: int, outputs: int) -> Fire:
            return Fire(inputs // scale, middle // scale, outputs // scale)

        super().__init__(
            Conv(3, 64 // scale, 3, 2, pad=False), nn.MaxPool2d(3, 2, ceil_mode=True),
            fire(64, 16, 64), fire(128, 16, 64), nn.MaxPool2d(3, 2, ceil_mode=True),
            fire(128, 32, 128), fire(256, 32, 128), nn.MaxPool2d(3, 2, ceil_mode=True),
            fire(256, 48, 192), fire(384, 48, 192), fire(384, 64, 256), fire(512, 64, 256),
            Conv(512 // scale, classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip


class Vgg19(nn.Sequential):
    """Sixteen convolutions and three linear layers, for 224x224. `scale` divides every number of channels."""

    def __init__(self, scale: int = 1, side: int = 7, classes: int = 1000) -> None:
        layers: list[nn.Module] = []
        inputs = 3
        for width, count in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(count):
                layers.append(Conv(inputs, width // scale, 3))
                inputs = width // scale
            layers.append(nn.MaxPool2d(2))
        hidden = 4096 // scale
        super().__init__(
            *layers, nn.Flatten(),
            nn.Linear(inputs * side * side, hidden), nn.ReLU(),
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes),
        )  # fmt: skip


# -- BERT (Devlin et al., 2019) --------------------------------------------------------------------------------------


class BertLayer(nn.Module):
    """Attention alone, as in the benchmark: no biases, norms or residuals.

    The benchmark leaves the softmax out, too; it is here because without it eight layers give no finite number.
    """

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(size, size, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens, size = x.shape
        query, key, value = (
            layer(x).reshape(tokens, self.heads, size // self.heads).transpose(0, 1)
            for layer in (self.query, self.key, self.value)
        )
        scores = torch.matmul(query, key.transpose(1, 2)) / math.sqrt(size // self.heads)
        mixed = torch.matmul(scores.softmax(-1), value)
        return self.out(mixed.transpose(0, 1).reshape(tokens, size))


class Bert(nn.Sequential):
    """Eight layers on 64 tokens of 1024 features, 16 heads."""

    def __init__(self, size: int = 1024, heads: int = 16, layers: int = 8) -> None:
        super().__init__(nn.ReLU(), *(BertLayer(size, heads) for _ in range(layers)))


# -- all of them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """One graph: how it is built and its input's shape, at its own size and at a small one."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    build_small: Callable[[], nn.Module]
    small_shape: tuple[int, ...]


BENCHMARKS: dict[str, Benchmark] = {
    "ResNeXt-50 cell": Benchmark(ResNeXtCell, (1, 64, 56, 56), lambda: ResNeXtCell(8, 16, 4), (1, 8, 7, 7)),
    "NasNet-A cell": Benchmark(NasNet, (1, 128, 56, 56), lambda: NasNet(6, 4), (1, 6, 7, 7)),
    "NasRNN cell": Benchmark(NasRnn, (5, 1, 512), lambda: NasRnn(6), (5, 1, 6)),
    "Inception-v3": Benchmark(Inception, (1, 3, 299, 299), lambda: Inception(16, 10), (1, 3, 75, 75)),
    "SqueezeNet": Benchmark(SqueezeNet, (1, 3, 224, 224), lambda: SqueezeNet(8, 10), (1, 3, 35, 35)),
    "VGG-19": Benchmark(Vgg19, (1, 3, 224, 224), lambda: Vgg19(16, 1, 10), (1, 3, 32, 32)),
    "BERT": Benchmark(Bert, (64, 1024), lambda: Bert(8, 2, 2), (4, 8)),
}
