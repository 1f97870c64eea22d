"""Makes a program line by line from choices that are plain bytes, running each line on real tensors as it goes.

A line that PyTorch refuses, or whose result would not stay exact (or small), is left out, so that any bytes give a
network that runs. Fewer and smaller bytes give a shorter one: that is how a failing network shrinks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from fxopt.testing.network import Network, Numbers, default_dtype, make

T = TypeVar("T")
Tensors = Callable[[torch.Tensor], bool]

LARGEST = 2000  # elements of a value
MOST_LINES = 40
#: How many binary digits an exact value may span. What is left of the mantissa is room for a rewrite's own sums.
EXACT_BITS = {torch.float64: 36, torch.float32: 14}
LARGEST_NUMBER = 1e4


class Unfit(Exception):
    """A line that this program cannot have; what came before it stays."""


@dataclass(frozen=True)
class Line:
    """One line: the names it sets, its text, and whether it changes something that exists."""

    names: tuple[str, ...]
    text: str
    writes: bool = False

    @property
    def reads(self) -> set[str]:
        """Every name in it."""
        return set(re.findall(r"\b[vx]\d*\b", self.text)) - set(self.names)


class Builder:
    """A program in the making: its values so far, by name, as real tensors."""

    def __init__(self, shape: tuple[int, ...], seed: int, *, exact: bool) -> None:
        self.shape, self.seed, self.exact = shape, seed, exact
        self.dtype = torch.float64 if exact else torch.float32
        self.texts: dict[str, str] = {}
        self.layers = SimpleNamespace()
        with default_dtype(self.dtype):
            self.values: dict[str, torch.Tensor] = {"x": Numbers(seed, "x", exact=exact).numbers(*shape)}
        self.lines: list[Line] = []
        self.made = 0
        self._bytes: Sequence[int] = ()
        self._place = 0
        self._most = MOST_LINES

    # -- choosing ----------------------------------------------------------------------------------------------------

    def take(self, word: Callable[[Builder], None], choices: Sequence[int]) -> None:
        """Adds what a word makes of its choices; as many lines of it as fit."""
        self.choose(choices)
        self._most = len(self.lines) + self.pick((1, 2, 3, 5, *[MOST_LINES] * 12))
        try:
            word(self)
        except Unfit:
            return

    def choose(self, choices: Sequence[int]) -> None:
        """Picks from these choices from now on."""
        self._bytes, self._place = choices, 0

    def pick(self, options: Sequence[T]) -> T:
        """The next choice among these; the first is the simplest."""
        byte = self._bytes[self._place] if self._place < len(self._bytes) else 0
        self._place += 1
        return options[byte % len(options)]

    def chance(self, percent: int) -> bool:
        """Whether to do what is not done in the simplest network."""
        return self.pick(range(100)) >= 100 - percent

    def any(self, fits: Tensors = lambda value: True) -> str:
        """A value that fits: most often one of the latest. Raises Unfit where there is none."""
        names = [name for name, value in self.values.items() if fits(value)]
        if not names:
            raise Unfit
        back = int((self.pick(range(100)) / 100) ** 2 * len(names))
        return names[-1 - back]

    def real(self, *ranks: int) -> str:
        """A floating-point value of one of these ranks, or of any."""
        return self.any(lambda value: value.is_floating_point() and (not ranks or value.dim() in ranks))

    def like(self, name: str) -> str:
        """A value of the same shape and dtype as another, perhaps itself."""
        first = self.values[name]
        return self.any(lambda value: value.shape == first.shape and value.dtype == first.dtype)

    # -- looking -----------------------------------------------------------------------------------------------------

    def size(self, name: str, dim: int) -> int:
        """One size of a value. Raises Unfit where it has no such dimension."""
        value = self.values[name]
        if not -value.dim() <= dim < value.dim():
            raise Unfit
        return value.shape[dim]

    def rank(self, name: str) -> int:
        """How many dimensions a value has."""
        return self.values[name].dim()

    def typed(self, name: str) -> str:
        """The dtype argument of a layer that takes a value: nothing where it is the network's own."""
        dtype = self.values[name].dtype
        if not dtype.is_floating_point:
            raise Unfit
        return "" if dtype == self.dtype else f", dtype={dtype}"

    # -- making ------------------------------------------------------------------------------------------------------

    def layer(self, text: str, name: str = "") -> str:
        """A new layer or tensor, as the text by which a line names it: `self.conv2d1`."""
        self._check_room()
        self.made += 1
        kind = re.match(r"(?:nn\.)?(\w+)", text)
        name = name or f"{kind[1].lower() if kind else 'tensor'}{self.made}"
        try:
            with default_dtype(self.dtype):
                make(self.layers, name, text, self.seed, exact=self.exact)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise Unfit from error
        made = getattr(self.layers, name.partition(".")[0])
        if isinstance(made, nn.Module):
            made.eval()
        self.texts[name] = text
        return f"self.{name}"

    def let(self, text: str, count: int = 1) -> str:
        """A new value by an expression; its name. With `count`, of that many parts the first (see `lets`)."""
        return self.lets(text, count)[0]

    def lets(self, text: str, count: int) -> tuple[str, ...]:
        """New values: the parts of what an expression gives."""
        self._check_room()
        found = self._run(text, self.values)
        parts = (found,) if count == 1 else tuple(found)
        if len(parts) != count:
            raise Unfit
        self._check(parts)
        number = sum(len(line.names) for line in self.lines)
        names = tuple(f"v{number + index + 1}" for index in range(count))
        self.lines.append(Line(names, f"{', '.join(names)} = {text}"))
        self.values.update(zip(names, parts, strict=True))
        return names

    def write(self, text: str) -> None:
        """A statement that changes a value in place: tried on copies that share memory as the values do."""
        self._check_room()
        trial = copy.deepcopy(self.values)
        self._run(text, trial)
        self._check(trial.values())
        self.values = trial
        self.lines.append(Line((), text, writes=True))

    def let_write(self, text: str) -> str:
        """A new value by an expression that also changes one in place."""
        self._check_room()
        trial = copy.deepcopy(self.values)
        found = self._run(text, trial)
        self._check([found, *trial.values()])
        name = f"v{sum(len(line.names) for line in self.lines) + 1}"
        self.values = {**trial, name: found}
        self.lines.append(Line((name,), f"{name} = {text}", writes=True))
        return name

    def _check_room(self) -> None:
        if len(self.lines) >= min(self._most, MOST_LINES):
            raise Unfit

    def _run(self, text: str, values: dict[str, torch.Tensor]) -> Any:
        scope = {"torch": torch, "nn": nn, "F": F, "self": self.layers, **values}
        try:
            with torch.no_grad():
                if re.match(r"\w+ [-+*/]?= ", text):
                    exec(text, scope)
                    return None
                return eval(text, scope)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise Unfit from error

    def _check(self, parts: Iterable[Any]) -> None:
        for part in parts:
            if not isinstance(part, torch.Tensor) or part.dim() > 5 or not 0 < part.numel() <= LARGEST:
                raise Unfit
            if not part.dtype.is_floating_point:
                if part.dtype != torch.bool and part.abs().max() > LARGEST_NUMBER:
                    raise Unfit
            elif self.exact:
                if _bits(part) > EXACT_BITS.get(part.dtype, 0):
                    raise Unfit
            elif not bool((part.abs() < LARGEST_NUMBER).all()):  # nor NaN
                raise Unfit

    # -- the result --------------------------------------------------------------------------------------------------

    def network(self, results: Sequence[str], structure: str, *, prune: bool) -> Network:
        """The program that hands out some values, without the lines that nothing of it needs if `prune`."""
        lines = self._needed(results) if prune else self.lines
        program = "\n".join([*(line.text for line in lines), "return " + structure.format(*results)])
        used = set(re.findall(r"self\.(\w+)", program))
        # A layer may read another: a tied weight keeps the one that it is tied to.
        for name, text in reversed(self.texts.items()):
            if name.partition(".")[0] in used:
                used |= set(re.findall(r"self\.(\w+)", text))
        texts = {name: text for name, text in self.texts.items() if name.partition(".")[0] in used}
        return Network(program, texts, {"x": self.shape}, exact=self.exact, seed=self.seed)

    def _needed(self, results: Sequence[str]) -> list[Line]:
        needed, kept = set(results), []
        for line in reversed(self.lines):
            if line.writes or needed & set(line.names):
                needed |= line.reads
                kept.append(line)
        return kept[::-1]


def _bits(value: torch.Tensor) -> int:
    """How many binary digits the numbers of a tensor span, from the largest one's first to the finest one's last."""
    numbers = value.double().flatten()
    numbers = numbers[numbers != 0]
    if not len(numbers):
        return 0
    if not bool(torch.isfinite(numbers).all()):
        return 99
    mantissa, exponent = torch.frexp(numbers)
    whole = (mantissa.abs() * 2**53).long()
    lowest = torch.log2((whole & -whole).double()).long() + exponent.long() - 53
    return int(exponent.max()) - int(lowest.min())
