"""The estimate of work: what each operator computes and moves, what a module does, whether a rewrite pays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt import cost, ir, ops
from fxopt.cost import Cost, Device
from fxopt.lowering.backend import set_concrete_values
from zoo import import_torchvision

aten = torch.ops.aten
F = nn.functional


class Function(nn.Module):
    """A function of tensors as a model."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


def of(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Cost | None:
    """The cost of the operation that a function of tensors ends with."""
    model = function.eval() if isinstance(function, nn.Module) else Function(function).eval()
    module = fxopt.trace(model, tuple(torch.randn(shape) for shape in shapes))
    return cost.of([node for node in module.graph.nodes if ir.is_compute(node)][-1])


IMAGE = (2, 3, 8, 8)  # 384 elements, 1536 bytes
MATRIX = (4, 6)

#: function, shapes of its inputs -> operations, elements read, elements written, elements copied
OPERATIONS = {
    "a convolution: two for each weight under each result": (
        nn.Conv2d(3, 5, 3), (IMAGE,), 2 * (2 * 5 * 6 * 6) * 27, 384 + 135 + 5, 360, 0,
    ),
    "a grouped convolution has a group's share of channels": (
        nn.Conv2d(4, 8, 3, groups=2, bias=False), ((1, 4, 5, 5),), 2 * 72 * 18, 100 + 144, 72, 0,
    ),
    "a depthwise convolution": (
        nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False), (IMAGE,), 2 * 384 * 9, 384 + 27, 384, 0,
    ),
    "a convolution in one dimension": (nn.Conv1d(3, 5, 3, bias=False), ((2, 3, 8),), 2 * 60 * 9, 48 + 45, 60, 0),
    "a transposed convolution: each input meets each weight of its channel": (
        nn.ConvTranspose2d(3, 5, 2, stride=2, bias=False), (IMAGE,), 2 * 384 * 20, 384 + 60, 2 * 5 * 16 * 16, 0,
    ),
    "a linear layer": (nn.Linear(6, 5), (MATRIX,), 2 * 20 * 6, 24 + 30 + 5, 20, 0),
    "a linear layer on a sequence": (nn.Linear(6, 5, bias=False), ((2, 4, 6),), 2 * 40 * 6, 48 + 30, 40, 0),
    "a matrix product": (torch.mm, (MATRIX, (6, 3)), 2 * 12 * 6, 24 + 18, 12, 0),
    "a batched matrix product": (torch.matmul, ((2, 4, 6), (2, 6, 3)), 2 * 24 * 6, 48 + 36, 24, 0),
    "a matrix product with an addition": (torch.addmm, ((3,), MATRIX, (6, 3)), 2 * 12 * 6 + 12, 3 + 24 + 18, 12, 0),
    "einsum": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), ((2, 4, 6), (2, 6, 3)), 2 * 24 * 6, 84, 24, 0),
    "attention: two products and a softmax": (
        F.scaled_dot_product_attention, ((2, 2, 5, 4),) * 3, (2 * 2 * 5 * 5) * (2 * 4 + 2 * 4 + 5), 240, 80, 0,
    ),
    "one operation each": (torch.add, (IMAGE, IMAGE), 384, 768, 384, 0),
    "an operand read twice is read once": (lambda x: x * x, (IMAGE,), 384, 384, 384, 0),
    "what broadcasts is read as it is": (torch.mul, (IMAGE, (3, 1, 1)), 384, 387, 384, 0),
    "what expand repeats is read once": (lambda x, y: x + y.expand_as(x), (IMAGE, (3, 1, 1)), 384, 387, 384, 0),
    "relu": (torch.relu, (IMAGE,), 384, 384, 384, 0),
    "relu6": (F.relu6, (IMAGE,), 384, 384, 384, 0),
    "gelu": (F.gelu, (IMAGE,), 8 * 384, 384, 384, 0),
    "silu": (F.silu, (IMAGE,), 5 * 384, 384, 384, 0),
    "sigmoid": (torch.sigmoid, (IMAGE,), 4 * 384, 384, 384, 0),
    "hardswish, which no tag calls elementwise": (F.hardswish, (IMAGE,), 4 * 384, 384, 384, 0),
    "a batch norm with running statistics": (nn.BatchNorm2d(3), (IMAGE,), 2 * 384, 384 + 12, 384, 0),
    "a layer norm": (nn.LayerNorm(6), (MATRIX,), 8 * 24, 24 + 12, 24, 0),
    "a group norm": (nn.GroupNorm(1, 3), (IMAGE,), 8 * 384, 384 + 6, 384, 0),
    "softmax": (lambda x: x.softmax(-1), (MATRIX,), 5 * 24, 24, 24, 0),
    "a mean reads more than it writes": (lambda x: x.mean((2, 3)), (IMAGE,), 384, 384, 6, 0),
    "max pooling": (nn.MaxPool2d(3, 2), (IMAGE,), 9 * 2 * 3 * 9, 384, 54, 0),
    "average pooling": (nn.AvgPool2d(2), (IMAGE,), 4 * 2 * 3 * 16, 384, 96, 0),
    "adaptive pooling": (nn.AdaptiveAvgPool2d(1), (IMAGE,), 384, 384, 6, 0),
    "nearest upsampling computes nothing": (lambda x: F.interpolate(x, scale_factor=2), (IMAGE,), 0, 384, 4 * 384, 0),
    "a concat copies its parts": (lambda x, y: torch.cat([x, y], 1), (IMAGE, IMAGE), 0, 768, 768, 768),
    "a stack copies its parts": (lambda x, y: torch.stack([x, y]), (IMAGE, IMAGE), 0, 768, 768, 768),
    "a concat of one value twice writes it twice": (lambda x: torch.cat([x, x], 1), (IMAGE,), 0, 384, 768, 768),
    "a clone": (torch.clone, (IMAGE,), 0, 384, 384, 384),
    "padding": (lambda x: F.pad(x, (1, 1)), (IMAGE,), 0, 384, 480, 480),
    "contiguous of what is not": (lambda x: x.transpose(1, 2).contiguous(), (IMAGE,), 0, 384, 384, 384),
    "a reshape that no strides say": (lambda x: x.transpose(1, 2).reshape(2, 192), (IMAGE,), 0, 384, 384, 384),
    "a flatten that no strides say": (lambda x: x.transpose(1, 2).flatten(1), (IMAGE,), 0, 384, 384, 384),
    "a cast is no copy of the same bytes": (lambda x: x.double(), (MATRIX,), 0, 24, 48, 0),
    "what is gathered is read, not all there is": (
        lambda x: x.index_select(0, torch.tensor([1, 2])), ((1000, 6),), 0, 12 + 4, 12, 0,
    ),
    "an operator without a rule reads its inputs and writes its outputs": (torch.tril, (MATRIX,), 0, 24, 24, 0),
    "a write in place": (lambda x, y: (y + 0).copy_(x), (MATRIX, MATRIX), 0, 24, 24, 24),
}  # fmt: skip


