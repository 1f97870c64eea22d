"""`fxopt bench` as somebody types it: models and their inputs, JSON, a file that later runs add to, exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fxopt
from fxopt import cli
from fxopt.bench import Benchmark, Timing
from fxopt.bench.result import Settings
from fxopt.cli import bench
from fxopt.models import Example, Shape, load_model

NET = """
import torch
from torch import nn

def plain():
    print("printed by the model")
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

def with_inputs():
    return nn.ReLU(), (torch.arange(6.0).reshape(3, 2),)

def with_names():
    return nn.Softmax(-1), (), {"input": torch.zeros(3, 2)}

def odd():
    return nn.ReLU(), 7

def raises():
    raise RuntimeError("no weights here")
"""

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command line in a folder that has net.py; exit code, standard output, standard error."""
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = sys.modules.pop("net", None)

    def command(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = cli.run(["bench", *arguments])
        return (code, *capfd.readouterr())

    yield command
    sys.modules.pop("net", None)
    if known is not None:
        sys.modules["net"] = known


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Example, Settings, tuple[str, ...]]]:
    """What was to be measured; nothing is. eager takes 2 s and fxopt 1 s."""
    asked = []

    def benchmark(
        example: Example, *, name: str, against: tuple[str, ...], progress: Any, **settings: Any
    ) -> Benchmark:
        if name.endswith("raises"):
            raise fxopt.UsageError("no weights here")
        asked.append((example, Settings(**settings), against))
        status = "wrong" if name.endswith("odd") else "ok"
        timings = Timing("eager", "ok", "", (2.0,)), Timing("fxopt", status, "", (1.0,), error=0.0)
        return Benchmark(name, (f"{example.batch or 1}x3",), Settings(**settings), {}, timings)

    monkeypatch.setattr(bench, "benchmark", benchmark)
    return asked


def test_a_model_is_measured_in_processes(run: Run) -> None:
    quick = ("--threads", "1", "--rounds", "2", "--calls", "1", "--pause", "0")
    code, out, err = run("net.py:plain@2x3x8x8", *quick, "--json", "--chart", "chart.svg")
    data = json.loads(out, parse_constant=pytest.fail)
    assert code == 0
    assert [line["status"] for line in data["benchmarks"][0]["runtimes"]] == ["ok", "ok"]
    assert data["benchmarks"][0]["inputs"] == ["2x3x8x8"]
    assert "printed by the model" in err
    assert "building fxopt" in err
    assert Path("chart.svg").read_text().startswith("<svg")


def test_every_combination_is_measured(run: Run, measured: list[Any]) -> None:
    code, out, _ = run("net.py:plain", "net.py:with_inputs", "--batch", "1,8", "--threads", "1,2", "--rounds", "3")
    assert code == 0
    assert [(example.batch, settings.threads) for example, settings, _ in measured] == 2 * [
        (1, 1),
        (1, 2),
        (8, 1),
        (8, 2),
    ]
    assert {settings.rounds for _, settings, _ in measured} == {3}
    assert out.count("Geometric means over 2 models") == 4


@pytest.mark.parametrize(
    ("arguments", "shapes", "default"),
    [
        pytest.param(("net.py:plain",), [], ["1x3x224x224"], id="an image, if the function gives nothing"),
        pytest.param(("net.py:plain", "--shape", "1x5"), ["1x5"], [], id="one for all"),
        pytest.param(("net.py:plain@2x7,mask=2x1:bool", "--shape", "1x5"), ["2x7", "mask=2x1:bool"], [], id="its own"),
    ],
)
def test_shapes(run: Run, measured: list[Any], arguments: Any, shapes: list[str], default: list[str]) -> None:
    run(*arguments)
    example = measured[0][0]
    assert (list(map(str, example.shapes)), list(map(str, example.default))) == (shapes, default)


def test_results_are_kept_and_not_measured_again(run: Run, measured: list[Any]) -> None:
    kept = ("--output", "results.json", "--threads", "1")
    run("net.py:plain", *kept)
    run("net.py:plain", "net.py:with_inputs", *kept)
    assert [example.name for example, *_ in measured] == ["net.py:plain", "net.py:with_inputs"]
    assert [entry["model"] for entry in json.loads(Path("results.json").read_text())["benchmarks"]] == [
        "net.py:plain", "net.py:with_inputs",
    ]  # fmt: skip
    run("net.py:plain", *kept, "--again")
    run("net.py:plain", *kept, "--rounds", "9")
    run("net.py:plain", *kept, "--against", "jit")
    assert len(measured) == 5
    assert len(json.loads(Path("results.json").read_text())["benchmarks"]) == 4


