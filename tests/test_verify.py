"""fxopt.verify: which data it takes, what of it forward is given, what it notices, and that it leaves no trace."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fxopt

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.zeros(6, dtype=torch.int64)


class Net(nn.Module):
    """Conv+BN+ReLU with an optional second argument; remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, image: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        result = torch.relu(self.norm(self.conv(image)))
        return result if shift is None else result + shift


class Pairs(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": IMAGES[index], "label": LABELS[index]}


class Given:
    """Stands for a compiled model: gives the model's answer, and notes how many arguments each call had."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.calls = model, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((len(args), sorted(kwargs)))
        return self.model(*args, **kwargs)


@pytest.fixture
def net() -> nn.Module:
    return Net().eval()


SHIFT = torch.ones(1)
NOT_PASSED = "the last entry of a batch of 2 not passed: taken for labels"
PAIRS = [(IMAGES[:2], SHIFT), (IMAGES[2:], SHIFT)]


@pytest.mark.parametrize(
    ("data", "calls", "notes"),
    [
        pytest.param(IMAGES, [(1, [])], (), id="a tensor is one batch"),
        pytest.param((IMAGES, SHIFT), [(2, [])], (), id="a tuple is the arguments of one batch"),
        pytest.param({"image": IMAGES}, [(0, ["image"])], (), id="a dict is the keyword arguments of one batch"),
        pytest.param([IMAGES, IMAGES[:1]], [(1, []), (1, [])], (), id="a list of tensors is batches"),
        pytest.param(PAIRS, [(2, [])] * 2, (), id="a tuple in a list fills optional parameters too"),
        pytest.param(
            [(IMAGES, SHIFT, LABELS)], [(2, [])], ("the last entry of a batch of 3 not passed: taken for labels",),
            id="a tuple in a list loses what forward has no parameter for",
        ),
        pytest.param(
            DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4), [(1, [])] * 2, (NOT_PASSED,),
            id="a DataLoader's labels do not get into an optional parameter",
        ),
        pytest.param(
            DataLoader(TensorDataset(IMAGES), batch_size=3), [(1, [])] * 2, (), id="a DataLoader without labels"
        ),
        pytest.param(
            DataLoader(Pairs(), batch_size=3), [(0, ["image"])] * 2,
            ("not passed, because forward has no such parameter: label",),
            id="a DataLoader of dicts loses the keys that forward does not name",
        ),
        pytest.param((batch for batch in [IMAGES, IMAGES]), [(1, [])] * 2, (), id="a generator is batches"),
    ],
)  # fmt: skip
def test_data(net: nn.Module, data: Any, calls: list[Any], notes: tuple[str, ...]) -> None:
    given = Given(net)
    found = fxopt.verify(net, given, data)
    assert found.ok
    assert found.count == len(calls)
    assert given.calls == calls
    assert found.notes == notes


def test_limit_draws_no_more_than_it_compares(net: nn.Module) -> None:
    drawn = []

    def endless() -> Iterator[torch.Tensor]:
        while True:
            drawn.append(1)
            yield IMAGES

    assert fxopt.verify(net, net, endless(), limit=3).count == 3
    assert len(drawn) == 3


@pytest.mark.parametrize(
    ("data", "limit", "error", "message"),
    [
        pytest.param([], None, fxopt.UsageError, "no batches", id="an empty list"),
        pytest.param(iter(()), None, fxopt.UsageError, "no batches", id="a spent iterator"),
        pytest.param(IMAGES[:0], None, fxopt.UsageError, "every result on this data is empty", id="a batch of 0 alone"),
        pytest.param(IMAGES, 0, fxopt.UsageError, "limit is 0", id="a limit of 0"),
        pytest.param(7, None, fxopt.UsageError, "not int", id="a number"),
        pytest.param("images", None, fxopt.UsageError, "not str", id="a text"),
        pytest.param(
            (IMAGES, SHIFT, SHIFT), None, fxopt.InputError, "the model itself does not take batch 0",
            id="a tuple alone is passed whole",
        ),
        pytest.param(
            [IMAGES, IMAGES[:, :2]], None, fxopt.InputError, "does not take batch 1: RuntimeError", id="a wrong shape"
        ),
    ],
)  # fmt: skip
def test_data_that_is_refused(
    net: nn.Module, data: Any, limit: int | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fxopt.verify(net, net, data, limit=limit)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(fxopt.UsageError, match=r"an nn\.Module, not function"):
        fxopt.verify(lambda x: x, lambda x: x, [IMAGES])  # type: ignore[arg-type]


def test_a_batch_of_0_is_compared_beside_others(net: nn.Module) -> None:
    assert fxopt.verify(net, net, [IMAGES[:0], IMAGES]).count == 2


# -- what it notices -------------------------------------------------------------------------------------------------


def _raises(x: torch.Tensor) -> torch.Tensor:
    raise ValueError("out of luck")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        pytest.param(lambda x: x * 2 + 1e-3, "output misses the float64 reference by", id="another value"),
        pytest.param(lambda x: (x * 2)[:1], "output has shape (1, 3, 8, 8) instead of", id="another shape"),
        pytest.param(lambda x: (x * 2).double(), "dtype torch.float64 instead of torch.float32", id="another dtype"),
        pytest.param(lambda x: [x * 2], "the results have another structure", id="another structure"),
        pytest.param(lambda x: x * 2 + math.inf, "output is off where the original is zero or", id="infinities"),
        pytest.param(lambda x: x.mul_(2), "args[0] after the call", id="an argument written in place"),
        pytest.param(_raises, "the compiled model raises ValueError: out of luck", id="an exception"),
    ],
)
def test_a_wrong_answer(wrong: Callable[..., Any], reason: str) -> None:
    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    found = fxopt.verify(Double(), wrong, [IMAGES])
    assert not found
    assert len(found.wrong) == 1
    assert reason in found.wrong[0].reason
    assert str(found).startswith("WRONG on 1 of 1 batch")


def test_an_argument_that_only_the_model_writes_is_noticed() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.add_(1)

    found = fxopt.verify(Writes(), lambda x: x + 1, IMAGES)
    assert not found.ok
    assert "args[0] after the call" in found.wrong[0].reason
    assert fxopt.verify(Writes(), Writes(), IMAGES).ok


def test_one_wrong_batch_of_three_is_named(net: nn.Module) -> None:
    def sometimes(x: torch.Tensor) -> torch.Tensor:
        return net(x) + (0.1 if len(x) == 2 else 0.0)

    found = fxopt.verify(net, sometimes, [IMAGES, IMAGES[:2], IMAGES[:3]])
    assert [wrong.batch for wrong in found.wrong] == [1]
    assert found.outputs[0].batch == 1
    assert found.outputs[0].name == "output"
    assert "f32[2, 3, 8, 8]" in found.wrong[0].inputs


def test_rounding_beyond_the_first_bound_is_settled_in_float64() -> None:
    class Loses(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x + 4096) - 4096

    found = fxopt.verify(Loses(), lambda x: x, IMAGES)
    assert found.ok
    assert found.error > 1e-5
    assert found.original_error is not None
    assert found.compiled_error is not None
    assert found.compiled_error < found.original_error
    assert not fxopt.verify(Loses(), lambda x: x + 0.01, IMAGES).ok


def test_outputs_are_named_by_their_place() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"a": x, "b": [x + 1]}

    found = fxopt.verify(Two(), lambda x: {"a": x, "b": [x + 1.5]}, IMAGES)
    assert [output.name for output in found.outputs] == ["output['a']", "output['b'][0]"]
    assert found.wrong[0].reason.startswith("output['b'][0] ")


def test_random_numbers_are_the_same_on_both_sides() -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    model, before = Noise(), torch.get_rng_state()
    assert fxopt.verify(model, model, [IMAGES, IMAGES]).error == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_compiled_bitwise_is_held_to_the_bit(net: nn.Module) -> None:
    compiled = fxopt.compile(net, (IMAGES,), numerics="bitwise")
    assert fxopt.verify(net, compiled, IMAGES).error == 0
    assert fxopt.verify(net, lambda x: net(x) * (1 + 2e-7), IMAGES).ok
    compiled.register_forward_hook(lambda module, args, result: result * (1 + 2e-7))
    assert "the same bits were asked for" in fxopt.verify(net, compiled, IMAGES).wrong[0].reason


# -- compiled models, end to end -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False], ids=["with gradients enabled", "without gradients"])
@pytest.mark.parametrize("inputs", [(IMAGES,), None], ids=["compiled on inputs", "compiled without inputs"])
def test_a_compiled_model_on_a_loader(net: nn.Module, inputs: Any, grad: bool) -> None:
    compiled = fxopt.compile(net, inputs)
    told: list[tuple[str, int, int]] = []
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    with torch.set_grad_enabled(grad):
        found = fxopt.verify(net, compiled, loader, progress=lambda *said: told.append(said))
    assert found.ok
    assert 0 < found.error < 2e-6
    assert told == [("verify", 0, 2), ("verify", 1, 2), ("done", 2, 2)]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["count"] == 2


def test_the_caller_s_model_is_run_as_in_eval_mode_and_left_in_training_mode() -> None:
    model = Net()
    compiled = fxopt.compile(model.eval(), (IMAGES,))
    model.train()
    assert fxopt.verify(model, compiled, IMAGES).ok
    assert model.training
    assert not model.norm.running_mean.any()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_state_and_data_are_left_as_they_were() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x.add_(1) * self.calls

    model = Counts().eval()
    # Strides with gaps and strides that overlap: copies must not share memory with the caller's.
    batches = [torch.zeros(4, 6)[:, ::2], torch.zeros(2, 3)[:, [0, 1, 2]], torch.zeros(5, 3)]
    compiled = fxopt.compile(model, (torch.zeros(4, 3),))
    for _ in range(2):
        assert fxopt.verify(model, compiled, batches).error == 0
    assert model.calls == 0
    assert not any(bool(batch.any()) for batch in batches)
    assert compiled(torch.zeros(4, 3)).unique().tolist() == [1.0]


def test_an_expanded_input_is_compared(net: nn.Module) -> None:
    assert fxopt.verify(net, fxopt.compile(net, (IMAGES,)), IMAGES[:1].expand(3, -1, -1, -1)).ok


def test_weights_that_changed_after_compiling_are_not_verified_away(net: nn.Module) -> None:
    compiled = fxopt.compile(net, (IMAGES,))
    with torch.no_grad():
        net.norm.bias.add_(1)
    with pytest.raises(fxopt.StaleWeightsError):
        fxopt.verify(net, compiled, IMAGES)