@pytest.mark.parametrize(
    ("function", "shapes", "flops", "read", "written", "copied"), OPERATIONS.values(), ids=list(OPERATIONS)
)
def test_an_operation(
    function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...], flops: int, read: int, written: int, copied: int
) -> None:
    assert of(function, *shapes) == Cost(flops, 4 * read, 4 * written, 4 * copied, 1)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: x.transpose(1, 2), id="a transposition"),
        pytest.param(lambda x: x[:, 1:, ::2], id="slices"),
        pytest.param(lambda x: x.reshape(2, 192), id="a reshape that strides say"),
        pytest.param(lambda x: x.flatten(1), id="a flatten that strides say"),
        pytest.param(lambda x: x.chunk(3, 1), id="chunks"),
        pytest.param(lambda x: x.expand(4, 2, 3, 8, 8), id="an expansion"),
        pytest.param(lambda x: F.dropout(x, training=False), id="a dropout in inference"),
        pytest.param(lambda x: x.contiguous(), id="contiguous of what is so"),
        pytest.param(lambda x: x.detach(), id="a detached value"),
    ],
)
def test_what_only_looks_at_memory_otherwise_costs_nothing(function: Callable[..., Any]) -> None:
    module = fxopt.trace(Function(function).eval(), (torch.randn(IMAGE),))
    assert [cost.of(node) for node in module.graph.nodes] == [Cost()] * len(module.graph.nodes)


def test_other_dtypes_have_other_bytes() -> None:
    module = fxopt.trace(Function(torch.relu), (torch.randn(MATRIX).to(torch.bfloat16),))
    assert cost.of_module(module).work == Cost(24, 48, 48, 0, 1)


# -- the operators of fxopt and of its backends ----------------------------------------------------------------------


def compute(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if ir.is_compute(node)]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 3, 1), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv(x) + x.sin())
        return F.gelu(self.linear(y))


def test_a_fused_operation_reads_its_residual_and_computes_its_activation() -> None:
    passes = ("fuse-conv-activation", "fuse-linear-activation")
    fast = fxopt.compile(Residual().eval(), (torch.randn(IMAGE),), passes=passes)
    _, convolution, linear = compute(fast.fused_graph)
    assert (convolution.target, linear.target) == (ops.convolution, ops.linear)
    assert cost.of(convolution) == Cost(2 * 384 * 3 + 2 * 384, 4 * (768 + 9 + 3), 1536, 0, 1)
    assert cost.of(linear) == Cost(2 * 384 * 8 + 8 * 384, 4 * (384 + 64 + 8), 1536, 0, 1)


