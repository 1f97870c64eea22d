"""`make onnx`: what the rewrites leave in ONNX and what that is worth in ONNX Runtime, and docs/exporting.md.

    python docs/make_onnx.py                    counts nodes, measures what has no result yet, then the page
    python docs/make_onnx.py --only 'resnet'    models whose name matches
    python docs/make_onnx.py --count            counts alone, then the page
    python docs/make_onnx.py --page             the page alone

Results are kept in build/onnx.json, each as soon as it is there. While it measures the machine should do nothing else.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import benchmark_models
from make_benchmarks import machines
from written import fill, table

import fxopt
from fxopt.bench import Benchmark, OnnxRuntime

HERE = Path(__file__).resolve().parent
PAGE = HERE / "exporting.md"
RESULTS = HERE.parent / "build" / "onnx.json"
BEGIN, END = "<!-- tables: written by make onnx -->", "<!-- end of tables -->"

NAMES = ("resnet18", "googlenet", "densenet121", "mobilenet_v2", "squeezenet1_1", "bert_base")
ORIGINAL, OURS = "the original", "ours"
BY_ITSELF = "by itself: "  # ONNX Runtime without its graph optimisations
EXPORTS = {ORIGINAL: OnnxRuntime(), OURS: OnnxRuntime(rewritten=True)}
RUNTIMES = {
    **EXPORTS,
    BY_ITSELF + ORIGINAL: OnnxRuntime(optimised=False),
    BY_ITSELF + OURS: OnnxRuntime(rewritten=True, optimised=False),
}

Counts = dict[str, dict[str, dict[str, int]]]  # model -> export -> what is counted -> its number


def count(name: str) -> dict[str, dict[str, int]]:
    """For the original and ours: nodes in the file, layers and norms among them, and nodes that ONNX Runtime runs."""
    import onnx
    import onnxruntime

    model, args, kwargs = getattr(benchmark_models, name)()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for export, runtime in EXPORTS.items():
            file, run = Path(folder) / f"{export}.onnx", Path(folder) / f"{export}, run.onnx"
            runtime.write(model, args, kwargs, file)
            options = runtime.options()
            options.optimized_model_filepath = str(run)
            options.log_severity_level = 3  # it warns that what it writes is for this machine
            onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            kinds = Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)
            nodes = onnx.load(run, load_external_data=False).graph.node
            layers = sum(kinds[kind] for kind in ("Conv", "Gemm", "MatMul"))
            norms = kinds["BatchNormalization"]
            found[export] = {"file": kinds.total(), "layers": layers, "norms": norms, "run": len(nodes)}
    return found


def work(options: argparse.Namespace) -> None:
    """Counts and measures the models that have no result yet."""
    options.results.parent.mkdir(parents=True, exist_ok=True)
    counts, done = load(options.results)
    for name in (name for name in NAMES if re.search(options.only, name)):
        print(name, flush=True)
        counts[name] = count(name)
        if not options.count and not any(one.model == name for one in done):
            done.append(
                fxopt.benchmark(
                    getattr(benchmark_models, name),
                    against=RUNTIMES,
                    name=name,
                    threads=options.threads,
                    rounds=options.rounds,
                )
            )
        kept = {"counts": counts, "benchmarks": [one.to_dict() for one in done]}
        options.results.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def load(results: Path) -> tuple[Counts, list[Benchmark]]:
    """What has been counted and measured."""
    kept: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    return kept.get("counts", {}), [Benchmark.from_dict(entry) for entry in kept.get("benchmarks", [])]


def nodes(counts: Counts) -> str:
    """The table of counts."""
    head = ("model", "nodes", "ours", "layers", "ours", "batch norms", "ours", "run by ONNX Runtime", "ours")
    rows = []
    for name in (name for name in NAMES if name in counts):
        found = counts[name]
        kinds = ("file", "layers", "norms", "run")
        rows.append([name, *(str(found[export][kind]) for kind in kinds for export in EXPORTS)])
    return table(head, rows)


def times(benchmarks: list[Benchmark]) -> str:
    """The table of times."""
    head = ("model", "original ms", "ours ms", "ratio", "by itself: original ms", "ours ms", "ratio", "error")
    rows, ratios = [], []
    for one in sorted(benchmarks, key=lambda one: NAMES.index(one.model)):
        cells = []
        for prefix in ("", BY_ITSELF):
            pair = [one[prefix + export] for export in EXPORTS]
            ratio = one.speedup(prefix + OURS, prefix + ORIGINAL)
            cells += [f"{1000 * line.median:.2f}" if line.ran else line.status for line in pair]
            cells.append("" if ratio is None else f"{ratio.median:.2f} ±{100 * ratio.spread / 2:.0f}%")
        ratios.append(one.speedup(OURS, ORIGINAL))
        rows.append([one.model, *cells, "" if one[OURS].error is None else f"{one[OURS].error:.0e}"])
    means = [ratio.median for ratio in ratios if ratio is not None]
    if means:
        rows.append(["geometric mean", "", "", f"**{statistics.geometric_mean(means):.2f}**", "", "", "", ""])
    return f"{machines(benchmarks)}\n\n{table(head, rows)}"


def write(results: Path) -> None:
    """Writes the tables into the page."""
    counts, benchmarks = load(results)
    parts = [nodes(counts) if counts else "Nothing has been counted yet."]
    parts.append(times(benchmarks) if benchmarks else "Times have not been measured yet.")
    fill(PAGE, BEGIN, END, "\n\n".join(parts))


def main() -> None:
    """Counts and measures, unless told not to, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the names shall contain")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", action="store_true", help="count nodes, measure nothing")
    parser.add_argument("--page", action="store_true", help="neither count nor measure, write the page")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not options.page:
        work(options)
    write(options.results)


if __name__ == "__main__":
    main()
