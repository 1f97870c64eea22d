"""Verification by default: a wrong answer is never handed over, whoever is to blame; what NaN and infinity do."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt import compare, plugins
from fxopt.lowering.backend import Backend
from graphs import FRONT_ENDS, Network, randomised

pytestmark = pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice")

front_ends = pytest.mark.parametrize("front_end", FRONT_ENDS)


def convnet() -> nn.Module:
    return randomised(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8)


@front_ends
def test_what_is_verified_is_said(front_end: str) -> None:
    given = image()
    compiled = fxopt.compile(convnet(), (given,)) if front_end == "export" else fxopt.compile(convnet())
    if front_end == "symbolic":
        assert compiled.report.verdict is None
        assert "first call" in compiled.report.verification
        compiled(given)
    verdict = compiled.report.verdict
    assert verdict is not None
    assert verdict.ok
    assert verdict.error < 1e-5
    assert "verified: max|difference| / max|expected| = " in str(compiled.report)


def lying(build: Any) -> Backend:
    """A backend that is wrong by a tenth of a percent."""

    def wrong(module: fx.GraphModule, packed: dict[Any, Any]) -> Any:
        run = build(module, packed)
        return lambda *tensors: tuple(result * 1.001 for result in run(*tensors))

    return Backend("lying", "reassociate", lambda module, setting: None, wrong)


@pytest.fixture
def liar(monkeypatch: pytest.MonkeyPatch) -> None:
    real = plugins.backend
    monkeypatch.setattr(plugins, "backend", lambda name: lying(real("aten").build) if name == "lying" else real(name))


@pytest.mark.usefixtures("liar")
@front_ends
def test_a_backend_that_is_wrong_is_replaced_and_named(front_end: str) -> None:
    model = convnet()
    example = (image(),) if front_end == "export" else None
    compiled = fxopt.compile(model, example, backend="lying")
    for batch in (2, 1, 3):
        given = image(batch)
        torch.testing.assert_close(compiled(given), model(given), rtol=2e-5, atol=1e-5)
    assert compiled.report.backend == "aten"
    assert any("backend lying gave another answer" in notice for notice in compiled.report.notices)


@pytest.mark.usefixtures("liar")
def test_strict_raises_where_a_backend_is_wrong() -> None:
    with pytest.raises(fxopt.VerificationError, match="another answer"):
        fxopt.compile(convnet(), (image(),), backend="lying", strict=True)


def scribbling(build: Any) -> Backend:
    """A backend that gives the right answer, and overwrites what it was given."""

    def wrong(module: fx.GraphModule, packed: dict[Any, Any]) -> Any:
        run = build(module, packed)

        def call(*tensors: torch.Tensor) -> Any:
            results = run(*tensors)
            for tensor in tensors:
                tensor.zero_()
            return results

        return call

    return Backend("scribbling", "reassociate", lambda module, setting: None, wrong)


@front_ends
def test_a_backend_that_writes_to_the_inputs_is_replaced_and_named(front_end: str) -> None:
    fxopt.register(scribbling(plugins.backend("aten").build))
    try:
        given = image()
        compiled = fxopt.compile(convnet(), (given,) if front_end == "export" else None, backend="scribbling")
        before = given.clone()
        compiled(given)
    finally:
        plugins.unregister("scribbling")
    assert torch.equal(given, before)
    assert compiled.report.backend == "aten"
    said = "backend scribbling gave another answer, aten runs instead: input args[0], after the call, misses"
    assert any(notice.startswith(said) for notice in compiled.report.notices)


class Counts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(1.0009765).sum()


@front_ends
def test_inputs_that_the_model_writes_to_are_compared_as_it_leaves_them(front_end: str) -> None:
    given = image()
    compiled = fxopt.compile(Counts(), (given.clone(),) if front_end == "export" else None)
    twin = given.clone()
    torch.testing.assert_close(compiled(given), Counts()(twin))
    assert torch.equal(given, twin)
    assert compiled.report.verdict is not None
    assert len(compiled.report.verdict.outputs) == 2


def test_a_difference_that_looks_large_is_settled_in_float64() -> None:
    """Sums that cancel: float32 itself is far off, and the fold may be as far."""
    model = nn.Sequential(nn.Conv2d(64, 1, 1, bias=False), nn.BatchNorm2d(1)).eval()
    with torch.no_grad():
        weight = torch.randn(32) * 1e3
        model[0].weight.copy_(torch.cat([weight, -weight]).reshape(1, 64, 1, 1))
        model[1].running_var.fill_(0.37)
    given = torch.randn(2, 32, 4, 4)
    given = torch.cat([given, given + 1e-4 * torch.randn_like(given)], 1)
    compiled = fxopt.compile(model, (given,), backend="aten")
    verdict = compiled.report.verdict
    assert verdict is not None
    assert verdict.ok


# -- comparing -------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("expected", "actual", "ok"),
    [
        pytest.param([1.0, 2.0], [1.0, 2.0], True, id="the same bits"),
        pytest.param([1.0, 2.0], [1.0, 2.0 + 1e-6], True, id="rounding"),
        pytest.param([1.0, 2.0], [1.0, 2.1], False, id="another number"),
        pytest.param([NAN, 2.0], [NAN, 2.0], True, id="NaN where NaN was"),
        pytest.param([NAN, 2.0], [0.0, 2.0], False, id="a number where NaN was"),
        pytest.param([1.0, 2.0], [NAN, 2.0], False, id="NaN where a number was"),
        pytest.param([INF, 2.0], [INF, 2.0], True, id="infinity where infinity was"),
        pytest.param([INF, 2.0], [-INF, 2.0], False, id="the other infinity"),
        pytest.param([INF, 2.0], [3e38, 2.0], False, id="a large number where infinity was"),
        pytest.param([0.0, 0.0], [0.0, 0.0], True, id="zeros"),
        pytest.param([0.0, 0.0], [1e-30, 0.0], False, id="a small number where all is zero"),
        pytest.param([], [], True, id="nothing"),
    ],
)
def test_verdicts(expected: list[float], actual: list[float], ok: bool) -> None:
    assert compare.compare([torch.tensor(expected)], [torch.tensor(actual)]).ok is ok


@pytest.mark.parametrize(
    ("expected", "actual", "reason"),
    [
        pytest.param(torch.zeros(2), torch.zeros(3), "shape (3,) instead of (2,)", id="shape"),
        pytest.param(torch.zeros(2), torch.zeros(2).double(), "dtype torch.float64", id="dtype"),
        pytest.param(torch.zeros(2, 3), torch.zeros(3, 2).T, "strides", id="strides"),
        pytest.param(torch.zeros(2).int(), torch.ones(2).int(), "other integers", id="integers"),
        pytest.param(None, torch.ones(2), "instead of None", id="a tensor for None"),
        pytest.param(3, 4, "4 instead of 3", id="a number"),
        pytest.param(True, 1, "1 instead of True", id="1 for True"),
    ],
)
def test_what_is_no_rounding_is_said(expected: Any, actual: Any, reason: str) -> None:
    verdict = compare.compare([expected], [actual])
    assert not verdict.ok
    assert reason in verdict.reason


def test_bitwise_takes_no_rounding() -> None:
    one = torch.ones(2)
    assert compare.compare([one], [one.clone()], bitwise=True).ok
    assert not compare.compare([one], [one + 2e-7], bitwise=True).ok


@pytest.mark.parametrize("units", [23.0, 25.0])
def test_what_is_within_the_bound_of_the_original_needs_no_reference(units: float) -> None:
    """|c - e| <= |c - o| + |o - e| <= 24 u + |o - e|: no reference could say otherwise."""
    one, asked = torch.ones(1), []

    def reference() -> list[torch.Tensor]:
        asked.append(True)
        return [one.double()]

    off = (one.double() + units * torch.finfo(torch.float32).eps).float()
    assert compare.compare([one], [off], reference=reference).ok is (units < 24)
    assert bool(asked) is (units > 24)


def test_the_reference_settles_what_is_no_plain_rounding() -> None:
    exact = torch.tensor([1.0], dtype=torch.float64)
    off = [torch.tensor([1.0 + 1e-4])]
    assert compare.compare(off, [torch.tensor([1.0])], reference=lambda: [exact]).ok, "nearer than the original"
    assert not compare.compare([torch.tensor([1.0])], off, reference=lambda: [exact]).ok


def test_a_reference_that_does_not_run_settles_nothing() -> None:
    def fails() -> Any:
        raise RuntimeError("no float64 here")

    verdict = compare.compare([torch.ones(1)], [torch.ones(1) * 1.01], reference=fails)
    assert not verdict.ok
    assert "no float64 here" in verdict.reason


@front_ends
def test_nan_in_an_input_stays_nan_in_the_portable_backend(front_end: str) -> None:
    model = convnet()
    example = (image(),) if front_end == "export" else None
    compiled, given = fxopt.compile(model, example, backend="aten"), image()
    compiled(given)
    given[0, 0, 3, 3] = NAN
    torch.testing.assert_close(compiled(given), model(given), rtol=2e-5, atol=1e-5, equal_nan=True)
    assert compiled(given).isnan().sum() == model(given).isnan().sum() > 0


def test_an_example_with_nan_is_verified_and_falls_back_to_what_keeps_it() -> None:
    model, given = Network(lambda m, x: m.conv(x).relu(), conv=nn.Conv2d(3, 4, 3)).eval(), image()
    given[0, 0, 3, 3] = NAN
    compiled = fxopt.compile(model, (given,))
    assert compiled.report.backend == "aten"
    torch.testing.assert_close(compiled(given), model(given), rtol=2e-5, atol=1e-5, equal_nan=True)
