"""simplify-shapes: two moves in a row become one, or none, unless somebody could tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import event, given
from torch import nn
from torch.nn import functional as F

import fxopt
from graphs import (
    FRONT_ENDS,
    Network,
    bits,
    compiled_by,
    fired,
    operations,
)
from moves import Program, captured, check_same, programs, rewritten, special

PASSES = ("simplify-shapes",)
SHAPE = (2, 4, 6, 3)
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]

aten = torch.ops.aten
RESHAPE, BACK, NOTHING = "reshape-of-reshape", "back-to-shape", "squeeze-nothing"
PART, CONCAT, PIECE, ONE = "part-of-part", "part-of-concat", "one-piece", "concat-of-one"
EXPAND, CONTIGUOUS = "expand-of-expand", "contiguous-of-contiguous"


def within(body: Body) -> nn.Module:
    """The body between two operations, so that neither input nor result is its own."""
    return Network(
        lambda m, x: torch.abs(body(m, torch.neg(x))), weight=torch.randn(4, 6), wide=torch.zeros(6, 3).double()
    ).eval()


def other(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(x)


REWRITES: list[tuple[str, Body, list[str], dict[str, int]]] = [
    ("reshape of reshape", lambda m, x: x.reshape(-1, 72).reshape(-1, 8, 9), [RESHAPE], {"reshape": 1}),
    ("view of view", lambda m, x: x.view(-1, 72).view(-1, 8, 9), [RESHAPE], {"reshape": 1}),
    ("reshape of flatten", lambda m, x: x.flatten(2).reshape(-1, 8, 9), [RESHAPE], {"reshape": 1}),
    ("flatten of reshape", lambda m, x: x.reshape(-1, 8, 9).flatten(1), [RESHAPE], {"reshape": 1}),
    ("flatten of flatten", lambda m, x: x.flatten(2).flatten(1), [RESHAPE], {"reshape": 1}),
    ("unflatten of flatten", lambda m, x: x.flatten(2).unflatten(2, (2, 9)), [RESHAPE], {"reshape": 1}),
    ("unflatten of unflatten", lambda m, x: x.unflatten(1, (2, 2)).unflatten(3, (2, 3)), [RESHAPE], {"reshape": 1}),
    ("unsqueeze of reshape", lambda m, x: x.reshape(-1, 8, 9).unsqueeze(2), [RESHAPE], {"reshape": 1}),
    ("reshape of squeeze", lambda m, x: x[:, :1].squeeze(1).reshape(-1, 2, 9), [RESHAPE], {"reshape": 1, "slice": 1}),
    ("squeeze of flatten", lambda m, x: x[:, :1].flatten(2).squeeze(1), [RESHAPE], {"reshape": 1, "slice": 1}),
    ("four of them", lambda m, x: x.flatten(1).view(-1, 8, 9).flatten(1).view(-1, 9, 8), [RESHAPE] * 3, {"reshape": 1}),
    (
        "reshape of a copy in another order",
        lambda m, x: x.transpose(1, 2).contiguous().view(-1, 24, 3),
        [RESHAPE],
        {"transpose": 1, "reshape": 1},
    ),
    ("reshape of a clone", lambda m, x: x.clone().view(-1, 72), [RESHAPE], {"reshape": 1}),
    (
        "reshape of a reshape that copies",
        lambda m, x: x.transpose(1, 3).reshape(-1, 72).reshape(-1, 8, 9),
        [RESHAPE],
        {"transpose": 1, "reshape": 1},
    ),
    (
        "reshapes of a view that others read",
        lambda m, x: (y := x.view(-1, 72)).view(-1, 8, 9).sum() + y.view(-1, 9, 8),
        [RESHAPE, RESHAPE],
        {"reshape": 2, "sum": 1, "add": 1},
    ),
    ("there and back", lambda m, x: x.flatten(1).view(-1, 4, 6, 3), [BACK], {}),
    ("unsqueeze and squeeze", lambda m, x: x.unsqueeze(1).squeeze(1), [BACK], {}),
    ("unsqueeze and squeeze, twice", lambda m, x: x.unsqueeze(1).unsqueeze(0).squeeze(0).squeeze(1), [BACK, BACK], {}),
    ("unsqueeze and squeeze, negative", lambda m, x: x.unsqueeze(-1).squeeze(4), [BACK], {}),
    ("squeeze and unsqueeze", lambda m, x: x[:, :1].squeeze(1).unsqueeze(1), [BACK], {"slice": 1}),
    ("unflatten and flatten", lambda m, x: x.unflatten(2, (2, 3)).flatten(2, 3), [BACK], {}),
    ("unsqueeze and squeeze of a transpose", lambda m, x: x.mT.unsqueeze(1).squeeze(1), [BACK], {"mT": 1}),
    ("squeeze of a dim of four", lambda m, x: x.squeeze(1), [NOTHING], {}),
    ("squeeze of two longer dims", lambda m, x: x.squeeze((1, -1)), [NOTHING], {}),
    ("squeeze of an image without a 1", lambda m, x: x[0].squeeze(), [NOTHING], {"select": 1}),
    (
        "expand of expand",
        lambda m, x: x[:, :1, :1].expand(-1, 4, -1, -1).expand(-1, -1, 6, -1),
        [EXPAND],
        {"expand": 1, "slice": 2},
    ),
    (
        "expand of expand to another rank",
        lambda m, x: x[:, :1].expand(-1, 4, -1, 3).expand(5, -1, -1, -1, -1),
        [EXPAND],
        {"expand": 1, "slice": 1},
    ),
    ("slice of slice", lambda m, x: x[:, :, 1:5][:, :, 1:3], [PART], {"slice": 1}),
    ("slice of slice with steps", lambda m, x: x[:, :, ::2][:, :, 1::2], [PART], {"slice": 1}),
    ("slice of slice from the end", lambda m, x: x[:, :, -5:][:, :, -2:], [PART], {"slice": 1}),
    ("slice of slice beyond the end", lambda m, x: x[:, :, 2:99][:, :, 1:50], [PART], {"slice": 1}),
    ("three slices", lambda m, x: x[:, :, 1:][:, :, 1:][:, :, 1:], [PART, PART], {"slice": 1}),
    ("narrow of narrow", lambda m, x: x.narrow(2, 1, 4).narrow(2, -2, 2), [PART], {"slice": 1}),
    ("select of slice", lambda m, x: x[:, :, 1::2].select(2, 1), [PART], {"select": 1}),
    ("select of slice from the end", lambda m, x: x[:, :, 1:4].select(2, -1), [PART], {"select": 1}),
    (
        "slices of a slice",
        lambda m, x: (y := x[:, :, 1:])[:, :, :2] * y[:, :, 3:],
        [PART, PART],
        {"slice": 2, "mul": 1},
    ),
    ("slices along two dims", lambda m, x: x[:, 1:][:, :, 1:], [], {"slice": 2}),
    (
        "a slice along another dim than the parts",
        lambda m, x: torch.cat((x[0], other(x[0])))[:, 1:3],
        [],
        {"exp": 1, "select": 2, "cat": 1, "slice": 1},
    ),
    ("a slice within one part", lambda m, x: torch.cat((x[0], other(x[0])))[1:3], [CONCAT], {"slice": 1, "select": 1}),
    ("a slice that is one part", lambda m, x: torch.cat((x[0], other(x[0])))[:4], [CONCAT], {"select": 1}),
    (
        "a slice of the second part",
        lambda m, x: torch.cat((other(x[0]), x[0]))[5:8:2],
        [CONCAT],
        {"slice": 1, "select": 1},
    ),
    ("an entry of a part", lambda m, x: torch.cat((other(x[0]), x[0]))[6], [CONCAT], {"select": 2}),
    ("the last entry", lambda m, x: torch.cat((other(x[0]), x[0]))[-1], [CONCAT], {"select": 2}),
    (
        "a piece of the parts",
        lambda m, x: torch.cat((other(x[0]), x[0])).split(4)[1],
        [CONCAT],
        {"select": 1},
    ),
    (
        "pieces of parts",
        lambda m, x: (y := torch.cat((other(x[0]), x[0])).chunk(4))[0] + y[-1],
        [CONCAT, CONCAT],
        {"exp": 1, "slice": 2, "add": 1, "select": 2},
    ),
    ("an entry of a stack", lambda m, x: torch.stack((other(x), x))[1], [CONCAT], {}),
    ("an item of a stack", lambda m, x: torch.stack((other(x), x)).unbind()[1], [CONCAT], {}),
    ("a concatenation of one", lambda m, x: torch.cat((x,), 1), [ONE], {}),
    ("a stack of one", lambda m, x: torch.stack((x,), 1), [ONE], {"unsqueeze": 1}),
    ("a split into one", lambda m, x: x.split(4, 1)[0], [PIECE], {}),
    ("a split into one that is longer", lambda m, x: x.split(9, 1)[0], [PIECE], {}),
    ("a split by one size", lambda m, x: x.split([4], 1)[0], [PIECE], {}),
    ("one chunk", lambda m, x: x.chunk(1, -1)[0], [PIECE], {}),
    ("one chunk, from the end", lambda m, x: x.chunk(1, 1)[-1], [PIECE], {}),
    ("one part of tensor_split", lambda m, x: x.tensor_split(1, 1)[0], [PIECE], {}),
    (
        "contiguous of another order",
        lambda m, x: x.mT.contiguous(memory_format=torch.channels_last).contiguous(),
        [CONTIGUOUS],
        {"mT": 1, "contiguous": 1},
    ),
]


@both
@pytest.mark.parametrize(("body", "rules", "left"), [pytest.param(*row[1:], id=row[0]) for row in REWRITES])
def test_rewrites(body: Body, rules: list[str], left: dict[str, int], front_end: str) -> None:
    x = special(*SHAPE)
    compiled = compiled_by((*PASSES, "eliminate-dead-code"), within(body), (x,), front_end)
    assert [rule for rule in fired(compiled) if rule != "unread"] == rules
    found = operations(compiled.fused_graph)
    assert {name: count for name, count in found.items() if name not in ("neg", "abs", "sym_size")} == left
    assert bits(compiled(x)) == bits(within(body)(x))


@both
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda m, x: x.flatten(2).reshape(-1, 8, 9), id="reshapes"),
        pytest.param(
            lambda m, x: x[0].unsqueeze(0).transpose(0, 1).flatten(2).reshape(4, 3, 6),
            id="reshapes of what has an odd stride along a dim of 1",
        ),
        pytest.param(lambda m, x: x[:, 1:].select(1, 1), id="parts"),
        pytest.param(lambda m, x: x[:, :1].expand(-1, 4, -1, -1).expand(-1, -1, 6, -1), id="expansions"),
    ],
)
def test_a_view_that_is_handed_out_stays_a_view_of_the_same_memory(body: Body, front_end: str) -> None:
    model = Network(lambda m, x: (y := torch.neg(x), body(m, y))).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(SHAPE),), front_end)
    assert fired(compiled)
    whole, view = compiled(torch.randn(SHAPE))
    whole.zero_()
    assert not view.any()
    assert view is not whole


@both
def test_writes_behind_views_reach_both(front_end: str) -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        y = torch.neg(x)
        part = y.view(-1, 72).view(-1, 8, 9)[:, 1:][:, 1:3]
        y.add_(1)
        return part * 2, y

    model, x = Network(body).eval(), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert fired(compiled) == [RESHAPE, PART]
    for found, expected in zip(compiled(x), model(x), strict=True):
        assert torch.equal(found, expected)


def test_what_needs_shapes_waits_for_the_first_call() -> None:
    bodies: dict[str, Body] = {
        "whether the shape and strides come back": lambda m, x: x.unsqueeze(0).squeeze(0),
        "whether a size is 1": lambda m, x: x.squeeze(1),
        "the sizes and strides": lambda m, x: x.flatten(1).reshape(2, 72),
        "the size of slice_tensor": lambda m, x: aten.slice.Tensor(aten.slice.Tensor(x, 1, 1, 2), 1, 0, 1),
        "the size of cat": lambda m, x: aten.select.int(torch.cat((x, x)), 0, 1),
        "the size of neg": lambda m, x: x.split(4, 1)[0],
        "the strides": lambda m, x: torch.cat((x,)),
    }
    for reason, body in bodies.items():
        compiled = fxopt.compile(within(body), passes=PASSES)
        assert not fired(compiled)
        assert reason in {decline.reason for decline in compiled.report.pending}, reason
    for body in (
        lambda m, x: x.expand(2, 4, 6, 3).expand(2, 4, 6, 3),
        lambda m, x: aten.contiguous.default(aten.contiguous.default(x)),
    ):
        compiled = fxopt.compile(within(body), passes=PASSES)
        assert {decline.reason for decline in compiled.report.pending} == {"the strides"}


@both
def test_shapes_of_attention(front_end: str) -> None:
    """Heads out and in: the copy in front of the last reshape goes into it."""

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        heads = m.linear(x).view(batch, tokens, 2, 4).transpose(1, 2)
        return F.relu(heads).transpose(1, 2).contiguous().view(batch, tokens, 8) @ m.weight

    model = Network(body, linear=nn.Linear(8, 8), weight=torch.randn(8, 8)).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(3, 5, 8),), front_end)
    assert "contiguous" not in operations(compiled.fused_graph)


@given(programs())
def test_random_moves_keep_bits_strides_and_memory(drawn: tuple[Program, torch.Tensor]) -> None:
    program, x = drawn
    module = captured(program, x)
    check_same(module, program, x)
    run = rewritten(module, PASSES)
    for rewrite in run.journal.rewrites:
        event(rewrite.rule)
    check_same(module, program, x)
    before = str(module.graph)
    assert not rewritten(module, PASSES).journal.rewrites
    assert str(module.graph) == before
