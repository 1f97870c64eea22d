"""What a benchmark found: a line for each runtime, and ratios that are paired round by round."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fxopt.bench.system import Memory
from fxopt.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

#: ok; wrong: it ran, but its answer is not eager's; failed: it could not be built or run; not installed.
Status = Literal["ok", "wrong", "failed", "not installed"]

EAGER, FXOPT = "eager", "fxopt"


@dataclass(frozen=True)
class Ratio:
    """The median of the ratios round by round, and their spread (see `spread`)."""

    median: float
    spread: float

    def to_dict(self) -> dict[str, Any]:
        """The ratio for programs."""
        return {"median": self.median, "spread": self.spread}


def spread(values: Sequence[float]) -> float:
    """The interquartile range over the median: the middle half of the values lies within it. 0 for a single one."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


@dataclass(frozen=True)
class Timing:
    """One runtime of a benchmark.

    `rounds` are seconds per call, the median of each round's calls. `build_seconds` go from the model in memory to the
    first answer, without the import of the runtime's own packages; `stages` has parts of it that the runtime names, in
    seconds, and "import" beside them. `error` is max|difference| / max|eager| over all outputs, infinite for
    another structure. `detail` says what went wrong, `version` what was measured.
    """

    runtime: str
    status: Status
    detail: str = ""
    rounds: tuple[float, ...] = ()
    build_seconds: float | None = None
    stages: dict[str, float] = field(default_factory=dict)
    memory: Memory | None = None
    error: float | None = None
    version: str = ""
    notes: tuple[str, ...] = ()

    @property
    def ran(self) -> bool:
        """Whether there are times, be the answer right or wrong."""
        return self.status in ("ok", "wrong")

    @property
    def median(self) -> float:
        """The median over rounds, in seconds per call. Raises UsageError where it did not run."""
        if not self.rounds:
            raise UsageError(f"{self.runtime} has no times: {self.status}: {self.detail}", hint="look at its status")
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """The spread of the rounds."""
        return spread(self.rounds)

    def to_dict(self) -> dict[str, Any]:
        """The line for programs: only JSON's types."""
        finite = self.error is None or math.isfinite(self.error)
        return {
            "runtime": self.runtime,
            "status": self.status,
            "detail": self.detail,
            "version": self.version,
            "seconds": list(self.rounds),
            "median": self.median if self.rounds else None,
            "spread": self.spread if self.rounds else None,
            "build_seconds": self.build_seconds,
            "stages": dict(self.stages),
            "memory": None if self.memory is None else self.memory.to_dict(),
            "error": self.error if finite else str(self.error),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Timing:
        """Reads what `to_dict` wrote."""
        memory, error = data["memory"], data["error"]
        return cls(
            data["runtime"],
            data["status"],
            data["detail"],
            tuple(data["seconds"]),
            data["build_seconds"],
            dict(data["stages"]),
            None if memory is None else Memory(**memory),
            None if error is None else float(error),
            data["version"],
            tuple(data["notes"]),
        )


@dataclass(frozen=True)
class Settings:
    """How it is measured: `rounds` turns of `calls` calls each, `pause` seconds before each turn, on `threads` threads.

    `threads` None is torch's own number. `tolerance` is the error from which on an answer is wrong. A step of a runtime
    (its build, or one turn) that takes more than `limit` seconds is given up.
    """

    threads: int | None = None
    rounds: int = 7
    calls: int = 5
    pause: float = 0.2
    seed: int = 0
    tolerance: float = 1e-3
    limit: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("threads", "rounds", "calls"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}", hint=f"give at least 1 for {name}")
        if self.pause < 0:
            raise UsageError(f"pause is {self.pause}", hint="give the seconds before each turn, 0 or more")

    def to_dict(self) -> dict[str, Any]:
        """The settings for programs, without `limit`, which changes no number."""
        names = ("threads", "rounds", "calls", "pause", "seed", "tolerance")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Benchmark:
    """One model on one set of inputs, timed on several runtimes; `timings` has eager's first.

    `inputs` describes each tensor, as "1x3x224x224"; `machine` says where: processor, torch.
    """

    model: str
    inputs: tuple[str, ...]
    settings: Settings
    machine: dict[str, str]
    timings: tuple[Timing, ...]

    def __getitem__(self, runtime: str) -> Timing:
        """The line of a runtime. Raises UsageError where it was not measured."""
        for timing in self.timings:
            if timing.runtime == runtime:
                return timing
        names = ", ".join(timing.runtime for timing in self.timings)
        raise UsageError(f"{runtime!r} was not measured", hint=f"there are: {names}")

    @property
    def batch(self) -> int | None:
        """The first size of the first input; None where it has none."""
        found = self.inputs[0].partition("=")[2] or self.inputs[0] if self.inputs else ""
        first = found.partition(":")[0].partition("x")[0]
        return int(first) if first.isdigit() else None

    @property
    def short_name(self) -> str:
        """The model's name without the file or package that it comes from."""
        return self.model.rpartition(":")[2]

    @property
    def title(self) -> str:
        """The model's short name, its inputs and the threads."""
        threads = self.settings.threads
        return f"{self.short_name}, {' '.join(self.inputs)}, {threads} thread{'' if threads == 1 else 's'}"

    def speedup(self, runtime: str = FXOPT, over: str = EAGER) -> Ratio | None:
        """How many times as fast as `over` a runtime is, paired round by round; None where one of them did not run."""
        slow, fast = self[over], self[runtime]
        if not (slow.ran and fast.ran):
            return None
        ratios = [a / b for a, b in zip(slow.rounds, fast.rounds, strict=True)]
        return Ratio(statistics.median(ratios), spread(ratios))

    def to_dict(self) -> dict[str, Any]:
        """The benchmark for programs: only JSON's types. Each line has its speed over eager's, and fxopt's over it."""
        lines = []
        for timing in self.timings:
            ratios = self.speedup(timing.runtime), self.speedup(FXOPT, timing.runtime)
            over_eager, of_fxopt = (None if ratio is None else ratio.to_dict() for ratio in ratios)
            lines.append({**timing.to_dict(), "times_eager": over_eager, "fxopt_times_it": of_fxopt})
        return {
            "model": self.model,
            "inputs": list(self.inputs),
            "batch": self.batch,
            "settings": self.settings.to_dict(),
            "machine": dict(self.machine),
            "runtimes": lines,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Benchmark:
        """Reads what `to_dict` wrote."""
        timings = tuple(Timing.from_dict(line) for line in data["runtimes"])
        return cls(data["model"], tuple(data["inputs"]), Settings(**data["settings"]), dict(data["machine"]), timings)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from fxopt.bench.table import rich_table

        yield rich_table(self)

    def __str__(self) -> str:
        from fxopt.bench.table import plain

        return plain(self)


@dataclass(frozen=True)
class Mean:
    """The geometric mean of a runtime's speed over eager's, and of fxopt's over it, each over `models` models."""

    batch: int | None
    threads: int | None
    runtime: str
    models: int
    times_eager: float
    fxopt_times_it: float | None

    def to_dict(self) -> dict[str, Any]:
        """The mean for programs."""
        return dict(vars(self))


def means(benchmarks: Iterable[Benchmark]) -> list[Mean]:
    """The means of each runtime over models, for each batch size and number of threads.

    Only right answers count, for fxopt's speed over a runtime those of both.
    """
    groups: dict[tuple[int | None, int | None], list[Benchmark]] = {}
    for benchmark in benchmarks:
        groups.setdefault((benchmark.batch, benchmark.settings.threads), []).append(benchmark)
    found = []
    for (batch, threads), group in groups.items():
        for runtime in dict.fromkeys(timing.runtime for benchmark in group for timing in benchmark.timings):
            right = [benchmark for benchmark in group if _right(benchmark, runtime)]
            both = [benchmark for benchmark in right if _right(benchmark, FXOPT)]
            eager = [ratio.median for one in right if (ratio := one.speedup(runtime)) is not None]
            ours = [ratio.median for one in both if (ratio := one.speedup(FXOPT, runtime)) is not None]
            if eager:
                mean = statistics.geometric_mean(ours) if ours else None
                found.append(Mean(batch, threads, runtime, len(eager), statistics.geometric_mean(eager), mean))
    return found


def _right(benchmark: Benchmark, runtime: str) -> bool:
    return any(timing.runtime == runtime and timing.status == "ok" for timing in benchmark.timings)
