"""Patterns for formulas as people write them: a product in any order and nesting, a number as any spelling of it.

    product(X, one_plus(erf(product(X, constant=near("1/sqrt(2)")))), constant=near("1/2"))

fits `0.5 * x * (1 + erf(x / sqrt(2)))`, `x * 0.5 * ...`, `x * (0.5 * ...)` and `x / 2 * ...` alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxopt import Match, NoMatch, call, ir
from fxopt.pattern import Pattern

aten = torch.ops.aten

#: Numbers that formulas are made of, by the name that a match binds them to.
NUMBERS = {
    "0": 0.0,
    "1": 1.0,
    "3": 3.0,
    "6": 6.0,
    "1/2": 0.5,
    "1/6": 1 / 6,
    "1/sqrt(2)": math.sqrt(0.5),
    "sqrt(2/pi)": math.sqrt(2 / math.pi),
    "0.044715": 0.044715,
}
#: How far a number may be from what it stands for to be taken for it at all; `numbers_guard` asks for more.
_LIKE = 1e-2


def number(value: Any) -> float | None:
    """A literal, or a constant without dimensions that no training changes, as a number; None for anything else."""
    if type(value) in (int, float):
        return float(value)
    held = ir.tensor(value)
    if held is None or held.dim() != 0 or held.is_meta or held.requires_grad:
        return None
    if held.is_complex() or held.dtype is torch.bool:
        return None
    return float(held)


@dataclass(frozen=True)
class _Near(Pattern):
    name: str

    def fits(self, value: Any, state: Any) -> Iterator[Any]:
        found, wanted = number(value), NUMBERS[self.name]
        if found is None or not math.isclose(found, wanted, rel_tol=_LIKE):
            shown = value.name if isinstance(value, fx.Node) else repr(value)
            yield NoMatch(f"{shown} is not {self.name}", value if isinstance(value, fx.Node) else None)
        else:
            yield state.bind(f"{self.name}~{len(state.bindings)}", found)


def near(name: str) -> Pattern:
    """A number that is meant to be one of NUMBERS."""
    return _Near(name)


def numbers_guard(match: Match, dtype: torch.dtype) -> NoMatch | None:
    """Each `near` number of a match is what it stands for, to the precision of the dtype (of float32 below that)."""
    # A rounding or two: people write 0.70710678, and divide by what they rounded.
    allowed = 4 * min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps / 4)
    for name, found in match.bindings.items():
        wanted, _, place = name.partition("~")
        if place and not math.isclose(found, NUMBERS[wanted], rel_tol=allowed):
            exact = f"{wanted} = {NUMBERS[wanted]:.17g}"
            return NoMatch(f"{found!r} is not {exact} to the precision of {dtype}", match.root)
    return None


@dataclass(frozen=True)
class _Product(Pattern):
    factors: tuple[Pattern, ...]
    constant: Pattern

    def roots(self) -> frozenset[Any]:
        return frozenset({aten.mul.Tensor, aten.div.Tensor})

    def fits(self, value: Any, state: Any) -> Iterator[Any]:
        found = _flatten(value, _DEPTH)
        if found is None:
            shown = f"{value.name} is {ir.target_name(value)}" if isinstance(value, fx.Node) else f"{value!r} is"
            yield NoMatch(f"{shown}, not a product", value if isinstance(value, fx.Node) else None)
            return
        factors, scale, nodes = found
        if len(factors) != len(self.factors):
            yield NoMatch(f"{value.name} is a product of {len(factors)} values, not {len(self.factors)}", value)
            return
        start = replace(state, nodes=(*state.nodes, *nodes))
        nearest: tuple[int, NoMatch] | None = None
        for depth, outcome in self._assign(self.factors, factors, scale, start):
            if not isinstance(outcome, NoMatch):
                yield outcome
            elif nearest is None or depth > nearest[0]:
                nearest = depth, outcome
        if nearest is not None:
            yield nearest[1]

    def _assign(
        self, patterns: tuple[Pattern, ...], factors: tuple[fx.Node, ...], scale: float, state: Any
    ) -> Iterator[tuple[int, Any]]:
        """Every assignment of factors to patterns, or how it fails; each with how far it went."""
        depth = 2 * (len(self.factors) - len(patterns))
        if not patterns:
            yield from ((depth, outcome) for outcome in self.constant.fits(scale, state))
            return
        for place, factor in enumerate(factors):
            rest = factors[:place] + factors[place + 1 :]
            for outcome in patterns[0].fits(factor, state):
                if isinstance(outcome, NoMatch):
                    yield depth + (outcome.node is not factor), outcome
                else:
                    yield from self._assign(patterns[1:], rest, scale, outcome)


def product(*factors: Pattern, constant: Pattern | None = None) -> Pattern:
    """The product of the factors and a number (1 if none is given), in any order, nesting and spelling."""
    return _Product(factors, near("1") if constant is None else constant)


Factors = tuple[tuple[fx.Node, ...], float, tuple[fx.Node, ...]]


#: How deep the products of a formula are nested at most. A graph of two thousand multiplications has no end of them.
_DEPTH = 6


def _flatten(value: Any, depth: int) -> Factors | None:
    """A product's factors, the number among them, and the nodes that multiply; None for what is no product.

    A product inside is a factor as it is where others read it too, or below `depth`.
    """
    if not isinstance(value, fx.Node) or depth == 0 or (len(value.users) != 1 and depth < _DEPTH):
        return None
    match value.target:
        case aten.mul.Tensor:
            parts = [_factor(operand, depth) for operand in value.args]
        case aten.div.Tensor:
            divisor = number(value.args[1])
            if not divisor:
                return None
            parts = [_factor(value.args[0], depth), ((), 1 / divisor, ())]
        case aten.square.default:
            parts = [_factor(value.args[0], depth)] * 2
        case aten.pow.Tensor_Scalar if number(value.args[1]) in (2, 3):
            parts = [_factor(value.args[0], depth)] * (2 if number(value.args[1]) == 2 else 3)
        case _:
            return None
    factors: list[fx.Node] = []
    nodes = [value]
    scale = 1.0
    for part in parts:
        if part is None:
            return None
        factors += part[0]
        scale *= part[1]
        nodes += part[2]
    return tuple(factors), scale, tuple(dict.fromkeys(nodes))


def _factor(value: Any, depth: int) -> Factors | None:
    constant = number(value)
    if constant is not None:
        return (), constant, ()
    if not isinstance(value, fx.Node):
        return None
    return _flatten(value, depth - 1) or ((value,), 1.0, ())


def plus(value: Pattern, other: Pattern) -> Pattern:
    """The sum of two patterns in any order."""
    return call(aten.add.Tensor, value, other, alpha=1, commutative=True)
