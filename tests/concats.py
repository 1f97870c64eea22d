"""What the tests of concats share: exact numbers, and random networks that join and split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

from fxopt import buffers, cost, ir, normalize, ops, plugins
from fxopt.capture import capture_symbolic, private_copy
from fxopt.lowering.backend import set_concrete_values
from fxopt.pipeline import PassManager, Run
from fxopt_passes import eliminate_concat
from graphs import Network, randomised

Body = Callable[[Any, Any], Any]
SIXTEEN = (2, 16, 6, 6)  # channels are worth a kernel


def dyadic(*shape: int) -> torch.Tensor:
    """Small multiples of 1/2 in float64, whose sums and products do not round."""
    return torch.randint(-2, 3, shape).double() / 2


def exact(model: nn.Module) -> nn.Module:
    """The model in eval mode with dyadic float64 weights, and norms whose scales are powers of two."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(dyadic(*parameter.shape))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.eps = 0.25
                module.running_mean.copy_(dyadic(module.num_features))
                module.running_var.copy_(4.0 ** torch.randint(0, 2, (module.num_features,)) - 0.25)
    return model


@contextmanager
def everything_pays() -> Iterator[None]:
    """Whatever an estimate says, and however thin a part is, the rewrite is done: only legality is left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost.Comparison, "pays", property(lambda self: True))
        patch.setattr(eliminate_concat, "FEWEST_CHANNELS", 1)
        yield


# -- passes over a capture -------------------------------------------------------------------------------------------


def captured(model: nn.Module, *inputs: torch.Tensor) -> fx.GraphModule:
    """The model in normal form, with values."""
    module, _ = ir.copy(capture_symbolic(private_copy(model)).module)
    set_concrete_values(module, list(inputs))
    normalize.normalize(module)
    return module


def rewritten(module: fx.GraphModule, names: Sequence[str]) -> Run:
    """The module after some passes, in place; the contract is checked after each."""
    return PassManager(tuple(plugins.named(name) for name in names), strict=True).run(module)


def results_of(module: fx.GraphModule, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What the module gives, on copies of the inputs."""
    with torch.no_grad():
        found: tuple[torch.Tensor, ...] = tuple(fx.Interpreter(module).run(*[tensor.clone() for tensor in inputs]))
    return found


def strides(value: torch.Tensor) -> list[int]:
    """The strides that mean something: those of more than one element."""
    return [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1]


def sharing(results: Sequence[torch.Tensor]) -> list[list[int]]:
    """Which results share memory with which."""
    places = [result.untyped_storage().data_ptr() for result in results]
    return [[other for other, held in enumerate(places) if held == place] for place in places]


