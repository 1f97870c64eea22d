"""The compiled module as an nn.Module: signatures, threads, stale weights, copies, conversions."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from convnets import assert_close, compiled_by, convnet, front_ends, image
from fxopt.runtime import MOST_SPECIALISATIONS
from graphs import randomised, unmodified

pytestmark = pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice")


def folded() -> nn.Module:
    """Every weight is folded: nothing is shared."""
    return randomised(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()))


# -- signatures ------------------------------------------------------------------------------------------------------


def test_a_call_of_a_known_signature_makes_nothing_new() -> None:
    compiled = fxopt.compile(convnet(), (image(),))
    with torch.no_grad():
        compiled(image())
        known = list(compiled._ready.values())
        for _ in range(3):
            compiled(image())
    assert [id(made) for made in compiled._ready.values()] == [id(made) for made in known]


def test_specialisations_are_bounded_and_the_oldest_goes_first() -> None:
    model = nn.ReLU()
    compiled = fxopt.compile(model, verify=False)
    for batch in range(2, MOST_SPECIALISATIONS + 12):
        assert compiled(torch.ones(batch, 1)).shape == (batch, 1)
    assert len(compiled._ready) == MOST_SPECIALISATIONS
    assert torch.equal(compiled(torch.ones(2, 1)), torch.ones(2, 1))


def test_captures_are_bounded() -> None:
    compiled = fxopt.compile(nn.ReLU(), (torch.ones(2, 2),), verify=False)
    for size in range(2, 16):
        assert compiled(torch.ones(2, size)).shape == (2, size)
    assert len(compiled._session.programs) <= 8


@front_ends
def test_several_threads_with_several_shapes_at_once(front_end: str) -> None:
    model = convnet()
    compiled = compiled_by(front_end, model)
    start = threading.Barrier(4)

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        start.wait()
        for step in range(12):
            batch, size = 1 + (seed + step) % 3, 8 + step % 2
            given = torch.randn(batch, 3, size, size, generator=generator)
            with torch.set_grad_enabled(seed % 2 == 0):
                assert_close(compiled(given), model(given))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for seed in range(4)]:
            done.result()


@front_ends
def test_other_models_run_in_other_threads_while_one_is_compiled(front_end: str) -> None:
    model = convnet()
    running, stop = fxopt.compile(model, (image(),)), threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        given = image()
        try:
            while not stop.is_set():
                assert_close(running(given), model(given))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(4):
            compiled_by(front_end, model)(image())
    finally:
        stop.set()
        thread.join()
    assert not failures, failures[0]


@pytest.mark.parametrize("verify", [True, False])
def test_a_call_with_gradients_on_runs_what_was_lowered_without(verify: bool) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(2, 3, 8, 8)
    compiled = fxopt.compile(model, (x,), verify=verify)
    for enter in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with enter():
            torch.testing.assert_close(compiled(x), model(x), rtol=2e-5, atol=2e-5)
    compiled(x.to(memory_format=torch.channels_last))
    assert len({id(made.run) for made in compiled._ready.values()}) == 2
    wants = x.clone().requires_grad_()
    compiled(wants).sum().backward()
    assert wants.grad is not None
    assert len({id(made.run) for made in compiled._ready.values()}) == 3


# -- weights that change ---------------------------------------------------------------------------------------------


def _add(model: nn.Module) -> None:
    with torch.no_grad():
        model.head.weight.add_(1)


def _load(model: nn.Module) -> None:
    model.load_state_dict(convnet().state_dict())


def _step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(image()).sum().backward()
    optimizer.step()


def _statistics(model: nn.Module) -> None:
    model.train()
    model(image())
    model.eval()


def _folded_weight(model: nn.Module) -> None:
    with torch.no_grad():
        model.conv.weight.mul_(2)


@front_ends
@pytest.mark.parametrize(
    ("change", "name"),
    [
        pytest.param(_add, "head.weight", id="an in-place write"),
        pytest.param(_load, "head.weight", id="load_state_dict"),
        pytest.param(_step, "head.weight", id="an optimizer's step"),
        pytest.param(_statistics, "norm.num_batches_tracked", id="statistics gathered in training mode"),
        pytest.param(_folded_weight, "conv.weight", id="a weight that was folded, not shared"),
    ],
)
@pytest.mark.parametrize("new", [False, True], ids=["known signature", "new signature"])
def test_a_weight_that_changed_is_an_error_that_names_it(
    front_end: str, change: Callable[[nn.Module], None], name: str, new: bool
) -> None:
    model = convnet()
    compiled = compiled_by(front_end, model)
    compiled(image())
    change(model)
    with pytest.raises(fxopt.StaleWeightsError) as caught:
        compiled(image(5) if new else image())
    assert name.rpartition(".")[2] in str(caught.value)
    assert "compile again" in str(caught.value) or "fxopt.compile again" in str(caught.value)
    again = fxopt.compile(model, (image(),))
    given = image()
    assert_close(again(given), model(given))


def test_a_write_to_a_folded_weight_of_the_compiled_module_is_noticed() -> None:
    compiled = fxopt.compile(folded(), (image(),))
    name, weight = next(iter(compiled.state_dict().items()))
    weight.mul_(2)
    with pytest.raises(fxopt.StaleWeightsError, match=name.rpartition(".")[2]):
        compiled(image())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m.double(), id="double()"),
        pytest.param(lambda m: m.half(), id="half()"),
        pytest.param(lambda m: setattr(m, "head", nn.Linear(4, 5)), id="another layer"),
        pytest.param(lambda m: m.train(), id="train()"),
    ],
)
def test_a_snapshot_does_not_see_what_happens_to_the_callers_modules(change: Callable[[nn.Module], Any]) -> None:
    model = convnet()
    compiled, kept = fxopt.compile(model, (image(),)), copy.deepcopy(model)
    change(model)
    for batch in (2, 1, 3):
        given = image(batch)
        assert_close(compiled(given), kept(given))


def test_the_callers_model_is_left_as_it_was() -> None:
    model = convnet()
    with unmodified(model):
        compiled = fxopt.compile(model, (image(),))
        compiled(image(3))
        compiled.to(torch.float64)
        compiled(image().double())
        copy.deepcopy(compiled)(image().double())


# -- an nn.Module ----------------------------------------------------------------------------------------------------


def test_eval_is_fine_and_train_is_refused_with_a_reason() -> None:
    compiled = fxopt.compile(convnet(), (image(),))
    assert compiled.eval() is compiled
    assert compiled.train(False) is compiled
    with pytest.raises(fxopt.UsageError, match="inference") as caught:
        compiled.train()
    assert "train the original" in str(caught.value)
    assert not compiled.training


def test_it_can_be_a_part_of_another_module() -> None:
    model = convnet()
    whole = nn.Sequential(fxopt.compile(model, (image(),)), nn.Softmax(1)).eval()
    given = image()
    assert_close(whole(given), model(given).softmax(1))
    assert any(name.endswith("head.weight") for name in whole.state_dict())


def test_its_tensors_have_the_models_names_and_none_requires_grad() -> None:
    model = convnet()
    compiled = fxopt.compile(model, (image(),))
    parameters = dict(compiled.named_parameters())
    assert parameters["head.weight"].data_ptr() == model.head.weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in parameters.values())
    tensors = {**parameters, **dict(compiled.named_buffers())}
    assert set(tensors) == set(compiled.state_dict())
    assert {"conv.weight_folded_merged", "conv.bias_merged", "head.weight"} <= set(tensors)  # conv and skip are added
    assert not any(name.startswith("norm.") for name in tensors)


def test_loading_weights_is_refused_with_a_reason() -> None:
    compiled = fxopt.compile(convnet(), (image(),))
    with pytest.raises(fxopt.UsageError, match="does not load weights"):
        compiled.load_state_dict(convnet().state_dict())


def test_its_repr_says_what_became_of_the_model() -> None:
    text = repr(fxopt.compile(convnet(), (image(),)))
    assert text.startswith("CompiledModule(Network: ")
    assert "rewrites" in text


@front_ends
def test_a_deep_copy_is_independent(front_end: str) -> None:
    model = convnet()
    compiled, kept = compiled_by(front_end, model), copy.deepcopy(model)
    compiled(image())
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        model.head.weight.add_(1)
    for batch in (2, 1, 3):
        given = image(batch)
        assert_close(twin(given), kept(given))
    with pytest.raises(fxopt.StaleWeightsError):
        compiled(image())


class Savable(nn.Module):
    """A model that pickles."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@front_ends
