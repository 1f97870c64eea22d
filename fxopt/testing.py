"""For authors of passes: random whole networks, to see that a pass keeps them equal.

`random_network(seed)` gives a module and its input: a directed graph of convolutions, norms, activations, sums,
concats, splits, views, in-place operations, shared layers and dtype changes, with results at any node. With `exact` all
numbers are small dyadic rationals in float64 and every norm's scale is a power of two, so that rewrites that are exact
in exact arithmetic must give `torch.equal` results.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Step = tuple[str, tuple[int, ...], dict[str, Any]]


class RandomNetwork(nn.Module):
    """A network that is a list of steps over a growing list of values; `steps` reads as a program."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.steps: list[Step] = []
        self.outputs: list[int] = []
        self.structure = "tuple"

    def add_layer(self, layer: nn.Module) -> str:
        """Keeps a layer under a new name."""
        name = f"layer{len(self.layers)}"
        self.layers[name] = layer
        return name

    def forward(self, x: torch.Tensor) -> Any:
        """Runs the steps and hands out the chosen values."""
        values: list[torch.Tensor] = [x]
        for kind, operands, options in self.steps:
            taken = [values[index] for index in operands]
            values.append(_STEPS[kind](self, taken, options))
        results = [values[index] for index in self.outputs]
        if self.structure == "dict":
            return {f"y{index}": result for index, result in enumerate(results)}
        return results[0] if self.structure == "single" else tuple(results)

    def extra_repr(self) -> str:
        """The steps, one a line."""
        numbered = enumerate(self.steps, start=1)
        lines = [f"v{index} = {kind}{operands} {options or ''}" for index, (kind, operands, options) in numbered]
        return "\n".join([*lines, f"return {self.structure} {self.outputs}"])


