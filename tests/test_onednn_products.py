"""Matrix products within the oneDNN backend: which library multiplies, ATen's answer, weights packed once."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.lowering import onednn_products
from fxopt.lowering.weights import Weights
from graphs import Network, operations
from test_onednn import ACTIVATIONS, EachActivation, assert_each, assert_eager, passing, poisoned

pytestmark = pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice")

needs_mkl = pytest.mark.skipif(not onednn_products.has_mkl(), reason="this torch is built without MKL")


def libraries(compiled: fxopt.CompiledModule, index: int = -1) -> dict[str, int]:
    """How many products each library has in a specialisation, the last one if none is named."""
    found = operations(list(compiled._ready.values())[index].module)
    names = {
        "mkl._mkl_linear": "mkl", "mkldnn._linear_pointwise": "onednn", "linear": "aten",
        "mkldnn._convolution_pointwise": "convolution", "mkldnn._convolution_transpose_pointwise": "transposed",
    }  # fmt: skip
    return {names[name]: count for name, count in found.items() if name in names}


PRODUCTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "one row": (lambda: nn.Linear(512, 512), (1, 512), "aten"),
    "two rows": (lambda: nn.Linear(512, 512), (2, 1, 512), "aten"),
    "a few rows": (lambda: nn.Linear(96, 64), (256, 96), "mkl"),
    "a few rows of two dimensions": (lambda: nn.Linear(96, 64, bias=False), (4, 64, 96), "mkl"),
    "many rows": (lambda: nn.Linear(96, 64), (513, 96), "onednn"),
    "one pixel": (lambda: nn.Conv2d(4, 6, 1), (1, 4, 1, 1), "aten"),
    "two images of a pixel": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 1, 1), "aten"),
    "two pixels": (lambda: nn.Conv2d(4, 6, 1), (1, 4, 1, 2), "aten"),
    "a few pixels": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 4, 8), "mkl"),
    "a few images of a pixel": (lambda: nn.Conv2d(4, 6, 1), (8, 4, 1, 1), "mkl"),
    "many pixels of few channels": (lambda: nn.Conv2d(4, 6, 1), (1, 4, 5, 13), "aten"),
    "many pixels of many channels": (lambda: nn.Conv2d(512, 8, 1), (2, 512, 25, 21), "convolution"),
    "many pixels of a few channels less": (lambda: nn.Conv2d(512, 8, 1), (2, 512, 16, 32), "aten"),
    "a larger kernel": (lambda: nn.Conv2d(4, 6, (1, 2)), (1, 4, 4, 4), "convolution"),
    "a stride": (lambda: nn.Conv2d(4, 6, 1, stride=2), (1, 4, 4, 4), "convolution"),
    "padding": (lambda: nn.Conv2d(4, 6, 1, padding=1), (1, 4, 2, 2), "convolution"),
    "a dilation, which parts no taps": (lambda: nn.Conv2d(4, 6, 1, dilation=2), (1, 4, 4, 4), "mkl"),
    "a few voxels": (lambda: nn.Conv3d(4, 6, 1), (1, 4, 2, 2, 2), "convolution"),
    "a transposed kernel": (lambda: nn.ConvTranspose2d(4, 4, 1), (1, 4, 4, 4), "transposed"),
    "groups": (lambda: nn.Conv2d(4, 6, 1, groups=2), (1, 4, 4, 4), "convolution"),
}
rows = pytest.mark.parametrize(("layer", "shape", "library"), PRODUCTS.values(), ids=PRODUCTS.keys())


@needs_mkl
@rows
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "with a residual"])
def test_each_library_with_every_activation_gives_atens_answer(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], library: str, with_residual: bool
) -> None:
    model = EachActivation(layer).eval()
    inputs = [torch.randn(shape)]
    if with_residual:
        inputs.append(torch.randn(model.layers[0](inputs[0]).shape))
    compiled = fxopt.compile(model, disable=("merge-siblings",))
    before = [given.clone() for given in inputs]
    assert_each(compiled(*inputs), model(*inputs))
    assert compiled.report.backend == "onednn", compiled.report.notices
    assert libraries(compiled) == {library: len(ACTIVATIONS)}
    assert all(torch.equal(given, kept) for given, kept in zip(inputs, before, strict=True))


@needs_mkl
def test_mkls_weights_serve_one_number_of_rows_and_onednns_all_others() -> None:
    model = Network(lambda m, x: m.linear(x), linear=nn.Linear(512, 512)).eval()
    compiled = fxopt.compile(model, (torch.randn(64, 512),))
    for number, library in ((64, "mkl"), (128, "onednn"), (200, "onednn"), (1, "aten")):
        assert_eager(model, compiled, torch.randn(number, 512))
        assert libraries(compiled) == {library: 1}
    assert sorted(key for key, _ in compiled._session.packed.made()) == [("linear",), ("mkl", 64)]


@needs_mkl
def test_a_weight_that_two_layers_share_is_packed_once() -> None:
    shared = nn.Conv2d(4, 4, 1)
    model = Network(lambda m, x: m.first(m.first(x).sin()), first=shared).eval()
    x = torch.randn(1, 4, 4, 4)
    compiled = fxopt.compile(model, (x,))
    assert_eager(model, compiled, x)
    assert libraries(compiled) == {"mkl": 2}
    assert [key for key, _ in compiled._session.packed.made()] == [("mkl", 16)]


def test_without_mkl_onednn_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_products, "has_mkl", lambda: False)
    monkeypatch.setattr(onednn_products, "SMALL", 0)
    model = Network(
        lambda m, x: m.linear(m.conv(x).flatten(2)), conv=nn.Conv2d(64, 64, 1), linear=nn.Linear(64, 64)
    ).eval()
    x = torch.randn(1, 64, 8, 8)
    compiled = fxopt.compile(model, (x,))
    assert_eager(model, compiled, x)
    assert libraries(compiled) == {"convolution": 1, "onednn": 1}


@needs_mkl
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_as_in_aten(value: float) -> None:
    model, given = EachActivation(passing).eval(), poisoned(value)[:, :, :4, :4]
    compiled = fxopt.compile(model, (torch.randn(1, 1, 4, 4),), disable=("merge-siblings",))
    assert_each(compiled(given), model(given))
    assert libraries(compiled) == {"mkl": len(ACTIVATIONS)}


@needs_mkl
def test_a_permutation_of_the_users_whose_result_is_channels_last_is_not_another_products() -> None:
    model = Network(lambda m, x: m.conv(x.transpose(1, 2).permute(0, 3, 2, 1)), conv=nn.Conv2d(3, 4, 1)).eval()
    x = torch.randn(1, 5, 5, 3)
    compiled = fxopt.compile(model, (x,), passes=(), strict=True, verify=False)
    assert_eager(model, compiled, x)
    assert libraries(compiled) == {"mkl": 1}


@needs_mkl
def test_a_product_reads_what_another_gave_as_it_is() -> None:
    model = Network(lambda m, x: m.second(m.first(x)), first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(4, 5, 1)).eval()
    x = torch.randn(1, 3, 4, 4).to(memory_format=torch.channels_last)
    compiled = fxopt.compile(model, (x,))
    assert_eager(model, compiled, x)
    graph = list(compiled._ready.values())[-1].module.graph
    first, second = sorted(graph.find_nodes(op="call_function", target=torch.ops.mkl._mkl_linear.default))
    assert second.args[0] is first


ATENS: dict[str, tuple[Callable[[nn.Module, torch.Tensor], torch.Tensor], tuple[int, ...], str]] = {
    "a convolution's weight": (lambda m, x: F.conv2d(x, m.kernel * x.mean()), (2, 4, 9, 9), "weight is computed"),
    "a product's weight": (lambda m, x: F.conv2d(x, m.tap * x.mean()), (1, 4, 4, 4), "weight is computed"),
    "a linear layer's weight": (lambda m, x: F.linear(x, m.square * x.mean()), (64, 64), "weight is computed"),
    "a convolution's bias": (lambda m, x: F.conv2d(x, m.kernel, x.mean((0, 2, 3))), (2, 4, 9, 9), "bias is computed"),
    "a linear layer's bias": (lambda m, x: F.linear(x, m.square, x.mean(0)), (64, 64), "bias is computed"),
    "one number for all features": (lambda m, x: F.linear(x, m.square, m.row[:1]), (64, 64), "for each feature"),
    "a number as bias": (lambda m, x: F.linear(x, m.square, m.row[0]), (1024, 64), "for each feature"),
    "a bias for each row": (lambda m, x: F.linear(x, m.square, m.square), (64, 64), "for each feature"),
    "a bias of two dimensions": (lambda m, x: F.linear(x, m.square, m.row[None]), (1024, 64), "for each feature"),
    "a vector as weight": (lambda m, x: F.linear(x, m.row), (4096, 64), "weight is a vector"),
}


@pytest.mark.parametrize(("body", "shape", "reason"), ATENS.values(), ids=ATENS.keys())
def test_a_layer_stays_atens_with(
    body: Callable[[nn.Module, torch.Tensor], torch.Tensor], shape: tuple[int, ...], reason: str
) -> None:
    parts = {"kernel": torch.randn(4, 4, 3, 3), "tap": torch.randn(4, 4, 1, 1), "square": torch.randn(64, 64)}
    model, x = Network(body, row=torch.randn(64), **parts).eval(), torch.randn(shape)
    compiled = fxopt.compile(model, (x,), passes=("fold-constants",), verify=False, strict=True)
    assert_eager(model, compiled, x)
    assert compiled.report.backend == "onednn", compiled.report.notices
    assert [reason in decline.reason for decline in compiled.report.declines] == [True]
    assert set(libraries(compiled)) <= {"aten"}


def test_a_packed_weight_is_not_taken_for_that_of_another_at_the_same_place() -> None:
    packed = Weights()
    for number in range(8):
        weight = torch.full((64, 64), float(number))
        found = packed.once(("clone",), weight, weight.clone)
        assert torch.equal(found, torch.full((64, 64), float(number)))
        del weight


def read_before_and_behind(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    first = m.conv(y)
    y[:, 0] = 0.0
    return first + m.conv(y)


def given_before_and_behind(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    residual = m.conv(x)
    z = y.contiguous(memory_format=torch.channels_last)
    y[:, 0] = 0.0
    return residual + m.conv(y) + z.sum()


@pytest.mark.parametrize("body", [read_before_and_behind, given_before_and_behind])
@pytest.mark.parametrize("size", [4, 9], ids=["a product", "a convolution"])
def test_what_is_written_between_two_readers_is_copied_for_each(
    body: Callable[[nn.Module, torch.Tensor], torch.Tensor], size: int
) -> None:
    model = Network(body, conv=nn.Conv2d(3, 4, 1)).eval()
    for batch in (2, 3):
        x = torch.randn(batch, 3, size, size)
        compiled = fxopt.compile(model, (x,), verify=False, disable=("merge-siblings",))
        torch.testing.assert_close(compiled(x), model(x), rtol=2e-5, atol=2e-5)
        assert compiled.report.backend == "onednn", compiled.report.notices


@pytest.mark.parametrize(
    ("body", "weight", "shape"),
    [
        pytest.param(lambda m, x: (F.conv2d(x, m.w), m.w.add_(1))[0], (4, 3, 3, 3), (2, 3, 9, 9), id="a convolution"),
        pytest.param(lambda m, x: (F.conv2d(x, m.w), m.w[0].add_(1))[0], (4, 3, 1, 1), (2, 3, 4, 4), id="a product"),
        pytest.param(lambda m, x: (F.linear(x, m.w), m.w.add_(1))[0], (64, 64), (64, 64), id="a linear layer"),
    ],
)
def test_weights_that_are_written_are_never_packed(
    body: Callable[[nn.Module, torch.Tensor], torch.Tensor], weight: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    w, x = torch.randn(weight), torch.randn(shape)
    model, twin = Network(body, w=w.clone()).eval(), Network(body, w=w.clone()).eval()
    compiled = fxopt.compile(model, (x,), verify=False)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), twin(x), rtol=2e-5, atol=2e-5)
    assert compiled.report.backend == "aten", compiled.report.notices


WRITES = {
    "to what layouts do not reach": (
        lambda m, x: m.linear(m.conv(x).flatten(2)) + mask(x), "onednn",
    ),
    "to what a convolution gives": (lambda m, x: written(m.conv(x)), "aten"),
    "to what is computed of it": (lambda m, x: written(m.conv(x).relu() * 2), "aten"),
}  # fmt: skip


def mask(x: torch.Tensor) -> torch.Tensor:
    found = x.new_zeros(4, 64)
    found[1:3, 5:9] = 1.0
    return found


def written(y: torch.Tensor) -> torch.Tensor:
    rows = y.view(y.shape[0], 4, -1)
    rows[:, 1, 3:5] = 0.5
    return F.relu(y) + rows.sum()


@pytest.mark.parametrize(("body", "backend"), WRITES.values(), ids=WRITES.keys())
def test_writes_are_onednns_where_no_stride_could_redirect_them(
    body: Callable[[nn.Module, torch.Tensor], torch.Tensor], backend: str
) -> None:
    model = Network(body, conv=nn.Conv2d(3, 4, 3, padding=1), linear=nn.Linear(64, 64)).eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = fxopt.compile(model, (x,))
    torch.testing.assert_close(compiled(x), model(x), rtol=2e-5, atol=2e-5)
    assert compiled.report.backend == backend, compiled.report.notices
    assert backend == "onednn" or any("strides could redirect" in notice for notice in compiled.report.notices)
