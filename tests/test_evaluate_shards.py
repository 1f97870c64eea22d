"""`fxopt.evaluate` in several processes: the numbers of one, each example counted once, errors in every process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, WeightedRandomSampler

import fxopt
from processes import found_by_all, needs_gloo
from test_evaluate import EXAMPLES, Net, Stream, examples, loader
from test_evaluate_cli import NET

pytestmark = needs_gloo


def few() -> DataLoader[Any]:
    x, labels = examples()
    return DataLoader(TensorDataset(x[:2], labels[:2]), batch_size=4)


def sampled(**options: Any) -> DataLoader[Any]:
    dataset = TensorDataset(*examples())
    sampler: Any = DistributedSampler(dataset, **options) if dist.is_initialized() else None
    return DataLoader(dataset, batch_size=16, sampler=sampler)


LOADERS: dict[str, Callable[[], Any]] = {
    "a DataLoader": loader,
    "one that shuffles": lambda: loader(shuffle=True),
    "a DistributedSampler": sampled,
    "a DistributedSampler that shuffles": lambda: sampled(shuffle=True, seed=4),
    "a stream": lambda: DataLoader(Stream(), batch_size=16),
    "a list": lambda: list(loader()),
    "fewer examples than processes": few,
}


def scores(data: Any, group: Any) -> dict[str, Any]:
    return fxopt.evaluate(Net(), Net(off=0.3).eval(), data, process_group=group).to_dict()


def out_of_range(rank: int) -> Any:
    x, labels = examples()
    labels[1] = 9  # the second process's first
    return DataLoader(TensorDataset(x, labels), batch_size=16)


def group_of_three(rank: int) -> dict[str, Any]:
    group = dist.group.WORLD
    found: dict[str, Any] = {name: scores(data(), group) for name, data in LOADERS.items()}
    wrong: dict[str, Callable[[], Any]] = {
        "out of range": lambda: scores(out_of_range(rank), group),
        "other weights": lambda: fxopt.evaluate(Net(off=float(rank)), Net().eval(), loader(), process_group=group),
        "a sampler": lambda: scores(loader(sampler=WeightedRandomSampler([1.0] * EXAMPLES, EXAMPLES)), group),
        "nothing": lambda: scores([], group),
        "a last batch dropped": lambda: scores(loader(drop_last=True), group),
    }
    for name, call in wrong.items():
        with pytest.raises(fxopt.FxoptError) as raised:
            call()
        found[name] = f"{type(raised.value).__name__}: {raised.value}"
    return found


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return found_by_all(3, tmp_path_factory.mktemp("three"), group_of_three)


@pytest.mark.parametrize("name", LOADERS)
def test_three_processes_find_what_one_does(three: list[Any], name: str) -> None:
    expected = scores(LOADERS[name](), None)
    for result in three:
        found = result[name]
        assert found["examples"] == expected["examples"]
        for score, values in expected["scores"].items():
            for key, value in values.items():
                # float32 logits round otherwise in batches of other sizes; what is counted does not.
                bound = 1e-12 if score.startswith("top") or score == "agreement" else 1e-6
                near = None if value is None else pytest.approx(value, abs=bound)
                assert found["scores"][score][key] == near, (score, key)


SAID = {
    "out of range": ("rank 1 of 3 failed: batch 0: example 0 has the label 9", 1),
    "other weights": ("CollectiveError: the model differs between processes: linear.weight is", None),
    "a sampler": ("a loader with a WeightedRandomSampler cannot be shared", None),
    "a last batch dropped": ("a loader that drops the last batch cannot be shared", None),
    "nothing": ("UsageError: the data has no examples", None),
}


@pytest.mark.parametrize("name", SAID)
def test_what_goes_wrong_is_said_in_every_process(three: list[Any], name: str) -> None:
    said, guilty = SAID[name]
    for rank, result in enumerate(three):
        assert (said.partition("failed: ")[2] if rank == guilty else said) in result[name]


def test_torchrun_gives_the_numbers_of_one_process(tmp_path: Path) -> None:
    (tmp_path / "scored.py").write_text(NET, encoding="utf-8")
    command = ["-m", "fxopt", "evaluate", "scored.py:build", "--data", "scored.py:data", "--json"]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    results = [
        subprocess.run(
            [sys.executable, *start, *command], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        for start in ([], several)
    ]
    assert [result.returncode for result in results] == [0, 0], results
    one, three = (json.loads(result.stdout) for result in results)
    assert three["examples"] == one["examples"] == 50
    for name, score in one["scores"].items():
        assert three["scores"][name]["compiled"] == pytest.approx(score["compiled"], abs=1e-6), name
    assert not torch.distributed.is_initialized()
