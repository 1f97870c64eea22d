"""`fxopt verify --data` and `fxopt bench --data`: a DataLoader in the place of shapes, of every kind of batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import IMAGE, Ran, command_line

NET = """
import random

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

IMAGES, LABELS = torch.linspace(-1, 1, 10 * 48).view(10, 3, 4, 4), torch.arange(10) % 5

def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)).eval()

class Named(nn.Module):
    def forward(self, pixels, *, scale):
        return torch.relu(pixels * scale)

class Stream(IterableDataset):
    def __iter__(self):
        yield from IMAGES

class Drawn(TensorDataset):
    def __getitem__(self, index):
        return random.random() + IMAGES[index]

def tuples():
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)

def workers():
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4, shuffle=True, num_workers=1)

def tensors():
    return DataLoader(IMAGES, batch_size=4)

def dicts():
    scales = [torch.tensor([[[2.0]]])] * 10
    rows = [{"pixels": x, "scale": scale, "label": label} for x, scale, label in zip(IMAGES, scales, LABELS)]
    return DataLoader(rows, batch_size=4)

def stream():
    return DataLoader(Stream(), batch_size=4)

def drawn():
    return DataLoader(Drawn(IMAGES), batch_size=4)

def nothing():
    return DataLoader(TensorDataset(IMAGES[:0]))

def once():
    return iter(tuples())

def number():
    return 7

def texts():
    return DataLoader([{"text": "a"}, {"text": "b"}])
"""


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Ran]]:
    with command_line(tmp_path, monkeypatch, capfd, loaded=NET) as command:
        yield command


KINDS = {
    "tuples that end in labels": ("build", "tuples"),
    "of workers, shuffled": ("build", "workers"),
    "tensors": ("build", "tensors"),
    "dicts with labels": ("Named", "dicts"),
    "a stream without a length": ("build", "stream"),
}


@pytest.mark.parametrize(("model", "data"), KINDS.values(), ids=KINDS)
def test_verify_compares_on_every_batch_and_compiles_for_the_first(run: Any, model: str, data: str) -> None:
    ran: Ran = run("verify", f"loaded.py:{model}", "--data", f"loaded.py:{data}", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["count"] == 3
    assert ran.json["inputs"][0] == "4x3x4x4" if model == "build" else "pixels=4x3x4x4"


def test_limit_is_how_many_batches(run: Any) -> None:
    ran = run("verify", "loaded.py:build", "--data", "loaded.py:tuples", "--limit", "2")
    assert "verified on 2 batches" in ran.out
    assert "taken for labels" in ran.out


def test_verify_tells_its_progress(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    told: list[tuple[str, int, int]] = []

    @contextmanager
    def progress() -> Iterator[Callable[..., None]]:
        yield lambda *step: told.append(step)

    monkeypatch.setattr("fxopt.cli.commands.progress", progress)
    run("verify", "loaded.py:build", "--data", "loaded.py:tuples")
    assert [step for step in told if step[0] == "verify"] == [("verify", 0, 3), ("verify", 1, 3), ("verify", 2, 3)]


@pytest.mark.parametrize("command", ["verify", "bench"])
@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        pytest.param("nothing", 2, "the data has no batches", id="nothing in it"),
        pytest.param("number", 2, "not int", id="no DataLoader"),
        pytest.param("once", 2, "can be read only once", id="an iterator"),
        pytest.param("missing", 2, "has no 'missing'", id="no such function"),
        pytest.param("texts", 2, "forward has no such parameter: text", id="keys that the model does not take"),
    ],
)
def test_data_that_is_refused(run: Any, command: str, data: str, code: int, said: str) -> None:
    ran = run(command, "loaded.py:build", "--data", f"loaded.py:{data}")
    assert (ran.code, ran.out) == (code, "")
    assert said in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(("verify", "loaded.py:build", *IMAGE), "--shape", id="verify: shapes"),
        pytest.param(("verify", "loaded.py:build", "--input", "net.py"), "--input", id="verify: a picture"),
        pytest.param(("verify", "loaded.py:build", "--batches", "4"), "--batches", id="verify: random batches"),
        pytest.param(("bench", "loaded.py:build", *IMAGE), "--shape", id="bench: shapes"),
        pytest.param(("bench", "loaded.py:build@2x3x8x8"), "MODEL@SHAPE", id="bench: a model's own shapes"),
        pytest.param(("bench", "loaded.py:build", "--batch", "1,8"), "--batch", id="bench: batch sizes"),
    ],
)
def test_what_the_data_says_already_is_not_said_again(run: Any, arguments: tuple[str, ...], said: str) -> None:
    ran = run(*arguments, "--data", "loaded.py:tuples")
    assert ran.code == 2
    assert f"--data does not go with {said}" in ran.err


def test_a_limit_is_of_data(run: Any) -> None:
    ran = run("verify", "loaded.py:build", *IMAGE, "--limit", "2")
    assert ran.code == 2
    assert "--batches is how many random ones" in ran.err


QUICK = ("--threads", "1", "--rounds", "1", "--calls", "1", "--pause", "0", "--json")


@pytest.mark.parametrize(
    ("model", "data", "inputs"),
    [
        pytest.param("build", "workers", ["4x3x4x4"], id="a loader with workers, without its labels"),
        pytest.param("Named", "dicts", ["pixels=4x3x4x4", "scale=4x1x1x1"], id="dicts"),
        pytest.param("build", "drawn", ["4x3x4x4"], id="what is drawn anew in each process"),
    ],
)
def test_bench_runs_the_first_batch_in_every_process(run: Any, model: str, data: str, inputs: list[str]) -> None:
    ran = run("bench", f"loaded.py:{model}", "--data", f"loaded.py:{data}", *QUICK, "--output", "results.json")
    assert ran.code == 0, ran.err
    (found,) = ran.json["benchmarks"]
    assert found["inputs"] == inputs
    (kept,) = json.loads(Path("results.json").read_text())["benchmarks"]
    assert kept["request"]["data"] == f"loaded.py:{data}"