def test_a_model_that_fails_does_not_stop_the_others(run: Run, measured: list[Any]) -> None:
    code, out, err = run("net.py:raises", "net.py:plain", "--json")
    data = json.loads(out)
    assert code == 2
    assert [entry["model"] for entry in data["benchmarks"]] == ["net.py:plain"]
    assert [entry["message"] for entry in data["failures"]] == ["no weights here"]
    assert "no weights here" in err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        pytest.param(("net.py:odd",), 1, "", id="1: fxopt gives another answer"),
        pytest.param((), 2, "Missing argument", id="2: no model"),
        pytest.param(("net.py",), 2, "names no model", id="2: a model without a factory"),
        pytest.param(("net.py:plain@3y4",), 2, "is no shape", id="2: a shape"),
        pytest.param(("net.py:plain", "--against", "none"), 2, "no runtime is named", id="2: a runtime"),
        pytest.param(("net.py:plain", "--batch", "0"), 2, "whole numbers", id="2: a batch of none"),
        pytest.param(("net.py:plain", "--threads", "x"), 2, "whole numbers", id="2: threads"),
        pytest.param(("net.py:plain", "--chart", "c.bmp"), 2, "is not saved as", id="2: a suffix"),
        pytest.param(("net.py:plain", "--chart", "none/c.svg"), 2, "there is no folder", id="2: a chart's folder"),
        pytest.param(("net.py:plain", "--output", "none/r.json"), 2, "there is no folder", id="2: a file's folder"),
        pytest.param(("net.py:plain", "--output", "net.py"), 2, "no file of fxopt bench", id="2: another file"),
        pytest.param(("net.py:raises",), 2, "no weights here", id="2: what benchmark raises"),
    ],
)
def test_exit_codes(run: Run, measured: list[Any], arguments: tuple[str, ...], code: int, said: str) -> None:
    found, out, err = run(*arguments)
    assert found == code
    assert said in err
    as_json, out, _ = run(*arguments, "--json")
    assert as_json == code
    assert said in json.dumps(json.loads(out))


# -- models with inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        pytest.param(Example("net.py:with_inputs"), [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], id="its own"),
        pytest.param(Example("net.py:with_inputs", batch=1), [[0.0, 1.0]], id="fewer rows"),
        pytest.param(
            Example("net.py:with_inputs", batch=4), [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [0.0, 1.0]], id="more rows"
        ),
        pytest.param(Example("net.py:with_names", batch=1), [[0.0, 0.0]], id="by name"),
    ],
)
def test_a_function_gives_its_inputs(run: Run, example: Example, expected: list[list[float]]) -> None:
    _, args, kwargs = example()
    assert [*args, *kwargs.values()][0].tolist() == expected


def test_shapes_go_before_a_function_s_inputs(run: Run) -> None:
    image, ids, other = Shape.parse("2x3"), Shape.parse("ids=2x4:int64"), Shape.parse("5")
    _, args, kwargs = Example("net.py:with_inputs", (image, other, ids), batch=7)()
    assert [tuple(value.shape) for value in args] == [(7, 3), (5,)]
    assert kwargs["ids"].shape == (7, 4)
    assert Example("net.py:plain", default=(image,))()[1][0].shape == (2, 3)


def test_the_other_commands_take_the_model_alone(run: Run) -> None:
    assert isinstance(load_model("net.py:with_inputs"), torch.nn.ReLU)


def test_what_is_no_model_with_inputs(run: Run) -> None:
    with pytest.raises(fxopt.UsageError, match="no model with its inputs"):
        Example("net.py:odd")()


def test_norms_are_randomised_as_by_the_other_commands(run: Run) -> None:
    fresh = Example("net.py:plain", default=(Shape.parse("1x3x8x8"),))
    assert not fresh()[0][1].running_mean.any()
    assert replace(fresh, randomize_norms=True)()[0][1].running_mean.any()