def test_what_a_backend_lowers_to_costs_the_same() -> None:
    model, image = Residual().eval(), torch.randn(2, 3, 30000, 8)  # too many pixels for a product of ATen's
    fast = fxopt.compile(model, (image,), backend="onednn")
    lowered = next(iter(fast._ready.values())).module
    assert fast.report.backend == "onednn"
    fused = [cost.of(node) for node in compute(fast.fused_graph) if ops.is_fused(node)]
    found = [cost.of(node) for node in compute(lowered) if getattr(node.target, "namespace", "") == "mkldnn"]
    assert [work.flops for work in found if work] == [work.flops for work in fused if work]
    assert [work.moved for work in found if work] == [work.moved for work in fused if work]


def test_a_concat_in_place_copies_what_was_not_placed() -> None:
    model = Function(lambda x, y: torch.cat([torch.relu(x), y], 1)).eval()
    fast = fxopt.compile(model, (torch.randn(IMAGE), torch.randn(IMAGE)), passes=["allocate-buffers"])
    (buffer,) = [node for node in compute(fast.fused_graph) if ir.target_name(node) == "fxopt.buffer"]
    assert cost.of(buffer) == Cost(0, 1536, 1536, 1536, 1)
    model = Function(lambda x: torch.cat([torch.relu(x), torch.sigmoid(x)], 1)).eval()
    fast = fxopt.compile(model, (torch.randn(IMAGE),))
    (buffer,) = [node for node in compute(fast.fused_graph) if ir.target_name(node) == "fxopt.buffer"]
    assert cost.of(buffer) == Cost()


def test_a_rule_for_an_operator_of_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxopt import work

    monkeypatch.setattr(work, "_RULES", dict(work._RULES))

    @cost.rule("tril")
    def triangle(call: cost.Call) -> Cost:
        return call.cost(7)

    assert of(torch.tril, MATRIX) == Cost(7, 96, 96, 0, 1)


# -- what is not known -----------------------------------------------------------------------------------------------


def test_without_shapes_nothing_is_guessed() -> None:
    module = fxopt.trace(Residual().eval())
    assert [cost.of(node) for node in compute(module)] == [None] * 6
    assert cost.of_module(module).unknown == 6


def test_an_opaque_module_is_not_guessed() -> None:
    module = fxopt.trace(nn.Sequential(nn.LSTM(3, 4)).eval())
    assert [cost.of(node) for node in compute(module)] == [None]


def test_a_size_that_values_decide_is_not_guessed() -> None:
    module = fxopt.trace(Function(lambda x: x[x > 0] * 2), (torch.randn(MATRIX),))
    found = {ir.target_name(node): cost.of(node) for node in compute(module)}
    assert found["gt"] == Cost(24, 96, 24, 0, 1)
    assert found["index"] is found["mul"] is None


@pytest.mark.parametrize("batch", [1, 2, 5], ids=lambda batch: f"a batch of {batch}")
def test_open_sizes_are_those_of_the_example_and_stay_open(batch: int) -> None:
    module = fxopt.trace(nn.Conv2d(3, 5, 3, bias=False).eval(), (torch.randn(batch, 3, 8, 8),))
    (node,) = compute(module)
    before = len(ir.fake_mode(module).shape_env.guards)
    assert isinstance(ir.shape(node)[0], torch.SymInt)
    assert cost.of(node) == Cost(batch * 2 * 180 * 27, 4 * (batch * 192 + 135), 4 * batch * 180, 0, 1)
    assert len(ir.fake_mode(module).shape_env.guards) == before


# -- a module --------------------------------------------------------------------------------------------------------

UNIT = Device("unit", 1.0, 1.0, 0.0)


def test_a_node_takes_the_longer_of_arithmetic_and_memory_and_its_launch() -> None:
    module = fxopt.trace(nn.Linear(6, 5).eval(), (torch.randn(MATRIX),))
    (node,) = compute(module)
    work = cost.of(node)
    assert cost.estimate(node, UNIT) == max(work.flops, work.moved) == 4 * (24 + 35 + 20)
    assert cost.estimate(node, Device("slow", 0.5, 1.0, 3.0)) == 240 / 0.5 + 3
    assert cost.estimate(node) == Device.cpu().seconds(work)


def test_a_module_takes_what_its_nodes_take_one_after_the_other() -> None:
    module = fxopt.trace(Residual().eval(), (torch.randn(IMAGE),))
    total = cost.of_module(module, UNIT)
    assert total.work == sum(map(cost.of, module.graph.nodes), Cost())
    assert total.work.launches == len(compute(module)) == 6
    assert total.seconds == sum(cost.estimate(node, UNIT) for node in compute(module))


