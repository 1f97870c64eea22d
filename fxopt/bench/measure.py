"""`fxopt.benchmark`: runtimes of one model against each other, each in its own process, in turns.

Runtimes leave spinning threads behind, so two in one process slow each other; a machine's speed drifts, so ratios are
taken round by round; and only one process works at a time, while it builds, too.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import pickle
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from fxopt.bench import runtimes
from fxopt.bench.result import EAGER, FXOPT, Benchmark, Settings, Timing
from fxopt.bench.runtimes import Prepare
from fxopt.bench.system import machine
from fxopt.bench.worker import Build, Example, Failed, Problem, Ready, Worker, tensors
from fxopt.compare import relative_error
from fxopt.errors import FxoptError, UsageError
from fxopt.pipeline import Progress
from fxopt.verification import first_call

Against = str | Sequence[str] | Mapping[str, Prepare]


def benchmark(
    model: torch.nn.Module | Build,
    args: tuple[Any, ...] | torch.Tensor | DataLoader[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    against: Against = (EAGER,),
    name: str | None = None,
    threads: int | None = None,
    rounds: int = Settings.rounds,
    calls: int = Settings.calls,
    pause: float = Settings.pause,
    seed: int = Settings.seed,
    tolerance: float = Settings.tolerance,
    limit: float = Settings.limit,
    progress: Progress | None = None,
) -> Benchmark:
    """How fast `model` is on its inputs: in eager PyTorch, compiled by fxopt, and in other runtimes.

    `model` is a module, with the arguments of a call or a DataLoader whose first batch they are (labels left out as
    `fxopt.verify` leaves them out); or a module-level function without arguments that gives the model
    and its arguments, `(model, args)` or `(model, args, kwargs)`, and is called in each process under the same `seed`.
    It is run in eval mode, without gradients.

    `against` names runtimes of `fxopt.bench.RUNTIMES` ("all" for all of them), or `fxopt:BACKEND`, `fxopt:no-PASS`,
    `fxopt:no-passes`; or it maps names of your own to functions as those (see `fxopt.bench.runtimes`). Eager PyTorch,
    which every answer is compared with, and fxopt are always measured.

    Each runtime has a process of its own, which is started, builds and runs while the others wait. There are `rounds`
    rounds; in each, every runtime has a turn of one call to warm up and `calls` calls, whose median counts, after
    `pause` seconds; every second round goes backwards. `threads` is how many threads each may use. An answer whose
    error is above `tolerance` is wrong. `limit` are the seconds that one build or turn may take.

    A runtime that is not installed, fails, or answers wrongly has that as its status; the others go on.
    Raises UsageError for an option, a name, or a model that cannot be sent to another process, FxoptError where eager
    PyTorch itself fails. A script calls this under `if __name__ == "__main__":`, as the processes import it.
    """
    settings = Settings(threads, rounds, calls, pause, seed, tolerance, limit)
    chosen = chosen_runtimes(against)
    with tempfile.TemporaryDirectory(prefix="fxopt-bench-", ignore_cleanup_errors=True) as folder:
        if isinstance(model, torch.nn.Module):
            if isinstance(args, DataLoader):
                args, kwargs = first_call(model, args)
            build: Build = _saved(model, args, kwargs, Path(folder) / "model.pt")
            called = name or type(model).__name__
        else:
            if args is not None or kwargs:
                raise UsageError("a function that builds the model gives its arguments, too", hint="leave out args")
            build = model
            called = name or str(getattr(model, "__name__", type(model).__name__))
        payloads = {each: _pickled(build, prepare, each) for each, prepare in chosen.items()}
        with contextlib.closing(_Race(payloads, settings, Path(folder), progress)) as race:
            return race.run(called)


def chosen_runtimes(against: Against) -> dict[str, Prepare]:
    """The runtimes that `against` comes to: eager first, fxopt second unless it is named at another place.

    Raises UsageError for a name that no runtime, backend or pass has.
    """
    if isinstance(against, Mapping):
        found = dict(against)
    else:
        names = against.split(",") if isinstance(against, str) else against
        found = runtimes.named([name.strip() for name in names])
    first = {EAGER: runtimes.eager}
    return first | ({} if FXOPT in found else runtimes.named([FXOPT])) | found | first


# -- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Saved:
    """A module and its arguments in a file."""

    path: str

    def __call__(self) -> Example:
        try:
            found: Example = torch.load(self.path, weights_only=False)
        except Exception as error:
            raise UsageError(
                f"the model could not be read in another process: {type(error).__name__}: {error}", hint=_FUNCTION
            ) from error
        return found


_FUNCTION = (
    "give benchmark a module-level function of a file that can be imported, which returns (model, args), "
    "instead of the model"
)


def _saved(model: torch.nn.Module, args: Any, kwargs: Mapping[str, Any] | None, path: Path) -> _Saved:
    given = (args,) if isinstance(args, torch.Tensor) else tuple(args or ())
    if not given and not kwargs:
        raise UsageError("there are no inputs to run the model on", hint="fxopt.benchmark(model, (x,))")
    try:
        torch.save((model, given, dict(kwargs or {})), path)
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise UsageError(f"the model cannot be sent to another process: {error}", hint=_FUNCTION) from error
    return _Saved(str(path))


def _pickled(build: Build, prepare: Prepare, name: str) -> bytes:
    """What a process is sent."""
    for what, value in (("what builds the model", build), (f"the runtime {name}", prepare)):
        try:
            pickle.dumps(value)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UsageError(
                f"{what} cannot be sent to another process: {error}",
                hint="make it a module-level function, or an object of a module-level class",
            ) from error
    return pickle.dumps((build, prepare))


# -- the measurement -------------------------------------------------------------------------------------------------


class _Race:
    """The processes of one benchmark, and what is known of each so far."""

    def __init__(
        self,
        payloads: Mapping[str, bytes],
        settings: Settings,
        folder: Path,
        progress: Progress | None,
    ) -> None:
        self.settings = settings
        self.told: Progress = progress or (lambda stage, done, total: None)
        self.steps = len(payloads) * (1 + settings.rounds) + 1
        self.done = 0
        self.workers: dict[str, Worker] = {}
        self.ready: dict[str, Ready] = {}
        self.seconds: dict[str, list[float]] = {}
        self.timings = {name: Timing(name, "failed") for name in payloads}
        try:
            # All start at once, as they only import; they build one after another.
            for index, (name, payload) in enumerate(payloads.items()):
                own = folder / str(index)
                own.mkdir()
                self.workers[name] = Worker(payload, own, settings.threads, settings.seed)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends every process that is left."""
        for name in list(self.workers):
            self._drop(name)

    def run(self, model: str) -> Benchmark:
        """Builds, measures and finishes; what fails on the way becomes a line."""
        self._tell("starting processes", 1)
        for name in list(self.workers):
            with self._lines(name):
                self.workers[name].wait(self.settings.limit)
        for name in list(self.workers):
            self._tell(f"building {name}", 1)
            with self._lines(name):
                self.ready[name] = self.workers[name].build(self.settings.limit)
                self.seconds[name] = []
        for number in range(self.settings.rounds):
            names = list(self.workers)
            for name in names if number % 2 == 0 else reversed(names):
                self._tell(f"round {number + 1} of {self.settings.rounds}: {name}", 1)
                time.sleep(self.settings.pause)
                with self._lines(name):
                    self.seconds[name].append(self.workers[name].turn(self.settings.calls, self.settings.limit))
        for name in list(self.workers):
            with self._lines(name):
                self._finish(name)
        first = self.ready[EAGER]
        settings = replace(self.settings, threads=first.threads)
        return Benchmark(model, first.inputs, settings, machine(), tuple(self.timings.values()))

    def _finish(self, name: str) -> None:
        finished, ready = self.workers[name].finish(self.settings.limit), self.ready[name]
        expected = tensors(self.ready[EAGER].outputs)
        # The first answer and the last: a runtime that reuses memory may spoil a later one.
        found = [_distance(expected, tensors(outputs)) for outputs in (ready.outputs, finished.outputs)]
        error = max(distance for distance, _ in found)
        said = next((text for _, text in found if text), "")
        if error > self.settings.tolerance:
            said = said or f"off from eager's answer by {error:.1e}"
        self.timings[name] = Timing(
            name,
            "wrong" if error > self.settings.tolerance else "ok",
            said,
            tuple(self.seconds[name]),
            ready.build_seconds,
            ready.stages,
            finished.memory,
            error,
            ready.version,
            ready.notes,
        )

    @contextlib.contextmanager
    def _lines(self, name: str) -> Iterator[None]:
        """What fails inside is the runtime's line, and its process ends; only eager's failure is everybody's."""
        try:
            yield
        except Failed as failed:
            self._drop(name)
            self.timings[name] = _failure(name, failed.problem, self.ready.get(name))
            if name == EAGER:
                raise _no_reference(failed.problem) from failed

    def _drop(self, name: str) -> None:
        self.workers.pop(name).close()

    def _tell(self, stage: str, steps: int) -> None:
        self.told(stage, self.done, self.steps)
        self.done += steps


