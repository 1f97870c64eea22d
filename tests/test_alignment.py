"""Which nodes of two graphs are the same: by the record of rewrites, or by name, origin and place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

import fxopt
from diffs import said, sound
from fxopt import align, ir
from fxopt.journal import Rewrite

aten = torch.ops.aten


# -- the record ------------------------------------------------------------------------------------------------------


def graph_of(*steps: tuple[str, Any, tuple[str, ...]]) -> fx.GraphModule:
    """An IR module of (name, operator, operands), from an input x to the last step."""
    graph = fx.Graph()
    made = {"x": graph.placeholder("x")}
    for name, target, operands in steps:
        made[name] = graph.create_node("call_function", target, tuple(made[o] for o in operands), {}, name)
    graph.output((list(made.values())[-1],))
    return ir.new_module(graph)


def rewrite(root: str, result: str, removed: Iterable[str], added: Iterable[str]) -> Rewrite:
    return Rewrite("p", "r", ((root, result),), tuple(removed), tuple(added), ())


RELU, SIN, COS = aten.relu.default, aten.sin.default, aten.cos.default

RECORDS: dict[str, tuple[Any, Any, list[Rewrite], dict[str, tuple[str, ...]], dict[str, str]]] = {
    "a name that was freed and given again is another node": (
        [("a", SIN, ("x",)), ("b", RELU, ("a",))],
        [("a", COS, ("x",)), ("b", RELU, ("a",))],
        [rewrite("a", "c", ["a"], ["c"]), rewrite("c", "a", ["c"], ["a"])],
        {"a": ("a",), "b": ("b",)},
        {"a": "removed", "b": "kept"},
    ),
    "a node put in between leaves both ends kept": (
        [("a", SIN, ("x",)), ("b", RELU, ("a",))],
        [("a", SIN, ("x",)), ("n", COS, ("a",)), ("b", RELU, ("n",))],
        [rewrite("a", "n", [], ["n"])],
        {"a": ("a",), "b": ("b",)},
        {"a": "kept", "b": "kept"},
    ),
    "a chain of replacements leads to the last": (
        [("a", SIN, ("x",)), ("b", RELU, ("a",))],
        [("d", COS, ("x",)), ("b", RELU, ("d",))],
        [rewrite("a", "c", ["a"], ["c"]), rewrite("c", "d", ["c"], ["d"])],
        {"a": ("d",), "b": ("b",)},
        {"a": "removed", "b": "kept"},
    ),
    "an operator changed in place is changed": (
        [("a", SIN, ("x",))],
        [("a", COS, ("x",))],
        [],
        {"a": ("a",)},
        {"a": "changed"},
    ),
    "what nobody recorded is the normal form's": (
        [("a", SIN, ("x",)), ("b", RELU, ("a",))],
        [("b", RELU, ("x",))],
        [],
        {"a": (), "b": ("b",)},
        {"a": "removed", "b": "changed"},
    ),
    "two nodes that became one are both its past": (
        [("a", SIN, ("x",)), ("b", SIN, ("x",)), ("c", aten.add.Tensor, ("a", "b"))],
        [("a", SIN, ("x",)), ("c", aten.add.Tensor, ("a", "a"))],
        [rewrite("b", "a", ["b"], [])],
        {"a": ("a",), "b": ("a",)},
        {"a": "kept", "b": "removed", "c": "kept"},
    ),
}


@pytest.mark.parametrize(("before", "after", "record", "partners", "statuses"), RECORDS.values(), ids=RECORDS.keys())
def test_alignment_by_record(
    before: Any, after: Any, record: list[Rewrite], partners: dict[str, tuple[str, ...]], statuses: dict[str, str]
) -> None:
    left, right = graph_of(*before), graph_of(*after)
    diff = fxopt.graphdiff.assemble(left, right, align.by_record(left, right, record), title="t", subject="s")
    sound(diff)
    found = {node.name: node for node in diff.before}
    assert {name: found[name].partners for name in partners} == partners
    assert {name: found[name].status for name in statuses} == statuses


def test_each_of_several_that_were_replaced_in_one_rewrite_leads_to_its_own_result() -> None:
    total = aten.add.Tensor
    left = graph_of(("a", SIN, ("x",)), ("b", COS, ("x",)), ("c", total, ("a", "b")))
    right = graph_of(("w", RELU, ("x",)), ("d", SIN, ("w",)), ("e", COS, ("w",)), ("c", total, ("d", "e")))
    record = Rewrite("p", "r", (("a", "d"), ("b", "e")), ("a", "b"), ("w", "d", "e"), ())
    found = align.by_record(left, right, [record])
    assert (found.became["a"], found.became["b"], found.became["c"]) == (("d",), ("e",), ("c",))
    assert [(group.before, group.after) for group in found.groups] == [(("a", "b"), ("w", "d", "e"))]


def test_what_nobody_recorded_names_the_normal_form() -> None:
    left, right = graph_of(("a", SIN, ("x",)), ("b", RELU, ("a",))), graph_of(("b", RELU, ("x",)))
    diff = fxopt.graphdiff.assemble(left, right, align.by_record(left, right, []), title="t", subject="s")
    assert diff.groups[0].by == (align.NORMAL_FORM,)
    changed = next(node for node in diff.after if node.name == "b")
    assert changed.changes == ("argument self: a -> x",)


# -- two graphs ------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.bn = nn.BatchNorm2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv(x))) + 1


def traced() -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(Small().eval())


def edited(edit: Callable[[fx.GraphModule], object]) -> fx.GraphModule:
    module = traced()
    edit(module)
    module.recompile()
    return module


def node_of(module: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in module.graph.nodes if node.name == name)


def _other_weights(module: fx.GraphModule) -> None:
    with torch.no_grad():
        module.conv.weight.add_(1)


EDITS: dict[str, tuple[Callable[[fx.GraphModule], object], dict[str, str], tuple[str, ...]]] = {
    "equal graphs are kept, weights compared by value": (lambda module: None, {}, ()),
    "another operator is a change": (
        lambda module: setattr(node_of(module, "relu"), "target", torch.sigmoid),
        {"relu": "changed"},
        ("operator: relu -> sigmoid",),
    ),
    "another number is a change": (
        lambda module: node_of(module, "add").update_arg(1, 1.0),
        {"add": "changed"},
        ("argument 1: 1 -> 1.0",),
    ),
    "other weights of a module are a change": (_other_weights, {"conv": "changed"}, ("weights: weight",)),
    "another module is a change": (
        lambda module: setattr(module, "bn", nn.Identity()),
        {"bn": "changed"},
        (" -> Identity()",),
    ),
}


@pytest.mark.parametrize(("edit", "statuses", "changes"), EDITS.values(), ids=EDITS.keys())
def test_two_graphs_by_name(
    edit: Callable[[fx.GraphModule], object], statuses: dict[str, str], changes: tuple[str, ...]
) -> None:
    diff = fxopt.diff(traced(), edited(edit))
    sound(diff)
    assert {node.name: node.status for node in diff.before if node.status != "kept"} == statuses
    found = [text for node in diff.after for text in node.changes]
    assert all(text.endswith(end) for text, end in zip(found, changes, strict=True)), found
    assert set(diff.alignment) == {"name", "place"}


def test_torch_fx_own_fusion_is_drawn_too() -> None:
    model = Small().eval()
    diff = fxopt.diff(fx.symbolic_trace(model), fuse(copy.deepcopy(model)))
    sound(diff)
    assert next(node for node in diff.before if node.name == "bn").modules == ("bn",)
    assert {node.name: node.status for node in diff.before} == {
        "x": "kept",
        "conv": "changed",
        "bn": "removed",
        "relu": "changed",
        "add": "kept",
        "output": "kept",
    }


def test_where_both_have_origins_these_tell_and_not_the_names() -> None:
    model = Small().eval()
    left = fxopt.trace(model)
    right = fxopt.compile(model).fused_graph
    diff = fxopt.diff(left, right)
    sound(diff)
    assert said(diff) == ["- conv2d", "- batch_norm", "- relu", "+ fxopt.convolution", "= add"]
    assert diff.groups[0].before == ("conv2d", "batch_norm", "relu")
    assert diff.alignment["origin"] == 1


def test_both_front_ends_give_graphs_that_align_by_module() -> None:
    model = Small().eval()
    diff = fxopt.diff(fxopt.trace(model), fxopt.trace(model, (torch.randn(2, 2, 4, 4),)))
    sound(diff)
    assert (diff.counts()["removed"], diff.counts()["added"]) == (0, 0)
    assert {node.evidence for node in diff.before if node.compute and node.modules} == {"origin"}


def with_origins(module: fx.GraphModule, **modules: str) -> fx.GraphModule:
    for node in module.graph.nodes:
        if node.name in modules:
            node.meta["origin"] = (ir.Origin(modules[node.name]),)
    return module


def test_nodes_of_one_name_but_different_origins_are_not_the_same() -> None:
    left = with_origins(graph_of(("a", SIN, ("x",))), a="first")
    right = with_origins(graph_of(("a", SIN, ("x",))), a="second")
    assert said(fxopt.diff(left, right)) == ["- sin", "~ output", "+ sin"]


def test_of_several_nodes_of_one_origin_only_those_that_names_tell_apart_are_paired() -> None:
    steps = [("a", SIN, ("x",)), ("b", SIN, ("a",)), ("c", SIN, ("b",))]
    left = with_origins(graph_of(*steps), a="m", b="m", c="m")
    right = with_origins(graph_of(("b", SIN, ("x",)), ("d", SIN, ("b",))), b="m", d="m")
    found = {node.name: node for node in fxopt.diff(left, right).before}
    assert (found["b"].status, found["b"].evidence) == ("changed", "origin")
    assert found["a"].status == found["c"].status == "removed"


def test_graphs_without_a_module_are_compared_by_what_they_are() -> None:
    graph = fx.Graph()
    graph.output(graph.call_function(torch.add, (graph.placeholder("x"), graph.get_attr("weight"))))
    diff = fxopt.diff(graph, copy.deepcopy(graph))
    sound(diff)
    assert diff.counts()["kept"] == 3


@pytest.mark.parametrize("wrong", [nn.ReLU(), None, "graph"], ids=["a module", "nothing", "a name"])
def test_what_is_no_graph_is_refused_with_what_to_give_instead(wrong: Any) -> None:
    with pytest.raises(fxopt.UsageError, match=r"(?s)two torch.fx graphs.*fused_graph"):
        fxopt.diff(wrong, fx.Graph())
