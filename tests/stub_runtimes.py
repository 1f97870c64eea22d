"""Runtimes and models for the tests of benchmarks. Each process imports this file, so everything is module-level."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from fxopt.bench import Built


def small() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A model that prints, and its input."""
    print("printed by the model")
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU()), (torch.randn(2, 4),)


class Named(torch.nn.Module):
    """Takes its arguments by position and by name, in a dictionary; has two outputs."""

    def forward(self, x: dict[str, torch.Tensor], *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"twice": 2 * x["a"], "scaled": x["a"] * scale}


def broken_model() -> Any:
    raise RuntimeError("no weights here")


class NotReadable(torch.nn.Module):
    """Can be saved, but not read."""

    def __setstate__(self, state: Any) -> None:
        raise RuntimeError("not here")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def sleeps(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    """Takes 20 ms for a call, 100 MB while it is built, 50 MB for good; tells its surroundings."""
    passing, kept = torch.ones(12_500_000), torch.ones(12_500_000)
    del passing
    cache = [path for path in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*") if path.is_file()]
    threads = f"threads {torch.get_num_threads()}, {os.environ['OMP_NUM_THREADS']}"
    notes = (threads, f"cached {cache}", f"grad {torch.is_grad_enabled()}", f"training {model.training}")

    def call(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        return model(*args, **kwargs) + 0 * kept[0]

    return Built(call, "sleeps 1.0", {"import": 100.0, "capture": 0.5}, notes)


def raises_building(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    raise RuntimeError("cannot build this\nand more lines")


def raises_running(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    calls = []

    def call(*args: Any) -> Any:
        calls.append(None)
        if len(calls) > 4:
            raise ValueError("enough")
        return model(*args)

    return Built(call)


def answers_wrongly(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    return Built(lambda x: model(x) * 1.01)


def spoils_its_memory(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    """Its first answer is right, a later one is not."""
    kept = model(*args)

    def call(x: torch.Tensor) -> torch.Tensor:
        kept.add_(1)
        return kept

    kept.sub_(1)
    return Built(call)


def has_other_outputs(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    return Built(lambda x: (model(x), x))


def is_not_installed(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    import no_such_runtime.engine

    return Built(no_such_runtime.engine)


def dies(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    os._exit(7)
