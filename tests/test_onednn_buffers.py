"""oneDNN's backend: concats that grow have one memory; products write into it, and what else is new is copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxopt
from fxopt import ir
from fxopt.lowering import onednn
from graphs import Network

pytestmark = pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN")


class DenseBlock(nn.Module):
    """Each layer reads what all layers in front of it gave; whole numbers, so that every sum is exact."""

    def __init__(self, depth: int, dim: int = 1, growth: int = 4) -> None:
        super().__init__()
        self.stem, self.dim = nn.Conv2d(3, 8, 3, padding=1), dim
        self.layers = nn.ModuleList(nn.Conv2d(8 + growth * n, growth, 3, padding=1) for n in range(depth))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randint(-1, 2, parameter.shape))

    def forward(self, x: torch.Tensor) -> Any:
        """The concat of everything."""
        features = [torch.relu(self.stem(x))]
        for layer in self.layers:
            features.append(torch.clamp(layer(torch.cat(features, 1)), 0, 3))
        return torch.cat(features, 1)


def lowered(fast: fxopt.CompiledModule) -> fx.GraphModule:
    (made,) = fast._ready.values()
    assert made.backend == "onednn"
    return made.module


def copies(module: fx.GraphModule) -> list[int]:
    """The channels that each copy into memory copies."""
    found = module.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    return [int((ir.shape(node) or (0, 0))[1]) for node in found]


def written(module: fx.GraphModule) -> list[int]:
    """The channels that each product writes into memory."""
    found = [node for node in module.graph.nodes if node.target in (torch.ops.aten.addmm.out, torch.ops.aten.mm.out)]
    return [int((ir.shape(node) or (0, 0))[1]) for node in found]


def image() -> torch.Tensor:
    return torch.randint(-2, 3, (2, 3, 6, 6)).float()


def test_a_dense_block_copies_what_it_computes_once() -> None:
    model, x = DenseBlock(5).eval(), image()
    fast = fxopt.compile(model, (x,), backend="onednn", strict=True)
    assert copies(lowered(fast)) == [8, 4, 4, 4, 4, 4]
    assert not lowered(fast).graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    for batch in (x, torch.cat([x, x, x])):
        assert torch.equal(fast(batch), model(batch))
        assert fast(batch).stride() == model(batch).stride()


@pytest.mark.parametrize("depth", [4, 8, 16])
def test_what_is_copied_grows_linearly_with_depth(depth: int) -> None:
    fast = fxopt.compile(DenseBlock(depth).eval(), (image(),), backend="onednn", verify=False)
    assert sum(copies(lowered(fast))) == 8 + 4 * depth
    asked = fxopt.compile(
        DenseBlock(depth).eval(), (image(),), backend="onednn", disable=("allocate-buffers",), verify=False
    )
    concats = lowered(asked).graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    assert sum(int((ir.shape(node) or (0, 0))[1]) for node in concats) > depth * depth


def test_each_call_has_memory_of_its_own() -> None:
    model, x = DenseBlock(3).eval(), image()
    fast = fxopt.compile(model, (x,), backend="onednn", strict=True)
    first, kept = fast(x), model(x)
    second = fast(-x)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert torch.equal(first, kept)


READERS: dict[str, Any] = {
    "elementwise": lambda m, a, b, c: torch.sigmoid(a) * 2,
    "a pool": lambda m, a, b, c: nn.functional.max_pool2d(a, 2),
    "a convolution": lambda m, a, b, c: m.reader(a),
    "a reshape": lambda m, a, b, c: a.flatten(1) + 1,
    "a mean": lambda m, a, b, c: a.mean((2, 3)),
    "a slice": lambda m, a, b, c: a[:, 1:3] + 1,
    "a norm over channels": lambda m, a, b, c: nn.functional.group_norm(a, 3),
    "a sum with a part": lambda m, a, b, c: a[:, :8] + c,
}


@pytest.mark.parametrize("name", READERS)
def test_readers_of_a_buffer_inside_another_read_the_same_values(name: str) -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        c = torch.relu(m.first(x))
        a = torch.cat([c, torch.relu(m.second(c))], 1)
        b = torch.cat([a, torch.relu(m.third(a))], 1)
        return READERS[name](m, a, b, c), b.sum((2, 3))

    parts = {
        "first": nn.Conv2d(3, 8, 3), "second": nn.Conv2d(8, 4, 1), "third": nn.Conv2d(12, 4, 1),
        "reader": nn.Conv2d(12, 4, 3),
    }  # fmt: skip
    model, x = Network(body, **parts).eval(), torch.randn(2, 3, 8, 8)
    fast = fxopt.compile(model, (x,), backend="onednn", strict=True)
    assert copies(lowered(fast)) == [8]
    assert written(lowered(fast)) == [4, 4]
    for result, expected in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


Expected = tuple[list[int], list[int]]


def pixels(m: Any, x: torch.Tensor) -> Any:
    """A linear layer over the channels of each pixel."""
    return m.linear(wide(x))


def wide(x: torch.Tensor) -> torch.Tensor:
    """Images with their channels last."""
    return x.permute(0, 2, 3, 1)


PARTS: dict[str, tuple[Any, Expected]] = {
    "a product": (lambda m, x: [m.first(x), m.third(x)], ([4], [6])),
    "a product without a bias": (lambda m, x: [m.plain(x), m.third(x)], ([4], [6])),
    "a product and its activation": (lambda m, x: [torch.relu(m.first(x)), m.third(x)], ([4], [6])),
    "a product, its residual and activation": (lambda m, x: [torch.relu(m.first(x) + x), m.third(x)], ([4], [6])),
    "two products": (lambda m, x: [m.first(x), m.plain(x)], ([4, 4], [])),
    "an activation that has no kernel to overwrite": (lambda m, x: [F.mish(m.first(x)), m.third(x)], ([], [])),
    "a product that something else reads": (lambda m, x: [y := m.first(x), m.third(x), m.third(y)], ([], [])),
    "a linear layer over channels": (lambda m, x: [pixels(m, x).permute(0, 3, 1, 2), m.third(x)], ([4], [6])),
    "a linear layer, turned round": (lambda m, x: [pixels(m, x).permute(0, 3, 2, 1), m.third(x)], ([], [])),
    "a step that broadcasts": (
        lambda m, x: [(pixels(m, x[:, :, :1]) + wide(x)).permute(0, 3, 1, 2), m.third(x)], ([], []),
    ),
    "a linear layer whose bias has a row for each column": (
        lambda m, x: [F.linear(wide(x), m.linear.weight, m.bias).permute(0, 3, 1, 2), m.third(x)], ([], []),
    ),
    "a linear layer that something else reads": (
        lambda m, x: [(y := pixels(m, x)).permute(0, 3, 1, 2), m.third(x) + y.sum(3).unsqueeze(1)], ([], []),
    ),
    "a linear layer, read beside its activation": (
        lambda m, x: [torch.tanh(y := pixels(m, x)).permute(0, 3, 1, 2), m.third(x) + y.sum(3).unsqueeze(1)], ([], []),
    ),
    "an activation of a linear layer, read beside another": (
        lambda m, x: [
            torch.tanh(y := torch.sigmoid(pixels(m, x))).permute(0, 3, 1, 2), m.third(x) + y.sum(3).unsqueeze(1)
        ], ([], []),
    ),
    "a product that stands twice in it": (lambda m, x: [y := m.first(x), y, m.third(x)], ([], [])),
    "no product": (lambda m, x: [m.third(x), m.third(x) * 2], ([], [])),
}  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), PARTS.values(), ids=PARTS.keys())
@pytest.mark.parametrize("images", [1, 2])
def test_products_write_into_their_slices(body: Any, expected: Expected, images: int) -> None:
    parts = {
        "first": nn.Conv2d(4, 4, 1), "plain": nn.Conv2d(4, 4, 1, bias=False), "third": nn.Conv2d(4, 6, 3, padding=1),
        "reader": nn.LazyConv2d(4, 3), "linear": nn.Linear(4, 4),
        "bias": nn.Parameter(torch.randn(9, 4)),
    }  # fmt: skip
    model = Network(lambda m, x: m.reader(torch.cat(body(m, x), 1)), **parts).eval()
    x = torch.randn(images, 4, 9, 9)
    model(x)
    fast = fxopt.compile(model, (x,), backend="onednn", strict=True, disable=("merge-siblings", "eliminate-concat"))
    assert (written(lowered(fast)), copies(lowered(fast))) == expected
    for given in (x, torch.cat([x, x, x])):
        torch.testing.assert_close(fast(given), model(given), rtol=1e-5, atol=1e-5)


def test_a_product_is_not_moved_behind_a_write_to_what_it_reads() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        first = m.first(x)
        x.zero_()
        return m.reader(torch.cat([first, m.third(x)], 1))

    model = Network(body, first=nn.Conv2d(4, 4, 1), third=nn.Conv2d(4, 4, 3, padding=1), reader=nn.Conv2d(8, 4, 3))
    model = model.eval()
    x = torch.randn(2, 4, 9, 9).to(memory_format=torch.channels_last)
    fast = fxopt.compile(model, (x.clone(),), backend="onednn", strict=True)
    assert written(lowered(fast)) == []
    torch.testing.assert_close(fast(x.clone()), model(x.clone()), rtol=1e-5, atol=1e-5)


def test_buffers_nested_along_another_dimension() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        a = torch.cat([torch.relu(m.first(x)), torch.tanh(m.first(x))], 1)
        return torch.cat([a, torch.sigmoid(m.second(x))], 2)

    model = Network(body, first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(3, 8, 1)).eval()
    x = torch.randn(2, 3, 6, 6)
    passes = ("fuse-conv-activation", "allocate-buffers")
    fast = fxopt.compile(model, (x,), backend="onednn", strict=True, passes=passes)
    assert copies(lowered(fast)) == [4, 4, 8], "neither has its pixels at equal distances"
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_inputs_and_constants_are_copied_in() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        a = torch.cat([x, m.constant, torch.relu(m.conv(x))], 1)
        return torch.cat([a, torch.relu(m.wide(a))], 1)

    model = Network(body, conv=nn.Conv2d(3, 4, 1), wide=nn.Conv2d(9, 4, 1), constant=torch.randn(2, 2, 6, 6)).eval()
    x = torch.randn(2, 3, 6, 6)
    fast = fxopt.compile(model, (x,), backend="onednn", strict=True, dynamic_shapes=None)
    assert copies(lowered(fast)) == [3, 2, 4, 4]
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_buffer_of_no_other_is_left_to_cat_and_the_report_says_why() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        return torch.cat([torch.relu(m.first(x)), torch.relu(m.second(x))], 1)

    model = Network(body, first=nn.Conv2d(3, 4, 3), second=nn.Conv2d(3, 4, 3)).eval()
    fast = fxopt.compile(model, (torch.randn(2, 3, 6, 6),), backend="onednn", disable=("merge-siblings",))
    assert not copies(lowered(fast))
    reasons = [decline.reason for decline in fast.report.declines if decline.pass_name == "onednn-buffers"]
    assert len(reasons) == 2
    assert all("is copied: mkldnn._convolution_pointwise gives a tensor of its own here" in text for text in reasons)
    assert "gives a tensor of its own" in str(fast.explain("buffer"))


def test_a_buffer_that_is_twice_in_another_is_copied_once() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        a = torch.cat([m.first(x), m.second(x)], 1)
        return m.reader(torch.cat([a, a], 1))

    model = Network(body, first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(3, 2, 1), reader=nn.Conv2d(12, 4, 1)).eval()
    x = torch.randn(2, 3, 6, 6)
    fast = fxopt.compile(model, (x,), backend="onednn", passes=["allocate-buffers"], verify=False)
    assert (written(lowered(fast)), copies(lowered(fast))) == ([4, 2], [6])
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_the_copy_of_a_buffer_may_stand_in_front_of_it() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        a = torch.ops.fxopt.buffer([m.first(x), m.second(x)], 1, [])
        return m.reader(torch.ops.fxopt.buffer([a, a], 1, [0])), m.reader(torch.cat([a, -a], 1))

    model = Network(body, first=nn.Conv2d(3, 4, 1), second=nn.Conv2d(3, 2, 1), reader=nn.Conv2d(12, 4, 1)).eval()
    x = torch.randn(2, 3, 6, 6)
    fast = fxopt.compile(model, (x,), backend="onednn", passes=(), verify=False)
    assert (written(lowered(fast)), copies(lowered(fast))) == ([4, 2], [6])
    for result, expected in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
