"""merge-siblings: layers that read one value become one wide layer and slices of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt import ir
from fxopt.compare import relative_error
from graphs import (
    FRONT_ENDS,
    Network,
    bits,
    compiled_by,
    fired,
    only,
    operations,
)
from siblings import (
    ALONE,
    CONVS,
    FUSED,
    IMAGE,
    LINEARS,
    ROWS,
    Body,
    conv,
    dyadic,
    exact,
    joined,
    joined_rows,
    linear,
    results,
)

both = pytest.mark.parametrize("front_end", FRONT_ENDS)


def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (part(x).view(x.shape[0], -1, 2, 2).transpose(1, 2) for part in (m.q, m.k, m.v))
    scores = (q @ k.transpose(-2, -1)) * 0.5
    return m.o((scores.relu() @ v).transpose(1, 2).reshape(x.shape))


def nested(m: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = m.a(x), m.b(x)
    return torch.cat([m.c(first), m.d(first), second], 1)


def concat_in_another_order(m: Any, x: torch.Tensor) -> torch.Tensor:
    a, b, c = m.a(x), m.b(x), m.c(x)
    return torch.cat([c, a, m.pool(b)], 1)


#: What merges: the body, its parts, an input's shape, the passes, and how often each operation is there afterwards.
MERGES: list[Any] = [
    pytest.param(joined, {"a": conv(3), "b": conv(5)}, IMAGE, ALONE, {"conv2d": 1, "slice": 2, "cat": 1}, id="1x1"),
    pytest.param(
        lambda m, x: m.a(x).sum(1) + m.b(x).sum(1) + m.c(x).sum(1),
        {"a": conv(3, 3), "b": conv(2, 3, bias=False), "c": conv(1, 3)},
        IMAGE,
        ALONE,
        {"conv2d": 1, "slice": 3, "sum": 3, "add": 2},
        id="three, one without a bias",
    ),
    pytest.param(
        joined,
        {"a": conv(3, bias=False), "b": conv(3, bias=False)},
        IMAGE,
        ALONE,
        {"conv2d": 1, "slice": 2, "cat": 1},
        id="none has a bias",
    ),
    pytest.param(
        joined,
        {
            "a": conv(3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
            "b": conv(2, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        },
        IMAGE,
        ALONE,
        {"conv2d": 1, "slice": 2, "cat": 1},
        id="stride, padding and dilation",
    ),
    pytest.param(
        joined,
        {"a": nn.Conv1d(4, 3, 3), "b": nn.Conv1d(4, 2, 3)},
        (2, 4, 7),
        ALONE,
        {"conv1d": 1, "slice": 2, "cat": 1},
        id="1d",
    ),
    pytest.param(
        joined,
        {"a": nn.Conv3d(4, 3, 2), "b": nn.Conv3d(4, 2, 2)},
        (2, 4, 4, 3, 3),
        ALONE,
        {"conv3d": 1, "slice": 2, "cat": 1},
        id="3d",
    ),
    pytest.param(
        lambda m, x: torch.cat([m.a(x), m.b(x)], 0),
        {"a": conv(3, 3), "b": conv(2, 3)},
        (4, 6, 5),
        ALONE,
        {"conv2d": 1, "slice": 2, "cat": 1},
        id="an unbatched image",
    ),
    pytest.param(
        joined,
        {
            "a": nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
            "b": nn.ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1, bias=False),
        },
        IMAGE,
        ALONE,
        {"conv_transpose2d": 1, "slice": 2, "cat": 1},
        id="transposed",
    ),
    pytest.param(
        lambda m, x: m.a(x).relu().sum(1) + m.b(x).relu().sum(1),
        {"a": conv(3), "b": conv(5)},
        IMAGE,
        FUSED,
        {"fxopt.convolution": 1, "slice": 2, "sum": 2, "add": 1},
        id="with one activation for all",
    ),
    pytest.param(
        lambda m, x: F.leaky_relu(m.a(x), 0.5).sum(-1) + F.leaky_relu(m.b(x), 0.5).sum(-1),
        {"a": linear(3), "b": linear(5)},
        ROWS,
        FUSED,
        {"fxopt.linear": 1, "slice": 2, "sum": 2, "add": 1},
        id="linear layers with one activation for all",
    ),
    pytest.param(
        lambda m, x: F.hardshrink(m.a(x) + 0, 0.25).sum(1) + F.hardshrink(m.b(x) + 0, 0.25).sum(1),
        {"a": conv(3), "b": conv(5)},
        IMAGE,
        ALONE,
        {"conv2d": 1, "add": 2, "hardshrink": 1, "slice": 2, "sum": 2},
        id="steps that no layer takes, and that all have",
    ),
    pytest.param(
        lambda m, x: torch.abs(m.a(x)).sum(1) + torch.neg(m.b(x)).sum(1),
        {"a": conv(4), "b": conv(4)},
        IMAGE,
        ALONE,
        {"conv2d": 1, "slice": 2, "abs": 1, "neg": 1, "sum": 2, "add": 1},
        id="two steps behind them",
    ),
    pytest.param(
        lambda m, x: F.hardshrink(m.a(x), 0.25).sum(1) + F.hardshrink(m.b(x), 0.5).sum(1),
        {"a": conv(4), "b": conv(4)},
        IMAGE,
        ALONE,
        {"conv2d": 1, "slice": 2, "hardshrink": 2, "sum": 2, "add": 1},
        id="one step with two numbers",
    ),
    pytest.param(
        lambda m, x: torch.add(m.a(x), 0.5).sum(1) + torch.add(m.b(x), 0.5, alpha=2).sum(1),
        {"a": conv(4), "b": conv(4)},
        IMAGE,
        ALONE,
        {"conv2d": 1, "slice": 2, "add": 3, "sum": 2},
        id="one step with two alphas",
    ),
    pytest.param(
        lambda m, x: (m.a(x) + x).sum(1) + (m.b(x) + x).sum(1),
        {"a": conv(4), "b": conv(4)},
        IMAGE,
        ALONE,
        {"conv2d": 1, "slice": 2, "add": 3, "sum": 2},
        id="a step of two operands",
    ),
    pytest.param(
        lambda m, x: F.hardshrink(m.a(x).relu()).sum(1) + F.hardshrink(m.b(x)).sum(1),
        {"a": conv(4), "b": conv(4)},
        IMAGE,
        FUSED,
        {"conv2d": 1, "slice": 2, "relu": 1, "hardshrink": 2, "sum": 2, "add": 1},
        id="a step behind two activations",
    ),
    pytest.param(
        lambda m, x: [f(y) for y in (m.a(x), m.b(x)) for f in (lambda y: F.hardshrink(y).sum(1), lambda y: y.sum(1))],
        {"a": conv(3), "b": conv(5)},
        IMAGE,
        ALONE,
        {"conv2d": 1, "slice": 2, "hardshrink": 2, "sum": 4},
        id="a step that is not the only reader",
    ),
    pytest.param(
        lambda m, x: m.a(x).relu() * m.b(x),
        {"a": linear(5), "b": linear(5)},
        ROWS,
        FUSED,
        {"linear": 1, "slice": 2, "relu": 1, "mul": 1},
        id="a gated pair: the gate's activation stays behind",
    ),
    pytest.param(
        lambda m, x: F.relu6(m.a(x)).sum(1) + F.leaky_relu(m.b(x), 0.5).sum(1),
        {"a": conv(2), "b": conv(3)},
        IMAGE,
        FUSED,
        {"conv2d": 1, "slice": 2, "relu6": 1, "leaky_relu": 1, "sum": 2, "add": 1},
        id="two activations",
    ),
    pytest.param(
        joined_rows, {"a": linear(3), "b": linear(5, bias=False)}, ROWS, ALONE,
        {"linear": 1, "slice": 2, "cat": 1}, id="linear layers",
    ),
    pytest.param(
        joined_rows, {"a": linear(3), "b": linear(5)}, (4,), ALONE,
        {"linear": 1, "slice": 2, "cat": 1}, id="linear layers of a vector",
    ),
    pytest.param(
        attention,
        {name: linear(4) for name in "qkvo"},
        ROWS,
        ALONE,
        {"linear": 2, "slice": 3, "reshape": 4, "transpose": 5, "matmul": 2, "mul": 1, "relu": 1},
        id="the queries, keys and values of attention",
    ),
    pytest.param(
        joined,
        {"a": conv(3), "b": conv(2, 3, padding=1)},
        (1, 4, 2, 2),
        ALONE,
        {"conv2d": 1, "slice": 2, "cat": 1},
        id="a small kernel padded to a larger one, where that is next to nothing",
    ),
    pytest.param(
        joined,
        {"a": conv(1, (1, 3), padding=(0, 2), dilation=2), "b": conv(2, (3, 1), padding=(2, 0), dilation=2)},
        (1, 4, 2, 2),
        ALONE,
        {"conv2d": 1, "slice": 2, "cat": 1},
        id="kernels of which neither holds the other, dilated",
    ),
    pytest.param(
        nested,
        {"a": conv(4), "b": conv(2), "c": conv(3), "d": conv(2)},
        IMAGE,
        ALONE,
        {"conv2d": 2, "slice": 4, "cat": 1},
        id="siblings that read a slice of siblings",
    ),
    pytest.param(
        concat_in_another_order,
        {"a": conv(2), "b": conv(3), "c": conv(4), "pool": nn.MaxPool2d(3, 1, 1)},
        IMAGE,
        ALONE,
        {"conv2d": 1, "slice": 3, "max_pool2d": 1, "cat": 1},
        id="of which a concat reads some",
    ),
    pytest.param(
        lambda m, x: (m.a(x), m.b(x), m.b(x).sum(1)),
        {"a": conv(3), "b": conv(3)},
        IMAGE,
        ALONE,
        {"conv2d": 1, "slice": 3, "clone": 2, "sum": 1},
        id="handed out, as copies",
    ),
    pytest.param(
        lambda m, x: (m.a(x).view(x.shape[0], -1, 2), m.b(x).sum(-1)),
        {"a": linear(4), "b": linear(4)},
        ROWS,
        ALONE,
        {"linear": 1, "slice": 2, "clone": 1, "reshape": 1, "sum": 1},
        id="a view is handed out, of a copy",
    ),
]


@both
@pytest.mark.parametrize(("body", "parts", "shape", "passes", "expected"), MERGES)
def test_merges(
    body: Body,
    parts: dict[str, Any],
    shape: tuple[int, ...],
    passes: tuple[str, ...],
    expected: dict[str, int],
    front_end: str,
) -> None:
    model, x = exact(Network(body, **parts)), dyadic(*shape)
    compiled = compiled_by(passes, model, (x,), front_end)
    found = operations(compiled.fused_graph)
    assert {name: count for name, count in found.items() if name != "sym_size"} == expected
    assert {LINEARS, CONVS} & set(fired(compiled))
    ours, theirs = results(compiled(x)), results(model(x))
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)
        assert left.stride() == right.stride()
    places = [result.untyped_storage().data_ptr() for result in ours]
    assert len(set(places)) == len(places), "results share memory"


def test_what_a_concat_reads_comes_last_and_in_its_order() -> None:
    parts = {"a": conv(2), "b": conv(3), "c": conv(4), "pool": nn.MaxPool2d(3, 1, 1)}
    compiled = compiled_by(ALONE, exact(Network(concat_in_another_order, **parts)), (dyadic(*IMAGE),), "export")
    graph = compiled.fused_graph
    c, a, _ = ir.argument(only(graph, "cat"), "tensors")
    wide = only(graph, "conv2d")
    assert (c.args, a.args) == ((wide, 1, 3, 7), (wide, 1, 7, 9))
    assert next(part.name for part in wide.users) not in (c.name, a.name)


def test_a_merged_layer_comes_from_all_of_its_siblings() -> None:
    model = exact(Network(joined, a=conv(3), b=conv(5)))
    compiled = compiled_by(ALONE, model, (dyadic(*IMAGE),), "export")
    assert {origin.module for origin in ir.origins(only(compiled.fused_graph, "conv2d"))} == {"a", "b"}
    assert "merge-siblings (convolutions): conv2d" in str(compiled.explain("b"))
    assert {name for name, _ in compiled.named_parameters()} == {"a.weight_merged", "a.bias_merged"}


def test_what_became_of_one_sibling_is_its_own_slice() -> None:
    compiled = compiled_by(ALONE, exact(Network(joined, a=conv(3), b=conv(5))), (dyadic(*IMAGE),), "export")
    (rewrite,) = compiled.report.rewrites
    (first, one), (second, other) = rewrite.replaced
    assert [line.split(" = ")[0] for line in compiled.explain(first).after] == [one]
    assert [line.split(" = ")[0] for line in compiled.explain(second).after] == [other]


class Encoder(nn.Module):
    """A transformer's layer, as BERT and LLaMA spell its parts."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.gate, self.up, self.down = nn.Linear(width, 32), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (batch, words, width)."""
        heads = [part(x).view(*x.shape[:2], 4, -1).transpose(1, 2) for part in (self.q, self.k, self.v)]
        seen = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(x.shape)
        x = self.norm1(x + self.o(seen))
        return self.norm2(x + self.down(F.silu(self.gate(x)) * self.up(x)))


