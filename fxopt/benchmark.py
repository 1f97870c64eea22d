"""Times ways to run one model against each other: each in a process of its own, in turns, with a pause between turns.

Runtimes leave spinning threads behind, so two in one process slow each other; and a machine's speed drifts, so ratios
are taken round by round. Seconds are wall time per call, the median of a turn's calls.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.errors import FxoptError

#: Builds the model and its positional arguments; a module-level function, because each process calls it.
Build = Callable[[], tuple[torch.nn.Module, tuple[Any, ...]]]
#: Makes the thing to call from the model and its arguments; module-level for the same reason.
Prepare = Callable[[torch.nn.Module, tuple[Any, ...]], Callable[..., Any]]


@dataclass(frozen=True)
class Timing:
    """One runtime: seconds per call in each round, seconds to build, and how far its output is from the first one's."""

    name: str
    rounds: tuple[float, ...]
    build_seconds: float
    error: float

    @property
    def median(self) -> float:
        """The median over rounds, in seconds per call."""
        return statistics.median(self.rounds)


def speedup(slow: Timing, fast: Timing) -> float:
    """How many times faster `fast` is: the median of the ratios round by round."""
    return statistics.median(a / b for a, b in zip(slow.rounds, fast.rounds, strict=True))


def eager(model: torch.nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The model as it is."""
    return model


def compiled(model: torch.nn.Module, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The model compiled by fxopt on its arguments."""
    from fxopt.compiler import compile

    return compile(model, args)


def in_turns(
    build: Build,
    runtimes: Mapping[str, Prepare] | None = None,
    *,
    threads: int | None = None,
    rounds: int = 7,
    calls: int = 5,
    pause: float = 0.1,
) -> list[Timing]:
    """Times every runtime on the model of `build`; the first runtime's output is what the others are compared with.

    A turn is `calls` calls after one to warm up; there are `rounds` turns each, round-robin, `pause` seconds apart.
    Raises FxoptError with the traceback's last line where a process fails.
    """
    chosen = dict(runtimes or {"eager": eager, "fxopt": compiled})
    context = multiprocessing.get_context("spawn")
    workers: dict[str, tuple[Any, Connection]] = {}
    try:
        for name, prepare in chosen.items():
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, build, prepare, threads), daemon=True)
            process.start()
            theirs.close()
            workers[name] = (process, ours)
        ready = {name: _receive(name, pipe) for name, (_, pipe) in workers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        for _ in range(rounds):
            for name, (_, pipe) in workers.items():
                time.sleep(pause)
                pipe.send(calls)
                seconds[name].append(_receive(name, pipe))
    finally:
        for process, pipe in workers.values():
            pipe.close()
            process.join(timeout=10)
            if process.is_alive():
                process.terminate()
    first = next(iter(ready.values()))[1]
    return [
        Timing(name, tuple(seconds[name]), ready[name][0], _error(first, ready[name][1])) for name in chosen
    ]


def _receive(name: str, pipe: Connection) -> Any:
    try:
        kind, value = pipe.recv()
    except EOFError as error:
        raise FxoptError(f"the process of {name} ended without an answer") from error
    if kind == "error":
        raise FxoptError(f"the process of {name} failed: {value}")
    return value


def _work(pipe: Connection, build: Build, prepare: Prepare, threads: int | None) -> None:
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        model, args = build()
        with torch.no_grad():
            start = time.perf_counter()
            run = prepare(model, args)
            output = run(*args)
            built = time.perf_counter() - start
            leaves = [leaf.numpy() for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            pipe.send(("ready", (built, leaves)))
            while True:
                calls = pipe.recv()
                run(*args)
                taken = []
                for _ in range(calls):
                    start = time.perf_counter()
                    run(*args)
                    taken.append(time.perf_counter() - start)
                pipe.send(("seconds", statistics.median(taken)))
    except EOFError:
        return  # the other side closed the pipe: all turns are done
    except Exception as error:
        pipe.send(("error", f"{type(error).__name__}: {error}"))


def _error(expected: list[Any], actual: list[Any]) -> float:
    from fxopt.compare import relative_error

    pairs = zip(expected, actual, strict=True)
    return max((relative_error(torch.from_numpy(e), torch.from_numpy(a)) for e, a in pairs), default=0.0)


__all__ = ["Timing", "compiled", "eager", "in_turns", "speedup"]
