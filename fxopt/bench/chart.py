"""Benchmarks as a chart, a panel for each model, a bar for each runtime: as SVG, PNG, or an HTML page with figures."""

from __future__ import annotations

import math
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fxopt import page
from fxopt.bench.result import EAGER, FXOPT, Benchmark, Timing
from fxopt.bench.table import HEADINGS, cells, milliseconds, remarks
from fxopt.errors import RenderError, UsageError

SUFFIXES = ("svg", "png", "html")

#: Sizes in pixels: a panel, the space for names, a bar with the space below it, the head of a panel, the margins.
PANEL, NAMES, VALUES, STEP, HEAD, MARGIN, TITLE = 460, 118, 118, 19, 30, 20, 56


@dataclass(frozen=True)
class Bar:
    """One runtime: where its bar stands and how long it is, in pixels; what is written beside it."""

    runtime: str
    kind: str
    top: int
    length: float
    text: str


@dataclass(frozen=True)
class Panel:
    """One benchmark: its place in pixels, its title, its bars, and where eager's speed is on the axis."""

    left: int
    top: int
    title: str
    bars: tuple[Bar, ...]
    one: float
    height: int


@dataclass(frozen=True)
class Chart:
    """All panels, and the size of the picture in pixels."""

    panels: tuple[Panel, ...]
    width: int
    height: int
    title: str
    subtitle: str


def layout(benchmarks: Sequence[Benchmark]) -> Chart:
    """Panels in rows of up to three, bars on one scale: how many times as fast as eager."""
    if not benchmarks:
        raise UsageError("there is nothing to draw", hint="measure something first")
    ratios = [
        ratio.median
        for one in benchmarks
        for timing in one.timings
        if timing.ran and (ratio := one.speedup(timing.runtime)) is not None
    ]
    most = max(1.0, *ratios)
    scale = (PANEL - NAMES - VALUES) / most
    columns = min(3, math.ceil(math.sqrt(len(benchmarks))))
    panels, top, width = [], TITLE + MARGIN, 0
    for start in range(0, len(benchmarks), columns):
        row = benchmarks[start : start + columns]
        height = HEAD + STEP * max(len(one.timings) for one in row)
        for column, one in enumerate(row):
            left = MARGIN + column * (PANEL + MARGIN)
            panels.append(_panel(one, left, top, scale))
            width = max(width, left + PANEL + MARGIN)
        top += height + MARGIN
    return Chart(
        tuple(panels), width, top, "Times as fast as eager PyTorch", "Longer is faster. The line is eager's own speed."
    )


def _panel(benchmark: Benchmark, left: int, top: int, scale: float) -> Panel:
    bars = tuple(_bar(benchmark, timing, HEAD + STEP * place, scale) for place, timing in enumerate(benchmark.timings))
    return Panel(left, top, benchmark.title, bars, NAMES + scale, STEP * len(bars))


def _bar(benchmark: Benchmark, timing: Timing, top: int, scale: float) -> Bar:
    ratio = benchmark.speedup(timing.runtime)
    if ratio is None:
        return Bar(timing.runtime, "none", top, 0, timing.status)
    kind = "wrong" if timing.status == "wrong" else "ours" if timing.runtime.startswith(FXOPT) else "peer"
    time = f"{milliseconds(timing)} ms"
    text = time if timing.runtime == EAGER else f"{ratio.median:.2f}×  {time}"
    return Bar(timing.runtime, kind, top, ratio.median * scale, text + (" WRONG" if kind == "wrong" else ""))


# -- files -----------------------------------------------------------------------------------------------------------


def kind_of(path: Path) -> str:
    """How a chart is saved under a path.

    Raises UsageError for a suffix that is none of SUFFIXES, RenderError where the program for it is missing.
    """
    kind = page.kind_of(path, SUFFIXES, "a chart")
    if kind == "png" and shutil.which("rsvg-convert") is None:
        raise RenderError(
            "a chart as .png is drawn by the program `rsvg-convert`, which is not installed",
            hint="install the system package librsvg2-bin (Fedora: librsvg2-tools), or save as .svg or .html",
        )
    return kind


def to_svg(benchmarks: Sequence[Benchmark]) -> str:
    """The chart as SVG that needs nothing else; it follows the reader's light or dark scheme."""
    return page.filled("chart.svg", chart=layout(benchmarks))


def to_html(benchmarks: Sequence[Benchmark]) -> str:
    """The chart and all figures as tables, as one page that needs nothing else."""
    from markupsafe import Markup

    tables = [(one.title, [cells(one, timing) for timing in one.timings], remarks(one)) for one in benchmarks]
    picture = Markup(to_svg(benchmarks))  # the template has escaped every name in it
    machines = list(dict.fromkeys(", ".join(one.machine.values()) for one in benchmarks))
    return page.filled("chart.html", picture=picture, headings=HEADINGS, tables=tables, machines=machines)


def save(benchmarks: Sequence[Benchmark], path: Path) -> Path:
    """Writes the chart as its path's suffix says: .svg, .png or .html; returns the path.

    Raises UsageError for another suffix, RenderError where `rsvg-convert` is needed and is missing or fails.
    """
    kind = kind_of(path)
    text = to_html(benchmarks) if kind == "html" else to_svg(benchmarks)
    if kind != "png":
        path.write_text(text, encoding="utf-8")
        return path
    done = subprocess.run(
        ["rsvg-convert", "--format=png", "--zoom=2", "--background-color=white"],
        input=text.encode(), capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise RenderError(
            f"`rsvg-convert` failed: {said[0] if said else f'exit status {done.returncode}'}",
            hint="save as .svg or .html instead",
        )
    path.write_bytes(done.stdout)
    return path
