"""`make bench`: measures the models of docs/benchmark_models.py, and writes docs/benchmarks.md and its chart.

    python docs/make_benchmarks.py                      what has no result yet, then the page
    python docs/make_benchmarks.py --only 'resnet'      those whose name matches; the page has all that is there
    python docs/make_benchmarks.py --again              all anew
    python docs/make_benchmarks.py --page               the page alone

Results are kept in build/benchmarks.json, each as soon as it is there. Meanwhile the machine should do nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from benchmark_models import NAMES
from written import fill

from fxopt import cli
from fxopt.bench import Benchmark, chart, means, table
from fxopt.bench.result import EAGER, FXOPT, Timing

HERE = Path(__file__).resolve().parent
PAGE = HERE / "benchmarks.md"
CHART = HERE / "images" / "benchmarks.svg"
RESULTS = HERE.parent / "build" / "benchmarks.json"
BEGIN, END = "<!-- tables: written by make bench -->", "<!-- end of tables -->"


def measure(options: argparse.Namespace) -> int:
    """Runs `fxopt bench` on what was asked for; its exit code."""
    options.results.parent.mkdir(parents=True, exist_ok=True)
    chosen = [f"docs/benchmark_models.py:{name}" for name in NAMES if re.search(options.only, name)]
    arguments = [*chosen, "--against", options.against, "--batch", options.batch, "--threads", options.threads]
    arguments += ["--rounds", str(options.rounds), "--calls", str(options.calls), "--output", str(options.results)]
    return cli.run(["bench", *arguments, *(["--again"] if options.again else [])])


def times_eager(benchmark: Benchmark, timing: Timing) -> str:
    """A cell: how many times as fast as eager, in bold for the fastest right answer."""
    ratio = benchmark.speedup(timing.runtime)
    if timing.status != "ok" or ratio is None:
        return timing.status
    fastest = min(one.median for one in benchmark.timings if one.status == "ok")
    return f"**{ratio.median:.2f}**" if timing.median == fastest else f"{ratio.median:.2f}"


def build_seconds(benchmark: Benchmark, timing: Timing) -> str:
    """A cell: seconds to build, for fxopt those of capture and of the rest."""
    if not timing.ran or timing.build_seconds is None or timing.runtime == EAGER:
        return ""
    capture = timing.stages.get("capture")
    if not timing.runtime.startswith(FXOPT) or capture is None:
        return f"{timing.build_seconds:.1f}"
    return f"{capture:.1f} + {timing.build_seconds - capture:.1f}"


def held_megabytes(benchmark: Benchmark, timing: Timing) -> str:
    """A cell: millions of bytes at the peak, and held, beyond the model."""
    if not timing.ran or timing.memory is None or timing.memory.peak is None or timing.memory.held is None:
        return ""
    return f"{timing.memory.peak / 1e6:.0f} / {timing.memory.held / 1e6:.0f}"


OVERVIEWS = (
    ("Milliseconds", "The median of a call.", table.median_cell),
    ("Times as fast as eager", "The median of the ratios round by round; the fastest in bold.", times_eager),
    ("Seconds to build", "To the first answer, caches cold; for fxopt capture + the rest.", build_seconds),
    ("Megabytes at the peak / held", "Beyond the process with the model.", held_megabytes),
)


def tables(benchmarks: list[Benchmark]) -> str:
    """What stands between the markers of the page."""
    if not benchmarks:
        return "Nothing has been measured yet."
    parts = [machines(benchmarks), "![Times as fast as eager PyTorch: a bar for each runtime](images/benchmarks.svg)"]
    groups: dict[tuple[int | None, int | None], list[Benchmark]] = {}
    for benchmark in benchmarks:
        groups.setdefault((benchmark.batch, benchmark.settings.threads), []).append(benchmark)
    for (batch, threads), group in sorted(groups.items(), key=str):
        parts.append(f"## Batch {batch}, {threads} thread{'' if threads == 1 else 's'}")
        for title, says, value in OVERVIEWS:
            parts.append(f"**{title}.** {says}\n\n{table.overview(group, value)}")
            if value is times_eager:
                parts[-1] += mean_row(group)
    parts.append("## Every figure\n\n" + table.markdown(benchmarks))
    return "\n\n".join(parts)


def mean_row(group: list[Benchmark]) -> str:
    """A row for the table of ratios: the geometric mean of each runtime over the models that it answered rightly."""
    found = {mean.runtime: mean.times_eager for mean in means(group)}
    names = dict.fromkeys(timing.runtime for one in group for timing in one.timings)
    return f"\n| geometric mean | {' | '.join(f'{found[name]:.2f}' if name in found else '' for name in names)} |"


def machines(benchmarks: list[Benchmark]) -> str:
    """The machines and versions that the results come from."""
    places = {
        f"{one.machine['cores']} cores of {one.machine['processor']} ({one.machine['kernels']} kernels), "
        f"{one.machine['system']}, Python {one.machine['python']}"
        for one in benchmarks
    }
    versions = {timing.version for one in benchmarks for timing in one.timings if timing.version}
    turns = {f"{one.settings.rounds} rounds of {one.settings.calls} calls" for one in benchmarks}
    parts = ("; ".join(sorted(places)), ", ".join(sorted(versions)), "; ".join(sorted(turns)))
    return f"Measured on {'. '.join(parts)}."


def write(results: Path) -> None:
    """Writes the tables into the page, and the chart."""
    entries = json.loads(results.read_text(encoding="utf-8"))["benchmarks"] if results.exists() else []
    order = {name: place for place, name in enumerate(NAMES)}
    measured = [Benchmark.from_dict(entry) for entry in entries]
    latest = {(one.model, one.batch, one.settings.threads): one for one in measured}  # of those with other rounds, too
    found = list(latest.values())
    found.sort(key=lambda one: (one.settings.threads or 0, one.batch or 0, order.get(one.short_name, len(order))))
    fill(PAGE, BEGIN, END, tables(found))
    if found:
        chart.save(found, CHART)


def main() -> int:
    """Measures, unless told not to, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the names shall contain")
    parser.add_argument("--against", default="all", help="runtimes, as of fxopt bench")
    parser.add_argument("--batch", default="1", help="batch sizes, as 1,8")
    parser.add_argument("--threads", default="2", help="numbers of threads, as 1,2")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="measure what has results, too")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.results = options.results.resolve()
    os.chdir(HERE.parent)  # the models are named from here
    code = 0 if options.page else measure(options)
    write(options.results)
    return code


if __name__ == "__main__":
    sys.exit(main())
