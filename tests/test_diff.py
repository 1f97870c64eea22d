"""The before/after diff as data: what is kept, changed, removed and added, and on what evidence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse

import fxopt
from fxopt import align, ir
from fxopt.graphdiff import GraphDiff
from fxopt.journal import Rewrite

aten = torch.ops.aten


class Residual(nn.Module):
    """One ResNet block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv(x)) + x)


def compiled(*layers: nn.Module, **options: Any) -> fxopt.CompiledModule:
    """A chain of layers on a small image, compiled with it, so that every shape is known."""
    return fxopt.compile(nn.Sequential(*layers).eval(), (torch.randn(2, 4, 6, 6),), **options)


def said(diff: GraphDiff) -> list[str]:
    """A diff as lines: a sign and an operator each, before nodes first."""
    signs = {"removed": "-", "added": "+", "changed": "~", "kept": "="}
    before = [f"{signs[node.status]} {node.operator}" for node in diff.before if node.status != "kept"]
    return [*before, *(f"{signs[node.status]} {node.operator}" for node in diff.after if node.compute)]


def sound(diff: GraphDiff) -> None:
    """What holds for every diff: names lead somewhere, partners are mutual, every change is in one group."""
    sides = [{node.name: node for node in side} for side in (diff.before, diff.after)]
    for number, side in enumerate(sides):
        for node in side.values():
            assert {name for _, name in node.inputs} <= side.keys(), node
            assert set(node.partners) <= sides[1 - number].keys(), node
            for partner in node.partners:
                assert node.name in sides[1 - number][partner].partners
            groups = [group for group in diff.groups if node.name in (group.before, group.after)[number]]
            assert len(groups) == (node.status in ("removed", "added")), node
            assert bool(node.changes) == (node.status == "changed")
    assert sum(diff.counts().values()) == len(diff.after) + diff.counts()["removed"]


# -- what compiling did ----------------------------------------------------------------------------------------------

CONV, NORM = (lambda: nn.Conv2d(4, 4, 3)), (lambda: nn.BatchNorm2d(4))

MODELS: dict[str, tuple[Callable[[], Iterable[nn.Module]], list[str]]] = {
    "a convolution, norm and activation become one node": (
        lambda: (CONV(), NORM(), nn.ReLU()),
        ["- conv2d", "- batch_norm", "- relu", "+ fxopt.convolution"],
    ),
    "a norm folded into a convolution replaces both by one": (
        lambda: (CONV(), NORM()),
        ["- conv2d", "- batch_norm", "+ conv2d"],
    ),
    "what no pass touches is kept": (lambda: (nn.MaxPool2d(2), nn.Sigmoid()), ["= max_pool2d", "= sigmoid"]),
    "a dropped identity is removed, and its reader kept": (
        lambda: (nn.Sigmoid(), nn.Dropout(), nn.Tanh()),
        ["- dropout", "= sigmoid", "= tanh"],
    ),
    "a residual sum is part of the fused node": (
        lambda: (Residual(),),
        ["- conv2d", "- batch_norm", "- add", "- relu", "+ fxopt.convolution"],
    ),
}


@pytest.mark.parametrize(("layers", "expected"), MODELS.values(), ids=MODELS.keys())
def test_statuses(layers: Callable[[], Iterable[nn.Module]], expected: list[str]) -> None:
    diff = compiled(*layers()).diff()
    sound(diff)
    assert said(diff) == expected
    assert set(diff.alignment) == {"record"}


def test_a_fused_layer_is_one_group_with_the_steps_that_made_it() -> None:
    diff = compiled(CONV(), NORM(), nn.ReLU(), nn.Dropout()).diff()
    fused, dropped = diff.groups
    assert (len(fused.before), len(fused.after)) == (3, 1)
    assert fused.by == (("fold-batchnorm", "norm-after-layer"), ("fuse-conv-activation", "activation"))
    assert dropped.by == (("drop-identities", "identity"),)
    dropout = next(node for node in diff.before if node.operator == "dropout")
    assert dropout.partners == fused.after, "what is read in place of the dropout"


def test_parameters_belong_to_their_reader() -> None:
    diff = compiled(CONV(), NORM()).diff()
    assert not any(node.kind == "get_attr" for node in (*diff.before, *diff.after))
    convolution = next(node for node in diff.after if node.operator == "conv2d")
    assert [(entry.argument, entry.path, entry.value) for entry in convolution.parameters] == [
        ("weight", "0.weight_folded", "f32[4, 4, 3, 3]"),
        ("bias", "0.bias_folded", "f32[4]"),
    ]
    assert convolution.modules == ("0", "1")


def test_a_kept_node_says_why_it_was_left() -> None:
    diff = compiled(nn.MaxPool2d(2)).diff()
    pool = next(node for node in diff.after if node.operator == "max_pool2d")
    assert ("drop-identities", "identity", "it pools") in pool.declined


def test_json_there_and_back_is_the_same_diff() -> None:
    diff = compiled(CONV(), NORM(), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2)).diff()
    plain = json.loads(json.dumps(diff.to_dict()))
    assert plain == diff.to_dict()
    assert GraphDiff.from_dict(plain) == diff
    assert plain["counts"] == {"removed": 4, "added": 1, "changed": 0, "kept": 3}
    assert plain["operators"]["batch_norm"] == [1, 0]
    with pytest.raises(fxopt.UsageError, match="not a diff"):
        GraphDiff.from_dict({"format": "something else"})


