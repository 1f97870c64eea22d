"""Branches that a capture could get wrong: each call gets the branch that the model takes for it, as in eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.session import Session
from graphs import Network, TwoInputs, randomised

pytestmark = pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice")


def image(batch: int, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def convnet() -> nn.Module:
    return randomised(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))


def branch(condition: Callable[[torch.Tensor], bool]) -> nn.Module:
    return Network(lambda _, x: x + 1 if condition(x) else x * 2).eval()


def assert_same(model: nn.Module, compiled: nn.Module, *inputs: torch.Tensor) -> None:
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=2e-5, atol=1e-5)


def captures(compiled: fxopt.CompiledModule) -> int:
    session: Session = compiled._session
    return len(session.programs)


@pytest.mark.parametrize("example", [1, 2, 3])
def test_one_capture_serves_every_batch(example: int) -> None:
    model = convnet()
    compiled = fxopt.compile(model, (image(example),))
    for batch in (1, 2, 3, 5, 0):
        assert_same(model, compiled, image(batch))
    assert captures(compiled) == 1


def test_one_symbolic_capture_serves_every_batch_and_resolution() -> None:
    model = convnet()
    compiled = fxopt.compile(model)
    for batch, size in ((1, 8), (2, 8), (3, 9), (0, 8), (5, 16)):
        assert_same(model, compiled, image(batch, size))
    assert captures(compiled) == 1


@pytest.mark.parametrize(
    ("condition", "example", "batches"),
    [
        pytest.param(lambda x: x.shape[0] % 2 == 1, 2, (2, 3, 4, 1, 5, 0), id="the parity of the batch, seen even"),
        pytest.param(lambda x: x.shape[0] % 2 == 1, 3, (2, 3, 4, 1, 5, 0), id="the parity of the batch, seen odd"),
        pytest.param(lambda x: x.shape[0] == 7, 2, (1, 2, 7, 3, 7), id="a batch of 7, seen 2"),
        pytest.param(lambda x: x.shape[0] == 7, 7, (7, 1, 2, 7, 3), id="a batch of 7, seen 7"),
        pytest.param(lambda x: x.shape[0] != 1, 1, (1, 2, 3, 1, 0), id="a batch of 1, seen 1"),
        pytest.param(lambda x: x.shape[0] != 1, 4, (4, 2, 1, 3, 1), id="a batch of 1, seen 4"),
        pytest.param(lambda x: x.shape[0] == 0, 2, (2, 0, 1, 0), id="an empty batch"),
        pytest.param(lambda x: x.shape[0] > 4, 2, (2, 4, 5, 3, 9), id="a batch above 4"),
    ],
)
def test_a_branch_on_the_batch_is_taken_for_each_batch(
    condition: Callable[[torch.Tensor], bool], example: int, batches: tuple[int, ...]
) -> None:
    model = branch(condition)
    compiled = fxopt.compile(model, (image(example),))
    for batch in batches:
        assert_same(model, compiled, image(batch))


def test_a_new_resolution_gets_a_capture_of_its_own() -> None:
    model = convnet()
    compiled = fxopt.compile(model, (image(2),))
    for size in (8, 9, 16, 8, 1):
        assert_same(model, compiled, image(2, size))
    assert captures(compiled) == 4


def test_with_all_dimensions_open_one_capture_serves_every_resolution() -> None:
    model = convnet()
    compiled = fxopt.compile(model, (image(2),), dynamic_shapes="all")
    for batch, size in ((2, 8), (3, 9), (2, 16)):
        assert_same(model, compiled, image(batch, size))
    assert captures(compiled) == 1


def test_with_no_dimension_open_another_batch_gets_a_capture_of_its_own() -> None:
    model = convnet()
    compiled = fxopt.compile(model, (image(2),), dynamic_shapes=None)
    for batch in (2, 3, 2):
        assert_same(model, compiled, image(batch))
    assert captures(compiled) == 2


@pytest.mark.parametrize(
    "condition",
    [
        pytest.param(lambda x: x.is_contiguous(), id="is_contiguous()"),
        pytest.param(lambda x: x.stride(1) == 1, id="stride(1)"),
        pytest.param(lambda x: x.is_contiguous(memory_format=torch.channels_last), id="is_contiguous(channels_last)"),
    ],
)
def test_a_branch_on_strides_is_taken_for_each_stride_order(condition: Callable[[torch.Tensor], bool]) -> None:
    model = branch(condition)
    compiled = fxopt.compile(model, (image(2),))
    orders = [
        image(2),
        image(2).to(memory_format=torch.channels_last),
        image(2).transpose(2, 3),
        image(2, 16)[:, :, ::2, ::2],
        image(2),
    ]
    for given in orders:
        assert_same(model, compiled, given)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(image(2).to(memory_format=torch.channels_last), id="channels last"),
        pytest.param(image(2).transpose(2, 3), id="transposed"),
        pytest.param(image(2, 16)[:, :, ::2, ::2], id="every second pixel"),
        pytest.param(image(1)[0].expand(2, 3, 8, 8), id="one image seen twice"),
    ],
)
@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_results_have_the_strides_that_eager_gives_for_any_strides(given: torch.Tensor, front_end: str) -> None:
    model = convnet()
    compiled = fxopt.compile(model, (image(2),)) if front_end == "export" else fxopt.compile(model)
    assert_same(model, compiled, given)
    assert compiled(given).stride() == model(given).stride()


def test_a_branch_on_the_dtype_is_taken_for_each_dtype() -> None:
    model = branch(lambda x: x.dtype == torch.float64)
    compiled = fxopt.compile(model, (image(2),))
    assert_same(model, compiled, image(2).double())
    assert_same(model, compiled, image(2))


# -- torch's state ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_a_branch_on_autocast_is_taken_for_each_state(front_end: str) -> None:
    model = branch(lambda _: torch.is_autocast_enabled("cpu"))
    compiled = fxopt.compile(model, (image(2),)) if front_end == "export" else fxopt.compile(model)
    assert_same(model, compiled, image(2))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model, compiled, image(2))
    assert_same(model, compiled, image(2))


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_autocast_gives_its_dtype_and_eagers_answer_within_its_rounding(front_end: str) -> None:
    model = convnet()
    compiled = fxopt.compile(model, (image(2),)) if front_end == "export" else fxopt.compile(model)
    given = image(2)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected, result = model(given), compiled(given)
    assert result.dtype == expected.dtype == torch.bfloat16
    exact = model(given).double()
    assert (result.double() - exact).abs().max() <= 2 * (expected.double() - exact).abs().max() + 4 * 2**-8
    assert_same(model, compiled, given)


#: What a rewrite may take for one dtype is several under autocast.
NARROWED = {
    "a constant behind a convolution": lambda m, x: m.conv(x) * m.constant,
    "a sum of a convolution and its input": lambda m, x: m.conv(x) + x,
    "casts that cancel": lambda m, x: (m.conv(x).float() + 1, m.conv(x).double().float() + 1),
    "a concat that a convolution reads": lambda m, x: m.wide(torch.cat([m.conv(x), m.other(x)], 1)),
    "a product of constants": lambda m, x: x @ (m.square @ m.square),
}


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize("first", [False, True], ids=["off first", "on first"])
@pytest.mark.parametrize("name", NARROWED)
def test_what_was_rewritten_for_one_autocast_state_does_not_serve_another(
    front_end: str, first: bool, name: str
) -> None:
    model = Network(
        NARROWED[name], conv=nn.Conv2d(16, 16, 1), other=nn.Conv2d(16, 16, 1), wide=nn.Conv2d(32, 4, 1),
        constant=torch.rand(16, 1, 1), square=torch.rand(8, 8),
    ).eval()  # fmt: skip
    x = torch.randn(2, 16, 8, 8)
    example = (x,) if front_end == "export" else None
    compiled = fxopt.compile(model, example, verify=False, strict=True)
    for on in (first, not first, first, not first):
        with torch.autocast("cpu", torch.bfloat16, enabled=on), torch.no_grad():
            expected, result = model(x), compiled(x)
        pairs = zip(expected, result, strict=True) if isinstance(expected, tuple) else [(expected, result)]
        for wanted, found in pairs:
            assert found.dtype == wanted.dtype
            torch.testing.assert_close(found, wanted, rtol=2e-2 if on else 1e-5, atol=2e-2 if on else 1e-5)
    assert len(compiled._session.programs) <= 2


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize("compiled_in_grad_mode", [True, False], ids=["compiled with grad", "compiled without grad"])
def test_a_branch_on_the_grad_mode_is_taken_for_each_mode(front_end: str, compiled_in_grad_mode: bool) -> None:
    model = branch(lambda _: torch.is_grad_enabled())
    with torch.set_grad_enabled(compiled_in_grad_mode):
        compiled = fxopt.compile(model, (image(2),)) if front_end == "export" else fxopt.compile(model)
    for _ in range(2):
        assert_same(model, compiled, image(2))
        with torch.no_grad():
            assert_same(model, compiled, image(3))
        with torch.inference_mode():
            assert_same(model, compiled, image(2))


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_an_input_that_requires_grad_gets_the_right_gradient(front_end: str) -> None:
    model = convnet()
    compiled = fxopt.compile(model, (image(2),)) if front_end == "export" else fxopt.compile(model)
    given = image(2).requires_grad_()
    (expected,) = torch.autograd.grad(model(given).square().sum(), given)
    (result,) = torch.autograd.grad(compiled(given).square().sum(), given)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    assert not compiled(image(2)).requires_grad


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize("first", [True, False], ids=["grad first", "no grad first"])
def test_a_region_without_grad_inside_the_model_stays_one(front_end: str, first: bool) -> None:
    def body(_: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = x * 3
        return x * scale

    model = Network(body).eval()
    with torch.set_grad_enabled(first):
        compiled = fxopt.compile(model, (image(2),)) if front_end == "export" else fxopt.compile(model)
        compiled(image(2))
    given = image(2).requires_grad_()
    (expected,) = torch.autograd.grad(model(given).sum(), given)
    (result,) = torch.autograd.grad(compiled(given).sum(), given)
    assert torch.equal(result, expected)


def test_inference_mode_gives_inference_tensors_and_leaves_no_trace_outside() -> None:
    model = convnet()
    with torch.inference_mode():
        compiled = fxopt.compile(model, (image(2),))
        assert compiled(image(2)).is_inference()
    assert_same(model, compiled, image(2))
    assert not compiled(image(3)).is_inference()


def test_a_model_made_in_inference_mode_compiles_and_runs_in_and_out_of_it() -> None:
    with torch.inference_mode():
        model = convnet()
        for compiled in (fxopt.compile(model, (image(2),)), fxopt.compile(model)):
            assert_same(model, compiled, image(2))
    with torch.no_grad():
        assert_same(model, compiled, image(1))


# -- several inputs, and arguments that are no tensors ---------------------------------------------------------------


def test_inputs_whose_batches_differ_each_keep_their_own() -> None:
    model = TwoInputs(lambda _, x, y: x.sum(0) + y.mean(0)).eval()
    compiled = fxopt.compile(model, (torch.randn(2, 4), torch.randn(3, 4)))
    for left, right in ((2, 3), (3, 3), (5, 2), (1, 1), (4, 1)):
        assert_same(model, compiled, torch.randn(left, 4), torch.randn(right, 4))


def test_inputs_that_must_have_one_batch_and_one_that_broadcasts() -> None:
    model = TwoInputs(lambda _, x, y: x + y).eval()
    compiled = fxopt.compile(model, (torch.randn(3, 4), torch.randn(3, 4)))
    for left, right in ((3, 3), (5, 5), (1, 5), (5, 1), (1, 1)):
        assert_same(model, compiled, torch.randn(left, 4), torch.randn(right, 4))


class Choosing(nn.Module):
    """Arguments that are no tensors, in every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: Any = 1.0, *, mode: str = "plain", flip: bool = False) -> torch.Tensor:
        y = self.linear(x) / scale
        if mode == "shifted":
            y = y + 1
        return y.flip(0) if flip else y


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_each_value_of_a_constant_argument_gets_its_own_answer(front_end: str) -> None:
    model, given = Choosing().eval(), torch.randn(2, 4)
    compiled = fxopt.compile(model, (given,)) if front_end == "export" else fxopt.compile(model)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((given,), {}),
        ((given, 2), {}),
        ((given, 2.0), {}),
        ((given, True), {}),
        ((given, 0.0), {}),
        ((given, -0.0), {}),
        ((given,), {"scale": torch.tensor(4.0)}),
        ((given,), {"mode": "shifted"}),
        ((), {"x": given, "flip": True, "mode": "shifted"}),
        ((given,), {}),
    ]
    for args, kwargs in calls * 2:
        torch.testing.assert_close(compiled(*args, **kwargs), model(*args, **kwargs))


def test_a_constant_that_is_not_a_number_is_captured_once() -> None:
    model, given = Choosing().eval(), torch.randn(2, 4)
    compiled = fxopt.compile(model, (given, float("nan")))
    for _ in range(3):
        assert compiled(given, float("nan")).isnan().all()
    assert captures(compiled) == 1
