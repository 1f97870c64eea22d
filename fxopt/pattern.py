"""The pattern language: a tree of `call`, `var`, `const`, `lit` and `any_of` that a node matches, or does not and why.

    X, W = var("x"), const("weight")
    CONV = call(aten.conv2d.default, X, W, name="conv")
    PATTERN = call(aten.relu.default, CONV, name="activation")

Arguments of a `call` stand for the operator's schema arguments in order, or by name; what is not mentioned may be
anything. A name that occurs twice must stand for the same value both times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch._ops import OpOverload

from fxopt import ir


@dataclass(frozen=True)
class NoMatch:
    """Why a rule does not apply: a reason that a user can act on, and the node that it is about.

    `fits` is False where not even the pattern is there, so that nobody would have expected the rule to apply.
    It is truthy, so that guards chain: `first(match) or second(match)`. Ask a match by `isinstance(found, NoMatch)`.
    """

    reason: str
    node: fx.Node | None = None
    fits: bool = True


@dataclass(frozen=True)
class Match:
    """How a pattern fits: `root`, the `nodes` that its calls stand for, and what each name stands for."""

    root: fx.Node
    nodes: tuple[fx.Node, ...]
    bindings: dict[str, Any]
    shared: frozenset[fx.Node] = frozenset()

    def __getitem__(self, name: str) -> Any:
        return self.bindings[name]

    def node(self, name: str) -> fx.Node:
        """What a name stands for, which must be a node."""
        found = self.bindings[name]
        assert isinstance(found, fx.Node), f"{name} stands for {found!r}, which is no node"
        return found

    def get(self, name: str, default: Any = None) -> Any:
        """What a name stands for, or `default` where the match has no such name."""
        return self.bindings.get(name, default)


def _node(value: object) -> fx.Node | None:
    return value if isinstance(value, fx.Node) else None


@dataclass
class _State:
    bindings: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()
    shared: frozenset[fx.Node] = frozenset()

    def bind(self, name: str | None, value: Any) -> _State | NoMatch:
        if name is None:
            return self
        if name in self.bindings:
            if ir.same_literal(self.bindings[name], value):
                return self
            return NoMatch(f"{name} would stand for two different values", _node(value))
        return _State({**self.bindings, name: value}, self.nodes, self.shared)


class Pattern:
    """Base of the pattern classes."""

    def fits(self, value: Any, state: _State) -> Iterator[_State | NoMatch]:
        """Every way in which `value` fits, or one NoMatch."""
        raise TypeError(f"{type(self).__name__} is no pattern")

    def match(self, node: fx.Node) -> Match | NoMatch:
        """The first way in which `node` fits, or the reason of the nearest miss."""
        nearest: NoMatch | None = None
        for outcome in self.fits(node, _State()):
            if isinstance(outcome, _State):
                return Match(node, outcome.nodes, outcome.bindings, outcome.shared)
            nearest = outcome if nearest is None else nearest
        return NoMatch("nothing fits", node) if nearest is None else nearest

    def roots(self) -> frozenset[Any]:
        """The call targets that a matching node can have."""
        return frozenset()


@dataclass(frozen=True)
class _Var(Pattern):
    name: str

    def fits(self, value: Any, state: _State) -> Iterator[_State | NoMatch]:
        yield state.bind(self.name, value)


@dataclass(frozen=True)
class _Const(Pattern):
    name: str
    optional: bool

    def fits(self, value: Any, state: _State) -> Iterator[_State | NoMatch]:
        if value is None and self.optional:
            yield state.bind(self.name, None)
        elif ir.tensor(value) is None:
            what = f"{value.name} ({ir.target_name(value)})" if isinstance(value, fx.Node) else repr(value)
            yield NoMatch(f"the {self.name} is {what}, computed at run time, not a constant", _node(value))
        else:
            yield state.bind(self.name, value)


@dataclass(frozen=True)
class _Lit(Pattern):
    value: Any

    def fits(self, value: Any, state: _State) -> Iterator[_State | NoMatch]:
        yield state if ir.same_literal(self.value, value) else NoMatch(f"{value!r} is not {self.value!r}")


@dataclass(frozen=True)
class _AnyOf(Pattern):
    choices: tuple[Pattern, ...]

    def fits(self, value: Any, state: _State) -> Iterator[_State | NoMatch]:
        for choice in self.choices:
            yield from choice.fits(value, state)

    def roots(self) -> frozenset[Any]:
        return frozenset().union(*(choice.roots() for choice in self.choices))


@dataclass(frozen=True)
class _Call(Pattern):
    targets: tuple[Any, ...]
    positional: tuple[Pattern, ...]
    named: tuple[tuple[str, Pattern], ...]
    name: str | None
    commutative: bool
    shared: bool

    def roots(self) -> frozenset[Any]:
        return frozenset(self.targets)

    def fits(self, value: Any, state: _State) -> Iterator[_State | NoMatch]:
        if not isinstance(value, fx.Node) or value.op != "call_function" or value.target not in self.targets:
            wanted = " or ".join(dict.fromkeys(_short(target) for target in self.targets[:3]))
            wanted += " ..." if len(self.targets) > 3 else ""
            what = f"{value.name} is {ir.target_name(value)}" if isinstance(value, fx.Node) else f"{value!r} is"
            yield NoMatch(f"{what}, not {wanted}", _node(value))
            return
        bound = state.bind(self.name, value)
        if isinstance(bound, NoMatch):
            yield bound
            return
        shared = bound.shared | {value} if self.shared else bound.shared
        start = _State(bound.bindings, (*bound.nodes, value), shared)
        given = ir.arguments(value)
        order = list(given)
        pairs = [(order[position], pattern) for position, pattern in enumerate(self.positional)] + list(self.named)
        yield from _all_fit([(given[name], pattern) for name, pattern in pairs], start)
        if self.commutative and len(self.positional) >= 2:
            swapped = {**given, order[0]: given[order[1]], order[1]: given[order[0]]}
            yield from _all_fit([(swapped[name], pattern) for name, pattern in pairs], start)


def _all_fit(pairs: list[tuple[Any, Pattern]], state: _State) -> Iterator[_State | NoMatch]:
    if not pairs:
        yield state
        return
    (value, pattern), rest = pairs[0], pairs[1:]
    for outcome in pattern.fits(value, state):
        if isinstance(outcome, NoMatch):
            yield outcome
        else:
            yield from _all_fit(rest, outcome)


def _short(target: Any) -> str:
    return target._opname if isinstance(target, OpOverload) else getattr(target, "__name__", str(target))


def _pattern(value: Any) -> Pattern:
    return value if isinstance(value, Pattern) else _Lit(value)


def var(name: str) -> Pattern:
    """Anything: a node or a literal, bound to `name`."""
    return _Var(name)


def const(name: str, *, optional: bool = False) -> Pattern:
    """A parameter, buffer or constant of the model (a `get_attr` node); with `optional` also None."""
    return _Const(name, optional)


def lit(value: Any) -> Pattern:
    """Exactly this literal: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    return _Lit(value)


def any_of(*choices: Pattern) -> Pattern:
    """The first of several patterns that fits."""
    return _AnyOf(choices)


def call(
    targets: Any | Iterable[Any],
    *arguments: Any,
    name: str | None = None,
    commutative: bool = False,
    shared: bool = False,
    **named: Any,
) -> Pattern:
    """A call of one of `targets` whose arguments fit; bound to `name`.

    `commutative` also tries the first two arguments swapped. A call inside a pattern must have no reader outside the
    match, unless it is `shared`.
    """
    found = (targets,) if callable(targets) else tuple(targets)
    return _Call(
        found,
        tuple(_pattern(argument) for argument in arguments),
        tuple((key, _pattern(value)) for key, value in named.items()),
        name,
        commutative,
        shared,
    )


Guard = Callable[[Match], NoMatch | None]