@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after calls"])
def test_torch_save_and_load(front_end: str, called: bool, tmp_path: Path) -> None:
    model = randomised(Savable())
    compiled = compiled_by(front_end, model)
    if called:
        for batch in (2, 1):
            compiled(image(batch))
    torch.save(compiled, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert isinstance(loaded, fxopt.CompiledModule)
    for batch in (2, 1, 3):
        given = image(batch)
        assert_close(loaded(given), model(given))
    assert str(loaded.report.model) == "Savable"
    assert loaded.explain("conv").rewrites


def test_a_state_dict_saves_alone() -> None:
    compiled, file = fxopt.compile(convnet(), (image(),)), io.BytesIO()
    torch.save(compiled.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    for name, tensor in compiled.state_dict().items():
        assert torch.equal(loaded[name], tensor)


# -- conversions -----------------------------------------------------------------------------------------------------


@front_ends
def test_to_another_dtype_and_back(front_end: str) -> None:
    model = convnet()
    wide = copy.deepcopy(model).double()
    compiled = compiled_by(front_end, model)
    given = image()
    assert_close(compiled(given), model(given))
    assert compiled.to(torch.float64) is compiled
    assert_close(compiled(given.double()), wide(given.double()))
    assert {parameter.dtype for parameter in compiled.parameters()} == {torch.float64}
    compiled.float()
    assert_close(compiled(given), model(given))


@pytest.mark.parametrize("same", [torch.float32, "cpu", torch.device("cpu")], ids=str)
def test_to_what_it_is_already_changes_nothing(same: Any) -> None:
    compiled = fxopt.compile(convnet(), (image(),))
    ready = list(compiled._ready.values())
    assert compiled.to(same) is compiled
    assert list(compiled._ready.values()) == ready


def test_a_converted_module_no_longer_shares_the_callers_weights() -> None:
    model = convnet()
    compiled, wide = fxopt.compile(model, (image(),)).double(), copy.deepcopy(model).double()
    with torch.no_grad():
        model.head.weight.add_(1)
    given = image().double()
    assert_close(compiled(given), wide(given))
