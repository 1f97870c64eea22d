"""Benchmarks: what a runtime can do wrong is a line, ratios are paired, answers and memory are looked at.

The runtimes are stubs in tests/stub_runtimes.py; starting a process takes seconds, so most tests share one benchmark.
"""

from __future__ import annotations

import json
import multiprocessing
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxopt
import stub_runtimes
from fxopt.bench import Benchmark, Built, Memory, Timing, chart, means, measure, runtimes, system, table, worker
from fxopt.bench.measure import chosen_runtimes
from fxopt.bench.result import Settings, spread

STUBS = {
    name: getattr(stub_runtimes, name)
    for name in (
        "sleeps", "raises_building", "raises_running", "answers_wrongly", "spoils_its_memory", "has_other_outputs",
        "is_not_installed", "dies",
    )
}  # fmt: skip
QUICK: dict[str, Any] = {"threads": 1, "rounds": 3, "calls": 1, "pause": 0.0}


@pytest.fixture(scope="module")
def stubs() -> Benchmark:
    """All stubs beside eager and fxopt, on one small model."""
    return fxopt.benchmark(stub_runtimes.small, against=STUBS, **QUICK)


# -- what runtimes do ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("runtime", "status", "detail"),
    [
        pytest.param("eager", "ok", "", id="the reference runs"),
        pytest.param("fxopt", "ok", "", id="fxopt is measured unasked"),
        pytest.param("sleeps", "ok", "", id="a slow one is fine"),
        pytest.param("raises_building", "failed", "building: RuntimeError: cannot build this", id="cannot be built"),
        pytest.param("raises_running", "failed", "running: ValueError: enough", id="fails in a later call"),
        pytest.param(
            "answers_wrongly", "wrong", "off from eager's answer by 1.0e-02", id="a wrong answer is no result"
        ),
        pytest.param("spoils_its_memory", "wrong", "off from eager's answer", id="the last answer is compared, too"),
        pytest.param("has_other_outputs", "wrong", "more outputs than eager's", id="other outputs are wrong"),
        pytest.param("is_not_installed", "not installed", "pip install no_such_runtime", id="what is not there"),
        pytest.param("dies", "failed", "building: its process ended with exit code 7", id="a process that dies"),
    ],
)
def test_what_a_runtime_does_is_its_status(stubs: Benchmark, runtime: str, status: str, detail: str) -> None:
    found = stubs[runtime]
    assert found.status == status
    assert found.detail.startswith(detail)
    assert len(found.rounds) == (QUICK["rounds"] if found.ran else 0)


def test_every_runtime_has_its_line_with_eager_first(stubs: Benchmark) -> None:
    assert [timing.runtime for timing in stubs.timings] == ["eager", "fxopt", *STUBS]
    assert stubs.inputs == ("2x4",)
    assert stubs.batch == 2
    assert stubs.settings.threads == 1


def test_what_was_measured_is_told(stubs: Benchmark) -> None:
    slow = stubs["sleeps"]
    assert 0.02 <= slow.median < 0.2
    assert slow.version == "sleeps 1.0"
    assert slow.stages["capture"] == 0.5
    assert {"capture", "rewrite", "lower", "verify", "first call"} <= stubs["fxopt"].stages.keys()
    assert 0 < stubs["fxopt"].stages["capture"] < stubs["fxopt"].build_seconds
    assert stubs["fxopt"].error < 1e-5
    ratio = stubs.speedup("sleeps")
    assert ratio is not None
    assert ratio.median < 0.1


def test_importing_a_runtime_is_not_building_it(stubs: Benchmark) -> None:
    assert stubs["sleeps"].stages["import"] == 100.0
    assert stubs["sleeps"].build_seconds < 0


def test_each_process_has_its_threads_and_a_cold_cache(stubs: Benchmark) -> None:
    assert stubs["sleeps"].notes == ("threads 1, 1", "cached []", "grad False", "training False")


@pytest.mark.skipif(system.resident() is None, reason="the system does not tell what a process holds")
def test_memory_is_what_comes_on_top_of_the_model(stubs: Benchmark) -> None:
    memory = stubs["sleeps"].memory
    assert memory is not None
    assert memory.model > 50e6
    assert memory.peak - memory.held == pytest.approx(50e6, rel=0.3)
    assert memory.held == pytest.approx(50e6, rel=0.5)
    assert stubs["eager"].memory.held < 25e6


