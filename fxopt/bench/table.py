"""Benchmarks as tables: for a terminal, and in Markdown."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from fxopt.bench.result import EAGER, FXOPT, Benchmark, Mean, Ratio, Timing, means

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

HEADINGS = (
    "runtime", "median ms", "spread", "times eager", "fxopt's times it", "build s", "peak MB", "held MB", "error",
)  # fmt: skip
MEAN_HEADINGS = ("runtime", "models", "times eager", "fxopt's times it")


def cells(benchmark: Benchmark, timing: Timing) -> tuple[str, ...]:
    """One line of the table, as `HEADINGS` names its cells. What did not run has its status in the second."""
    if not timing.ran:
        return (timing.runtime, timing.status, *("",) * (len(HEADINGS) - 2))
    ours = "" if timing.runtime == FXOPT else _ratio(benchmark.speedup(FXOPT, timing.runtime))
    error = "" if timing.runtime == EAGER else f"{timing.error:.0e}"
    if timing.status == "wrong":
        error = f"WRONG {error}"
    memory = timing.memory
    return (
        timing.runtime,
        milliseconds(timing),
        f"{timing.spread:.0%}",
        "1" if timing.runtime == EAGER else _ratio(benchmark.speedup(timing.runtime)),
        ours,
        _build(timing),
        _megabytes(memory.peak if memory else None),
        _megabytes(memory.held if memory else None),
        error,
    )


def milliseconds(timing: Timing) -> str:
    """The median of a runtime that ran, to three digits or more."""
    value = 1000 * timing.median
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3}f}"


def _ratio(ratio: Ratio | None) -> str:
    return "" if ratio is None else f"{ratio.median:.2f} ±{ratio.spread / 2:.0%}"


def _build(timing: Timing) -> str:
    if timing.runtime == EAGER or timing.build_seconds is None:
        return ""
    total, capture = timing.build_seconds, timing.stages.get("capture")
    return f"{total:.1f}" if capture is None else f"{total:.1f} ({capture:.1f} + {total - capture:.1f})"


def _megabytes(number: int | None) -> str:
    return "?" if number is None else f"{number / 1e6:.0f}"


def remarks(benchmark: Benchmark) -> list[str]:
    """What is to be said below the table: why a runtime has no times, or what is wrong with its answer."""
    return [f"{one.runtime}: {one.status}: {one.detail}" for one in benchmark.timings if one.status != "ok"]


def mean_cells(mean: Mean) -> tuple[str, ...]:
    """One line of the table of means, as `MEAN_HEADINGS` names its cells."""
    ours = "" if mean.runtime == FXOPT or mean.fxopt_times_it is None else f"{mean.fxopt_times_it:.2f}"
    return mean.runtime, str(mean.models), f"{mean.times_eager:.2f}", ours


def _mean_title(batch: int | None, threads: int | None, all_models: int) -> str:
    return f"Geometric means over {all_models} models, batch {batch}, {threads} thread{'' if threads == 1 else 's'}"


def _groups(benchmarks: Sequence[Benchmark]) -> Iterable[tuple[str, list[Mean]]]:
    """The means of each batch size and number of threads that more than one model has been measured with."""
    groups: dict[tuple[int | None, int | None], list[Mean]] = {}
    for mean in means(benchmarks):
        groups.setdefault((mean.batch, mean.threads), []).append(mean)
    for (batch, threads), group in groups.items():
        models = {one.model for one in benchmarks if (one.batch, one.settings.threads) == (batch, threads)}
        if len(models) > 1:
            yield _mean_title(batch, threads, len(models)), group


# -- terminal --------------------------------------------------------------------------------------------------------


def rich_table(benchmark: Benchmark) -> Group:
    """The benchmark for a terminal: the table, and remarks below it."""
    from rich.console import Group
    from rich.text import Text

    table = _rich(benchmark.title, HEADINGS)
    styles = {"ok": "", "wrong": "bold red", "failed": "red", "not installed": "dim"}
    for timing in benchmark.timings:
        style = "bold" if timing.runtime == FXOPT and timing.status == "ok" else styles[timing.status]
        table.add_row(*(Text(cell, style) for cell in cells(benchmark, timing)))
    return Group(table, *map(Text, remarks(benchmark)))


def rich_means(benchmarks: Sequence[Benchmark]) -> list[Table]:
    """Tables of the geometric means, where there are several models."""
    found = []
    for title, group in _groups(benchmarks):
        table = _rich(title, MEAN_HEADINGS)
        for mean in group:
            table.add_row(*mean_cells(mean))
        found.append(table)
    return found


def _rich(title: str, headings: Sequence[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for place, heading in enumerate(headings):
        number = place > 0 and heading != "error"
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    return table


def plain(benchmark: Benchmark) -> str:
    """The table as text of 120 columns."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=120).print(rich_table(benchmark))
    return text.getvalue().rstrip()


# -- Markdown --------------------------------------------------------------------------------------------------------


def markdown(benchmarks: Sequence[Benchmark], level: int = 3) -> str:
    """Every benchmark under a heading of its own, and the means after them."""
    mark, parts = "#" * level, []
    for benchmark in benchmarks:
        lines = [cells(benchmark, timing) for timing in benchmark.timings]
        parts.append(f"{mark} {benchmark.title}\n\n{_rows(HEADINGS, lines)}")
        if said := remarks(benchmark):
            parts.append("\n".join(f"- {_escape(text)}" for text in said))
    for title, group in _groups(benchmarks):
        parts.append(f"{mark} {title}\n\n{_rows(MEAN_HEADINGS, map(mean_cells, group))}")
    return "\n\n".join(parts)


def overview(benchmarks: Sequence[Benchmark], value: Callable[[Benchmark, Timing], str]) -> str:
    """One line for each benchmark, one column for each runtime: `value` gives the cell."""
    names = list(dict.fromkeys(timing.runtime for one in benchmarks for timing in one.timings))
    lines = []
    for one in benchmarks:
        by_name = {timing.runtime: timing for timing in one.timings}
        values = (value(one, by_name[name]) if name in by_name else "" for name in names)
        lines.append((one.short_name, *values))
    return _rows(("model", *names), lines)


def median_cell(benchmark: Benchmark, timing: Timing) -> str:
    """A cell of the overview: the median in milliseconds, or what is wrong."""
    if not timing.ran:
        return timing.status
    return milliseconds(timing) + (" (wrong)" if timing.status == "wrong" else "")


def _rows(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = f"| --- |{' ---: |' * (len(headings) - 1)}"
    rows = [f"| {' | '.join(map(_escape, line))} |" for line in (headings, *lines)]
    return "\n".join([rows[0], rule, *rows[1:]])


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
