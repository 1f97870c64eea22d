"""The command `fxopt bench`: models on several runtimes, as tables, as JSON that a later run adds to, as a chart."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Group

from fxopt.bench import RUNTIMES, Benchmark, benchmark, means
from fxopt.bench import chart as charts
from fxopt.bench.measure import chosen_runtimes
from fxopt.bench.result import FXOPT, Settings
from fxopt.bench.table import rich_means
from fxopt.cli.making import PICTURE_SHAPE, stdout_kept
from fxopt.cli.options import JSON, SavedType, ShapeType, data_option, refuse_beside_data
from fxopt.errors import FxoptError, UsageError
from fxopt.models import FORMS, Example, Shape, load, load_model
from fxopt.pipeline import Progress
from fxopt.terminal import EXIT_CODES, Exit, describe, note, progress, show
from fxopt.verification import first_call


class _NumbersType(click.ParamType[tuple[int, ...]]):
    """Whole numbers of at least 1: `1,8`."""

    name = "n,n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isdigit() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is no list of whole numbers of at least 1: write 1,8", param, ctx)
        return tuple(dict.fromkeys(map(int, parts)))


class _ModelType(click.ParamType[tuple[str, tuple[Shape, ...]]]):
    """A model's name, and shapes of its own: `net.py:build@1x3x64x64,mask=1x16:bool`."""

    name = "model"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[Shape, ...]]:
        if isinstance(value, tuple):
            return value
        name, _, shapes = value.partition("@")
        place, _, factory = name.rpartition(":")
        if not place or not factory:
            raise UsageError(f"{value!r} names no model", hint=f"it is written {FORMS}, and @1x3x64x64 for its inputs")
        convert = ShapeType().convert
        return name, tuple(convert(text, param, ctx) for text in shapes.split(",") if text)


@dataclass(frozen=True)
class Data:
    """What --data named, and the loader that it gave."""

    name: str
    loader: Any


@dataclass(frozen=True)
class Job:
    """One benchmark to be run."""

    example: Example
    settings: Settings
    runtimes: tuple[str, ...]
    data: Data | None = None

    @property
    def request(self) -> dict[str, Any]:
        """What was asked for, as an earlier result has it that need not be measured again."""
        return {
            "model": self.example.name,
            **({"data": self.data.name} if self.data is not None else self._drawn()),
            "randomize_norms": self.example.randomize_norms,
            "settings": self.settings.to_dict(),
            "runtimes": list(self.runtimes),
        }

    def _drawn(self) -> dict[str, Any]:
        shapes = self.example.shapes or self.example.default
        return {"shapes": [str(shape) for shape in shapes], "batch": self.example.batch}

    @property
    def title(self) -> str:
        batch = "" if self.example.batch is None else f", batch {self.example.batch}"
        return f"{self.example.name}{batch}, {self.settings.threads} threads"

    def run(self, told: Progress) -> Benchmark:
        example = self.example
        if self.data is not None:
            # Read here, once: the processes could not start workers, and might draw other batches.
            model = load_model(example.name, example.seed)
            example = replace(example, inputs=first_call(model, self.data.loader))
        return benchmark(
            example,
            name=example.name,
            against=self.runtimes,
            progress=told,
            **vars(self.settings),
        )


class Results:
    """The benchmarks that were found, in a file where one is given; each is written as soon as it is there."""

    def __init__(self, path: Path | None, *, again: bool) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        if path is not None and path.exists():
            try:
                self.entries = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
                for entry in self.entries:
                    Benchmark.from_dict(entry)
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(
                    f"{path} is no file of fxopt bench: {type(error).__name__}: {error}", hint="name another one"
                ) from error
        self.again = again

    def known(self, job: Job) -> Benchmark | None:
        """The earlier result of a job, unless it is to be measured again."""
        found = next((entry for entry in self.entries if entry.get("request") == job.request), None)
        return None if found is None or self.again else Benchmark.from_dict(found)

    def add(self, job: Job, found: Benchmark) -> None:
        """Puts a result in the place of an earlier one of the same job, or at the end, and writes the file."""
        entry = {"request": job.request, **found.to_dict()}
        places = [place for place, old in enumerate(self.entries) if old.get("request") == job.request]
        if places:
            self.entries[places[0]] = entry
        else:
            self.entries.append(entry)
        if self.path is not None:
            # In one step: an interrupted run leaves the old file or the new one.
            written = self.path.with_name(self.path.name + ".part")
            written.write_text(
                json.dumps({"benchmarks": self.entries}, indent=1, allow_nan=False) + "\n", encoding="utf-8"
            )
            written.replace(self.path)


