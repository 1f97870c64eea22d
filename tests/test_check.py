"""Every check of the contract finds what breaks it, and names it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt import check, ir, ops
from graphs import Network

aten = torch.ops.aten


def module() -> fx.GraphModule:
    model = Network(
        lambda m, x: (m.conv(x).relu() + m.bias.reshape(-1, 1, 1)).flatten(1),
        conv=nn.Conv2d(3, 4, 3),
        bias=torch.ones(4),
    )
    return fxopt.trace(model.eval(), (torch.randn(2, 3, 8, 8),))


def named(traced: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in traced.graph.nodes if node.name == name)


def _two_outputs(traced: fx.GraphModule) -> None:
    traced.graph.output(())


def _no_tuple(traced: fx.GraphModule) -> None:
    output = traced.graph.output_node()
    output.args = (output.args[0][0],)  # type: ignore[index]


def _late_input(traced: fx.GraphModule) -> None:
    with traced.graph.inserting_before(traced.graph.output_node()):
        traced.graph.placeholder("late")


def _out_of_order(traced: fx.GraphModule) -> None:
    named(traced, "conv2d").prepend(named(traced, "relu"))


def _stale_users(traced: fx.GraphModule) -> None:
    named(traced, "conv2d").users.pop(named(traced, "relu"))


def _name(traced: fx.GraphModule) -> None:
    named(traced, "relu").name = "conv2d"


def _no_identifier(traced: fx.GraphModule) -> None:
    named(traced, "relu").name = "x; import os"


def _view(traced: fx.GraphModule) -> None:
    named(traced, "reshape").target = aten.view.default


def _misplaced(traced: fx.GraphModule) -> None:
    relu = named(traced, "relu")
    relu.kwargs, relu.args = {"self": relu.args[0]}, ()


def _defaults(traced: fx.GraphModule) -> None:
    add = named(traced, "add")
    add.kwargs = {"alpha": 1}


def _unknown_argument(traced: fx.GraphModule) -> None:
    named(traced, "relu").kwargs = {"inplace": True}


def _no_attribute(traced: fx.GraphModule) -> None:
    named(traced, "conv_weight").target = "conv.weigth"


def _injected(traced: fx.GraphModule) -> None:
    named(traced, "conv_weight").target = "conv.weight); import os; (0"


def _second_name(traced: fx.GraphModule) -> None:
    ir.set_attribute(traced, "again", traced.conv.bias)
    with traced.graph.inserting_before(named(traced, "conv2d")):
        again = traced.graph.get_attr("again")
    again.meta = dict(named(traced, "conv_bias").meta)
    named(traced, "relu").args = (again,)


def _writes(traced: fx.GraphModule) -> None:
    named(traced, "relu").target = aten.relu_.default


def _no_value(traced: fx.GraphModule) -> None:
    del named(traced, "relu").meta["val"]


def _view_in_a_buffer(traced: fx.GraphModule) -> None:
    reshape = named(traced, "reshape")
    with traced.graph.inserting_after(reshape):
        buffer = traced.graph.call_function(ops.buffer, ([reshape],))
    buffer.args, buffer.meta = ([reshape], 1), dict(reshape.meta)


def _shape_in_place(traced: fx.GraphModule) -> None:
    relu = named(traced, "relu")
    with traced.graph.inserting_after(relu):
        traced.graph.call_function(aten.unsqueeze_.default, (relu, 0)).meta["origin"] = ()


def _no_origin(traced: fx.GraphModule) -> None:
    del named(traced, "relu").meta["origin"]


def _training(traced: fx.GraphModule) -> None:
    ir.set_attribute(traced, "leaf", nn.LSTM(3, 3))
    with traced.graph.inserting_before(named(traced, "conv2d")):
        traced.graph.call_module("leaf", (named(traced, "conv_bias"),)).meta["origin"] = ()


@pytest.mark.parametrize(
    ("breach", "name"),
    [
        pytest.param(_two_outputs, "structure", id="two outputs"),
        pytest.param(_no_tuple, "structure", id="an output that is no tuple"),
        pytest.param(_late_input, "structure", id="an input behind a computation"),
        pytest.param(_out_of_order, "users", id="an operand that comes later"),
        pytest.param(_stale_users, "users", id="users that do not mirror arguments"),
        pytest.param(_name, "names", id="a name twice"),
        pytest.param(_no_identifier, "names", id="a name with code in it"),
        pytest.param(_view, "targets", id="view instead of reshape"),
        pytest.param(_misplaced, "arguments", id="a positional argument by name"),
        pytest.param(_defaults, "arguments", id="a default spelled out"),
        pytest.param(_unknown_argument, "arguments", id="an argument that the schema lacks"),
        pytest.param(_no_attribute, "attributes", id="an attribute that is not there"),
        pytest.param(_injected, "attributes", id="an attribute with code in it"),
        pytest.param(_second_name, "one-name", id="a second name of one tensor"),
        pytest.param(_writes, "functional", id="a write that could be pure"),
        pytest.param(_shape_in_place, "shapes", id="a shape changed in place"),
        pytest.param(_no_value, "values", id="a value that is not known"),
        pytest.param(_view_in_a_buffer, "buffers", id="a view that is written in place"),
        pytest.param(_no_origin, "origins", id="a node from nowhere"),
        pytest.param(_training, "inference", id="an opaque module in training mode"),
    ],
)
def test_a_breach_is_found(breach: Callable[[fx.GraphModule], None], name: str) -> None:
    traced = module()
    assert check.problems(traced) == []
    breach(traced)
    assert name in {found for found, _, _ in check.problems(traced)}


def test_every_check_has_a_breach_here() -> None:
    marks = next(mark for mark in test_a_breach_is_found.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
    assert {parameter.values[1] for parameter in marks.args[1]} == set(check.summary())


def test_the_error_names_check_node_line_and_what_was_done_last() -> None:
    traced = module()
    _view(traced)
    with pytest.raises(fxopt.CheckError) as caught:
        check.check(traced, after="the pass 'mine'")
    said = str(caught.value)
    for word in ("after the pass 'mine'", "check 'targets'", "reshape is a view", "node: reshape", ".py:"):
        assert word in said
