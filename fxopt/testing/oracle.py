"""What a network gives, and whether what was made of it gives the same: values, structure, dtypes, strides, which
results share memory with which, what is written to the inputs, and the original model, which stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.compare import compare, relative_error, unit
from fxopt.testing.network import Network

#: What an input has among its numbers where every bit is to be compared.
SPECIAL = (-0.0, float("inf"), float("nan"), 0.0, -float("inf"))


def bits(tensor: torch.Tensor, *, one_nan: bool = False) -> bytes:
    """A tensor's memory, which tells -0.0 from 0.0 and, unless there is to be `one_nan`, one NaN from another."""
    packed = tensor.detach().clone(memory_format=torch.contiguous_format)
    if one_nan and packed.is_floating_point():
        packed[packed.isnan()] = float("nan")
    return packed.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@dataclass
class Outcome:
    """What a run gave: its flat results, their structure, and the inputs as it left them."""

    results: list[Any]
    structure: Any
    inputs: tuple[torch.Tensor, ...]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The inputs, then the results that are tensors."""
        return [*self.inputs, *(result for result in self.results if isinstance(result, torch.Tensor))]

    def sharing(self) -> list[int]:
        """Of each tensor, the first one that shares its memory."""
        places = [tensor.untyped_storage().data_ptr() for tensor in self.tensors]
        return [places.index(place) for place in places]


def run(call: Callable[..., Any], inputs: tuple[torch.Tensor, ...]) -> Outcome:
    """Calls a model on inputs that it may write to."""
    with torch.no_grad():
        results, structure = pytree.tree_flatten(call(*inputs))
    return Outcome(results, structure, inputs)


class Oracle:
    """A network, what it gives, and whether something else gives the same.

    With `special` its input has zeros of both signs, infinities and NaN in it.
    """

    def __init__(self, network: Network, *, special: bool = False) -> None:
        self.network, self.special = network, special
        self.before = {name: (tensor, bits(tensor)) for name, tensor in network.state_dict(keep_vars=True).items()}
        self.expected = run(network, self.inputs())

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """New inputs, the same each time."""
        inputs = self.network.example_inputs()
        for tensor in inputs if self.special else ():
            flat = tensor.view(-1)
            flat[: 2 * len(SPECIAL) : 2] = torch.tensor(SPECIAL, dtype=tensor.dtype)[: (len(flat) + 1) // 2]
        return inputs

    def differences(self, call: Callable[..., Any], *, same_bits: bool = False) -> list[str]:
        """What `call` does otherwise, in sentences; `same_bits`: every bit counts, in an exact network every number, in
        another what is no rounding."""
        expected, actual = self.expected, run(call, self.inputs())
        if expected.structure != actual.structure:
            return [f"the results are {actual.structure}, not {expected.structure}"]
        found = []
        left, right = ([*outcome.results, *outcome.inputs] for outcome in (expected, actual))
        if same_bits:
            pairs = zip(expected.tensors, actual.tensors, strict=True)
            # Which NaN the sum of two is, IEEE 754 leaves open, and PyTorch's kernels do, too.
            same = [bits(left, one_nan=True) == bits(right, one_nan=True) for left, right in pairs]
            found += [f"tensor {index} has other bits" for index, one in enumerate(same) if not one]
        verdict = compare(left, right, reference=self._reference, bitwise=self.network.exact)
        settled = verdict.original_error is not None  # by the reference: all else but rounding is as it should be
        if not verdict.ok and not found and not (settled and self._unlucky(left, right)):
            found.append(verdict.reason)
        if expected.sharing() != actual.sharing():
            found.append(f"inputs and results share memory as {actual.sharing()}, not {expected.sharing()}")
        return found + self._changes()

    def _changes(self) -> list[str]:
        """How the original is not what it was."""
        now = self.network.state_dict(keep_vars=True)
        if list(now) != list(self.before):
            return [f"the original has {list(now)}, not {list(self.before)}"]
        return [
            f"the original's {name} was changed"
            for name, (tensor, held) in self.before.items()
            if now[name] is not tensor or bits(tensor) != held
        ]

    # -- rounding ----------------------------------------------------------------------------------------------------

    @cached_property
    def _wide(self) -> list[Any]:
        outcome = run(self.network.widened(), tuple(tensor.double() for tensor in self.inputs()))
        return [*outcome.results, *outcome.inputs]

    def _reference(self) -> list[Any]:
        return self._wide

    def _unlucky(self, expected: list[Any], actual: list[Any]) -> bool:
        """Whether numbers that differ by no more than float32's rounding of inputs and weights make as much of a
        difference: one run's rounding may be luckier than another's by more than `compare` allows."""
        spread = [0.0] * len(expected)
        generator = torch.Generator().manual_seed(0)

        def nudged(tensor: torch.Tensor) -> torch.Tensor:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            return tensor.double() * (1 + noise * torch.finfo(torch.float32).eps)

        for _ in range(8):
            twin = copy.deepcopy(self.network.widened())
            with torch.no_grad():
                for tensor in (*twin.parameters(), *twin.buffers()):
                    if tensor.is_floating_point():
                        tensor.copy_(nudged(tensor))
            other = run(twin, tuple(nudged(tensor) for tensor in self.inputs()))
            leaves = [*other.results, *other.inputs]
            errors = [_error(a, b) for a, b in zip(self._wide, leaves, strict=True)]
            spread = [max(pair) for pair in zip(spread, errors, strict=True)]
        ours = [_error(a, b) for a, b in zip(self._wide, actual, strict=True)]
        theirs = [_error(a, b) for a, b in zip(self._wide, expected, strict=True)]
        units = [unit(leaf.dtype) if isinstance(leaf, torch.Tensor) else 0.0 for leaf in expected]
        return all(o <= 4 * max(t, s) + 16 * u for o, t, s, u in zip(ours, theirs, spread, units, strict=True))


def _error(expected: Any, actual: Any) -> float:
    if not isinstance(expected, torch.Tensor) or not isinstance(actual, torch.Tensor):
        return 0.0
    if expected.dtype.is_floating_point and expected.shape == actual.shape:
        return relative_error(expected, actual)
    return 0.0 if torch.equal(expected, actual) else float("inf")
