"""TorchInductor behind fxopt's rewrites: ATen's answer, the model's strides and memory, what is declined and why."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.cli import run
from fxopt.lowering import inductor
from fxopt.testing import Oracle, networks
from graphs import FRONT_ENDS, Network, TwoInputs, randomised, snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice"),
    pytest.mark.skipif(inductor.unavailable("cpu") is not None, reason="TorchInductor needs a C++ compiler"),
]


def compiled(model: nn.Module, *inputs: torch.Tensor, front_end: str = "export", **options: Any) -> Any:
    """The model by TorchInductor, called once; it must not have fallen back."""
    fast = fxopt.compile(model, inputs if front_end == "export" else None, backend="inductor", **options)
    fast(*inputs)
    assert fast.report.backend == "inductor", fast.report.notices
    return fast


def assert_same(model: nn.Module, fast: nn.Module, *inputs: torch.Tensor) -> None:
    """Values, strides, and which results share memory with one another or with an input."""
    expected, results = (list(call(*inputs)) for call in (model, fast))
    for left, right in zip(results, expected, strict=True):
        if isinstance(right, torch.Tensor):
            torch.testing.assert_close(left, right, rtol=2e-5, atol=2e-5)
            assert left.stride() == right.stride()
        else:
            assert left == right
    assert shared([*results, *inputs]) == shared([*expected, *inputs])


def shared(values: list[Any]) -> list[int]:
    """For each value the first one that lies in the same memory."""
    places = [value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else value for value in values]
    return [places.index(place) for place in places]


def image(batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, 8, 8)


def convnet() -> nn.Module:
    """Conv+BN+ReLU, a residual, a concat, a linear layer."""

    def body(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = F.relu(m.norm(m.first(x)))
        joined = torch.cat([y, F.relu(m.second(y) + y)], 1)
        return m.head(joined.mean((2, 3))), joined

    parts = {"first": nn.Conv2d(3, 8, 3, padding=1), "norm": nn.BatchNorm2d(8), "head": nn.Linear(16, 4)}
    return randomised(Network(body, second=nn.Conv2d(8, 8, 3, padding=1), **parts))


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_a_convnet_is_rewritten_and_handed_over(front_end: str) -> None:
    model, x = convnet(), image()
    before = snapshot(model)
    fast = compiled(model, x, front_end=front_end)
    assert "norm-after-layer" in {rewrite.rule for rewrite in fast.report.rewrites}
    assert_same(model, fast, x)
    assert all(torch.equal(tensor, kept) for _, tensor, kept in before)


def test_each_batch_size_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    real = inductor._compile
    monkeypatch.setattr(inductor, "_compile", lambda *given: made.append(given) or real(*given))
    model = convnet()
    fast = compiled(model, image())
    for batch in (3, 2, 3):
        assert_same(model, fast, image(batch))  # gradients on, where compiling had them off
        with torch.no_grad():
            assert_same(model, fast, image(batch))
    assert {ready.backend for ready in fast._ready.values()} == {"inductor"}
    assert len(made) == 2


def test_attention() -> None:
    def body(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value = m.project(m.norm(x)).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.transpose(-2, -1) / 2, -1)
        y = x + (weights @ value).transpose(1, 2).reshape(2, 5, 8)
        return y + F.gelu(m.up(y)), weights

    model = Network(body, project=nn.Linear(8, 24), norm=nn.LayerNorm(8), up=nn.Linear(8, 8)).eval()
    x = torch.randn(2, 5, 8)
    assert_same(model, compiled(model, x), x)


def test_results_share_memory_as_they_do_in_eager() -> None:
    def body(m: Any, x: torch.Tensor) -> tuple[Any, ...]:
        y = m.conv(x)
        z, joined = y.tanh(), torch.cat([y, x], 1)
        views = (y[:, 1:], joined[:, :2], z.transpose(1, 2), z.expand(2, *z.shape), z)
        return (y, y, y.clone(), *views, x[0], x, x.clone(), m.conv.bias, m.conv.weight.clone(), x.shape[0])

    model, x = Network(body, conv=nn.Conv2d(3, 3, 1)).eval(), image()
    fast = compiled(model, x)
    assert_same(model, fast, x)
    fast(x)[12].zero_()  # a result of its own
    assert_same(model, fast, x)
    assert not fast(x)[11].requires_grad


def test_one_tensor_given_twice_and_a_layer_called_twice() -> None:
    model = TwoInputs(lambda m, x, y: (m.conv(x) + m.conv(y).relu(), x * y), conv=nn.Conv2d(3, 3, 1)).eval()
    x, y = image(), image()
    fast = compiled(model, x, y)
    assert_same(model, fast, x, y)
    assert_same(model, fast, x, x)


def test_a_model_that_works_in_place_on_its_own_values() -> None:
    def body(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = m.conv(x)
        y += 1
        y[:, 0].mul_(1)  # nobody reads the view
        return (F.relu(y, inplace=True).mul_(2),)

    model, x = Network(body, conv=nn.Conv2d(3, 4, 3)).eval(), image()
    fast = fxopt.compile(model, (x,), backend="inductor")
    assert_same(model, fast, x)
    plain = Network(lambda m, x: (F.relu(m.conv(x), inplace=True).mul_(2),), conv=nn.Conv2d(3, 4, 3)).eval()
    assert_same(plain, compiled(plain, x), x)


#: What TorchInductor folds into the convolution in front of it along the wrong axis, or fails to, where weights and
#: constants are frozen (torch 2.13.0).
WRONG_FOLDS: dict[str, tuple[Callable[[], nn.Module], Callable[..., torch.Tensor], tuple[int, ...]]] = {
    "a constant as wide as there are channels": (lambda: nn.Conv2d(8, 8, 3, padding=1), lambda m, y: y * m.k, (1, 8)),
    "one added": (lambda: nn.Conv2d(8, 8, 3, padding=1), lambda m, y: y + m.k, (1, 8)),
    "a transposed convolution": (lambda: nn.ConvTranspose2d(8, 8, 3), lambda m, y: y * m.k + m.k, (1, 8, 1, 1)),
    "a number behind one": (lambda: nn.ConvTranspose2d(8, 4, 3), lambda m, y: y + 2.5, (1,)),
}


@pytest.mark.parametrize("case", WRONG_FOLDS)
def test_wrong_folds_do_not_happen(case: str) -> None:
    layer, behind, shape = WRONG_FOLDS[case]
    model = Network(lambda m, x: (behind(m, m.layer(x)),), layer=layer(), k=torch.randn(shape)).eval()
    x = image(channels=8)
    assert_same(model, compiled(model, x, passes=[], verify=False), x)


def test_nan_stays_nan_outside_of_layers() -> None:
    model = Network(lambda m, x: (F.relu(x.tanh()), x.clamp(-1, 1), F.relu6(x))).eval()
    x = image()
    fast = compiled(model, x)
    x[0, 0, 0] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0] * 2)
    for left, right in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(left, right, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(144, 3)
    model, x = randomised(nn.Sequential(*layers)).to(dtype), image().to(dtype)
    fast = compiled(model, x)  # verified
    assert fast(x).dtype == dtype


# -- what it does not take -------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x)[0].relu()


DECLINED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "writes in place": (lambda: Network(lambda m, x: x.mul_(2) + 1), "mul_ writes in place"),
    "draws random numbers": (lambda: Network(lambda m, x: F.dropout(x, 0.5, True) + 1), "draws random numbers"),
    "was left whole": (Recurrent, "is a LSTM that was left whole"),
    "complex numbers": (lambda: Network(lambda m, x: torch.fft.fft(x).abs()), "is torch.complex64"),
    "nothing is computed": (lambda: Network(lambda m, x: x[0]), "nothing is computed"),
}


@pytest.mark.parametrize("case", DECLINED)
def test_what_is_declined_runs_in_aten_and_says_why(case: str) -> None:
    build, reason = DECLINED[case]
    model, x = build().eval(), torch.randn(3, 2, 8)
    torch.manual_seed(0)
    fast = fxopt.compile(model, None if case == "was left whole" else (x.clone(),), backend="inductor")
    fast(x.clone())
    assert fast.report.backend == "aten"
    assert any(f"backend inductor passed over: {reason}" in said or reason in said for said in fast.report.notices)
    if case != "draws random numbers":
        torch.testing.assert_close(fast(x.clone()), model(x.clone()))


def test_gradients_and_autocast_are_served_by_aten() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval(), torch.randn(2, 4)
    fast = fxopt.compile(model, backend="inductor")
    wanted = x.clone().requires_grad_()
    fast(wanted).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        fast(x)
    assert {ready.backend for ready in fast._ready.values()} == {"aten"}
    assert wanted.grad is not None
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x))
    assert {ready.backend for ready in fast._ready.values()} == {"aten", "inductor"}


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("g++")

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", none)
    fast = fxopt.compile(convnet(), (image(),), backend="inductor")
    assert fast.report.backend == "aten"
    assert any("finds no C++ compiler (FileNotFoundError): install g++" in said for said in fast.report.notices)
    assert "probed on the CPU and CUDA, not on mps" in str(inductor.unavailable("mps"))


def test_a_compilation_that_fails_gives_way_to_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("Python.h: no such file")

    monkeypatch.setattr(inductor, "_compile", fails)
    model, x = convnet(), image()
    fast = fxopt.compile(model, (x,), backend="inductor")
    assert_same(model, fast, x)
    assert any("backend inductor failed, aten runs instead" in said for said in fast.report.notices)


def test_same_bits_are_not_promised() -> None:
    fast = fxopt.compile(convnet(), (image(),), backend="inductor", numerics="bitwise")
    assert fast.report.backend == "aten"
    assert any("does not promise the same bits" in said for said in fast.report.notices)


# -- being a compiled module -----------------------------------------------------------------------------------------


def test_copies_and_saved_modules_are_compiled_again() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).eval(), torch.randn(2, 4)
    fast = compiled(model, x)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for twin in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        torch.testing.assert_close(twin(x), model(x))
        assert [ready.backend for ready in twin._ready.values()] == ["inductor"]


def test_the_command_line(tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run(["compile", "net.py:build", "--shape", "2x4", "--backend", "inductor", "--json"]) == 0
    assert '"backend": "inductor"' in json.dumps(json.loads(capsys.readouterr().out))


@pytest.mark.slow
@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(network=networks())
def test_random_networks(network: Any) -> None:
    fast = fxopt.compile(network, backend="inductor", verify=False)
    assert not Oracle(network).differences(fast)
