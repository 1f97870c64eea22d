"""The sweep: every model of the zoo through both front ends, compared with eager and with each other.

    make sweep                                     all of it, then docs/sweep.md from what was found
    python tests/sweep.py --only 'timm:vit'        those whose name matches; --again forgets earlier results

Each model runs in a process of its own under a time and memory limit, and leaves one JSON line in build/sweep.jsonl;
what is there is not run again. The exit code is 1 if a model gave a wrong answer, failed verification, or crashed.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt import ir, normalize
from fxopt.capture import Captured, Inputs, capture_export, capture_symbolic, private_copy
from fxopt.errors import CaptureError, FxoptError
from fxopt.lowering.backend import set_concrete_values
from sweep_models import build, names
from zoo import import_timm, import_torchvision

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "build" / "sweep.jsonl"
TABLE = HERE.parent / "docs" / "sweep.md"

# -- one model -------------------------------------------------------------------------------------------------------


def normal_form(captured: Captured, inputs: Inputs) -> fx.GraphModule:
    """The captured module once shapes are known and constant ones propagated, before any rewrite."""
    module, _ = ir.copy(captured.module)
    set_concrete_values(module, inputs.tensors)
    normalize.normalize(module)
    return module


def operations(module: fx.GraphModule) -> Counter[str]:
    """How many of each compute operation a module has."""
    return Counter(ir.target_name(node) for node in module.graph.nodes if ir.is_compute(node))


def run(module: fx.GraphModule, inputs: Inputs) -> list[Any]:
    """What a module of the normal form gives."""
    with torch.no_grad():
        return list(fx.Interpreter(module).run(*(tensor.clone() for tensor in inputs.tensors)))


def equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """The same shape, dtype and bits; NaN where there is NaN."""
    return left.shape == right.shape and left.dtype == right.dtype and torch.allclose(left, right, 0, 0, equal_nan=True)


def same(left: list[Any], right: list[Any]) -> bool:
    """Whether two lists of results are the same bits."""
    return len(left) == len(right) and all(
        equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(left, right, strict=True)
    )


def leaves(result: Any) -> list[Any]:
    """The flat results of a call."""
    return list(pytree.tree_leaves(result))


def compare_front_ends(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Both captures of a model: their operations, and whether each gives eager's bits.

    `error` stands where a front end cannot take the model; `difference` lists operations in other numbers.
    """
    inputs = Inputs.flatten((x,), {})
    with torch.no_grad():
        expected = leaves(model(x))
    found: dict[str, Any] = {}
    counts: dict[str, Counter[str]] = {}
    for front_end in ("symbolic", "export"):
        start = time.perf_counter()
        try:
            private = private_copy(model)
            captured = capture_symbolic(private) if front_end == "symbolic" else capture_export(private, inputs)
        except CaptureError as error:
            found[front_end] = {"error": error.message, "line": error.line}
            continue
        module = normal_form(captured, inputs)
        counts[front_end] = operations(module)
        found[front_end] = {
            "seconds": round(time.perf_counter() - start, 2),
            "nodes": sum(counts[front_end].values()),
            "equal": same(expected, run(module, inputs)),
        }
    if len(counts) == 2:
        symbolic, export = counts["symbolic"], counts["export"]
        found["difference"] = {
            name: [symbolic[name], export[name]] for name in sorted(symbolic | export) if symbolic[name] != export[name]
        }
    return found


