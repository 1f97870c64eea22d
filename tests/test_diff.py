"""The before/after diff of a compiled model: what is kept, changed, removed and added, and by which pass."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from diffs import said, sound
from fxopt.graphdiff import GraphDiff

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
        pytest.param("merge-siblings", ["= fxopt.convolution"], id="a pass without work keeps everything"),
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
    assert said(diff) == ["- conv2d", "- relu", "+ fxopt.convolution"]  # the residual is in the kernel already


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
