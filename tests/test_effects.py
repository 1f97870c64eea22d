"""Effects: what a node writes, aliases, draws and may raise; unknown means that it may do anything."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

from fxopt import effects, ir
from graphs import Network

aten = torch.ops.aten


def graph_of(build: Callable[[fx.Graph, fx.Node, fx.Node], Any], **attributes: Any) -> fx.GraphModule:
    """A module of two inputs whose result is what `build` gives."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    module = ir.new_module(graph)
    for name, value in attributes.items():
        ir.set_attribute(module, name, value)
    result = build(graph, x, y)
    graph.output((result,))
    return module


def effects_of(target: Any, *arguments: Any, **keywords: Any) -> effects.Effects:
    """Of a call on `x` and `y` (the strings)."""

    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
        names = {"x": x, "y": y}
        args = tuple(names.get(a, a) if isinstance(a, str) else a for a in arguments)
        return graph.call_function(target, args, keywords)

    module = graph_of(build)
    return effects.of(next(node for node in module.graph.nodes if node.op == "call_function"))


def said(found: effects.Effects) -> str:
    parts = [f"writes {node.name}" for node in found.writes] + [f"aliases {node.name}" for node in found.aliases]
    parts += [word for word in ("random", "raises", "opaque") if getattr(found, word)]
    return ", ".join(parts)


def a_function_of_the_users(*_: Any) -> None:
    """Nobody knows what it does."""


@pytest.mark.parametrize(
    ("target", "arguments", "expected"),
    [
        pytest.param(aten.relu.default, ("x",), "", id="relu is pure and fresh"),
        pytest.param(aten.add.Tensor, ("x", "y"), "", id="add is pure and fresh"),
        pytest.param(aten.conv2d.default, ("x", "y"), "", id="conv2d is pure and fresh, though composite"),
        pytest.param(aten.relu_.default, ("x",), "writes x, aliases x", id="relu_ writes"),
        pytest.param(aten.add_.Tensor, ("x", "y"), "writes x, aliases x", id="add_ writes its first operand only"),
        pytest.param(aten.copy_.default, ("x", "y"), "writes x, aliases x", id="copy_ writes"),
        pytest.param(aten.view.default, ("x", [-1]), "aliases x", id="view aliases"),
        pytest.param(aten.permute.default, ("x", [0]), "aliases x", id="permute aliases"),
        pytest.param(aten.reshape.default, ("x", [-1]), "aliases x", id="reshape may alias"),
        pytest.param(aten.contiguous.default, ("x",), "aliases x", id="contiguous may alias"),
        pytest.param(aten.to.dtype, ("x", torch.float32), "aliases x", id="to may alias"),
        pytest.param(aten.split.Tensor, ("x", 2), "aliases x", id="split aliases"),
        pytest.param(aten.dropout.default, ("x", 0.5, False), "aliases x", id="dropout hands out its input in eval"),
        pytest.param(aten.dropout.default, ("x", 0.5, True), "aliases x, random", id="dropout draws in training"),
        pytest.param(aten.dropout.default, ("x", 0.0, True), "aliases x", id="dropout of nothing draws nothing"),
        pytest.param(aten.rand_like.default, ("x",), "random", id="rand_like draws"),
        pytest.param(aten.bernoulli.default, ("x",), "random", id="bernoulli draws"),
        pytest.param(torch._assert, ("x", "no"), "raises", id="an assertion is there to raise"),
        pytest.param(a_function_of_the_users, ("x",), "writes x, aliases x, random, raises, opaque", id="unknown"),
    ],
)
def test_effects(target: Any, arguments: tuple[Any, ...], expected: str) -> None:
    assert said(effects_of(target, *arguments)) == expected


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_writes_its_statistics_in_training_only(training: bool) -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
        mean, variance = graph.get_attr("mean"), graph.get_attr("variance")
        return graph.call_function(aten.batch_norm.default, (x, None, None, mean, variance, training, 0.1, 1e-5, False))

    module = graph_of(build, mean=torch.zeros(3), variance=torch.ones(3))
    found = effects.of(next(node for node in module.graph.nodes if node.op == "call_function"))
    assert [node.name for node in found.writes] == (["mean", "variance"] if training else [])
    assert found.pure is not training


