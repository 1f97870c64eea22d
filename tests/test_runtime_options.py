"""The options of a compiled module, and what it shows: report, explanations, graphs."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import fxopt
from convnets import assert_close, compiled_by, convnet, front_ends, image
from fxopt import plugins

pytestmark = pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice")


# -- options ---------------------------------------------------------------------------------------------------------


@front_ends
def test_bitwise_gives_the_same_bits(front_end: str) -> None:
    model = convnet()
    compiled = compiled_by(front_end, model, numerics="bitwise")
    for batch in (2, 1, 5):
        given = image(batch)
        assert torch.equal(compiled(given), model(given))
    assert compiled.report.backend == "aten"
    assert any("same bits" in notice for notice in compiled.report.notices)
    skipped = {result.name for result in compiled.report.passes if result.status == "skipped"}
    assert "fold-batchnorm" in skipped
    assert skipped == {result.name for result in compiled.report.passes if result.numerics != "bitwise"}


@front_ends
@pytest.mark.parametrize("verify", [True, False, "each"])
@pytest.mark.parametrize("backend", ["aten", "onednn", "auto"])
def test_every_backend_and_way_of_verifying(front_end: str, verify: Any, backend: str) -> None:
    model = convnet()
    compiled = compiled_by(front_end, model, verify=verify, backend=backend)
    for batch in (2, 1):
        given = image(batch)
        assert_close(compiled(given), model(given))
    assert compiled.report.backend == ("onednn" if backend == "auto" else backend)
    assert (compiled.report.verdict is None) is (verify is False)


def test_verify_each_judges_every_pass_that_did_something() -> None:
    report = fxopt.compile(convnet(), (image(),), verify="each").report
    judged = {result.name for result in report.passes if result.verdict is not None}
    assert judged == {result.name for result in report.passes if result.rewrites}


def test_disabled_passes_do_not_run() -> None:
    compiled = fxopt.compile(convnet(), (image(),), disable=("fold-batchnorm",))
    assert "fold-batchnorm" not in {result.name for result in compiled.report.passes}
    assert "batch_norm" in str(compiled.fused_graph.graph)


def test_chosen_passes_run_in_their_order() -> None:
    fold = plugins.named("fold-batchnorm")
    compiled = fxopt.compile(convnet(), (image(),), passes=["eliminate-dead-code", fold])
    assert [result.name for result in compiled.report.passes] == ["eliminate-dead-code", "fold-batchnorm"]


def test_progress_is_told() -> None:
    said: list[tuple[str, int, int]] = []
    fxopt.compile(convnet(), (image(),), progress=lambda *step: said.append(step))
    assert said[-1][0] == "done"
    assert all(0 <= done <= total for _, done, total in said)


# -- looking ---------------------------------------------------------------------------------------------------------


@front_ends
def test_the_report_prints_and_is_json(front_end: str) -> None:
    compiled = compiled_by(front_end, convnet())
    compiled(image())
    text, said = str(compiled.report), json.loads(json.dumps(compiled.report.to_dict()))
    for name in ("fold-batchnorm", "fuse-conv-activation", "onednn-convolution", "verified"):
        assert name in text
    assert said["nodes"]["before"] > said["nodes"]["after"]
    assert {entry["name"] for entry in said["passes"]} >= {"fold-batchnorm", "eliminate-dead-code"}
    assert said["verdict"]["ok"] is True


@front_ends
@pytest.mark.parametrize(
    ("layer", "words"),
    [
        pytest.param("norm", ["fold-batchnorm", "batch_norm"], id="a norm that was folded"),
        pytest.param("conv", ["fold-batchnorm", "is:"], id="the convolution that it was folded into"),
        pytest.param("skip", ["fuse-conv-activation", "fxopt.convolution"], id="a convolution that took the residual"),
        pytest.param("head", ["linear"], id="a layer that nothing was done to"),
        pytest.param("pool", ["adaptive_avg_pool2d"], id="a layer that no pass knows"),
    ],
)
def test_explain_tells_the_story_of_a_layer(front_end: str, layer: str, words: list[str]) -> None:
    compiled = compiled_by(front_end, convnet())
    compiled(image())
    explanation = compiled.explain(layer)
    for word in words:
        assert word in str(explanation)
    assert ".py:" in str(explanation), "the user's line is not told"
    json.dumps(explanation.to_dict())


@front_ends
def test_explain_says_why_a_layer_was_declined(front_end: str) -> None:
    model = convnet()
    model.norm.running_var[0] = float("inf")
    model.norm.weight.data[1] = float("nan")
    compiled = compiled_by(front_end, model)
    compiled(image())
    assert "NaN or infinity" in str(compiled.explain("norm"))


@pytest.mark.parametrize(("name", "near"), [("hed", "head"), ("layer1.conv", "conv"), ("nrom", "norm")])
def test_explain_of_an_unknown_name_gives_the_nearest(name: str, near: str) -> None:
    with pytest.raises(fxopt.UsageError, match=f"no layer or node named '{name}'") as caught:
        fxopt.compile(convnet(), (image(),)).explain(name)
    assert near in str(caught.value)


@front_ends
def test_the_graphs_are_modules_that_run(front_end: str) -> None:
    model = convnet()
    compiled = compiled_by(front_end, model)
    given = image()
    compiled(given)
    for graph in (compiled.captured_graph, compiled.fused_graph, compiled.graph_module):
        assert_close(graph(given), model(given))
    assert "fxopt" in str(compiled.fused_graph.graph)
    assert "fxopt" not in str(compiled.graph_module.graph)
