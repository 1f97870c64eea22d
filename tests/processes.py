"""Runs a function in several processes that are one gloo group on this machine."""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(size: int, folder: Path, function: Callable[..., Any], *args: Any, limit: float = 120) -> list[Any]:
    """What `function(rank, *args)` gives in each process, an exception as its text; None for one that died."""
    context = mp.get_context("spawn")
    folder.mkdir(parents=True, exist_ok=True)
    started = [context.Process(target=_work, args=(rank, size, folder, function, args)) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(limit)
    hung = [process for process in started if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung, f"{len(hung)} processes hang"
    found = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in found]


def _work(rank: int, size: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=wait)
    try:
        result = function(rank, *args)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, folder / f"{rank}.pt")
    if not isinstance(result, str):
        dist.destroy_process_group()
