"""Runs a function in several processes that are one gloo group on this machine."""

from __future__ import annotations

import datetime
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

needs_gloo = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


def run(size: int, folder: Path, function: Callable[..., Any], *args: Any, limit: float = 120) -> list[Any]:
    """What `function(rank, *args)` gives in each process, an exception as its text; None for one that died."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job").write_bytes(pickle.dumps((function, args)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    program = "import sys; from processes import work; work(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])"
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(rank), str(size), str(folder)], env=environment)
        for rank in range(size)
    ]
    try:
        for process in started:
            process.wait(limit)
    finally:
        for process in started:
            process.kill()
    found = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in found]


def found_by_all(size: int, folder: Path, function: Callable[..., dict[Any, Any]]) -> list[Any]:
    """As `run`, for a function that gives a dict; AssertionError where a process raised or died."""
    results = run(size, folder, function)
    assert all(isinstance(result, dict) for result in results), results
    return results


def work(rank: int, size: int, folder: str) -> None:
    """One process of them."""
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=wait)
    function, args = pickle.loads((Path(folder) / "job").read_bytes())
    try:
        result = function(rank, *args)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, Path(folder) / f"{rank}.pt")
    if not isinstance(result, str):
        dist.destroy_process_group()