def compile_both_ways(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """What `fxopt.compile` makes of a model without and with inputs: nodes, seconds, the verdict, what went wrong."""
    found = {}
    with torch.no_grad():
        expected = leaves(model(x))
    for way in ("traced", "exported"):
        start = time.perf_counter()
        try:
            fast = fxopt.compile(model) if way == "traced" else fxopt.compile(model, (x,))
            with torch.no_grad():
                actual = leaves(fast(x))
        except FxoptError as error:
            found[way] = {"error": str(error)}
            continue
        report = fast.report
        error = max(
            (float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in zip(actual, expected, strict=True)
             if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel()),
            default=0.0,
        )  # fmt: skip
        found[way] = {
            "seconds": round(time.perf_counter() - start, 2),
            "front_end": report.front_end,
            "before": report.before,
            "after": report.after,
            "backend": report.backend,
            "ok": report.verdict is not None and report.verdict.ok,
            "error_against_eager": error,
            "notices": report.notices,
            "undone": [f"{r.name}: {r.reason}" for r in report.passes if r.status in ("failed", "rolled back")],
        }
    return found


def sweep_one(name: str) -> dict[str, Any]:
    """One model's line."""
    torch.set_num_threads(1)
    model, x = build(name)
    front_ends = compare_front_ends(model, x)
    return {"input": list(x.shape), **front_ends, **compile_both_ways(model, x)}


# -- all of them -----------------------------------------------------------------------------------------------------


def in_own_process(name: str, seconds: int, gigabytes: int, script: str = __file__) -> dict[str, Any]:
    """One model's line, from a process of its own that runs `script --one name`; what it dies of is its `crash`."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (gigabytes << 30, gigabytes << 30))

    command = [sys.executable, script, "--one", name]
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, preexec_fn=limit)
    except subprocess.TimeoutExpired:
        return {"name": name, "crash": f"over {seconds} s", "wall": seconds}
    wall = round(time.perf_counter() - start, 1)
    if done.returncode != 0:
        return {"name": name, "crash": done.stderr.strip()[-2000:] or f"exit code {done.returncode}", "wall": wall}
    return {"name": name, **json.loads(done.stdout.splitlines()[-1]), "wall": wall}


def is_bad(line: dict[str, Any]) -> bool:
    """Whether a line shows a crash, a wrong answer, a pass undone, or a compilation that failed or was not verified."""
    ways = [line.get(way, {}) for way in ("traced", "exported")]
    return "crash" in line or any("error" in way or not way["ok"] or way["undone"] for way in ways)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The lines so far by name, the latest of each."""
    if not path.exists():
        return {}
    return {line["name"]: line for line in map(json.loads, path.read_text().splitlines())}


# -- the table -------------------------------------------------------------------------------------------------------

#: Why two captures may differ: the reason of each exception, by what the names of the operations show.
HEAD = """# The sweep

Every architecture of `tests/sweep_models.py` through both front ends, with random weights and random batch-norm
statistics, batch 2. This page is written by

    {command}

on torch {torch}, torchvision {torchvision}, timm {timm}; `make sweep` runs it.
{summary}

- **nodes**: compute operations of the normal form, before any rewrite, shapes known: symbolic, export. "same" says that
  both have the same operations in the same numbers. "=" behind a number: its outputs are eager's, bit for bit.
- **compiled**: compute nodes before and after the default passes; the largest difference from eager over eager's
  largest value; seconds to compile without inputs (traced, and finished at the first call) and with (exported),
  verification included. Other work ran on the machine meanwhile: the seconds are upper bounds.
"""


def _front_end(line: dict[str, Any], name: str) -> str:
    found = line.get(name, {})
    if "error" in found or not found:
        return "—"
    return f"{found['nodes']}{' =' if found['equal'] else ' ≠'}"


def _row(line: dict[str, Any]) -> str:
    name = line["name"].partition(":")[2]
    if "crash" in line:
        return f"| {name} | | | | | crashed: {line['crash'].splitlines()[-1][:80]} | | | |"
    difference = line.get("difference")
    agree = "" if difference is None else "same" if not difference else "differ"
    best = line["exported"] if "before" in line["exported"] else line["traced"]
    if "before" not in best:
        ends = f"{_front_end(line, 'symbolic')} | {_front_end(line, 'export')}"
        return f"| {name} | {line['input'][-1]} | {ends} | {agree} | not compiled | | | |"
    seconds = [line[way].get("seconds", "—") for way in ("traced", "exported")]
    error = max(line[way].get("error_against_eager", 0.0) for way in ("traced", "exported"))
    return (
        f"| {name} | {line['input'][-1]} | {_front_end(line, 'symbolic')} | {_front_end(line, 'export')} | {agree} "
        f"| {best['before']} → {best['after']} | {error:.0e} | {seconds[0]} | {seconds[1]} |"
    )


def table(lines: dict[str, dict[str, Any]], command: str) -> str:
    """docs/sweep.md."""
    done = [lines[name] for name in names() if name in lines]
    both = [line for line in done if "difference" in line]
    alike = [line for line in both if not line["difference"]]
    equal = [line for line in done if all(line.get(f, {}).get("equal", True) for f in ("symbolic", "export"))]
    good = [line for line in done if not is_bad(line)]
    summary = (
        f"Of {len(done)} models, {len(good)} compile both ways and verify; symbolic tracing takes {len(both)}, "
        f"and of these {len(alike)} have the same operations from both front ends. "
        "The captured graph gives eager's very bits for "
        f"{len(equal)}."
    )
    versions = {"torch": torch.__version__.partition("+")[0]}
    versions["torchvision"] = import_torchvision().__version__.partition("+")[0]
    versions["timm"] = import_timm().__version__
    text = [HEAD.format(command=command, summary=summary, **versions)]
    for zoo in ("torchvision", "timm"):
        text.append(
            f"\n## {zoo}\n\n| model | size | symbolic | export | operations | nodes | error | traced s | exported s |"
        )
        text.append("| --- | ---: | ---: | ---: | --- | --- | ---: | ---: | ---: |")
        text += [_row(line) for line in done if line["name"].startswith(zoo + ":")]
    text.append("\n## Where the two front ends differ\n")
    for line in both:
        if line["difference"]:
            parts = ", ".join(f"{name} {left} and {right}" for name, (left, right) in line["difference"].items())
            text.append(f"- {line['name']} (symbolic and export): {parts}")
    text.append("\n## What symbolic tracing does not take\n\nThese are captured by torch.export at their first call.\n")
    for line in done:
        error = line.get("symbolic", {}).get("error")
        if error:
            where = _place(line["symbolic"].get("line") or "")
            text.append(f"- {line['name']}: {_short(error)}{f' ({where})' if where else ''}")
    unequal = [line for line in done if line not in equal]
    if unequal:
        text.append("\n## Where the captured graph rounds otherwise than eager\n")
        text += [f"- {line['name']}" for line in unequal]
    bad = [line for line in done if is_bad(line)]
    if bad:
        text.append("\n## What fails\n")
        for line in bad:
            reasons = [line["crash"].splitlines()[-1]] if "crash" in line else [
                _short(line[way].get("error") or "; ".join(line[way]["undone"]) or "not verified")
                for way in ("traced", "exported") if "error" in line[way] or line[way]["undone"] or not line[way]["ok"]
            ]  # fmt: skip
            text.append(f"- {line['name']}: {'; '.join(reasons)}")
    missing = [name for name in names() if name not in lines]
    if missing:
        text.append("\n## Not run yet\n\n" + ", ".join(missing))
    return "\n".join(text) + "\n"


def _short(text: str) -> str:
    first = text.strip().splitlines()[0].removeprefix("the model cannot be traced symbolically: ")
    return re.sub(r"\s+", " ", first)[:140]


def _place(line: str) -> str:
    """`timm/layers/x.py:12 in forward` without the folder that it is installed in."""
    return re.sub(r"^.*site-packages/", "", line)


def main() -> int:
    """Runs what is missing, one by one, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the names (zoo:model) shall contain")
    parser.add_argument("--again", action="store_true", help="run what has results, too")
    parser.add_argument("--bad", action="store_true", help="run again what failed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--seconds", type=int, default=600, help="time limit of one model")
    parser.add_argument("--gigabytes", type=int, default=12, help="limit of one model's address space")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(sweep_one(options.one)))
        return 0
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = read(options.results)
    chosen = [name for name in names() if re.search(options.only, name)]
    for name in chosen:
        if name in known and not options.again and not (options.bad and is_bad(known[name])):
            continue
        line = in_own_process(name, options.seconds, options.gigabytes)
        with options.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        known[name] = line
        print(
            f"{name}: {'BAD' if is_bad(line) else 'ok'} in {line['wall']} s, differing: {line.get('difference')}",
            flush=True,
        )
    options.table.write_text(table(known, "python tests/sweep.py --table docs/sweep.md"))
    return int(any(is_bad(known[name]) for name in chosen))


if __name__ == "__main__":
    sys.exit(main())
