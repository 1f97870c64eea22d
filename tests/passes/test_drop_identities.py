"""drop-identities: what gives back its input's bits goes, unless somebody could tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from graphs import FRONT_ENDS, Network, assert_declined, bits, compiled_by, fired, operations

PASSES = ("drop-identities",)
RULE = "identity"
SHAPE = (2, 3, 4, 4)
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]

aten = torch.ops.aten


def special(*shape: int) -> torch.Tensor:
    """Random numbers, and among them all that an operation could lose."""
    found = torch.randn(shape)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 0.0, 1e-40])
    found.view(-1)[: len(odd)] = odd
    return found


#: Each between two operations, so that neither input nor result is the identity's own.
IDENTITIES: list[tuple[str, Body]] = [
    ("dropout in inference", lambda m, x: F.dropout(x, 0.5, training=False)),
    ("dropout2d in inference", lambda m, x: F.dropout2d(x, 0.5, training=False)),
    ("alpha dropout in inference", lambda m, x: F.alpha_dropout(x, 0.5, training=False)),
    ("dropout of nothing, even in training", lambda m, x: F.dropout(x, 0.0, training=True)),
    ("a cast to its own dtype", lambda m, x: x.to(torch.float32)),
    ("contiguous of what is contiguous", lambda m, x: aten.contiguous.default(x)),
    ("a reshape to its own shape", lambda m, x: x.reshape(-1, 3, 4, 4)),
    ("a view of its own shape", lambda m, x: x.view(-1, 3, 4, 4)),
    ("a flatten of one dimension", lambda m, x: torch.flatten(x, 1, 1)),
    ("an expansion to its own shape", lambda m, x: x.expand(-1, 3, 4, 4)),
    ("a permutation that permutes nothing", lambda m, x: x.permute(0, 1, -2, 3)),
    ("a slice of everything", lambda m, x: aten.slice.Tensor(x, 1, 0, 3)),
    ("an index of everything", lambda m, x: x[:, 0:3]),
    ("another name", lambda m, x: aten.alias.default(x)),
    ("padding by nothing", lambda m, x: F.pad(x, (0, 0, 0, 0))),
    ("reflection of nothing", lambda m, x: F.pad(x, (0, 0, 0, 0), mode="reflect")),
    ("a max pool of one element", lambda m, x: F.max_pool2d(x, (1, 1), (1, 1))),
    ("a max pool whose kernel is a plain number and whose stride is missing", lambda m, x: F.max_pool2d(x, 1)),
    ("a max pool of numbers", lambda m, x: F.max_pool2d(x, 1, 1, 0)),
    ("x * 1", lambda m, x: x * 1),
    ("1.0 * x", lambda m, x: 1.0 * x),
    ("x / 1", lambda m, x: x / 1),
    ("x - 0", lambda m, x: x - 0),
    ("x + -0.0", lambda m, x: x + -0.0),
    ("a clone", lambda m, x: x.clone()),
    ("two in a row", lambda m, x: F.dropout(x.contiguous() * 1.0, training=False)),
]


def within(body: Body) -> nn.Module:
    return Network(lambda m, x: torch.abs(body(m, torch.neg(x))), like=torch.zeros(1)).eval()


@both
@pytest.mark.parametrize("body", [pytest.param(row[1], id=row[0]) for row in IDENTITIES])
def test_drops(body: Body, front_end: str) -> None:
    x = special(*SHAPE)
    compiled = compiled_by(PASSES, within(body), (x,), front_end)
    assert set(fired(compiled)) <= {RULE}
    assert operations(compiled.fused_graph) == {"neg": 1, "abs": 1}
    assert bits(compiled(x)) == bits(within(body)(x))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda m, x: x.type_as(m.like), id="a cast to the type of its like"),
        pytest.param(lambda m, x: x.to("cpu"), id="a move to its own device"),
        pytest.param(lambda m, x: x.view(x.shape), id="a view of the shape that it asks for"),
    ],
)
def test_drops_what_export_spells_out(body: Body) -> None:
    x = special(*SHAPE)
    compiled = compiled_by(PASSES, within(body), (x,), "export")
    assert operations(compiled.fused_graph) == {"neg": 1, "abs": 1}
    assert bits(compiled(x)) == bits(within(body)(x))


@pytest.mark.parametrize(
    ("pool", "shape"), [(F.max_pool1d, (2, 3, 4)), (F.max_pool3d, (1, 2, 2, 2, 2))], ids=["max_pool1d", "max_pool3d"]
)
def test_drops_pools_of_other_ranks(pool: Any, shape: tuple[int, ...]) -> None:
    x = special(*shape)
    compiled = compiled_by(PASSES, within(lambda m, y: pool(y, 1)), (x,), "symbolic")
    assert operations(compiled.fused_graph) == {"neg": 1, "abs": 1}
    assert bits(compiled(x)) == bits(within(lambda m, y: pool(y, 1))(x))


def test_the_dropouts_of_a_model_go_before_the_first_call() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Dropout1d(), nn.ReLU()).eval()
    compiled = fxopt.compile(model, passes=PASSES)
    assert operations(compiled.fused_graph) == {"linear": 1, "relu": 1}


def test_what_needs_shapes_waits_for_the_first_call() -> None:
    compiled = fxopt.compile(within(lambda m, x: x.contiguous()), passes=PASSES)
    assert [decline.reason for decline in compiled.report.pending] == [
        "whether the shape, dtype and strides are its input's"
    ]


def written_copy(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.neg(x)
    copy = y * 1
    y.view(-1).add_(1)
    return copy + y


def written_view(m: Any, x: torch.Tensor) -> Any:
    y = torch.neg(x)
    view = y.view(y.shape)
    view.unsqueeze_(0)
    return y + 1, view * 2


def written_input(m: Any, x: torch.Tensor) -> Any:
    y = torch.neg(x)
    view = y.view(y.shape)
    y.unsqueeze_(0)
    return y + 1, view * 2


def written_hand_on(m: Any, x: torch.Tensor) -> Any:
    y = torch.neg(x)
    view = F.dropout(y.view(y.shape), training=False)
    view.unsqueeze_(0)
    return y + 1, view * 2


DECLINES: list[tuple[str, Body, str]] = [
    ("dropout in training", lambda m, x: F.dropout(x, 0.5, training=True), "dropout is in training mode"),
    ("x * 2", lambda m, x: x * 2, "something else than 1"),
    ("x * True, which is no number", lambda m, x: aten.mul.Tensor(x, True), "something else than 1"),
    ("x / 2", lambda m, x: x / 2, "something else than 1"),
    ("x * a tensor of ones", lambda m, x: x * m.one, "something else than 1"),
    ("x - 1", lambda m, x: x - 1, "subtracts something else than 0"),
    ("x - -0.0 turns -0.0 into 0.0", lambda m, x: x - -0.0, "subtracts something else than 0"),
    ("x + 0 turns -0.0 into 0.0", lambda m, x: x + 0, r"x \+ 0 is not x for x = -0.0"),
    ("x + 0.0 turns -0.0 into 0.0", lambda m, x: x + 0.0, r"x \+ 0 is not x for x = -0.0"),
    ("x - (-1 * 0) is x + 0", lambda m, x: torch.sub(x, 0, alpha=-1), "alpha=-1"),
    ("x + (-1 * -0.0) is x + 0", lambda m, x: torch.add(x, -0.0, alpha=-1), "alpha=-1"),
    ("an integer image divided by 1 is a float", lambda m, x: (x > 0).to(torch.int64) / 1, "it changes torch.int64"),
    ("a comparison times 1 is an integer", lambda m, x: (x > 0) * 1, "it changes torch.bool"),
    ("a cast to another dtype", lambda m, x: x.to(torch.float64), "it changes torch.float32"),
    ("a cast that asks for a copy", lambda m, x: x.to(torch.float32, copy=True), "asks for a copy"),
    (
        "a cast that asks for a memory format, which copies where strides are ambiguous",
        lambda m, x: x[:, :1].to(torch.float32, memory_format=torch.channels_last),
        "memory format",
    ),
    ("contiguous of what is not", lambda m, x: x.transpose(2, 3).contiguous(), "it changes the strides"),
    ("a copy that is dense where its input is not", lambda m, x: x[:, ::2] * 1, "it changes the strides"),
    ("a reshape to another shape", lambda m, x: x.reshape(-1, 48), "it changes the shape"),
    ("an expansion", lambda m, x: x.expand(2, 2, 3, 4, 4), "it changes the shape"),
    ("a permutation of equal sizes", lambda m, x: x.permute(0, 1, 3, 2), "it permutes"),
    ("a slice from 1", lambda m, x: x[:, 1:], "it takes a part"),
    ("a slice of every second", lambda m, x: x[:, ::2], "it takes a part"),
    ("a slice up to 2", lambda m, x: x[:, :2], "it changes the shape"),
    ("padding", lambda m, x: F.pad(x, (0, 1)), "it pads"),
    ("padding that puts back what it takes", lambda m, x: F.pad(x, (1, -1)), "it pads"),
    ("a max pool of two elements", lambda m, x: F.max_pool2d(x, 2), "it pools"),
    ("a max pool that skips", lambda m, x: F.max_pool2d(x, 1, 2), "it pools"),
]


@both
@pytest.mark.parametrize(("body", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, reason: str, front_end: str) -> None:
    model = Network(lambda m, x: torch.abs(body(m, torch.neg(x))), one=torch.ones(1)).eval()
    compiled = compiled_by(PASSES, model, (special(*SHAPE),), front_end)
    assert_declined(compiled, RULE, reason)


OBSERVED: list[tuple[str, Body, str]] = [
    ("a copy that is handed out", lambda m, x: ((y := torch.neg(x)) * 1, y), "hands out the copy"),
    ("a copy of an input that is handed out", lambda m, x: x.clone(), "hands out the copy"),
    ("a view of a copy that is handed out", lambda m, x: (x * 1).transpose(2, 3), "hands out the copy"),
    ("a view that is handed out", lambda m, x: x.reshape(-1, 3, 4, 4), "hands out the view"),
    (
        "a view that is handed out by what may hand on its input",
        lambda m, x: aten.positive.default(torch.neg(x).reshape(-1, 3, 4, 4)),
        "hands out the view",
    ),
    (
        "a view that is handed out by a dropout, which hands on its input",
        lambda m, x: F.dropout(x.reshape(-1, 3, 4, 4), training=False),
        "hands out the view",
    ),
    ("a copy whose original is written", written_copy, "add_ may write to the copy or to its input"),
    ("a copy whose memory is looked at", lambda m, x: (x * 1).as_strided((2,), (1,)) + 1, "looks at the memory"),
]


@both
@pytest.mark.parametrize(("body", "reason"), [pytest.param(*row[1:], id=row[0]) for row in OBSERVED])
def test_declines_where_somebody_could_tell(body: Body, reason: str, front_end: str) -> None:
    x = torch.randn(SHAPE)
    compiled = compiled_by(PASSES, Network(body).eval(), (x,), front_end)
    found = [decline.reason for decline in compiled.report.declines]
    assert any(reason in text for text in found), found
    result = compiled(x)
    for leaf in result if isinstance(result, tuple) else (result,):
        assert leaf is not x


@pytest.mark.parametrize(
    ("body", "shapes"),
    [
        pytest.param(written_view, [SHAPE, (1, *SHAPE)], id="the view"),
        pytest.param(written_input, [(1, *SHAPE), SHAPE], id="its input"),
        pytest.param(written_hand_on, [SHAPE, (1, *SHAPE)], id="what a dropout hands on"),
    ],
)
def test_a_shape_changed_in_place_behind_a_view_is_nobody_elses(body: Body, shapes: list[tuple[int, ...]]) -> None:
    x = torch.randn(SHAPE)
    compiled = fxopt.compile(Network(body).eval(), (x,), passes=PASSES, backend="aten", verify=False)
    assert [tuple(leaf.shape) for leaf in compiled(x)] == shapes


@both
def test_an_average_of_one_element_stays_because_it_loses_the_sign_of_zero(front_end: str) -> None:
    x = special(*SHAPE)
    for options in ({}, {"divisor_override": 2}):
        model = within(lambda m, y, options=options: F.avg_pool2d(y, 1, **options))  # type: ignore[misc]
        compiled = compiled_by(PASSES, model, (x,), front_end)
        assert operations(compiled.fused_graph)["avg_pool2d"] == 1
        assert bits(compiled(x)) == bits(model(x))