@click.command("bench", short_help="Time MODELs on fxopt, eager PyTorch and other runtimes.", epilog=EXIT_CODES)
@click.argument("models", nargs=-1, required=True, type=_ModelType(), metavar="MODEL[@SHAPE,...]...")
@click.option(
    "--against",
    default="eager",
    show_default=True,
    metavar="NAME,...",
    help=f"Runtimes: {', '.join(name for name in RUNTIMES if name != FXOPT)}; all; or fxopt with other options: "
    "fxopt:BACKEND, fxopt:no-PASS, fxopt:no-passes. Eager and fxopt are always measured.",
)
@click.option(
    "--batch", "batches", type=_NumbersType(), default=None, help="Batch sizes, as 1,8: the first size of the inputs."
)
@click.option("--threads", type=_NumbersType(), default=None, help="Numbers of threads, as 1,2. Without: torch's own.")
@click.option(
    "--shape",
    multiple=True,
    type=ShapeType(),
    metavar="SHAPE",
    help="Random input, as 1x3x224x224, once per argument; of all models but those with inputs of their own, as "
    "MODEL@1x3x299x299. Without: what the model's function gives with it, else 1x3x224x224.",
)
@data_option(": its first batch, without labels, is the input of all models.")
@click.option("--seed", type=int, default=Settings.seed, show_default=True, help="Of random weights and inputs.")
@click.option(
    "--randomize-norms/--no-randomize-norms",
    default=None,
    help="Give batch norms that never saw data random statistics. Done by itself for models of installed packages.",
)
@click.option(
    "--rounds", type=click.IntRange(min=1), default=Settings.rounds, show_default=True, help="Turns of each runtime."
)
@click.option(
    "--calls", type=click.IntRange(min=1), default=Settings.calls, show_default=True, help="Timed calls of a turn."
)
@click.option(
    "--pause", type=click.FloatRange(min=0), default=Settings.pause, show_default=True, help="Seconds before each turn."
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=None,
    metavar="FILE.json",
    help="Where to keep the results; what is there already is not measured again.",
)
@click.option("--again", is_flag=True, help="Measure again what --output has already.")
@click.option(
    "--chart",
    type=SavedType(charts.kind_of),
    default=None,
    metavar="FILE",
    help="Draw the results: .svg, .png or .html.",
)
@JSON
def bench_command(
    models: tuple[tuple[str, tuple[Shape, ...]], ...],
    against: str,
    batches: tuple[int, ...] | None,
    threads: tuple[int, ...] | None,
    shape: tuple[Shape, ...],
    data: str | None,
    seed: int,
    randomize_norms: bool | None,
    rounds: int,
    calls: int,
    pause: float,
    output: Path | None,
    again: bool,
    chart: Path | None,
    as_json: bool,
) -> Exit:
    """Time each MODEL in eager PyTorch, compiled by fxopt, and in the runtimes of --against.

    Each runtime has a process of its own; they take turns, and ratios are paired round by round. A runtime that is not
    installed, fails or answers wrongly has that in its line. A MODEL is named as for the other commands; its function
    may also give the inputs: (model, args) or (model, args, kwargs).
    """
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"{output}: there is no folder {output.parent}", hint="make it, or name another one")
    runtimes = tuple(chosen_runtimes(against))
    loaded = None
    if data is not None:
        refuse_beside_data(**{"--shape": shape, "--batch": batches, "MODEL@SHAPE": any(own for _, own in models)})
        loaded = Data(data, load(data, seed))
    jobs = [
        Job(
            Example(name, own or shape, () if own or shape else (PICTURE_SHAPE,), batch, seed, randomize_norms),
            Settings(count, rounds, calls, pause, seed),
            runtimes,
            loaded,
        )
        for name, own in models
        for batch in batches or (None,)
        for count in threads or (torch.get_num_threads(),)
    ]
    results = Results(output, again=again)
    found, failures = [], []
    with stdout_kept(as_json), progress() as bar:
        for job in jobs:
            known = results.known(job)
            try:
                one = job.run(_telling(job, bar)) if known is None else known
            except FxoptError as error:
                if len(jobs) == 1:
                    raise
                failures.append((job, error))
                note(f"{job.title}: {error}")
                continue
            if known is None:
                results.add(job, one)
            found.append(one)
    result = {
        "benchmarks": [one.to_dict() for one in found],
        "means": [mean.to_dict() for mean in means(found)],
        "failures": [
            {"model": job.example.name, "request": job.request, **describe(error)[1]} for job, error in failures
        ],
    }
    show(result, Group(*found, *rich_means(found)), as_json=as_json)
    if chart is not None and found:
        charts.save(found, chart)
        note(f"saved {chart}")
    if failures:
        return describe(failures[0][1])[0]
    statuses = {one[FXOPT].status for one in found}
    return Exit.WRONG_ANSWER if "wrong" in statuses else Exit.FAILED if statuses - {"ok"} else Exit.FINE


def _telling(job: Job, bar: Progress) -> Progress:
    """Progress on the bar where there is a terminal; a line for each runtime that is built where there is none."""

    def told(stage: str, done: int, total: int) -> None:
        bar(f"{job.title}: {stage}", done, total)
        if not sys.stderr.isatty() and not stage.startswith("round "):
            click.echo(f"{job.title}: {stage}", err=True)

    return told