def test_it_prints_as_a_summary() -> None:
    text = str(compiled(CONV(), NORM(), nn.ReLU()).diff())
    assert "3 -> 1 nodes; 3 removed, 1 added, 0 changed, 2 kept" in text
    assert "batch_norm: 1 -> 0" in text


# -- without shapes --------------------------------------------------------------------------------------------------


def test_before_the_first_call_it_says_what_waits_for_shapes() -> None:
    fast = fxopt.compile(nn.Sequential(CONV(), NORM(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval())
    diff = fast.diff()
    sound(diff)
    assert said(diff)[:4] == ["- conv2d", "- batch_norm", "- relu", "+ fxopt.convolution"]
    assert all(node.value == "" for node in diff.before)


def test_after_the_first_call_both_sides_have_its_shapes() -> None:
    fast = fxopt.compile(nn.Sequential(Residual(), nn.Flatten(), nn.Linear(144, 2)).eval())
    fast(torch.randn(2, 4, 6, 6))
    diff = fast.diff()
    sound(diff)
    assert said(diff)[-3:] == ["+ fxopt.convolution", "= flatten", "= linear"]
    assert all(node.value for side in (diff.before, diff.after) for node in side if node.kind != "output")


def test_a_model_that_waits_for_its_first_call_has_no_graph_yet() -> None:
    class Branches(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin() if x.shape[0] > 1 else x.cos()

    with pytest.warns(fxopt.FxoptNotice):
        diff = fxopt.compile(Branches()).diff()
    assert any("no graph yet" in note for note in diff.notes)


# -- one pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param(
            "fold-batchnorm",
            ["- conv2d", "- batch_norm", "+ conv2d", "= relu", "= dropout"][:4],
            id="folding shows the norm go, and the activation stay",
        ),
        pytest.param(
            "fuse-conv-activation",
            ["- conv2d", "- relu", "+ fxopt.convolution"],
            id="fusing starts from the folded convolution",
        ),
        pytest.param("eliminate-dead-code", ["= fxopt.convolution"], id="a pass without work keeps everything"),
        pytest.param(
            "onednn-convolution",
            ["- fxopt.convolution", "+ contiguous", "+ mkldnn._convolution_pointwise"],
            id="a lowering pass starts from the rewritten graph",
        ),
    ],
)
def test_one_pass(name: str, expected: list[str]) -> None:
    diff = compiled(CONV(), NORM(), nn.ReLU(), nn.Dropout(), backend="onednn").diff(name)
    sound(diff)
    assert said(diff) == expected
    assert name in diff.subject
    assert not any("run again" in note for note in diff.notes)
    assert {step[0] for group in diff.groups for step in group.by} <= {name}


def test_one_pass_of_a_traced_model_is_shown_with_the_shapes_of_its_call() -> None:
    fast = fxopt.compile(nn.Sequential(Residual()).eval())
    fast(torch.randn(2, 4, 6, 6))
    diff = fast.diff("fuse-conv-activation")
    sound(diff)
    assert said(diff) == ["- conv2d", "- add", "- relu", "+ fxopt.convolution"]


@pytest.mark.parametrize("shapes", ["known when compiled", "known by a call"])
@pytest.mark.parametrize("name", [None, "fold-batchnorm", "fuse-conv-activation", "onednn-convolution"], ids=str)
def test_a_copy_is_drawn_like_the_original(name: str | None, shapes: str) -> None:
    model, x = nn.Sequential(Residual(), nn.Flatten()).eval(), torch.randn(2, 4, 6, 6)
    fast = fxopt.compile(model, (x,) if shapes == "known when compiled" else None, backend="onednn")
    fast(x)
    diff = copy.deepcopy(fast).diff(name)
    sound(diff)
    assert said(diff) == said(fast.diff(name))
    assert not any("run again" in note for note in diff.notes)


def test_a_pass_that_failed_changed_nothing_and_is_named() -> None:
    def broken(rewriter: fxopt.Rewriter) -> None:
        raise ValueError("no good")

    fast = compiled(CONV(), NORM(), passes=("fold-batchnorm", fxopt.Pass("broken", run=broken)))
    diff = fast.diff("broken")
    assert diff.counts() == {"removed": 0, "added": 0, "changed": 0, "kept": 3}
    assert any("broken was failed" in note and "no good" in note for note in diff.notes)


def test_a_pass_that_does_otherwise_when_run_again_is_told() -> None:
    done: list[str] = []

    def once(rewriter: fxopt.Rewriter) -> None:
        for node in list(rewriter.graph.nodes):
            if node.target is aten.relu.default and not done:
                done.append(node.name)
                rewriter.substitute(node, lambda node=node: rewriter.call(aten.relu.default, node.args[0]), rule="r")

    diff = compiled(nn.ReLU(), passes=(fxopt.Pass("once", run=once),)).diff("once")
    assert any("0 rewrites; when compiled, 1" in note for note in diff.notes)


def test_an_unknown_pass_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(fxopt.UsageError, match=r"(?s)'folding'.*fold-batchnorm"):
        compiled(CONV()).diff("folding")


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
