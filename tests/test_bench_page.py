"""docs/benchmarks.md as `make bench` writes it: which models, which tables, nothing but what is between its markers."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fxopt.bench import Benchmark, Memory, Timing
from fxopt.bench.result import Settings

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/make_benchmarks.py, imported."""
    return imported("make_benchmarks", monkeypatch)


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of docs, as a module."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(DOCS)])
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(model: str, threads: int) -> Benchmark:
    """eager, fxopt twice as fast, and a peer that is not there."""
    memory = Memory(10**8, 3 * 10**7, 2 * 10**7)
    timings = (
        Timing("eager", "ok", "", (0.2,), 0.2, {}, memory, 0.0, "torch 2"),
        Timing("fxopt", "ok", "", (0.1,), 1.5, {"capture": 0.5}, memory, 1e-7, "fxopt 1"),
        Timing("openvino", "not installed", "pip install openvino"),
    )
    machine = {
        "processor": "a fast one",
        "cores": "2",
        "kernels": "AVX2",
        "system": "Linux",
        "python": "3",
        "torch": "2",
    }
    return Benchmark(f"docs/benchmark_models.py:{model}", ("1x3",), Settings(threads), machine, timings)


def test_every_model_is_there(script: ModuleType) -> None:
    models = sys.modules["benchmark_models"]
    assert len(set(script.NAMES)) == 16
    assert all(callable(getattr(models, name)) for name in script.NAMES)


def test_the_page_has_its_markers(script: ModuleType) -> None:
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert text.count(script.BEGIN) == text.count(script.END) == 1


def test_tables_go_between_the_markers(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(f"before {script.BEGIN} stale {script.END} after")
    monkeypatch.setattr(script, "PAGE", page)
    monkeypatch.setattr(script, "CHART", tmp_path / "chart.svg")
    script.write(results)
    assert "Nothing has been measured yet." in page.read_text()
    found = [made("vgg16", 2), made("resnet18", 2), made("resnet18", 1)]
    results.write_text(json.dumps({"benchmarks": [one.to_dict() for one in found]}))
    script.write(results)
    text = page.read_text()
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert "stale" not in text
    assert (
        "Measured on 2 cores of a fast one (AVX2 kernels), Linux, Python 3. fxopt 1, torch 2. 7 rounds of 5 calls."
        in text
    )
    assert text.index("Batch 1, 1 thread\n") < text.index("Batch 1, 2 threads\n")
    for row in ("| resnet18 | 200 | 100 | not installed |", "| vgg16 | 1.00 | **2.00** | not installed |",
                "| geometric mean | 1.00 | 2.00 |  |", "| vgg16 |  | 0.5 + 1.0 |  |",
                "| vgg16 | 30 / 20 | 30 / 20 |  |"):  # fmt: skip
        assert row in text
    assert (tmp_path / "chart.svg").exists()


def test_the_ablation_adds_one_step_in_each_column(monkeypatch: pytest.MonkeyPatch) -> None:
    script = imported("make_ablation", monkeypatch)
    chosen = [flat(runtime.passes) for name, runtime in script.STEPS.items() if name not in ("capture", "layout")]
    everything = flat(script.without())
    for fewer, more in itertools.pairwise([*chosen, everything]):
        assert set(fewer) < set(more)
        assert [name for name in more if name in fewer] == fewer
    heads = [head for head, _, _ in script.columns()]
    text = (DOCS / "ablation.md").read_text(encoding="utf-8")
    assert all(f"| {head} |" in text for head in heads)
    assert text.count(script.BEGIN) == text.count(script.END) == 1


def test_the_ablation_compares_each_step_with_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    script = imported("make_ablation", monkeypatch)
    names = ["eager", *script.STEPS, *script.ALONE, "fxopt"]
    seconds = dict(zip(names, (0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.1, 0.6, 0.05), strict=True))
    timings = tuple(Timing(name, "ok", "", (seconds[name],)) for name in names)
    found = Benchmark("resnet18", ("1x3",), Settings(2), made("resnet18", 2).machine, timings)
    rows = script.tables([found]).splitlines()
    assert "| resnet18 | 800.0 | 1.33 | 1.00 | 2.00 | 1.00 | 2.00 | 1.00 | 2.00 | 2.00 | 16.00 |" in rows
    assert rows[-1].startswith("| geometric mean | | **1.33** |")


def test_the_page_on_onnx_has_counts_and_times_of_both_exports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = imported("make_onnx", monkeypatch)
    page, results = tmp_path / "exporting.md", tmp_path / "onnx.json"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    monkeypatch.setattr(script, "PAGE", page)
    seconds = dict(zip(("eager", "fxopt", *script.RUNTIMES), (1.0, 0.5, 0.3, 0.2, 0.4, 0.1), strict=True))
    timings = tuple(Timing(name, "ok", "", (second,), error=1e-6) for name, second in seconds.items())
    found = Benchmark("resnet18", ("1x3",), Settings(2), made("resnet18", 2).machine, timings)
    kinds = {"file": 9, "layers": 4, "norms": 1, "run": 5}
    counts = {"resnet18": {script.ORIGINAL: kinds, script.OURS: {kind: 2 * count for kind, count in kinds.items()}}}
    results.write_text(json.dumps({"counts": counts, "benchmarks": [found.to_dict()]}))
    script.write(results)
    text = page.read_text()
    assert "| resnet18 | 9 | 18 | 4 | 8 | 1 | 2 | 5 | 10 |" in text
    assert "| resnet18 | 300.00 | 200.00 | 1.50 ±0% | 400.00 | 100.00 | 4.00 ±0% | 1e-06 |" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert (DOCS / "exporting.md").read_text(encoding="utf-8").count(script.BEGIN) == 1


def flat(passes: Any) -> list[str]:
    return [name for step in passes for name in ((step,) if isinstance(step, str) else step)]
