"""docs/tutorial.md: its program runs, what it claims is so, and the page shows the program as it is."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fxopt
from processes import needs_gloo
from test_docs import DOCS, blocks

pytestmark = [pytest.mark.slow, needs_gloo]

SCORES = ("top-1", "top-5", "cross_entropy", "hinge")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """docs/make_tutorial.py, imported; it has the program as `tutorial`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(DOCS)])
        yield importlib.import_module("make_tutorial")


@pytest.fixture(scope="module")
def tutorial(script: ModuleType) -> Any:
    """The program, as a module."""
    return script.tutorial


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the program runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("tutorial"))
        yield Path.cwd()


@pytest.fixture(scope="module")
def results(tutorial: Any, folder: Path) -> Iterator[Any]:
    """What all steps left."""
    threads = torch.get_num_threads()
    yield tutorial.main()
    torch.set_num_threads(threads)


def test_each_optimiser_and_each_loss_learns(results: Any, tutorial: Any) -> None:
    assert list(results.curves) == ["SGD", "Adagrad", "Adam", "hinge"]
    for name, curve in results.curves.items():
        assert curve[-1] < 0.1 * curve[0], name
    _, held_out = tutorial.split(tutorial.digits())
    assert tutorial.accuracy(results.model, held_out) > 0.95


def test_two_processes_train_what_one_does(results: Any) -> None:
    between, from_one = results.apart
    assert between == 0
    assert from_one < 1e-9


def test_original_and_compiled_agree_on_every_digit(results: Any, tutorial: Any) -> None:
    x, _ = tutorial.digits().tensors
    assert len(x) == results.evaluation.examples == 1797
    assert results.evaluation["agreement"].compiled == 1
    with torch.no_grad():
        assert torch.equal(results.fast(x).argmax(1), results.model(x).argmax(1))


@pytest.mark.parametrize("side", ["original", "compiled"])
def test_the_scores_are_scikit_learns(results: Any, tutorial: Any, side: str) -> None:
    expected = tutorial.by_scikit_learn(results.model if side == "original" else results.fast)
    assert {name: getattr(results.evaluation[name], side) for name in SCORES} == pytest.approx(expected, abs=1e-6)


def test_three_processes_find_the_numbers_of_one(folder: Path, results: Any) -> None:
    program = DOCS / "tutorial.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    command = ["-m", "fxopt", "evaluate", f"{program}:build", "--data", f"{program}:data", "--json"]
    ran = subprocess.run(
        [sys.executable, *torchrun, *command],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["examples"] == results.evaluation.examples
    for name in (*SCORES, "agreement"):
        assert found["scores"][name]["compiled"] == pytest.approx(results.evaluation[name].compiled, abs=1e-6), name


@pytest.mark.usefixtures("results")
def test_the_picture_names_the_fused_layers(folder: Path) -> None:
    page = (folder / "build" / "tutorial" / "graph.html").read_text(encoding="utf-8")
    for picture in (page, (DOCS / "images" / "tutorial.svg").read_text(encoding="utf-8")):
        for said in ("fxopt.convolution (residual, relu)", "fxopt.convolution (sigmoid)", "fxopt.buffer"):
            assert said in picture


def test_the_compiled_graph_is_fine_tuned_and_compiled_again(results: Any, tutorial: Any) -> None:
    before, after = results.accuracies
    assert before < 0.7
    assert after > 0.9
    assert isinstance(results.tuned, fxopt.CompiledModule)
    _, held_out = tutorial.split(tutorial.digits())
    assert tutorial.accuracy(results.model, held_out) > 0.95, "the original is left as it was"


def test_the_chart_names_each_curve_and_what_it_came_to(script: ModuleType) -> None:
    drawn = script.chart("a title", {"SGD": [2.0, 0.5], "Adam & co": [1.0, 0.3]})
    assert all(said in drawn for said in ("a title", "SGD 0.500", "Adam &amp; co 0.300", "SGD from 2.000 to 0.500"))


def test_the_page_shows_the_program_as_it_is(script: ModuleType) -> None:
    assert [text.strip() for _, text in blocks(script.PAGE, "python")] == [
        code for name, code in script.sections().items() if name != "all of it"
    ]


def test_the_page_says_what_is_left_of_the_graph(results: Any, script: ModuleType) -> None:
    report = results.fast.report
    assert f"operations: {report.before} -> {report.after}" in script.PAGE.read_text(encoding="utf-8")
