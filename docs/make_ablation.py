"""`make ablation`: what each step of the compiler is worth in time, and docs/ablation.md.

    python docs/make_ablation.py                  what has no result yet, then the page
    python docs/make_ablation.py --only 'resnet'  models whose name matches
    python docs/make_ablation.py --page           the page alone

Results are kept in build/ablation.json, each as soon as it is there. Meanwhile the machine should do nothing else.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import benchmark_models
from make_benchmarks import machines
from written import fill

import fxopt
from fxopt.bench import Benchmark, Fxopt
from fxopt.plugins import default_pipeline
from fxopt.rewrite import Pass

HERE = Path(__file__).resolve().parent
PAGE = HERE / "ablation.md"
RESULTS = HERE.parent / "build" / "ablation.json"
BEGIN, END = "<!-- tables: written by make ablation -->", "<!-- end of tables -->"

VERTICAL = {"fuse-conv-activation", "fuse-linear-activation"}
ATTENTION = {"fuse-attention"}
HORIZONTAL = {"merge-parallel-branches", "merge-siblings"}
CONCAT = {"eliminate-concat", "allocate-buffers"}


def without(*groups: set[str]) -> tuple[str | tuple[str, ...], ...]:
    """The names of the default pipeline, in its order and groups, but for some passes."""
    gone = set().union(*groups)
    steps: list[str | tuple[str, ...]] = []
    for step in default_pipeline():
        if isinstance(step, Pass):
            steps += [step.name] if step.name not in gone else []
        else:
            steps.append(tuple(current.name for current in step if current.name not in gone))
    return tuple(steps)


#: Each step has all that the steps before it have. The last one, with everything, is the runtime `fxopt`.
STEPS = {
    "capture": Fxopt(backend="aten", passes=()),
    "layout": Fxopt(backend="onednn", passes=()),
    "folding": Fxopt(backend="onednn", passes=without(VERTICAL, ATTENTION, HORIZONTAL, CONCAT)),
    "vertical": Fxopt(backend="onednn", passes=without(ATTENTION, HORIZONTAL, CONCAT)),
    "attention": Fxopt(backend="onednn", passes=without(HORIZONTAL, CONCAT)),
    "horizontal": Fxopt(backend="onednn", passes=without(CONCAT)),
}
#: Beside the row: folding where nothing else is done, as `torch.fx`'s own fuse does it.
ALONE = {"folding alone": Fxopt(backend="aten", passes=without(VERTICAL, ATTENTION, HORIZONTAL, CONCAT))}
NAMES = {"concat": "fxopt"}  # how a column's runtime is called, where it has another name


def measure(options: argparse.Namespace) -> None:
    """Measures the models that have no result yet."""
    options.results.parent.mkdir(parents=True, exist_ok=True)
    done = load(options.results)
    for name in benchmark_models.NAMES:
        if not re.search(options.only, name) or any(one.model == name for one in done):
            continue
        print(name, flush=True)
        build = getattr(benchmark_models, name)
        done.append(
            fxopt.benchmark(
                build, against={**STEPS, **ALONE}, name=name, threads=options.threads, rounds=options.rounds
            )
        )
        text = json.dumps({"benchmarks": [one.to_dict() for one in done]}, indent=1)
        options.results.write_text(text + "\n", encoding="utf-8")


def load(results: Path) -> list[Benchmark]:
    """What has been measured."""
    entries = json.loads(results.read_text(encoding="utf-8"))["benchmarks"] if results.exists() else []
    return [Benchmark.from_dict(entry) for entry in entries]


def columns() -> list[tuple[str, str, str]]:
    """The columns: what each is called, its runtime, and the runtime that it is compared with."""
    row = ["eager", *STEPS, "concat"]
    found = [(name, NAMES.get(name, name), before) for before, name in itertools.pairwise(row)]
    return [("folding alone", "folding alone", "capture"), *found, ("all", "fxopt", "eager")]


def tables(benchmarks: list[Benchmark]) -> str:
    """What stands between the markers of the page."""
    if not benchmarks:
        return "Nothing has been measured yet."
    order = {name: place for place, name in enumerate(benchmark_models.NAMES)}
    benchmarks = sorted(benchmarks, key=lambda one: order.get(one.model, len(order)))
    heads = [name for name, _, _ in columns()]
    lines = [f"| model | eager ms | {' | '.join(heads)} |", f"| --- | ---: |{' ---: |' * len(heads)}"]
    ratios: dict[str, list[float]] = {head: [] for head in heads}
    for one in benchmarks:
        cells = []
        for head, runtime, before in columns():
            ratio = one.speedup(runtime, before)
            if ratio is not None:
                ratios[head].append(ratio.median)
            cells.append("" if ratio is None else f"{ratio.median:.2f}")
        lines.append(f"| {one.model} | {1000 * one['eager'].median:.1f} | {' | '.join(cells)} |")
    means = [f"**{statistics.geometric_mean(found):.2f}**" if found else "" for found in ratios.values()]
    lines.append(f"| geometric mean | | {' | '.join(means)} |")
    return f"{machines(benchmarks)}\n\n" + "\n".join(lines)


def write(results: Path) -> None:
    """Writes the table into the page."""
    fill(PAGE, BEGIN, END, tables(load(results)))


def main() -> None:
    """Measures, unless told not to, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the names shall contain")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.page:
        measure(options)
    write(options.results)


if __name__ == "__main__":
    main()
