"""A runtime in a process of its own: it builds, runs in turns when it is told to, and says what it took.

The process is spawned, not forked, so that it holds nothing of the caller's. It knows the number of threads before
torch is imported (OMP_NUM_THREADS), and it has a folder of its own for temporary files and TorchInductor's caches,
which are therefore cold. What it prints goes to standard error.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import multiprocessing
import os
import pickle
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from fxopt.bench import system
from fxopt.bench.runtimes import Built
from fxopt.errors import FxoptError
from fxopt.models import shapes_of

#: A model, its positional arguments, and its named ones if it has any.
Example = tuple[torch.nn.Module, tuple[Any, ...]] | tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]
#: Makes the model and its arguments; a module-level function or what else pickles, because each process calls it.
Build = Callable[[], Example]

#: What a process was doing: it starts, has the model built, makes the runtime of it, runs that.
Step = Literal["start", "model", "build", "run"]
#: Calls between the first and the first turn, after which memory is looked at.
WARM_CALLS = 2
#: Seconds that a process is given to end by itself.
PATIENCE = 5.0


@dataclass(frozen=True)
class Ready:
    """What a process says when its runtime is built, was called, and is warm."""

    build_seconds: float
    stages: dict[str, float]
    version: str
    notes: tuple[str, ...]
    inputs: tuple[str, ...]
    threads: int
    outputs: bytes


@dataclass(frozen=True)
class Finished:
    """What a process says after its last turn."""

    outputs: bytes
    memory: system.Memory


@dataclass(frozen=True)
class Problem:
    """Why a process could not go on, and at which step; `missing` is a module that is not there."""

    step: Step
    text: str
    hint: str = ""
    missing: str = ""


class Failed(Exception):
    """A process could not go on; it ends."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


# -- the caller's side -----------------------------------------------------------------------------------------------


class Worker:
    """The process of one runtime, seen from the caller's. Close it in any case."""

    def __init__(self, payload: bytes, folder: Path, threads: int | None, seed: int) -> None:
        """Starts the process, which imports torch and waits. `payload` is a Build and a Prepare, pickled."""
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, payload, threads, seed), daemon=True)
        own = {"TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
        with _environment(own if threads is None else {**own, "OMP_NUM_THREADS": str(threads)}):
            self._process.start()
        theirs.close()

    def wait(self, limit: float) -> None:
        """Waits until the process is there. Raises Failed."""
        self._receive(limit, "start")

    def build(self, limit: float) -> Ready:
        """Builds the runtime and calls it for the first times. Raises Failed."""
        found = self._ask("build", limit)
        assert isinstance(found, Ready)
        return found

    def turn(self, calls: int, limit: float) -> float:
        """The median seconds of `calls` calls, after one to warm up. Raises Failed."""
        found = self._ask(calls, limit)
        assert isinstance(found, float)
        return found

    def finish(self, limit: float) -> Finished:
        """The outputs of one more call, and the memory that all of it took. Raises Failed."""
        found = self._ask("finish", limit)
        assert isinstance(found, Finished)
        return found

    def close(self) -> None:
        """Ends the process, gently if it listens."""
        self._pipe.close()
        if self._process.pid is None:
            return
        self._process.join(PATIENCE)
        for stop in (self._process.terminate, self._process.kill):
            if self._process.is_alive():
                stop()
                self._process.join(PATIENCE)

    def _ask(self, message: Any, limit: float) -> Any:
        with contextlib.suppress(BrokenPipeError):  # what it said before it ended is still there to be read
            self._pipe.send(message)
        return self._receive(limit, "build" if message == "build" else "run")

    def _receive(self, limit: float, step: Step) -> Any:
        try:
            if not self._pipe.poll(limit):
                raise Failed(Problem(step, f"no answer in {limit:g} s", "give it more time: limit"))
            answer = self._pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join(PATIENCE)
            raise Failed(Problem(step, self._ending())) from error
        if isinstance(answer, Problem):
            raise Failed(answer)
        return answer

    def _ending(self) -> str:
        code = self._process.exitcode
        if code is not None and code < 0:
            return f"its process was ended by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        return f"its process ended with exit code {code} and no answer"


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for the processes that are started inside: threads are counted as torch is loaded."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# -- the process's side ----------------------------------------------------------------------------------------------


@dataclass
class _Server:
    """What the process holds between two messages."""

    payload: bytes
    seed: int
    step: Step = "model"
    call: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    model_bytes: int | None = None
    held_bytes: int | None = None

    def answer(self, message: Any) -> Any:
        if message == "build":
            return self._build()
        if message == "finish":
            peak = system.beyond(system.peak(), self.model_bytes)
            memory = system.Memory(self.model_bytes, peak, system.beyond(self.held_bytes, self.model_bytes))
            return Finished(_leaves(self._run()), memory)
        return self._turn(message)

    def _build(self) -> Ready:
        build, prepare = pickle.loads(self.payload)
        torch.manual_seed(self.seed)
        model, self.args, *named = build()
        self.kwargs = dict(named[0]) if named else {}
        model.eval()
        gc.collect()
        system.forget_peak()
        self.model_bytes = system.resident()
        self.step = "build"
        start = time.perf_counter()
        built: Built = prepare(model, self.args, self.kwargs)
        prepared = time.perf_counter()
        self.call = built.call
        outputs = self._run()
        end = time.perf_counter()
        stages = {**built.stages, "first call": end - prepared}
        self.step = "run"
        for _ in range(WARM_CALLS):
            self._run()
        gc.collect()
        self.held_bytes = system.resident()
        seconds = end - start - stages.get("import", 0.0)
        inputs = tuple(map(str, shapes_of(self.args, self.kwargs)))
        return Ready(
            seconds, stages, built.version, tuple(built.notes), inputs, torch.get_num_threads(), _leaves(outputs)
        )

    def _turn(self, calls: int) -> float:
        self._run()
        taken = []
        for _ in range(calls):
            start = time.perf_counter()
            self._run()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def _run(self) -> Any:
        assert self.call is not None
        return self.call(*self.args, **self.kwargs)


def _serve(pipe: Connection, payload: bytes, threads: int | None, seed: int) -> None:
    sys.stdout.flush()
    os.dup2(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller is interrupted, too, and ends the processes
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if threads is not None:
        torch.set_num_threads(threads)
    server = _Server(payload, seed)
    with contextlib.suppress(EOFError, BrokenPipeError), torch.no_grad():  # the caller closed the pipe: it is done
        pipe.send("here")
        while True:
            message = pipe.recv()
            try:
                answer = server.answer(message)
            except Exception as error:
                answer = _problem(server.step, error)
            pipe.send(answer)


def _problem(step: Step, error: Exception) -> Problem:
    missing = error.name or "" if isinstance(error, ModuleNotFoundError) else ""
    if isinstance(error, FxoptError):
        return Problem(step, error.message, error.hint or "", missing)
    lines = str(error).strip().splitlines()
    return Problem(step, f"{type(error).__name__}: {lines[0][:300] if lines else 'no message'}", "", missing)


def _leaves(output: Any) -> bytes:
    """The tensors of a result, as bytes: another process maps no memory of this one."""
    leaves = [leaf.detach().clone() for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    buffer = io.BytesIO()
    torch.save(leaves, buffer)
    return buffer.getvalue()


def tensors(outputs: bytes) -> list[torch.Tensor]:
    """The tensors that a process sent."""
    found: list[torch.Tensor] = torch.load(io.BytesIO(outputs), weights_only=True)
    return found