@both
def test_an_encoder_has_two_wide_layers_for_any_batch(front_end: str) -> None:
    model = Encoder().eval()
    compiled = compiled_by(("default",), model, (torch.randn(2, 5, 16),), front_end)
    found = operations(compiled.fused_graph)
    assert found["linear"] + found["fxopt.linear"] == 4
    assert fired(compiled).count(LINEARS) == 2
    with torch.no_grad():
        for batch in (1, 2, 7):
            x = torch.randn(batch, 5, 16)
            assert relative_error(model(x), compiled(x)) < 5e-6


def test_a_shared_weight_is_not_changed() -> None:
    model = exact(Network(lambda m, x: m.a(x) @ m.b(x).transpose(1, 2) + m.a.weight.sum(), a=linear(4), b=linear(4)))
    model.b.weight = model.a.weight
    x = dyadic(*ROWS)
    compiled = compiled_by(ALONE, model, (x,), "export")
    assert fired(compiled) == [LINEARS]
    assert torch.equal(compiled(x), model(x))


def test_shapes_are_waited_for() -> None:
    waiting = fxopt.compile(exact(Network(joined, a=conv(3), b=conv(5))), passes=ALONE, strict=True)
    assert [decline.pending for decline in waiting.report.declines] == [True, True]
    waiting(dyadic(*IMAGE))
    assert fired(waiting) == [CONVS]


@both
def test_an_infinity_stays_in_its_own_channels(front_end: str) -> None:
    model, x = exact(Network(joined, a=conv(3), b=conv(5))), dyadic(*IMAGE)
    x[0, 0, 0, 0] = float("inf")
    compiled = compiled_by(ALONE, model, (x,), front_end)
    assert bits(compiled(x)) == bits(model(x))
