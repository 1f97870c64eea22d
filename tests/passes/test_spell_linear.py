"""spell-linear: products with a constant matrix are linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fxopt
from graphs import FRONT_ENDS, Network, assert_declined, compiled_by, fired, operations

PASSES = ("spell-linear",)
TRANSPOSED, PRODUCT, BETWEEN = "product-of-transpose", "product", "linear-between-reshapes"
ADDMM_TRANSPOSED, ADDMM = "addmm-of-transpose", "addmm"
SHAPE = (3, 5, 4)
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]

aten = torch.ops.aten


def dyadic(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Small multiples of 1/8, whose products and sums are exact."""
    return torch.randint(-16, 17, shape).to(dtype) / 8


def conv1d(m: Any, x: torch.Tensor) -> torch.Tensor:
    """GPT-2's linear layer."""
    return torch.addmm(m.b6, x.view(-1, x.size(-1)), m.w).view(*x.size()[:-1], 6)


REWRITES: list[tuple[str, Body, list[str], dict[str, int]]] = [
    ("x @ w.t()", lambda m, x: x @ m.wt.t(), [TRANSPOSED], {}),
    ("x @ w.T", lambda m, x: x @ m.wt.T, [TRANSPOSED], {}),
    ("x @ w.mT", lambda m, x: torch.matmul(x, m.wt.mT), [TRANSPOSED], {}),
    ("x @ w.transpose(-1, -2)", lambda m, x: x.matmul(m.wt.transpose(-1, -2)), [TRANSPOSED], {}),
    ("x @ w.permute(1, 0)", lambda m, x: x @ m.wt.permute(1, 0), [TRANSPOSED], {}),
    ("mm(x, w.t())", lambda m, x: torch.mm(x[0], m.wt.t()), [TRANSPOSED], {"select": 1}),
    ("a vector @ w.t()", lambda m, x: x[0, 0] @ m.wt.t(), [TRANSPOSED], {"select": 2}),
    ("x @ w", lambda m, x: x @ m.w, [PRODUCT], {}),
    ("mm(x, w)", lambda m, x: torch.mm(x[0], m.w), [PRODUCT], {"select": 1}),
    ("a vector @ w", lambda m, x: x[0, 0] @ m.w, [PRODUCT], {"select": 2}),
    ("what is transposed @ w", lambda m, x: x.transpose(0, 1) @ m.w, [PRODUCT], {"transpose": 1}),
    ("addmm(b, x, w)", lambda m, x: torch.addmm(m.b6, x[0], m.w), [ADDMM], {"select": 1}),
    ("addmm(b, x, w.t())", lambda m, x: torch.addmm(m.b6, x[0], m.wt.t()), [ADDMM_TRANSPOSED], {"select": 1}),
    (
        "addmm with a beta and an alpha of 1.0",
        lambda m, x: torch.addmm(m.b6, x[0], m.w, beta=1.0, alpha=1.0),
        [ADDMM],
        {"select": 1},
    ),
    ("GPT-2's Conv1D", conv1d, [ADDMM, BETWEEN], {}),
    (
        "a linear layer between flatten and reshape",
        lambda m, x: m.linear(x.flatten(0, 1)).reshape(-1, 5, 6),
        [BETWEEN],
        {},
    ),
    (
        "a linear layer between reshapes to other dimensions",
        lambda m, x: m.linear(x.reshape(-1, 4)).reshape(5, -1, 6),
        [BETWEEN],
        {"reshape": 1},
    ),
    (
        "heads that come together",
        lambda m, x: m.linear(x.unflatten(2, (2, 2)).transpose(1, 2).reshape(-1, 4)).reshape(-1, 5, 6),
        [BETWEEN],
        {"reshape": 1, "transpose": 1, "unflatten": 1},
    ),
    (
        "two of them on one reshape",
        lambda m, x: m.linear(y := x.reshape(-1, 4)).view(-1, 5, 6) + m.linear(y).view(-1, 5, 6),
        [BETWEEN, BETWEEN],
        {"add": 1, "linear": 2},
    ),
]


def model_of(body: Body) -> nn.Module:
    return Network(
        body,
        w=dyadic(4, 6),
        wt=dyadic(6, 4),
        square=dyadic(4, 4),
        b6=dyadic(6),
        row=dyadic(1, 6),
        full=dyadic(5, 6),
        cube=dyadic(3, 4, 6),
        vector=dyadic(4),
        whole=torch.randint(-3, 3, (4, 6)),
        linear=nn.Linear(4, 6).double(),
        norm=nn.BatchNorm1d(6).double(),
    ).eval()