def _failure(name: str, problem: Problem, ready: Ready | None) -> Timing:
    text = problem.text + (f" ({problem.hint})" if problem.hint else "")
    if problem.missing and problem.step == "build":
        package = problem.missing.partition(".")[0]
        return Timing(name, "not installed", f"pip install {package}")
    doing = {"start": "starting: ", "model": "building the model: ", "build": "building: ", "run": "running: "}[
        problem.step
    ]
    return Timing(name, "failed", doing + text, version=ready.version if ready is not None else "")


def _no_reference(problem: Problem) -> FxoptError:
    """What is raised where eager itself cannot go on."""
    if problem.step == "start":
        hint = 'a script calls benchmark under `if __name__ == "__main__":`, because each process imports the script'
        return FxoptError(f"a process could not be started: {problem.text}", hint=hint)
    if problem.step == "model":
        return UsageError(f"the model could not be built: {problem.text}", hint=problem.hint or None)
    text = f"the model does not run in eager PyTorch, so there is nothing to compare with: {problem.text}"
    return FxoptError(text, hint=problem.hint or None)


def _distance(expected: Iterable[torch.Tensor], actual: Iterable[torch.Tensor]) -> tuple[float, str]:
    """The largest relative error of all outputs; infinity and why, where they are not of one structure."""
    worst = 0.0
    for index, (left, right) in enumerate(itertools.zip_longest(expected, actual)):
        if left is None or right is None:
            return math.inf, f"{'fewer' if right is None else 'more'} outputs than eager's"
        if left.shape != right.shape:
            return math.inf, f"output {index} is of shape {tuple(right.shape)} instead of {tuple(left.shape)}"
        worst = max(worst, relative_error(left, right))
    return worst, ""