@pytest.mark.parametrize(
    ("module", "pure"),
    [
        pytest.param(nn.LSTM(3, 3), True, id="torch's LSTM in eval"),
        pytest.param(nn.MultiheadAttention(4, 2), True, id="torch's attention in eval"),
        pytest.param(Network(lambda m, x: x), False, id="a module of the user's"),
    ],
)
def test_opaque_modules(module: nn.Module, pure: bool) -> None:
    built = graph_of(lambda graph, x, y: graph.call_module("inner", (x,)), inner=module.eval())
    node = next(node for node in built.graph.nodes if node.op == "call_module")
    assert effects.of(node).pure is pure
    if pure:
        module.train()
        assert not effects.of(node).pure, "in training mode nothing is known of it"


# -- aliases ---------------------------------------------------------------------------------------------------------


def test_views_of_views_share_one_root_and_fresh_values_do_not() -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
        first = graph.call_function(aten.reshape.default, (x, [-1]))
        second = graph.call_function(aten.slice.Tensor, (first, 0, 1))
        fresh = graph.call_function(aten.relu.default, (second,))
        return graph.call_function(aten.add_.Tensor, (fresh, y))

    module = graph_of(build)
    x, _, first, second, fresh, written, _ = module.graph.nodes
    aliases = effects.Aliases.scan(module.graph)
    assert aliases.root(x) is aliases.root(first) is aliases.root(second)
    assert aliases.root(fresh) is aliases.root(written)
    assert aliases.root(fresh) is not aliases.root(x)
    assert aliases.writer_of(fresh) is written
    assert aliases.writer_of(second) is None


def test_two_inputs_may_be_one_tensor() -> None:
    module = graph_of(lambda graph, x, y: graph.call_function(aten.add_.Tensor, (x, 1)))
    x, y, written, _ = module.graph.nodes
    aliases = effects.Aliases.scan(module.graph)
    assert aliases.root(x) is aliases.root(y)
    assert aliases.writer_of(y) is written


def test_two_attributes_of_one_storage_may_be_one_tensor() -> None:
    whole = torch.zeros(4)

    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
        return graph.call_function(aten.add_.Tensor, (graph.get_attr("left"), graph.get_attr("right")))

    module = graph_of(build, left=whole[:2], right=whole[2:])
    aliases = effects.Aliases.scan(module.graph)
    left, right = (node for node in module.graph.nodes if node.op == "get_attr")
    assert aliases.root(left) is aliases.root(right)


def test_a_writer_is_found_between_two_nodes_only_where_it_is() -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
        first = graph.call_function(aten.neg.default, (x,))
        graph.call_function(aten.add_.Tensor, (first, y))
        last = graph.call_function(aten.relu.default, (first,))
        return graph.call_function(aten.neg.default, (last,))

    module = graph_of(build)
    _, y, first, writer, last, behind, _ = module.graph.nodes
    aliases = effects.Aliases.scan(module.graph)
    assert aliases.writer_between(first, last, [first]) is writer
    assert aliases.writer_between(first, last, [y]) is None
    assert aliases.writer_between(last, behind, [first]) is None


@pytest.mark.parametrize(
    ("target", "arguments", "why"),
    [
        pytest.param(aten.relu.default, (), None, id="an operator computes from values"),
        pytest.param(aten.reshape.default, ([-1],), None, id="reshape gives the same values"),
        pytest.param(operator.getitem, (0,), None, id="one of several results"),
        pytest.param(aten.sym_size.int, (0,), None, id="a size is none of them"),
        pytest.param(aten.sym_stride.int, (0,), "may ask for them", id="a stride"),
        pytest.param(aten.as_strided.default, ([1], [1]), "reads memory", id="as_strided"),
        pytest.param(aten.bernoulli.default, (), "draws at random", id="random numbers come in the order of memory"),
        pytest.param(aten.relu_.default, (), "writes", id="a write"),
        pytest.param(torch.ops.prims.neg.default, (), "an operator of prims", id="an operator of somebody else's"),
        pytest.param(len, (), "opaque", id="a function"),
    ],
)
def test_strides_matter(target: Any, arguments: tuple[Any, ...], why: str | None) -> None:
    graph = fx.Graph()
    node = graph.call_function(target, (graph.placeholder("x"), *arguments))
    graph.output((node,))
    ir.new_module(graph)
    found = effects.strides_matter(node)
    assert found is None if why is None else found is not None and why in found
