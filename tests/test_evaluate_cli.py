"""`fxopt evaluate`: the table, JSON, and an exit code for a model that lost too much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import fxopt
from command_line import Ran, command_line
from fxopt.evaluation.evaluate import Evaluation, Score

NET = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def build():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 7))

def data():
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(50, 5), torch.randint(0, 7, (50,))), batch_size=16)

def nothing():
    return []
"""


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ran]]:
    with command_line(tmp_path, monkeypatch, capsys, scored=NET) as command:
        yield command


def test_the_table(run: Any) -> None:
    ran: Ran = run("evaluate", "scored.py:build", "--data", "scored.py:data", "--max-drop", "0")
    assert ran.code == 0, ran.err
    assert "50 examples" in ran.out
    assert all(name in ran.out for name in ("top-1", "top-5", "agreement", "cross_entropy", "hinge", "kl"))


def test_json_of_what_was_asked_for(run: Any) -> None:
    ran = run("evaluate", "scored.py:build", "--data", "scored.py:data", "--loss", "hinge", "--limit", "2", "--json")
    assert ran.json["examples"] == 32
    assert list(ran.json["scores"]) == ["top-1", "top-5", "agreement", "hinge"]
    assert ran.json["ok"] is True


def test_too_large_a_drop_fails(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    worse = Evaluation(50, (Score("top-1", 0.5, 0.48, -0.02, (-0.05, 0.01)),))
    monkeypatch.setattr("fxopt.cli.evaluate.evaluate", lambda *args, **options: worse)
    arguments = ("evaluate", "scored.py:build", "--data", "scored.py:data")
    assert run(*arguments, "--max-drop", "0.02").code == 0
    ran = run(*arguments, "--max-drop", "0.01")
    assert ran.code == 1
    assert "top-1 dropped by 0.02, and --max-drop is 0.01" in ran.err
    assert run(*arguments).code == 0, "without a bound nothing fails"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param([], "Missing option '--data'", id="no data"),
        pytest.param(["--data", "scored.py:nothing"], "the data has no examples", id="nothing in it"),
        pytest.param(["--data", "scored.py:missing"], "has no 'missing'", id="no such function"),
    ],
)
def test_usage(run: Any, arguments: list[str], said: str) -> None:
    ran = run("evaluate", "scored.py:build", *arguments)
    assert ran.code == 2
    assert said in ran.err


def test_it_is_public() -> None:
    assert fxopt.evaluate.__module__ == "fxopt.evaluation.evaluate"
