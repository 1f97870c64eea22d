"""Random chains of layers for hypothesis: convolutions (1d to 3d, transposed, grouped, dilated, of every padding mode),
linear layers, norms on either side, constants, activations, residuals, layers called again, and what does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
PIECEWISE = {
    "relu": F.relu,
    "relu6": F.relu6,
    "clamp": lambda y: y.clamp(-3, 4),
    "hardtanh": lambda y: F.hardtanh(y, -2.0, 2.0),
}
SMOOTH = {
    "leaky_relu": lambda y: F.leaky_relu(y, 0.1),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": F.elu,
    "mish": F.mish,
}
ACTIVATIONS = PIECEWISE | SMOOTH
NOTHING = {
    "dropout": lambda y: F.dropout(y, training=False),
    "times one": lambda y: y * 1.0,
    "minus zero": lambda y: y - 0,
    "contiguous": lambda y: y.contiguous(),
    "clone": lambda y: y.clone(),
}


@dataclass(frozen=True)
class Step:
    """One step of a chain: `kind`, and of a layer or norm the options it is built with."""

    kind: str
    name: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    def __getitem__(self, key: str) -> Any:
        return dict(self.options)[key]


@dataclass(frozen=True)
class Spec:
    """A chain as it is drawn: how many spatial dimensions, the input's channels, the steps, how numbers are drawn."""

    spatial: int
    channels: int
    batch: int
    steps: tuple[Step, ...]
    numbers: str  # "dyadic", "integer" or "random"
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        """Dyadic numbers are exact in float64; what reaches oneDNN is float32."""
        return torch.float64 if self.numbers == "dyadic" else torch.float32


#: What networks are made of, and what rewrites look for.
MOTIFS = (
    "layer norm",
    "layer norm activation",
    "norm layer",
    "norm relu layer",
    "norm norm",
    "layer activation",
    "residual activation",
    "residual again",
    "layer constant",
    "constant layer",
    "norm constant",
    "constant norm",
    "layer nothing norm",
    "nothing",
)
SIZE = 5  # of each spatial dimension of the input


@st.composite
def specs(draw: Any, numbers: str, activations: Sequence[str], most_layers: int = 3) -> Spec:
    """A chain whose every step fits the one before it."""
    spatial, channels = draw(st.integers(0, 3)), draw(st.sampled_from([2, 4]))
    batch = draw(st.integers(1, 2))
    first, size, layers, steps = channels, SIZE, 0, []
    motifs = draw(st.lists(st.sampled_from(MOTIFS), min_size=1, max_size=4))
    for kind in " ".join(motifs).split():
        if kind in ("layer", "again", "residual"):
            if layers == most_layers:
                continue
            layers += 1
        if kind == "layer":
            step, channels, size = draw(layer_steps(spatial, channels, size))
        elif kind == "residual":
            step, _, _ = draw(layer_steps(spatial, channels, size, keep=True))
            step = replace(step, kind="residual", name=draw(st.sampled_from(["left", "right"])))
        elif kind == "again":
            step = Step("again")
        elif kind == "norm":
            eps = draw(st.sampled_from([2**-10, 2**-3]))
            signs = draw(st.sampled_from(["no weight", "positive", "both"]))
            step = Step("norm", "", (("affine", signs != "no weight"), ("eps", eps), ("positive", signs == "positive")))
        elif kind == "relu":
            step = Step("activation", "relu")
        elif kind == "activation":
            step = Step("activation", draw(st.sampled_from(sorted(activations))))
        elif kind == "constant":
            operators = ["mul", "add", "sub", "rsub", "div"]
            step = Step("constant", draw(st.sampled_from(operators)), (("tensor", draw(st.booleans())),))
        else:
            step = Step("nothing", draw(st.sampled_from(sorted(NOTHING))))
        steps.append(step)
    return Spec(spatial, first, batch, tuple(steps), numbers, draw(st.integers(0, 2**16)))


@st.composite
def layer_steps(draw: Any, spatial: int, channels: int, size: int, keep: bool = False) -> tuple[Step, int, int]:
    """A layer for `channels` x `size`, and the channels and size that it gives; with `keep`, the same ones."""
    bias, out = draw(st.booleans()), channels if keep else draw(st.sampled_from([2, 4]))
    if spatial == 0:
        return Step("linear", "", (("ins", channels), ("outs", out), ("bias", bias))), out, size
    groups = draw(st.sampled_from([1, 2]))
    common = {"ins": channels, "outs": out, "bias": bias, "groups": groups}
    if keep:
        # A kernel of three, padded by one, keeps the size.
        mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])) if size > 1 else "zeros"
        mode = "zeros" if spatial == 3 and mode == "reflect" else mode
        kernel = draw(st.sampled_from([1, 3])) if spatial < 3 else 1
        more = {"kernel": kernel, "stride": 1, "padding": kernel // 2, "dilation": 1, "mode": mode, "extra": 0}
        return Step("convolution", "", tuple((common | more).items())), out, size
    kernel, stride = draw(st.integers(1, 3 if spatial < 3 else 2)), draw(st.integers(1, 2))
    padding, dilation = draw(st.integers(0, 1)), draw(st.integers(1, 2))
    reach = dilation * (kernel - 1)
    if size <= 8 and draw(st.integers(0, 3)) == 0:
        extra = draw(st.integers(0, stride - 1))
        padding = min(padding, reach // 2)
        more = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "extra": extra}
        after = (size - 1) * stride - 2 * padding + reach + extra + 1
        return Step("transposed", "", tuple((common | more | {"mode": "zeros"}).items())), out, after
    mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular", "same"]))
    if mode == "same":
        more = {"kernel": kernel, "stride": 1, "padding": "same", "dilation": dilation, "mode": "zeros", "extra": 0}
        return Step("convolution", "", tuple((common | more).items())), out, size
    if size + 2 * padding <= reach:
        kernel, reach = 1, 0
    if padding >= size or (spatial == 3 and mode == "reflect"):
        mode = "zeros"
    more = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "mode": mode, "extra": 0}
    after = (size + 2 * padding - reach - 1) // stride + 1
    return Step("convolution", "", tuple((common | more).items())), out, after