def test_a_system_that_tells_less(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(system, "_STATUS", tmp_path / "none")
    assert system.resident() is None
    assert system.beyond(system.peak(), None) is None


# -- a model and its inputs ------------------------------------------------------------------------------------------


def test_a_live_model_with_structured_arguments() -> None:
    args, kwargs = ({"a": torch.randn(3, 2)},), {"scale": torch.tensor(3.0)}
    found = fxopt.benchmark(stub_runtimes.Named(), args, kwargs, **QUICK)
    assert [timing.status for timing in found.timings] == ["ok", "ok"]
    assert found.model == "Named"
    assert found.inputs == ("3x2", "scale=")


def local_model() -> torch.nn.Module:
    class Local(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    return Local()


@pytest.mark.parametrize(
    ("model", "args", "options", "said"),
    [
        pytest.param(local_model(), (torch.ones(1),), {}, "cannot be sent", id="a class that nothing can import"),
        pytest.param(torch.nn.ReLU(), None, {}, "there are no inputs", id="no inputs"),
        pytest.param(stub_runtimes.small, (torch.ones(1),), {}, "gives its arguments", id="inputs twice"),
        pytest.param(stub_runtimes.small, None, {"against": "no_such"}, "no runtime is named", id="no such runtime"),
        pytest.param(stub_runtimes.small, None, {"against": ("fxopt:none",)}, "no backend is named", id="no backend"),
        pytest.param(stub_runtimes.small, None, {"against": "fxopt:no-such"}, "no pass is named", id="no such pass"),
        pytest.param(stub_runtimes.small, None, {"rounds": 0}, "rounds is 0", id="no rounds"),
        pytest.param(stub_runtimes.small, None, {"threads": 0}, "threads is 0", id="no threads"),
        pytest.param(stub_runtimes.small, None, {"pause": -1.0}, "pause is -1.0", id="no time to wait"),
        pytest.param(
            stub_runtimes.small, None, {"against": {"mine": lambda *_: None}}, "mine cannot be", id="a lambda"
        ),
        pytest.param(lambda: None, None, {}, "what builds the model cannot be", id="a lambda that builds"),
    ],
)
def test_what_is_refused_before_anything_is_measured(model: Any, args: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(fxopt.UsageError, match=said) as refused:
        fxopt.benchmark(model, args, **options)
    assert refused.value.hint


def test_a_model_that_cannot_be_built() -> None:
    with pytest.raises(fxopt.UsageError, match="could not be built: RuntimeError: no weights here"):
        fxopt.benchmark(stub_runtimes.broken_model, **QUICK)


def test_a_model_that_can_be_saved_but_not_read(tmp_path: Path) -> None:
    saved = measure._saved(stub_runtimes.NotReadable(), torch.ones(1), None, tmp_path / "model.pt")
    with pytest.raises(fxopt.UsageError, match="RuntimeError: not here") as refused:
        saved()
    assert "module-level function" in str(refused.value.hint)


def test_a_process_that_gives_no_answer_is_given_up() -> None:
    waiting = worker.Worker.__new__(worker.Worker)
    waiting._pipe, other = multiprocessing.Pipe()
    with pytest.raises(worker.Failed) as failed:
        waiting.build(0.01)
    assert failed.value.problem == worker.Problem("build", "no answer in 0.01 s", "give it more time: limit")
    assert other.recv() == "build"


@pytest.mark.parametrize(
    ("step", "kind", "said"),
    [
        pytest.param("start", fxopt.FxoptError, "if __name__", id="a script without a guard"),
        pytest.param("model", fxopt.UsageError, "could not be built: why", id="a model that cannot be built"),
        pytest.param("run", fxopt.FxoptError, "nothing to compare with: why", id="a model that does not run"),
    ],
)
def test_eager_s_failure_is_everybody_s(step: Any, kind: type[Exception], said: str) -> None:
    raised = measure._no_reference(worker.Problem(step, "why"))
    assert type(raised) is kind
    assert said in str(raised)


# -- runtimes by name ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("against", "expected"),
    [
        pytest.param((), ["eager", "fxopt"], id="the two that are always there"),
        pytest.param("jit, inductor", ["eager", "fxopt", "jit", "inductor"], id="names in one string"),
        pytest.param(("jit", "fxopt", "eager"), ["eager", "jit", "fxopt"], id="eager goes first"),
        pytest.param("all", ["eager", "fxopt", *list(runtimes.RUNTIMES)[2:]], id="all"),
        pytest.param({"mine": stub_runtimes.dies}, ["eager", "fxopt", "mine"], id="one's own"),
    ],
)
def test_runtimes_are_chosen(against: Any, expected: list[str]) -> None:
    assert list(chosen_runtimes(against)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fxopt:aten", runtimes.Fxopt(backend="aten")),
        ("fxopt:no-fold-batchnorm:no-merge-siblings", runtimes.Fxopt(disable=("fold-batchnorm", "merge-siblings"))),
        ("fxopt:aten:no-passes", runtimes.Fxopt(backend="aten", passes=())),
        ("fxopt:bitwise", runtimes.Fxopt(numerics="bitwise")),
    ],
)
def test_fxopt_with_other_options_by_name(name: str, expected: runtimes.Fxopt) -> None:
    assert runtimes.named([name]) == {name: expected}


class Picture(torch.nn.Module):
    """A convolution, its norm and ReLU; a second argument by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor, *, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(self.norm(self.conv(x)))
        return y, y.mean((2, 3)) * gain


PEERS: dict[str, tuple[str, ...]] = {"onnxruntime": ("onnxruntime", "onnxscript"), "openvino": ("openvino",)}
REWRITTEN = runtimes.OnnxRuntime(rewritten=True, optimised=False)


@pytest.mark.parametrize("name", ["eager", "fxopt", "channels_last", "fx_fuse", "jit", *PEERS, "onnxruntime, ours"])
def test_a_runtime_gives_the_model_s_answer(name: str) -> None:
    for needed in PEERS.get(name.partition(",")[0], ()):
        pytest.importorskip(needed, reason="the extra bench")
    model, args, kwargs = Picture().eval(), (torch.randn(2, 3, 9, 9),), {"gain": torch.randn(8)}
    with torch.no_grad():
        expected = model(*args, **kwargs)
        built = runtimes.RUNTIMES.get(name, REWRITTEN)(model, args, kwargs)
        actual = list(torch.utils._pytree.tree_leaves(built.call(*args, **kwargs)))
    assert isinstance(built, Built)
    assert built.version
    for left, right in zip(expected, actual, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-4, check_stride=False)


# -- results ---------------------------------------------------------------------------------------------------------


def made(model: str = "net.py:build", **rounds: tuple[float, ...]) -> Benchmark:
    """A benchmark with these seconds."""
    timings = tuple(
        Timing(name, "ok", "", seconds, 1.5, {"capture": 0.5}, Memory(100, 30, 20), 1e-7, "1.0", ("a note",))
        for name, seconds in rounds.items()
    )
    return Benchmark(model, ("1x3", "ids=1x4:int64"), Settings(2), {"processor": "a <fast> one"}, timings)


def test_ratios_are_paired_round_by_round() -> None:
    # The machine is three times slower in the second round. The ratio of the medians would be 4 / 3.
    found = made(eager=(4.0, 12.0, 4.0), fxopt=(2.0, 6.0, 3.0))
    assert found.speedup().median == 2.0
    assert found.speedup("eager", "fxopt").median == 0.5
    assert found.speedup().spread == pytest.approx((2.0 - 5 / 3) / 2.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [((5.0,), 0.0), ((1.0, 1.0), 0.0), ((1.0, 2.0, 3.0), 0.5), ((1.0, 2.0, 2.0, 2.0, 9.0), 0.0), ((0.0, 0.0), 0.0)],
)
def test_spread_is_the_middle_half_over_the_median(values: tuple[float, ...], expected: float) -> None:
    assert spread(values) == expected


def test_a_runtime_that_did_not_run_has_no_ratio(stubs: Benchmark) -> None:
    assert stubs.speedup("dies") is None
    assert stubs.speedup("fxopt", over="dies") is None
    with pytest.raises(fxopt.UsageError, match="dies has no times"):
        _ = stubs["dies"].median
    with pytest.raises(fxopt.UsageError, match="'none' was not measured"):
        _ = stubs["none"]


def test_means_are_geometric_and_of_right_answers_only() -> None:
    benchmarks = [made(f"m:{n}", eager=(8.0,), fxopt=(fast,)) for n, fast in enumerate((4.0, 1.0, 0.001))]
    wrong = benchmarks[2].timings[0], replace(benchmarks[2].timings[1], status="wrong")
    benchmarks[2] = replace(benchmarks[2], timings=wrong)
    eager, ours = means(benchmarks)
    assert (eager.runtime, eager.models, eager.times_eager) == ("eager", 3, 1.0)
    assert (ours.runtime, ours.models, ours.times_eager) == ("fxopt", 2, pytest.approx(4.0))
    assert eager.fxopt_times_it == pytest.approx(4.0)


def test_a_benchmark_is_json_and_back(stubs: Benchmark) -> None:
    data = json.loads(json.dumps(stubs.to_dict(), allow_nan=False))
    assert set(data) == {"model", "inputs", "batch", "settings", "machine", "runtimes"}
    assert {frozenset(line) for line in data["runtimes"]} == {
        frozenset({
            "runtime", "status", "detail", "version", "seconds", "median", "spread", "build_seconds", "stages",
            "memory", "error", "notes", "times_eager", "fxopt_times_it",
        })
    }  # fmt: skip
    assert Benchmark.from_dict(data).to_dict() == data


def test_the_table_marks_what_is_wrong_or_did_not_run(stubs: Benchmark) -> None:
    text = str(stubs)
    for expected in (
        "WRONG inf",
        "has_other_outputs: wrong: more outputs than eager's",
        "is_not_installed: not installed: pip install no_such_runtime",
        "raises_running: failed: running: ValueError: enough",
    ):
        assert expected in text


def test_build_time_is_split_where_capture_is_known() -> None:
    found = made(eager=(8.0,), fxopt=(4.0,))
    assert table.cells(found, found["fxopt"]) == (
        "fxopt", "4000", "0%", "2.00 ±0%", "", "1.5 (0.5 + 1.0)", "0", "0", "1e-07",
    )  # fmt: skip


def test_markdown_has_a_table_for_each_benchmark_and_the_means() -> None:
    benchmarks = [made("net.py:a|b", eager=(8.0,), fxopt=(4.0,)), made("net.py:c", eager=(8.0,), fxopt=(1.0,))]
    text = table.markdown(benchmarks)
    assert text.count("| runtime | median ms |") == 2
    assert "Geometric means over 2 models, batch 1, 2 threads" in text
    assert "| fxopt | 2 | 4.00 |  |" in text
    rows = table.overview(benchmarks, table.median_cell).splitlines()
    assert rows[0] == "| model | eager | fxopt |"
    assert rows[2] == "| a\\|b | 8000 | 4000 |"


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_a_chart_is_well_formed_and_needs_nothing_else(stubs: Benchmark, tmp_path: Path, suffix: str) -> None:
    named = replace(stubs, model="net.py:<b>&")
    path = chart.save([named, named], tmp_path / f"chart.{suffix}")
    text = path.read_text(encoding="utf-8")
    assert "<b>" not in text
    assert not [word for word in ("src=", "href=", "url(") if word in text]
    ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    for timing in stubs.timings:
        assert text.count(f">{timing.runtime}<") >= 2
    assert "WRONG" in text


def test_a_chart_as_png_needs_a_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(fxopt.RenderError, match="rsvg-convert"):
        chart.kind_of(tmp_path / "chart.png")
    with pytest.raises(fxopt.UsageError, match="is not saved as"):
        chart.kind_of(tmp_path / "chart.bmp")
    with pytest.raises(fxopt.UsageError, match="nothing to draw"):
        chart.save([], tmp_path / "chart.svg")


def test_a_loaders_first_batch_is_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Seen(Exception):
        pass

    def saved(model: nn.Module, args: Any, kwargs: Any, path: Path) -> Any:
        raise Seen(args, kwargs)

    monkeypatch.setattr(measure, "_saved", saved)
    x, labels = torch.arange(12.0).view(6, 2), torch.zeros(6)
    with pytest.raises(Seen) as seen:
        fxopt.benchmark(nn.Linear(2, 2), DataLoader(TensorDataset(x, labels), batch_size=4))
    (given,), kwargs = seen.value.args
    assert torch.equal(given, x[:4])
    assert kwargs == {}
    with pytest.raises(fxopt.UsageError, match="the data has no batches"):
        fxopt.benchmark(nn.Linear(2, 2), DataLoader(TensorDataset(x[:0], labels[:0])))
