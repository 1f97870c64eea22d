"""Patterns: what fits, and the reason of the nearest miss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import Match, NoMatch, any_of, call, const, lit, var
from fxopt.pattern import Pattern
from graphs import Network

aten = torch.ops.aten


def match(pattern: Pattern, body: Callable[[Any, torch.Tensor], Any], **parts: Any) -> Match | NoMatch:
    """The pattern against the last node of a model."""
    graph = fxopt.trace(Network(body, **parts).eval(), (torch.randn(2, 4),)).graph
    return pattern.match(graph.output_node().args[0][0])


X, Y = var("x"), var("y")
ADD = call(aten.add.Tensor, X, Y)
RELU_OF_ADD = call(aten.relu.default, call(aten.add.Tensor, X, Y, name="sum"), name="relu")


@pytest.mark.parametrize(
    ("pattern", "body"),
    [
        pytest.param(ADD, lambda m, x: x + x.neg(), id="a call"),
        pytest.param(RELU_OF_ADD, lambda m, x: (x + 1).relu(), id="a call of a call"),
        pytest.param(call(aten.add.Tensor, X, X), lambda m, x: x + x, id="one name twice for one value"),
        pytest.param(call(aten.add.Tensor, X, 1), lambda m, x: x + 1, id="a literal"),
        pytest.param(call(aten.add.Tensor, X, lit(1)), lambda m, x: x + 1, id="a literal said so"),
        pytest.param(call(aten.add.Tensor, alpha=2), lambda m, x: torch.add(x, x, alpha=2), id="an argument by name"),
        pytest.param(call(aten.add.Tensor, alpha=1), lambda m, x: x + x, id="an argument by its default"),
        pytest.param(call(aten.mul.Tensor, X, const("w")), lambda m, x: x * m.w, id="a constant"),
        pytest.param(call((aten.add.Tensor, aten.mul.Tensor), X, Y), lambda m, x: x * 2, id="one of several targets"),
        pytest.param(
            call(aten.add.Tensor, call(aten.neg.default, X), Y, commutative=True), lambda m, x: x + x.neg(),
            id="swapped operands",
        ),
        pytest.param(any_of(call(aten.mul.Tensor), ADD), lambda m, x: x + 1, id="the second of several patterns"),
        pytest.param(
            call(aten.linear.default, X, const("w"), const("b", optional=True)), lambda m, x: m.layer(x),
            id="a constant that may be missing",
        ),
    ],
)  # fmt: skip
def test_what_fits(pattern: Pattern, body: Callable[..., Any]) -> None:
    found = match(pattern, body, w=torch.ones(4), layer=nn.Linear(4, 4, bias=False))
    assert isinstance(found, Match), found


@pytest.mark.parametrize(
    ("pattern", "body", "reason"),
    [
        pytest.param(ADD, lambda m, x: x * 2, "mul is mul, not add", id="another operator"),
        pytest.param(RELU_OF_ADD, lambda m, x: (x * 2).relu(), "mul is mul, not add", id="another operator inside"),
        pytest.param(call(aten.add.Tensor, X, X), lambda m, x: x + x.neg(), "two different values", id="a name twice"),
        pytest.param(call(aten.add.Tensor, X, 1), lambda m, x: x + 1.0, "1.0 is not 1", id="1.0 is not 1"),
        pytest.param(call(aten.add.Tensor, X, True), lambda m, x: x + 1, "1 is not True", id="1 is not True"),
        pytest.param(call(aten.add.Tensor, X, 0.0), lambda m, x: x + -0.0, "-0.0 is not 0.0", id="-0.0 is not 0.0"),
        pytest.param(
            call(aten.add.Tensor, alpha=1), lambda m, x: torch.add(x, x, alpha=2), "2 is not 1", id="alpha counts"
        ),
        pytest.param(
            call(aten.mul.Tensor, X, const("weight")), lambda m, x: x * x.neg(), "at run time", id="no constant"
        ),
        pytest.param(
            call(aten.mul.Tensor, X, const("weight")), lambda m, x: x * 2, "the weight is 2", id="a number"
        ),
    ],
)
def test_what_does_not_fit_says_why(pattern: Pattern, body: Callable[..., Any], reason: str) -> None:
    found = match(pattern, body)
    assert isinstance(found, NoMatch)
    assert reason in found.reason


def test_a_match_names_its_nodes_and_bindings() -> None:
    found = match(RELU_OF_ADD, lambda m, x: (x + 3).relu())
    assert isinstance(found, Match)
    assert [node.name for node in found.nodes] == ["relu", "add"]
    assert found.root is found.node("relu")
    assert found["y"] == 3
    assert found.get("z", "none") == "none"
    with pytest.raises(AssertionError, match="is no node"):
        found.node("y")


def test_a_patterns_roots_are_what_the_driver_looks_for() -> None:
    assert any_of(call(aten.mul.Tensor), ADD).roots() == {aten.mul.Tensor, aten.add.Tensor}
    assert var("x").roots() == frozenset()
