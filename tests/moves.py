"""Random programs of moves (reshapes, views, parts, copies, a write now and then), and how to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx, nn

from fxopt import ir, normalize, plugins
from fxopt.capture import capture_symbolic, private_copy
from fxopt.lowering.backend import set_concrete_values
from fxopt.pipeline import PassManager, Run
from graphs import bits

#: One operation: a name of `MOVES`, and its numbers.
Step = tuple[str, tuple[Any, ...]]
#: The steps, and which of their results the model gives beside the last.
Program = tuple[tuple[Step, ...], tuple[int, ...]]

MOVES: dict[str, Callable[..., torch.Tensor]] = {
    "reshape": lambda x, *sizes: x.reshape(sizes),
    "flatten": lambda x, first, last: x.flatten(first, last),
    "unflatten": lambda x, dim, sizes: x.unflatten(dim, sizes),
    "unsqueeze": lambda x, dim: x.unsqueeze(dim),
    "squeeze": lambda x, dim: x.squeeze(dim),
    "squeeze all": lambda x: x.squeeze(),
    "transpose": lambda x, first, second: x.transpose(first, second),
    "permute": lambda x, *dims: x.permute(dims),
    "slice": lambda x, dim, start, end, step: torch.ops.aten.slice.Tensor(x, dim, start, end, step),
    "narrow": lambda x, dim, start, length: x.narrow(dim, start, length),
    "select": lambda x, dim, index: x.select(dim, index),
    "expand": lambda x, *sizes: x.expand(sizes),
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "split": lambda x, size, dim, item: x.split(size, dim)[item],
    "chunk": lambda x, count, dim, item: x.chunk(count, dim)[item],
    "cat one": lambda x, dim: torch.cat((x,), dim),
    "cat two": lambda x, dim: torch.cat((torch.neg(x), x), dim),
    "stack one": lambda x, dim: torch.stack((x,), dim),
    "relu": lambda x: torch.relu(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "sum": lambda x: x + torch.neg(x),
    "write": lambda x: x.add_(1),
}
_WITH_DIM = ("unsqueeze", "squeeze", "transpose", "select", "narrow", "slice", "split", "chunk")


def special(*shape: int) -> torch.Tensor:
    """Random numbers, and among them all that an operation could lose."""
    found = torch.randn(shape)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40])
    found.view(-1)[: len(odd)] = odd
    return found


class Moves(nn.Module):
    """Runs a program on `neg(x)`."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Its last result, and those asked for."""
        steps, kept = self.program
        found = [torch.neg(x)]
        for name, numbers in steps:
            found.append(MOVES[name](found[-1], *numbers))
        return (found[-1], *(found[place] for place in kept))


def _numbers(draw: Any, name: str, shape: Sequence[int]) -> tuple[Any, ...]:
    """Arguments of an operation that fit a shape."""
    rank = len(shape)
    dim = draw(st.integers(-rank, rank - 1)) if rank else 0
    size = shape[dim] if rank else 1
    match name:
        case "reshape":
            numel = torch.Size(shape).numel()
            first = draw(st.sampled_from([size for size in range(1, numel + 1) if numel % size == 0]))
            sizes = [first, numel // first] if draw(st.booleans()) else list(shape)
            if draw(st.booleans()) and sizes:
                sizes[draw(st.integers(0, len(sizes) - 1))] = -1
            return tuple(sizes)
        case "flatten":
            first = draw(st.integers(0, max(rank - 1, 0)))
            return first, draw(st.integers(first, max(rank - 1, 0)))
        case "unflatten":
            return dim, (draw(st.sampled_from([part for part in range(1, size + 1) if size % part == 0])), -1)
        case "unsqueeze":
            return (draw(st.integers(-rank - 1, rank)),)
        case "transpose":
            return dim, draw(st.integers(-rank, rank - 1))
        case "permute":
            return tuple(draw(st.permutations(range(rank))))
        case "slice":
            return dim, draw(st.integers(-size, size)), draw(st.integers(-size, size + 2)), draw(st.integers(1, 3))
        case "narrow":
            start = draw(st.integers(0, size - 1))
            return dim, start, draw(st.integers(1, size - start))
        case "select":
            return dim, draw(st.integers(-size, size - 1))
        case "expand":
            return tuple(draw(st.sampled_from([1, 2, 3] if size == 1 else [-1, size])) for size in shape)
        case "split" | "chunk":
            return draw(st.integers(1, size + 1)), dim, draw(st.sampled_from([0, -1]))
        case "cat two":
            return (draw(st.sampled_from([0, dim])),)
        case "cat one" | "squeeze":
            return (dim,)
        case "stack one":
            return (draw(st.integers(0, rank)),)
        case _:
            return ()


@st.composite
def programs(draw: Any, names: Sequence[str] = tuple(MOVES)) -> tuple[Program, torch.Tensor]:
    """A program of up to eight steps, and an input for it."""
    x = torch.randn(draw(st.sampled_from([(2, 3, 4), (1, 4, 6), (4, 1, 2, 3), (6, 4)])))
    shape = x.to("meta")
    steps: list[Step] = []
    for _ in range(draw(st.integers(2, 8))):
        name = draw(st.sampled_from(names))
        if shape.dim() == 0 and name in (*_WITH_DIM, "unflatten", "cat one", "cat two", "flatten"):
            continue
        if name == "write" and (0 in shape.stride() or draw(st.integers(0, 2))):
            continue
        step = (name, _numbers(draw, name, shape.shape))
        after = MOVES[name](shape, *step[1])
        if 0 < after.numel() < 200 and after.dim() < 6:
            shape = after
            steps.append(step)
    if draw(st.integers(0, 3)):
        steps.append(("relu", ()))
    kept = draw(st.lists(st.integers(0, len(steps)), max_size=2)) if draw(st.integers(0, 2)) == 0 else []
    return (tuple(steps), tuple(kept)), x


def captured(program: Program, x: torch.Tensor) -> fx.GraphModule:
    """The program in normal form, with values."""
    module, _ = ir.copy(capture_symbolic(private_copy(Moves(program).eval())).module)
    set_concrete_values(module, [x])
    normalize.normalize(module)
    return module


def rewritten(module: fx.GraphModule, names: Sequence[str]) -> Run:
    """Runs some passes over a module; "default" stands for the default pipeline."""
    default = plugins.default_pipeline()
    passes = [current for name in names for current in (default if name == "default" else [plugins.named(name)])]
    return PassManager(tuple(passes), strict=True).run(module)


def check_same(module: fx.GraphModule, program: Program, x: torch.Tensor) -> None:
    """A module gives what the program gives: bits, strides, and which results share memory or are one tensor."""
    given, expected_input = x.clone(), x.clone()
    found = fx.Interpreter(module).run(given)
    expected = Moves(program)(expected_input)
    assert bits(given) == bits(expected_input)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert bits(packed(ours)) == bits(packed(theirs))
        assert strides(ours) == strides(theirs)
    assert relations((given, *found)) == relations((expected_input, *expected))


def packed(value: torch.Tensor) -> torch.Tensor:
    """A copy without gaps, in the order of the indices."""
    return value.clone(memory_format=torch.contiguous_format)


def strides(value: torch.Tensor) -> list[int]:
    """The strides that mean something: those of more than one element."""
    return [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1]


def relations(tensors: Sequence[torch.Tensor]) -> list[tuple[bool, bool]]:
    """Of each two tensors, whether they share memory, and whether they are one."""
    return [
        (left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr(), left is right)
        for left in tensors
        for right in tensors
    ]
