"""A module that is a short program: the text of its layers and of its forward, and numbers drawn from a seed.

The text is all there is to it, so that a network that shows a fault can be pasted into a test as it is printed.
"""

from __future__ import annotations

import linecache
import math
import re
import textwrap
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_NAMES = count(1)
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


class Numbers:
    """Numbers for one tensor or layer, the same for the same seed and name.

    With `exact` they are small multiples of 1/4 and 1/2, and every norm's scale is a power of two, so that arithmetic
    in float64 does not round.
    """

    def __init__(self, seed: int, name: str, *, exact: bool) -> None:
        self.exact = exact
        self.generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))

    def _whole(self, low: int, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def _uniform(self, low: float, high: float, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low

    def numbers(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Numbers around 0: normally distributed, or multiples of 1/4 from -1 to 1."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if self.exact:
            return (self._whole(-4, 4, shape).double() / 4).to(dtype)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def powers(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Positive numbers to divide by: powers of two where arithmetic is to be exact."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        drawn: torch.Tensor = 2.0 ** self._whole(-1, 1, shape) if self.exact else self._uniform(0.5, 2, shape)
        return drawn.to(dtype)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        """Whole numbers of int64 from 0 to below `high`."""
        return self._whole(0, high - 1, shape)

    def fill(self, layer: nn.Module) -> None:
        """Gives a layer's parameters and statistics numbers of their own."""
        for part in layer.modules():
            for tensor in part._parameters.values():
                if tensor is not None:
                    tensor.copy_(self._weight(part, tuple(tensor.shape)))
            if isinstance(part, nn.modules.batchnorm._NormBase) and part.running_mean is not None:
                assert part.running_var is not None
                shape = tuple(part.running_mean.shape)
                part.running_mean.copy_(self.numbers(*shape) / (1 if self.exact else 4))
                # variance + eps is a power of four, so that 1/sqrt of it is a power of two
                powers = 4.0 ** self._whole(0, 1, shape) - part.eps
                part.running_var.copy_(powers if self.exact else self._uniform(0.5, 2, shape))

    def _weight(self, layer: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
        if isinstance(layer, _NORMS):
            signs = 2 * self._whole(0, 1, shape) - 1
            return signs * self.powers(*shape, dtype=torch.float64)
        if self.exact:
            return self._whole(-2, 2, shape).double() / 2
        fan_in = max(1, int(torch.Size(shape[1:]).numel()))
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return drawn / math.sqrt(fan_in)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors are of `dtype` inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make(holder: Any, name: str, text: str, seed: int, *, exact: bool) -> None:
    """Sets `holder.name` to what `text` says, in the default dtype: a layer, a tensor, or `self.other.weight`."""
    drawn = Numbers(seed, name, exact=exact)
    scope = {"numbers": drawn.numbers, "powers": drawn.powers, "integers": drawn.integers, "self": holder}
    with torch.no_grad():
        made = eval(text, {"torch": torch, "nn": nn, "F": F}, scope)
        if isinstance(made, nn.Module):
            drawn.fill(made)
    path, _, last = name.rpartition(".")
    for part in path.split(".") if path else ():
        holder = getattr(holder, part)
    if isinstance(holder, nn.Module) and type(made) is torch.Tensor:
        holder.register_buffer(last, made)
    else:
        setattr(holder, last, made)


class Network(nn.Module):
    """A module in eval mode: `layers` by the text that makes them, `program` the body of its forward.

    `inputs` are forward's arguments and their shapes, of the network's dtype: float64 with `exact`, else float32. The
    text of a layer may be `numbers(4, 1, 1)` or `nn.Parameter(numbers(4))` (around 0), `powers(4)` (to divide by),
    `integers(3, 4)` (four of 0, 1, 2), or `self.other.weight`, to tie one weight to another. Numbers are drawn from
    `seed` and the layer's name; with `exact` so that arithmetic in float64 does not round.
    """

    def __init__(
        self,
        program: str,
        layers: Mapping[str, str] | None = None,
        inputs: Mapping[str, tuple[int, ...]] | None = None,
        *,
        exact: bool = False,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.program = textwrap.dedent(program).strip("\n")
        self.texts = dict(layers or {})
        self.inputs = dict(inputs or {"x": (2, 4, 4, 4)})
        self.exact, self.seed = exact, seed
        self.dtype = dtype or (torch.float64 if exact else torch.float32)
        with default_dtype(self.dtype):
            for name, text in self.texts.items():
                make(self, name, text, seed, exact=exact)
        self._compile()
        self.eval().requires_grad_(False)  # torch computes some operators another way where a weight requires grad

    def _compile(self) -> None:
        source = f"def forward(self, {', '.join(self.inputs)}):\n{textwrap.indent(self.program, '    ')}\n"
        file = f"<network {next(_NAMES)}>"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # errors show the line
        scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
        exec(compile(source, file, "exec", dont_inherit=True), scope)
        self.forward = MethodType(scope["forward"], self)

    def __getstate__(self) -> dict[str, Any]:
        """All but the compiled program, which is made again."""
        return {name: value for name, value in self.__dict__.items() if name != "forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what `__getstate__` gave."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._compile()

    def example_inputs(self) -> tuple[torch.Tensor, ...]:
        """New tensors for one call, the same numbers each time."""
        with default_dtype(self.dtype):
            named = self.inputs.items()
            return tuple(Numbers(self.seed, name, exact=self.exact).numbers(*shape) for name, shape in named)

    def widened(self) -> Network:
        """The same network in float64, its casts too: the reference for what float32 rounds away."""
        layers = {name: _wide(text) for name, text in self.texts.items()}
        program = _wide(self.program)
        twin = Network(program, layers, self.inputs, exact=self.exact, seed=self.seed, dtype=torch.float64)
        twin.load_state_dict(self.state_dict())
        return twin

    def __repr__(self) -> str:
        """The call that makes this network."""
        lines = ["Network(", '    """', *textwrap.indent(self.program, "    " * 2).splitlines(), '    """,']
        if self.texts:
            lines += ["    layers={", *(f'        "{name}": "{text}",' for name, text in self.texts.items()), "    },"]
        lines += [f"    inputs={self.inputs!r},".replace("'", '"')]
        options = {"exact": self.exact, "seed": self.seed}
        lines += ["    " + ", ".join(f"{name}={value}" for name, value in options.items() if value) + ","]
        return "\n".join([*(line for line in lines if line.strip() != ","), ")"])


def _wide(text: str) -> str:
    return re.sub(r"\.float\(\)", ".double()", text.replace("torch.float32", "torch.float64"))