class Chain(nn.Module):
    """A chain of steps, its numbers drawn as the spec says."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        torch.manual_seed(spec.seed)
        self.parts = nn.ModuleDict()
        self.positive: dict[nn.Module, bool] = {}
        channels = spec.channels
        for place, step in enumerate(spec.steps):
            built, channels = self._built(step, channels)
            if built is not None:
                self.parts[f"{step.kind}{place}"] = built
        self.to(spec.dtype)
        for part in self.modules():
            self._number(part)
        self.eval()

    def _built(self, step: Step, channels: int) -> tuple[nn.Module | None, int]:
        spatial = self.spec.spatial
        if step.kind == "norm":
            norm = NORMS[spatial](channels, eps=step["eps"], affine=step["affine"])
            self.positive[norm] = step["positive"]
            return norm, channels
        if step.kind == "constant" and step["tensor"]:
            holder = nn.Module()
            shape = (channels, *[1] * spatial)
            value = 2.0 ** self._ints(shape, 0, 1) if step.name == "div" else self._drawn(shape)
            holder.register_buffer("value", value)
            return holder, channels
        if not step.options or "ins" not in dict(step.options):
            return None, channels
        if spatial == 0:
            return nn.Linear(step["ins"], step["outs"], bias=step["bias"]), step["outs"]
        options: dict[str, Any] = {key: step[key] for key in ("stride", "padding", "dilation", "groups", "bias")}
        if step.kind == "transposed":
            options["output_padding"] = step["extra"]
            return TRANSPOSED[spatial](step["ins"], step["outs"], step["kernel"], **options), step["outs"]
        options["padding_mode"] = step["mode"]
        return CONVOLUTIONS[spatial](step["ins"], step["outs"], step["kernel"], **options), step["outs"]

    @staticmethod
    def _ints(shape: tuple[int, ...], low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape).double()

    def _drawn(self, shape: tuple[int, ...]) -> torch.Tensor:
        match self.spec.numbers:
            case "dyadic":
                return self._ints(shape, -2, 2) / 2
            case "integer":
                return self._ints(shape, -1, 1)
            case _:
                return torch.randn(shape, dtype=torch.float64)

    def _number(self, part: nn.Module) -> None:
        with torch.no_grad():
            for tensor in part._parameters.values():
                if tensor is not None:
                    scale = 1.0 if self.spec.numbers != "random" else max(tensor[0].numel(), 1) ** -0.5
                    tensor.copy_(self._drawn(tuple(tensor.shape)) * scale)
            if not isinstance(part, nn.modules.batchnorm._BatchNorm):
                return
            shape = tuple(part.running_mean.shape)
            part.running_mean.copy_(self._drawn(shape))
            if self.spec.numbers == "random":
                part.running_var.uniform_(0.3, 3)
                if self.positive[part] and part.weight is not None:
                    part.weight.abs_().add_(0.1)
                return
            # variance + eps is a power of four, so that 1/sqrt of it is a power of two.
            lowest, highest = (-1, 1) if self.spec.numbers == "dyadic" else (0, 0)
            part.running_var.copy_(4.0 ** self._ints(shape, lowest, highest) - part.eps)
            if part.weight is not None:
                sign = 2 * self._ints(shape, 0, 1) - 1 if not self.positive[part] else 1.0
                part.weight.copy_(sign * 2.0 ** self._ints(shape, 0, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes the steps in turn."""
        again = None
        for place, step in enumerate(self.spec.steps):
            name = f"{step.kind}{place}"
            match step.kind:
                case "activation":
                    x = ACTIVATIONS[step.name](x)
                case "nothing":
                    x = NOTHING[step.name](x)
                case "constant":
                    constant = self.parts[name].value if step["tensor"] else 2
                    x = _constant_step(step.name, x, constant)
                case "residual":
                    x = x + self.parts[name](x) if step.name == "right" else self.parts[name](x) + x
                    again = self.parts[name]
                case "again":
                    x = x if again is None else again(x)
                case _:
                    x = self.parts[name](x)
                    again = None
        return x

    def example_input(self) -> torch.Tensor:
        """An input of the chain."""
        shape = (self.spec.batch, self.spec.channels, *[SIZE] * self.spec.spatial)
        return self._drawn(shape).to(self.spec.dtype)


def _constant_step(name: str, x: torch.Tensor, constant: Any) -> torch.Tensor:
    match name:
        case "mul":
            return x * constant
        case "add":
            return torch.add(constant, x) if isinstance(constant, torch.Tensor) else x + constant
        case "sub":
            return torch.sub(x, constant, alpha=2)
        case "rsub":
            return constant - x
        case _:
            return x / constant