@pytest.mark.zoo
@pytest.mark.slow
def test_published_numbers() -> None:
    torchvision = import_torchvision()
    with torch.device("meta"):
        model = torchvision.models.resnet50()
    module = fxopt.trace(model.eval(), (torch.empty(1, 3, 224, 224, device="meta"),))
    layers = [node for node in compute(module) if ir.target_name(node) in ("conv2d", "linear")]
    assert sum(cost.of(node).flops for node in layers) == pytest.approx(2 * 4.089e9, rel=1e-3)  # torchvision: 4.09 GMAC


class DenseBlock(nn.Module):
    """DenseNet's: each layer reads all that came before it."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(4 + 4 * index, 4, 1) for index in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found, 1)


def test_the_bytes_that_concats_copy() -> None:
    unit = 4 * 4 * 64  # four maps of 8x8
    copied = [
        cost.copied_by_concat(fxopt.trace(DenseBlock(layers).eval(), (torch.randn(1, 4, 8, 8),)))
        for layers in (1, 2, 3)
    ]
    assert copied == [3 * unit, 6 * unit, 10 * unit]  # quadratic: 1 + 2 + ... + (n + 1)
    assert cost.copied_by_concat(fxopt.trace(DenseBlock(2).eval())) is None


# -- before there are nodes ------------------------------------------------------------------------------------------


def test_a_layer_by_its_sizes_is_what_its_node_is() -> None:
    for layer in (nn.Conv2d(3, 5, 3, bias=False), nn.ConvTranspose2d(3, 5, 2, bias=False)):
        module = fxopt.trace(layer.eval(), (torch.randn(IMAGE),))
        (node,) = compute(module)
        source, weight = node.args[:2]
        sizes = (ir.shape(source), ir.shape(weight), ir.shape(node))
        transposed = isinstance(layer, nn.ConvTranspose2d)
        assert cost.layer(*sizes, dtype=ir.dtype(node), transposed=transposed) == cost.of(node)


def test_one_operation_on_each_element_and_a_copy_by_their_sizes() -> None:
    assert cost.elementwise(IMAGE, 2) == of(torch.add, IMAGE, IMAGE)
    assert cost.copy(IMAGE) == of(torch.clone, IMAGE)


def test_whether_a_rewrite_pays() -> None:
    """Two 1x1 convolutions of one input as one: the input is read once, and one launch is saved."""
    model = Function(lambda x, v, w: (F.conv2d(x, v), F.conv2d(x, w)))
    module = fxopt.trace(model, tuple(map(torch.randn, ((1, 64, 8, 8), (4, 64, 1, 1), (4, 64, 1, 1)))))
    convolutions = compute(module)
    wide = cost.layer((1, 64, 8, 8), (8, 64, 1, 1), (1, 8, 8, 8))
    found = cost.compare(convolutions, [wide])
    assert found.pays
    assert found.before.work.launches == 2
    copied = cost.compare(convolutions, [wide, cost.copy((1, 8, 800, 800))])
    assert not copied.pays
    assert str(copied).startswith("an estimated ")
    assert cost.compare(convolutions, [None]) is None
    assert cost.compare([wide], [wide]).pays is False


def test_an_unknown_size_makes_a_comparison_unknown() -> None:
    waiting = compute(fxopt.trace(nn.Conv2d(3, 5, 3).eval()))
    assert cost.compare(waiting, [cost.layer(IMAGE, (5, 3, 3, 3), (2, 5, 6, 6))]) is None
    module = fxopt.trace(Function(lambda x: x[x > 0]), (torch.randn(MATRIX),))
    (open_size,) = [ir.shape(node) for node in compute(module) if ir.target_name(node) == "index"]
    assert isinstance(open_size[0], torch.SymInt)
    assert cost.layer(open_size, (5, 3), open_size) is None
    assert cost.elementwise(open_size) is None
    assert cost.copy(open_size) is None


def test_a_cpu_of_more_threads_is_quicker_until_memory_is_the_limit() -> None:
    one, four, eight = (Device.cpu(threads) for threads in (1, 4, 8))
    assert one.flops_per_second < four.flops_per_second < eight.flops_per_second
    assert one.bytes_per_second < four.bytes_per_second == eight.bytes_per_second
    assert Device.cpu().name == f"cpu ({torch.get_num_threads()} threads)"
    assert Device.like(torch.device("cuda")) == Device.gpu()


def test_values_of_one_signature_are_numbers() -> None:
    image = torch.randn(3, 3, 8, 8)
    module = fxopt.trace(Residual().eval())
    set_concrete_values(module, [image])
    assert cost.of_module(module).unknown == 0
