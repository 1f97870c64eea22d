"""Which inputs a captured program fits: plain data taken from the capture, asked once per new signature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP
from torch.utils import _pytree as pytree

from fxopt import ir
from fxopt.capture import Captured, Inputs


@dataclass(frozen=True)
class Guards:
    """What a program was captured for.

    `sizes[i]` has for each dimension of tensor i a number, or the symbolic expression that it must satisfy; None where
    every shape fits (symbolic capture). `code` are Python expressions over `L['tensors'][i]`; `bounds` the range of
    each symbol; `kinds[i]` the dtype and device of tensor i (None: any). A capture made with gradients off (`grad`) has
    lost the model's own no_grad regions, so it does not fit where they are on. `autocast` is the state of autocast that
    it was rewritten in, which says of what dtype every value is (None where nothing was rewritten: any).
    """

    spec: pytree.TreeSpec
    constants: tuple[tuple[int, Any], ...]
    sizes: tuple[tuple[int | str, ...], ...] | None
    kinds: tuple[tuple[torch.dtype, torch.device], ...] | None
    code: tuple[str, ...]
    bounds: tuple[tuple[str, int, int | None], ...]
    grad: bool = True
    autocast: tuple[tuple[str, torch.dtype], ...] | None = None

    @classmethod
    def of(cls, captured: Captured) -> Guards:
        """Reads them off a capture."""
        interface = ir.interface(captured.module)
        constants = tuple(sorted(interface.constants.items()))
        if captured.front_end == "symbolic":
            return cls(interface.in_spec, constants, None, None, (), ())
        values = [ir.fake(node) for node in captured.module.graph.find_nodes(op="placeholder")]
        assert all(value is not None for value in values)
        sizes = tuple(
            tuple(size if type(size) is int else str(size) for size in value.shape)
            for value in values
            if value is not None
        )
        kinds = tuple((value.dtype, value.device) for value in values if value is not None)
        bounds = tuple((name, *span) for name, span in captured.bounds.items())
        return cls(interface.in_spec, constants, sizes, kinds, captured.guards, bounds, captured.grad)

    def refusal(self, inputs: Inputs) -> str | None:
        """None where the program fits these inputs; else what does not, as a person would say it."""
        if inputs.spec != self.spec:
            return "the arguments have another structure"
        if torch.is_grad_enabled() and not self.grad:
            return "gradients are on, and were off"
        if self.autocast is not None and self.autocast != ir.autocast():
            return f"autocast is {_state(ir.autocast())}, and was {_state(self.autocast)}"
        for position, value in self.constants:
            if not _same_constant(inputs.leaves[position], value):
                return f"{inputs.names[position]} is {inputs.leaves[position]!r}, and was {value!r}"
        if len(inputs.constants) != len(self.constants):
            return "an argument that was a constant is a tensor, or the reverse"
        if self.sizes is None or self.kinds is None:
            return None
        names = [name for name, leaf in zip(inputs.names, inputs.leaves, strict=True) if isinstance(leaf, torch.Tensor)]
        symbols: dict[str, int] = {}
        later: list[tuple[str, str, int]] = []
        for name, tensor, sizes, (dtype, device) in zip(names, inputs.tensors, self.sizes, self.kinds, strict=True):
            if tensor.dtype != dtype:
                return f"{name} is {tensor.dtype}, not {dtype}"
            if tensor.device != device:
                return f"{name} is on {tensor.device}, not {device}"
            if tensor.dim() != len(sizes):
                return f"{name} has {tensor.dim()} dimensions, not {len(sizes)}"
            for dim, (have, want) in enumerate(zip(tensor.shape, sizes, strict=True)):
                if isinstance(want, int):
                    if have != want:
                        return f"{name} has size {have} in dimension {dim}, not {want}"
                elif want.isidentifier():
                    if symbols.setdefault(want, have) != have:
                        return f"{name} has size {have} in dimension {dim}, which must be {symbols[want]}"
                else:
                    later.append((f"{name}, dimension {dim}", want, have))
        return self._refusal_of_expressions(inputs, symbols, later)

    def _refusal_of_expressions(
        self, inputs: Inputs, symbols: dict[str, int], later: list[tuple[str, str, int]]
    ) -> str | None:
        for place, expression, have in later:
            if _evaluate(expression, symbols) != have:
                return f"{place}: size {have} is not {expression}"
        for name, _, upper in self.bounds:
            if name in symbols and upper is not None and symbols[name] > upper:
                return f"a size of {symbols[name]} is above the captured bound {upper}"
        scope = {"L": {"tensors": inputs.tensors}}
        for expression in self.code:
            if not _evaluate(expression, scope):
                readable = expression.replace("L['tensors']", "tensors")
                return f"a branch of the model depends on: {readable}"
        return None

    def dynamic_sizes(self, inputs: Inputs) -> tuple[int, ...]:
        """The sizes that this program leaves open, each once."""
        if self.sizes is None:
            return tuple(tensor.shape[0] for tensor in inputs.tensors if tensor.dim())
        return tuple(
            have
            for tensor, sizes in zip(inputs.tensors, self.sizes, strict=True)
            for have, want in zip(tensor.shape, sizes, strict=True)
            if not isinstance(want, int)
        )

    def describe(self, names: tuple[str, ...]) -> str:
        """What the program takes, for an error message."""
        if self.sizes is None or self.kinds is None:
            return ", ".join(names)
        parts = []
        for name, sizes, (dtype, device) in zip(names, self.sizes, self.kinds, strict=True):
            shape = ", ".join("any" if isinstance(size, str) else str(size) for size in sizes)
            parts.append(f"{name}: {str(dtype).removeprefix('torch.')}[{shape}] on {device}")
        return "; ".join(parts)


def _same_constant(left: object, right: object) -> bool:
    if isinstance(left, (float, complex)):  # 0.0 and -0.0 differ, and NaN is the NaN that was
        return type(left) is type(right) and repr(left) == repr(right)
    return type(left) is type(right) and (left is right or bool(left == right))


def _evaluate(expression: str, scope: dict[str, Any]) -> Any:
    # The text is torch's own printing of its guards, not the user's.
    return eval(expression, {**SYMPY_INTERP, "math": math, "inf": math.inf}, dict(scope))


def _state(autocast: tuple[tuple[str, torch.dtype], ...]) -> str:
    return " and ".join(f"{dtype} on {kind}" for kind, dtype in autocast) or "off"