class Written:
    """Runs a graph as a backend would that writes parts in place: `memory` has the tensor of each buffer."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        found = sorted(module.graph.find_nodes(op="call_function", target=ops.buffer))
        self.owner = {part: node for node in found for part in buffers.in_place(node)}

    def place(self, node: fx.Node, memory: dict[fx.Node, torch.Tensor]) -> torch.Tensor:
        """Where a buffer or a part of one is: a slice of its owner's place, or memory of its own."""
        if node in memory:
            return memory[node]
        if node not in self.owner:
            like = ir.fake(node)
            assert like is not None
            memory[node] = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).fill_(float("nan"))
            return memory[node]
        owner = self.owner[node]
        dim = ir.argument(owner, "dim") % len(ir.shape(node) or ())
        sizes = [(ir.shape(part) or ())[dim] for part in buffers.parts(owner)]
        number = min({index for index, part in enumerate(buffers.parts(owner)) if part is node} - buffers.copied(owner))
        memory[node] = self.place(owner, memory).narrow(dim, sum(sizes[:number]), sizes[number])
        return memory[node]

    def run(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        memory: dict[fx.Node, torch.Tensor] = {}
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in self.module.graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                values[node] = next(given).clone()
            elif node.op == "get_attr":
                values[node] = ir.get_attribute(self.module, node.target)
            elif node.op == "output":
                return tuple(args[0])
            elif node.target is ops.buffer:
                values[node] = self.place(node, memory)
                dim, start = ir.argument(node, "dim"), 0
                for number, part in enumerate(buffers.parts(node)):
                    size = values[part].shape[dim]
                    if number in buffers.copied(node):
                        values[node].narrow(dim, start, size).copy_(values[part])
                    start += size
            elif node in self.owner:
                values[node] = self.place(node, memory)
                values[node].copy_(node.target(*args, **kwargs))
            else:
                values[node] = node.target(*args, **kwargs)
        raise AssertionError("there is no output")


# -- models of one line ----------------------------------------------------------------------------------------------


def sixteens() -> dict[str, Any]:
    """Layers of 16 channels, and of twice as many for what joins two."""
    return {
        "a": nn.Conv2d(16, 16, 1),
        "b": nn.Conv2d(16, 16, 3, padding=1, bias=False),
        "c": nn.Linear(6, 6),
        "d": nn.Linear(6, 6),
        "conv": nn.Conv2d(32, 8, 1),
        "padded": nn.Conv2d(32, 8, 3, stride=2, padding=1, dilation=2),
        "bare": nn.Conv2d(32, 8, 3, bias=False),
        "same": nn.Conv2d(32, 8, 3, padding="same"),
        "grouped": nn.Conv2d(32, 8, 1, groups=2),
        "transposed": nn.ConvTranspose2d(32, 8, 1),
        "circular": nn.Conv2d(32, 8, 3, padding=1, padding_mode="circular"),
        "four": nn.Conv2d(64, 8, 1),
        "thin": nn.Conv2d(20, 8, 1),
        "three": nn.Conv2d(48, 4, 1),
        "line": nn.Conv1d(32, 8, 3, padding=2),
        "volume": nn.Conv3d(32, 4, (1, 3, 3), padding=(0, 1, 1)),
        "linear": nn.Linear(32, 4),
        "plain": nn.Linear(32, 4, bias=False),
        "norm": nn.BatchNorm2d(32),
        "bare_norm": nn.BatchNorm2d(32, affine=False),
        "norm12": nn.BatchNorm2d(16),
        "square": torch.randn(32, 32),
        "nan_rows": torch.full((3, 32), float("nan")),
        "rows": nn.BatchNorm2d(12),
        "nan": nn.Conv2d(16, 16, 1),
        "free": nn.BatchNorm2d(32, track_running_stats=False),
    }


def model_of(body: Body) -> nn.Module:
    model = randomised(Network(body, **sixteens()))
    with torch.no_grad():
        model.nan.weight[0, 0] = float("nan")
    return model


def both_convs(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([m.a(x), m.b(x)], 1)


def joined(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    return torch.cat([torch.relu(x), x], dim)


# -- networks that join and split ------------------------------------------------------------------------------------


class Joins(nn.Module):
    """Steps over a growing list of values: concats, slices, splits, and what reads and makes their parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = []
        self.outputs: list[int] = []

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = [x]
        for kind, operands, options in self.steps:
            values.append(self.step(kind, [values[index] for index in operands], options))
        return tuple(values[index] for index in self.outputs)

    def step(self, kind: str, taken: list[torch.Tensor], options: tuple[Any, ...]) -> torch.Tensor:
        """One step's value."""
        y = taken[0]
        match kind, options:
            case "layer", (index,):
                found: torch.Tensor = self.layers[index](y)
                return found
            case "residual", (index,):
                return taken[1] + self.layers[index](y)
            case "cat", (dim,):
                return torch.cat(taken, dim)
            case "slice", (dim, start, stop, step):
                return y[(slice(None),) * dim + (slice(start, stop, step),)]
            case "chunk", (dim, count, index):
                return y.chunk(count, dim)[index]
            case "again", (dim, cut):
                rest = (slice(None),) * dim
                return torch.cat([y[(*rest, slice(None, cut))], y[(*rest, slice(cut, None))]], dim)
            case "max", ():
                return F.max_pool2d(y, 3, 1, 1)
            case "write", (factor,):
                y.mul_(factor)
                return y
            case name, ():
                return {"relu": torch.relu, "neg": torch.neg, "clamp": lambda v: v.clamp(-2, 3)}[name](y)
        raise AssertionError(kind)

    def extra_repr(self) -> str:
        lines = [f"v{number} = {kind}{operands} {options}" for number, (kind, operands, options) in self.numbered()]
        return "\n".join([*lines, f"return {self.outputs}"])

    def numbered(self) -> Iterator[tuple[int, tuple[str, tuple[int, ...], tuple[Any, ...]]]]:
        return enumerate(self.steps, start=1)


KINDS = ("cat", "cat", "cat", "slice", "chunk", "again", "conv", "conv", "norm", "linear", "residual", "max", "relu",
         "neg", "clamp", "write")  # fmt: skip


@st.composite
def networks(draw: Any, *, writes: bool = True) -> tuple[nn.Module, torch.Tensor]:
    """A network in exact arithmetic, and its input; layers are at most three deep."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    net, x = Joins(), dyadic(draw(st.integers(1, 2)), draw(st.integers(1, 4)), 4, 3)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    shapes, depths = [tuple(x.shape)], [0]
    for _ in range(draw(st.integers(2, 9))):
        kind = draw(st.sampled_from(KINDS))
        index = draw(st.integers(max(0, len(shapes) - 3), len(shapes) - 1))
        drawn = draw(options_of(kind, index, shapes, depths, writes))
        if drawn is None:
            continue
        operands, options = drawn
        if kind in ("conv", "norm", "linear", "residual"):
            layer, kind = options[0], "residual" if kind == "residual" else "layer"
            net.layers.append(exact(layer))
            options = (len(net.layers) - 1,)
        net.steps.append((kind, operands, options))
        with torch.no_grad():
            zeros = [torch.zeros(shapes[operand], dtype=torch.float64) for operand in operands]
            shapes.append(tuple(net.step(kind, zeros, options).shape))
        depths.append(max(depths[operand] for operand in operands) + (kind in ("layer", "residual")))
    net.outputs = sorted({len(shapes) - 1, *draw(st.lists(st.integers(0, len(shapes) - 1), max_size=2))})
    return net.eval(), x


@st.composite
def options_of(
    draw: Any, kind: str, index: int, shapes: list[tuple[int, ...]], depths: list[int], writes: bool
) -> tuple[tuple[int, ...], tuple[Any, ...]] | None:
    """Operands and options of a step; None where it does not fit."""
    shape, channels = shapes[index], shapes[index][1]
    dim = draw(st.sampled_from([1, 1, 1, 2, 3]))
    if kind == "cat":
        alike = [
            other for other, sizes in enumerate(shapes)
            if sizes[:dim] + sizes[dim + 1 :] == shape[:dim] + shape[dim + 1 :]
        ]  # fmt: skip
        operands = (index, *draw(st.lists(st.sampled_from(alike), min_size=0, max_size=3)))
        total = sum(shapes[operand][dim] for operand in operands)
        named = draw(st.sampled_from([dim, dim - 4]))
        return None if total > 16 else (tuple(draw(st.permutations(operands))), (named,))
    if kind in ("slice", "again"):
        if shape[dim] < 2:
            return None
        cut = draw(st.integers(1, shape[dim] - 1))
        if kind == "again":
            return (index,), (dim, cut)
        first, second = draw(st.sampled_from([(None, cut), (cut, None), (cut - shape[dim], None), (cut - 1, cut + 1)]))
        return (index,), (dim, first, second, draw(st.sampled_from([1, 1, 1, 2])))
    if kind == "chunk":
        count = draw(st.integers(2, 3))
        return ((index,), (dim, count, draw(st.integers(0, count - 1)))) if shape[dim] % count == 0 else None
    if kind == "write":
        return ((index,), (2.0,)) if writes and index else None
    if kind in ("conv", "norm", "linear", "residual"):
        if depths[index] >= 3 or (kind == "residual" and shape[2:] != (4, 3)):
            return None
        out, bias, kernel = draw(st.integers(1, 3)), draw(st.booleans()), draw(st.sampled_from([1, 3]))
        if kind == "norm":
            return (index,), (nn.BatchNorm2d(channels, affine=bias),)
        if kind == "linear":
            return (index,), (nn.Linear(shape[3], shape[3], bias),)
        layer = nn.Conv2d(channels, channels if kind == "residual" else out, kernel, 1, kernel // 2, bias=bias)
        alike = [other for other, sizes in enumerate(shapes) if sizes == shape]
        return (index, *([draw(st.sampled_from(alike))] if kind == "residual" else [])), (layer,)
    return (index,), ()