def _layer(net: RandomNetwork, taken: list[torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    result: torch.Tensor = net.layers[options["layer"]](taken[0])
    return result


def _rows(net: RandomNetwork, taken: list[torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    """A linear layer over the channels: (n, c, h, w) -> (n, h, w, c) -> linear -> back."""
    result: torch.Tensor = net.layers[options["layer"]](taken[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return result


def _write(net: RandomNetwork, taken: list[torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
    """A write into a part of a value that may have other readers."""
    value = taken[0]
    value[:, : options["channels"]].mul_(options["factor"])
    return value


_STEPS: dict[str, Callable[[RandomNetwork, list[torch.Tensor], dict[str, Any]], torch.Tensor]] = {
    "layer": _layer,
    "rows": _rows,
    "write": _write,
    "add": lambda net, v, o: v[0] + v[1],
    "sub": lambda net, v, o: v[0] - v[1],
    "add_": lambda net, v, o: v[0].add_(v[1]),
    "iadd": lambda net, v, o: _iadd(v[0], v[1]),
    "mul": lambda net, v, o: v[0] * v[1],
    "scale": lambda net, v, o: v[0] * o["by"] + o["plus"],
    "relu": lambda net, v, o: torch.relu(v[0]),
    "relu_": lambda net, v, o: torch.relu_(v[0]),
    "clamp": lambda net, v, o: v[0].clamp(o["low"], o["high"]),
    "sigmoid": lambda net, v, o: torch.sigmoid(v[0]),
    "cat": lambda net, v, o: torch.cat(v, dim=1),
    "first_half": lambda net, v, o: v[0].chunk(2, dim=1)[0],
    "second_half": lambda net, v, o: v[0].chunk(2, dim=1)[1],
    "channels": lambda net, v, o: v[0][:, : o["most"]],
    "pool": lambda net, v, o: nn.functional.max_pool2d(v[0], 3, 1, 1),
    "flat": lambda net, v, o: v[0].flatten(2).view(v[0].shape[0], -1, v[0].shape[2], v[0].shape[3]),
    "identity": lambda net, v, o: v[0] * 1,
    "clone": lambda net, v, o: v[0].clone(),
    "narrow": lambda net, v, o: v[0].to(torch.float32).to(v[0].dtype),
    "pad": lambda net, v, o: nn.functional.pad(v[0], (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
    "mean": lambda net, v, o: v[0] + v[0].mean((2, 3), keepdim=True),
    "dead": lambda net, v, o: (torch.relu(v[0]), v[0])[1],
}


def _iadd(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    left += right
    return left


def random_network(
    seed: int, *, size: int = 12, exact: bool = False, writes: bool = True
) -> tuple[RandomNetwork, tuple[torch.Tensor]]:
    """A random network in eval mode of `size` steps, and its input: float32 (float64 with `exact`) of (n, c, h, w).

    Without `writes` nothing is done in place. The same seed gives the same network.
    """
    for attempt in range(100):
        net, x = _network(random.Random(f"{seed}, {attempt}"), seed, size, exact=exact, writes=writes)
        try:
            with torch.no_grad():
                net(x.clone())
        except RuntimeError:
            continue  # PyTorch itself refuses it: a sum into a tensor that overlaps its operand
        return net, (x,)
    raise RuntimeError(f"no network of seed {seed} runs")


def _network(
    choose: random.Random, seed: int, size: int, *, exact: bool, writes: bool
) -> tuple[RandomNetwork, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if exact else torch.float32
    net = RandomNetwork()
    shape = (choose.choice([1, 2, 3]), choose.choice([2, 4, 6]), choose.choice([3, 4, 6]), choose.choice([3, 5]))
    shapes: list[tuple[int, ...]] = [shape]
    while len(net.steps) < size:
        step = _random_step(choose, net, shapes, exact=exact, writes=writes)
        if step is None:
            continue
        net.steps.append(step)
        with torch.no_grad():
            operands = [torch.zeros(shapes[index], dtype=dtype) for index in step[1]]
            shapes.append(tuple(_STEPS[step[0]](net.to(dtype).eval(), operands, step[2]).shape))
    for layer in net.layers.values():
        _fill(layer, generator, choose, exact=exact)
    net.structure = choose.choice(["single", "tuple", "tuple", "dict"])
    count = 1 if net.structure == "single" else choose.randint(1, 3)
    net.outputs = sorted({len(shapes) - 1, *choose.sample(range(len(shapes)), min(count, len(shapes)))})[-count:]
    x = _numbers(shape, generator, exact=exact).to(dtype)
    return net.to(dtype).eval(), x


def _random_step(
    choose: random.Random, net: RandomNetwork, shapes: list[tuple[int, ...]], *, exact: bool, writes: bool
) -> Step | None:
    index = choose.choice([len(shapes) - 1, len(shapes) - 1, choose.randrange(len(shapes))])
    channels = shapes[index][1]
    kinds = ["layer"] * 8 + ["relu"] * 3 + ["add"] * 2 + ["cat", "rows", "first_half", "second_half", "channels", "sub"]
    kinds += ["scale", "clamp", "pool", "flat", "identity", "clone", "pad", "dead"]
    kinds += [] if exact else ["sigmoid", "narrow", "mul", "mean"]
    kinds += ["relu_", "relu_", "add_", "iadd", "write"] if writes else []
    kind = choose.choice(kinds)
    if kind == "layer":
        reuse = [name for name, layer in net.layers.items() if _takes(layer) == channels]
        if reuse and choose.random() < 0.2:
            return kind, (index,), {"layer": choose.choice(reuse)}
        return kind, (index,), {"layer": net.add_layer(_random_layer(choose, channels, exact=exact))}
    if kind == "rows":
        rows = nn.Linear(channels, choose.choice([2, 4]), choose.random() < 0.7)
        return kind, (index,), {"layer": net.add_layer(rows)}
    if kind in ("add", "sub", "mul", "add_", "iadd", "cat"):
        same = [other for other, shape in enumerate(shapes) if shape == shapes[index]]
        if kind == "cat":
            same = [other for other, shape in enumerate(shapes) if shape[2:] == shapes[index][2:]]
            if channels > 8:
                return None
        other = choose.choice(same)
        written = kind in ("add_", "iadd")
        # The network's own input is not written here: that is tested apart, since each run would see another input.
        return None if written and (index == 0 or other == index) else (kind, (index, other), {})
    if kind in ("first_half", "second_half") and (channels < 2 or channels % 2):
        return None
    if kind in ("relu_", "write") and index == 0:
        return None
    options: dict[str, Any] = {}
    if kind == "scale":
        options = {"by": choose.choice([0.5, 2.0, -1.0, 1.0]), "plus": choose.choice([0.0, 0.25, -1.0])}
    elif kind == "clamp":
        options = {"low": choose.choice([-1.0, 0.0]), "high": choose.choice([0.5, 4.0, None])}
    elif kind in ("channels", "write"):
        options = {"most": max(1, channels // 2)} if kind == "channels" else {"channels": 1, "factor": 2.0}
    return kind, (index,), options


def _takes(layer: nn.Module) -> int | None:
    if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        return layer.in_channels
    return layer.num_features if isinstance(layer, nn.BatchNorm2d) else None


def _random_layer(choose: random.Random, channels: int, *, exact: bool) -> nn.Module:
    kind = choose.choice(["conv", "conv", "conv", "norm", "norm", "norm", "transposed", "dropout"])
    if kind == "norm":
        return nn.BatchNorm2d(channels, affine=choose.random() < 0.8, eps=0.25 if exact else 1e-5)
    if kind == "dropout":
        return choose.choice([nn.Dropout(0.5), nn.Dropout2d(0.1, inplace=True)])
    groups = choose.choice([1, 1, 2, channels]) if channels % 2 == 0 else 1
    out = groups * choose.choice([1, 2]) if groups > 1 else choose.choice([2, 4])
    bias = choose.random() < 0.5
    if kind == "transposed":
        return nn.ConvTranspose2d(channels, out, 3, padding=1, groups=groups, bias=bias)
    kernel = choose.choice([1, 3])
    modes: list[PaddingMode] = ["zeros", "zeros", "zeros", "reflect", "circular"]
    mode: PaddingMode = choose.choice(modes) if kernel == 3 else "zeros"
    return nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=bias, padding_mode=mode)


def _numbers(shape: tuple[int, ...], generator: torch.Generator, *, exact: bool) -> torch.Tensor:
    if exact:
        return torch.randint(-4, 5, shape, generator=generator).double() / 4
    return torch.randn(shape, generator=generator)


def _fill(layer: nn.Module, generator: torch.Generator, choose: random.Random, *, exact: bool) -> None:
    with torch.no_grad():
        for parameter in layer.parameters(recurse=False):
            parameter.copy_(_numbers(tuple(parameter.shape), generator, exact=exact) / (1 if exact else 2))
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean.copy_(_numbers((layer.num_features,), generator, exact=exact))
            if exact:
                # variance + eps is a power of four, so that its root is a power of two
                powers = torch.tensor([4.0 ** choose.choice([0, 1]) for _ in range(layer.num_features)])
                layer.running_var.copy_(powers - layer.eps)
            else:
                layer.running_var.copy_(torch.rand(layer.num_features, generator=generator) + 0.5)