@both
@pytest.mark.parametrize(("body", "rules", "left"), [pytest.param(*row[1:], id=row[0]) for row in REWRITES])
def test_rewrites(body: Body, rules: list[str], left: dict[str, int], front_end: str) -> None:
    x, model = dyadic(*SHAPE), model_of(body)
    compiled = compiled_by((*PASSES, "eliminate-dead-code"), model, (x,), front_end)
    assert [rule for rule in fired(compiled) if rule != "unread"] == rules
    found = {name: count for name, count in operations(compiled.fused_graph).items() if name != "sym_size"}
    assert found == {"linear": 1} | left
    if "linear" not in str(body.__code__.co_names):
        assert torch.equal(compiled(x), model(x))


def written(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x @ m.w
    m.w.add_(1)
    return y


DECLINES: list[tuple[str, Body, str, str]] = [
    ("a matrix that is computed", lambda m, x: x @ torch.exp(m.w), PRODUCT, "computed at run time, not a constant"),
    ("two values", lambda m, x: x @ x.mT, TRANSPOSED, "computed at run time, not a constant"),
    ("a batch of matrices", lambda m, x: x @ m.cube, PRODUCT, "the weight has 3 dimensions"),
    ("a vector", lambda m, x: x @ m.vector, PRODUCT, "the weight has 1 dimensions"),
    (
        "integers",
        lambda m, x: x.long() @ m.whole,
        PRODUCT,
        "the weight is torch.int64, not floating point",
    ),
    ("a transpose that moves nothing", lambda m, x: x @ m.square.transpose(0, 0), TRANSPOSED, "transposes nothing"),
    ("a matrix that is written", written, PRODUCT, "may write to w"),
    ("beta", lambda m, x: torch.addmm(m.b6, x[0], m.w, beta=2), ADDMM, "beta is 2, not 1"),
    ("alpha", lambda m, x: torch.addmm(m.b6, x[0], m.wt.t(), alpha=0.5), ADDMM_TRANSPOSED, "alpha is 0.5, not 1"),
    ("a bias of one row", lambda m, x: torch.addmm(m.row, x[0], m.w), ADDMM, r"the bias has the shape \(1, 6\)"),
    ("a matrix that is added", lambda m, x: torch.addmm(m.full, x[0], m.w), ADDMM, r"the bias has the shape \(5, 6\)"),
    ("an addend that is computed", lambda m, x: torch.addmm(x[0, :, 0], x[0, :5], m.w[:, :5]), ADDMM, "not a constant"),
    (
        "a reshape in front that is needed, and read by others",
        lambda m, x: m.linear(y := x.reshape(-1, 4)).reshape(5, -1, 6) + y.sum(),
        BETWEEN,
        "which may copy, is also read by sum",
    ),
    (
        "features that are split behind",
        lambda m, x: m.linear(x.reshape(-1, 4)).reshape(-1, 5, 2, 3),
        BETWEEN,
        "does not keep the features last",
    ),
    (
        "the layer has another reader",
        lambda m, x: (y := m.linear(x.reshape(-1, 4))).reshape(-1, 5, 6) + y.sum(),
        BETWEEN,
        "is also read by sum",
    ),
]


@both
@pytest.mark.parametrize(("body", "rule", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, rule: str, reason: str, front_end: str) -> None:
    compiled = compiled_by(PASSES, model_of(body), (dyadic(*SHAPE),), front_end)
    assert_declined(compiled, rule, reason)


def test_products_are_spelled_before_the_first_call_and_what_needs_shapes_waits() -> None:
    model = model_of(lambda m, x: torch.addmm(m.b6, (x @ m.square.t()).view(-1, 4), m.w).view(3, 5, 6))
    compiled = fxopt.compile(model, passes=PASSES)
    assert fired(compiled) == [TRANSPOSED, ADDMM]
    assert {decline.reason for decline in compiled.report.pending} == {"whether view_1 keeps the features last"}
    compiled(dyadic(*SHAPE))
    assert fired(compiled)[2:] == [BETWEEN]


@both
def test_one_matrix_has_one_transpose(front_end: str) -> None:
    model = model_of(lambda m, x: (x @ m.w).relu() + (x * 2) @ m.w)
    compiled = compiled_by(PASSES, model, (dyadic(*SHAPE),), front_end)
    assert fired(compiled) == [PRODUCT, PRODUCT]
    assert list(compiled.state_dict()) == ["w_transposed"]


@pytest.mark.parametrize("equal", [True, False], ids=["its transpose", "another matrix"])
@pytest.mark.parametrize("first", [True, False], ids=["read in front", "read behind"])
def test_a_matrix_of_the_model_has_the_name_of_the_transpose(equal: bool, first: bool) -> None:
    w = dyadic(4, 6)
    parts = {"w": w, "w_transposed": w.t().contiguous() if equal else dyadic(6, 4)}
    bodies: list[Body] = [lambda m, x: x @ m.w, lambda m, x: torch.nn.functional.linear(x, m.w_transposed)]
    left, right = reversed(bodies) if first else bodies
    model, x = Network(lambda m, x: left(m, x) - 2 * right(m, x), **parts).eval(), dyadic(*SHAPE)
    compiled = compiled_by(PASSES, model, (x,), "symbolic")
    assert fired(compiled) == [PRODUCT]
    assert torch.equal(compiled(x), model(x))


@both
def test_a_matrix_that_is_transposed_already_is_not_copied(front_end: str) -> None:
    """The output layer of a language model: its weight is its embedding's."""
    model = Network(
        lambda m, x: m.embedding(x) @ m.embedding.weight.t(), embedding=nn.Embedding(7, 4)
    ).eval()
    compiled = compiled_by(PASSES, model, (torch.randint(0, 7, (3, 5)),), front_end)
    assert operations(compiled.fused_graph) == {"embedding": 1, "linear": 1}
    assert [value.data_ptr() for value in compiled.state_dict().values()] == [model.embedding.weight.data_ptr()]


@both
def test_other_passes_see_the_layer(front_end: str) -> None:
    model = model_of(lambda m, x: torch.relu(m.norm(x[0] @ m.w + m.b6)))
    compiled = compiled_by(("default",), model, (dyadic(*SHAPE),), front_end)
    assert operations(compiled.fused_graph) == {"select": 1, "fxopt.linear": 1}


@given(
    st.sampled_from([(), (3,), (1,), (2, 3), (2, 1, 3)]),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from(["w", "wt", "addmm", "conv1d"]),
    st.sampled_from([torch.float64, torch.float32]),
)
def test_products_keep_every_bit_in_exact_arithmetic(
    batch: tuple[int, ...], inputs: int, outputs: int, kind: str, dtype: torch.dtype
) -> None:
    w, b = dyadic(inputs, outputs, dtype=dtype), dyadic(outputs, dtype=dtype)
    bodies: dict[str, Body] = {
        "w": lambda m, x: x @ m.w,
        "wt": lambda m, x: x @ m.wt.t() + m.b,
        "addmm": lambda m, x: torch.addmm(m.b, x.reshape(-1, x.shape[-1]), m.w),
        "conv1d": lambda m, x: torch.addmm(m.b, x.view(-1, x.shape[-1]), m.w).view(*x.shape[:-1], m.w.shape[1]),
    }
    model, x = Network(bodies[kind], w=w, wt=w.t().contiguous(), b=b).eval(), dyadic(*batch, inputs, dtype=dtype)
    compiled = fxopt.compile(model, passes=PASSES, backend="aten", strict=True)
    found = compiled(x)
    assert "linear" in operations(compiled.fused_graph)
    assert torch.equal(found, model(x))
    assert found.stride() == model(x).stride()
    rewrites = len(fired(compiled))
    compiled(dyadic(*batch, inputs, dtype=dtype))
    assert len(fired(compiled)) == rewrites


def test_declines_two_open_sizes_which_no_reshape_can_leave_out() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        batch, rows = x.shape[0], x.flatten(1)
        pairs = (rows @ rows.t()).unsqueeze(-1).expand(-1, -1, 4)
        return m.linear(pairs.reshape(-1, 4)).reshape(batch, 1, batch, 6)

    compiled = compiled_by(PASSES, model_of(body), (dyadic(*SHAPE),), "export")
    assert_declined(compiled, BETWEEN, "more than one size is known only at run time")


def test_declines_a_sparse_matrix() -> None:
    model = Network(lambda m, x: torch.mm(x, m.w), w=torch.eye(4, 6).to_sparse()).eval()
    compiled = fxopt.compile(model, passes=PASSES, strict=True)
    assert_declined(compiled, PRODUCT, "the weight is a Tensor of layout torch.sparse_coo")
