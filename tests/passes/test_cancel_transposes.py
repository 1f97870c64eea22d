"""cancel-transposes: two transposes are one or none, and around elementwise operations they cancel."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

import fxopt
from fxopt_passes.cancel_transposes import UNARY
from graphs import FRONT_ENDS, Network, assert_declined, bits, compiled_by, fired, operations
from moves import Program, captured, check_same, packed, programs, rewritten, special

PASSES = ("cancel-transposes",)
CHAIN, AROUND = "transpose-of-transpose", "transposes-around-elementwise"
SHAPE = (2, 4, 6, 3)
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]

aten = torch.ops.aten


def nhwc(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1)


def nchw(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 3, 1, 2)


REWRITES: list[tuple[str, Body, list[str], dict[str, int]]] = [
    ("transpose twice", lambda m, x: x.transpose(1, 2).transpose(2, 1), [CHAIN], {}),
    ("transpose twice, negative dims", lambda m, x: x.transpose(1, -1).transpose(-3, 3), [CHAIN], {}),
    ("mT twice", lambda m, x: x.mT.mT, [CHAIN], {}),
    ("t twice", lambda m, x: m.w.t().t() + x, [CHAIN], {"add": 1}),
    ("T and t", lambda m, x: m.w.T.t() + x, [CHAIN], {"add": 1}),
    ("permutation and its inverse", lambda m, x: nchw(nhwc(x)), [CHAIN], {}),
    ("permutation and movedim", lambda m, x: nhwc(x).movedim(-1, 1), [CHAIN], {}),
    ("movedim of two dims", lambda m, x: x.movedim((1, 2), (2, 1)).transpose(1, 2), [CHAIN], {}),
    ("moveaxis", lambda m, x: torch.moveaxis(torch.moveaxis(x, 1, -1), 3, 1), [CHAIN], {}),
    ("moveaxis of two dims", lambda m, x: torch.moveaxis(x, (1, 2), (2, 1)).transpose(1, 2), [CHAIN], {}),
    ("swapaxes and swapdims", lambda m, x: x.swapaxes(1, 2).swapdims(1, 2), [CHAIN], {}),
    ("two permutations", lambda m, x: nhwc(nhwc(x)), [CHAIN], {"permute": 1}),
    ("three permutations are none", lambda m, x: nhwc(nhwc(nhwc(x))), [CHAIN, CHAIN], {}),
    ("a permutation and a transpose", lambda m, x: nhwc(x).transpose(1, 2), [CHAIN], {"permute": 1}),
    (
        "an inner one that others read",
        lambda m, x: (y := x.mT).transpose(1, 3) + y.mT.mT.transpose(1, 3),
        [CHAIN, CHAIN, CHAIN],
        {"permute": 2, "add": 1},
    ),
    ("around a relu", lambda m, x: nchw(torch.relu(nhwc(x))), [AROUND], {"relu": 1}),
    (
        "around three operations",
        lambda m, x: nchw(torch.sigmoid(torch.clamp(nhwc(x), -1, 1)) * 2),
        [AROUND],
        {"clamp": 1, "sigmoid": 1, "mul": 1},
    ),
    (
        "around a sum of two",
        lambda m, x: nchw(nhwc(x) + nhwc(torch.exp(x))),
        [AROUND],
        {"exp": 1, "add": 1},
    ),
    (
        "around a value read twice",
        lambda m, x: nchw((y := torch.tanh(nhwc(x))) * torch.sigmoid(y)),
        [AROUND],
        {"tanh": 1, "sigmoid": 1, "mul": 1},
    ),
    (
        "around a tensor without dimensions",
        lambda m, x: nchw(nhwc(x) / m.scalar),
        [AROUND],
        {"div": 1},
    ),
    ("under other names", lambda m, x: x.movedim(1, -1).relu().movedim(-1, 1), [AROUND], {"relu": 1}),
    (
        "of a transpose that others read",
        lambda m, x: nchw(torch.relu(y := nhwc(x))) + y.sum(),
        [AROUND],
        {"relu": 1, "permute": 1, "sum": 1, "add": 1},
    ),
    (
        "of what lies in another order",
        lambda m, x: nchw(torch.sigmoid(nhwc(x.mT))),
        [CHAIN, AROUND],
        {"permute": 1, "sigmoid": 1},
    ),
    (
        "around a relu, not undone",
        lambda m, x: nhwc(torch.relu(nhwc(x))),
        [AROUND],
        {"permute": 1, "relu": 1},
    ),
    (
        "around each of two",
        lambda m, x: nchw(torch.sigmoid(nhwc(nchw(torch.tanh(nhwc(x)))))),
        [AROUND, AROUND],
        {"sigmoid": 1, "tanh": 1},
    ),
]


def model_of(body: Body) -> Network:
    return Network(
        lambda m, x: torch.abs(body(m, torch.neg(x))), w=torch.randn(3, 6), scalar=torch.tensor(0.7)
    ).eval()  # type: ignore[return-value]


@both
@pytest.mark.parametrize(("body", "rules", "left"), [pytest.param(*row[1:], id=row[0]) for row in REWRITES])
def test_rewrites(body: Body, rules: list[str], left: dict[str, int], front_end: str) -> None:
    shape = SHAPE if "w" not in body.__code__.co_names else (2, 4, 3, 6)
    x, model = special(*shape), model_of(body)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert fired(compiled) == rules
    found = operations(compiled.fused_graph)
    assert {name: count for name, count in found.items() if name not in ("neg", "abs")} == left
    assert bits(compiled(x)) == bits(model(x))


def written_in_between(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = nhwc(x)
    z = torch.relu(y)
    x.add_(1)
    return nchw(z) * x * y.sum()


def written_chain(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = nhwc(x)
    x.add_(1)
    return nchw(y) * x


DECLINES: list[tuple[str, Body, str, str]] = [
    ("a transpose back is the result", lambda m, x: x.mT.mT, CHAIN, "hands out the view"),
    (
        "a transpose back is the result of what hands on its input",
        lambda m, x: aten.positive.default(x.mT.mT),
        CHAIN,
        "hands out the view",
    ),
    ("a write in between two transposes", written_chain, CHAIN, "add_ may write to a value of the match"),
    ("a write in between, around a relu", written_in_between, AROUND, "add_ may write to a value of the match"),
    (
        "a product reads the last one",
        lambda m, x: torch.softmax(x, -1) @ nhwc(x).transpose(1, 3),
        CHAIN,
        "matmul takes the last transpose as it is",
    ),
    (
        "a product reads what is transposed around a relu",
        lambda m, x: torch.softmax(x, -1) @ torch.relu(nhwc(x)).transpose(1, 3),
        AROUND,
        "matmul takes the last transpose as it is",
    ),
    ("a value is also read by another", lambda m, x: nchw(y := torch.relu(nhwc(x))) + y.sum(), AROUND, "also read by"),
    ("a value is a result", lambda m, x: (nchw(y := torch.relu(nhwc(x))), y), AROUND, "is a result of the model"),
    ("nothing is transposed in front", lambda m, x: nchw(torch.relu(x)), AROUND, r"is not transposed"),
    (
        "one operand is not transposed",
        lambda m, x: nchw(nhwc(x) + m.row),
        AROUND,
        r"row \(row\) is not transposed",
    ),
    (
        "one operand is transposed otherwise",
        lambda m, x: nchw(nhwc(x[..., :1, :1]) + x[..., :1, :1].transpose(1, 2)),
        AROUND,
        "is transposed otherwise than",
    ),
    ("gaps in memory", lambda m, x: nchw(torch.sigmoid(nhwc(x[..., ::2]))), AROUND, "slice_1 has gaps in memory"),
    (
        "overlapping memory",
        lambda m, x: nchw(torch.sigmoid(nhwc(x[:, :1].expand(-1, 4, -1, -1)))),
        AROUND,
        "expand has gaps in memory|expand.* differ",
    ),
    (
        "two shapes",
        lambda m, x: nchw(nhwc(x) + nhwc(x.sum(1, keepdim=True))),
        AROUND,
        "differ in shape or strides",
    ),
    ("there are no dimensions", lambda m, x: torch.relu(x.sum()).t() + x, AROUND, "nothing is transposed"),
    ("one image and several", lambda m, x: nchw(nhwc(x) + nhwc(x[:1])), AROUND, "differ in shape or strides"),
    (
        "two orders in memory",
        lambda m, x: nchw(nhwc(x) + nhwc(x.contiguous(memory_format=torch.channels_last))),
        AROUND,
        "differ in shape or strides",
    ),
    (
        "alpha, which vector kernels multiply and add in one",
        lambda m, x: nchw(torch.add(nhwc(x), nhwc(torch.exp(x)), alpha=3)),
        AROUND,
        "alpha=3",
    ),
    ("a gelu, which rounds by its order", lambda m, x: nchw(torch.nn.functional.gelu(nhwc(x))), AROUND, None),
    ("a softmax", lambda m, x: nchw(torch.softmax(nhwc(x), 1)), AROUND, None),
    (
        "a softmax further in front",
        lambda m, x: nchw(torch.relu(torch.softmax(nhwc(x), 1))),
        AROUND,
        r"softmax \(softmax\) is not transposed",
    ),
]  # type: ignore[list-item]


@both
@pytest.mark.parametrize(("body", "rule", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, rule: str, reason: str | None, front_end: str) -> None:
    model = Network(lambda m, x: body(m, torch.neg(x)), row=torch.randn(4)).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(SHAPE),), front_end)
    if reason is None:
        assert rule not in fired(compiled)
    else:
        assert_declined(compiled, rule, reason)



def test_what_needs_shapes_waits_for_the_first_call() -> None:
    bodies: list[tuple[Body, str]] = [
        (lambda m, x: x.transpose(1, 2).transpose(1, 2), "the rank of transpose and the dims say what moves"),
        (lambda m, x: torch.relu(x.transpose(1, 2)).transpose(1, 2), "the rank of what transpose transposes"),
    ]
    for body, reason in bodies:
        compiled = fxopt.compile(model_of(body), passes=PASSES)
        assert [decline.reason for decline in compiled.report.pending] == [reason]
        compiled(torch.randn(SHAPE))
        assert len(fired(compiled)) == 1


def test_a_dim_that_is_computed_waits_for_the_first_call() -> None:
    """The norm proves the rank, and the batch is two."""
    norm = torch.nn.BatchNorm2d(4)
    model = Network(lambda m, x: m.norm(x).transpose(1, x.shape[0]).transpose(1, x.shape[0]).relu(), norm=norm).eval()
    compiled = fxopt.compile(model, passes=PASSES, backend="aten", strict=True)
    assert not fired(compiled)
    compiled(torch.randn(SHAPE))
    assert fired(compiled) == [CHAIN]


def test_a_rank_behind_an_operation_waits_for_the_first_call() -> None:
    norm, relu = torch.nn.BatchNorm2d(4), torch.nn.ReLU()
    model = Network(lambda m, x: m.relu(m.norm(x).transpose(2, 3)).transpose(2, 3).abs(), norm=norm, relu=relu).eval()
    compiled = fxopt.compile(model, passes=PASSES, backend="aten", strict=True)
    assert {decline.reason for decline in compiled.report.pending} == {"the rank of relu and the dims say what moves"}
    compiled(torch.randn(SHAPE))
    assert fired(compiled) == [AROUND]


def test_a_rank_that_is_proved_is_enough() -> None:
    """The norm takes four dimensions and no other number."""
    model = Network(
        lambda m, x: torch.relu(m.norm(x).transpose(1, 2).transpose(1, 2)), norm=torch.nn.BatchNorm2d(4)
    ).eval()
    assert fired(fxopt.compile(model, passes=PASSES)) == [CHAIN]


@both
def test_a_transpose_that_is_handed_out_stays_a_view_of_the_same_memory(front_end: str) -> None:
    model = Network(lambda m, x: (y := torch.neg(x), nhwc(nhwc(y)))).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(SHAPE),), front_end)
    assert fired(compiled) == [CHAIN]
    whole, view = compiled(torch.randn(SHAPE))
    whole.zero_()
    assert not view.any()


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("target", sorted(UNARY, key=str), ids=str)
def test_an_elementwise_operation_keeps_bits_and_strides_in_any_order(target: Any) -> None:
    """What the pass relies on: through memory without gaps the kernels go in memory's order."""
    more = {aten.clamp.default: (-1, 1), aten.pow.Tensor_Scalar: (3.3,), aten.threshold.default: (0.1, 20.0)}
    for dtype, order in itertools.product(DTYPES, ((0, 1, 2), (2, 0, 1), (1, 2, 0))):
        x = special(5, 7, 33).permute(order).to(dtype)
        expected = target(x, *more.get(target, ()))
        for moved in itertools.permutations(range(3)):
            back = [moved.index(dim) for dim in range(3)]
            found = target(x.permute(moved), *more.get(target, ())).permute(back)
            assert found.stride() == expected.stride()
            assert bits(packed(found)) == bits(packed(expected))


#: Every transpose and elementwise operation that the random programs have.
NAMES = ("transpose", "permute", "relu", "sigmoid", "sum", "unsqueeze", "slice", "clone", "write")


@given(programs((*NAMES, "transpose", "permute", "permute")))
def test_random_transposes_keep_bits_strides_and_memory(drawn: tuple[Program, torch.Tensor]) -> None:
    program, x = drawn
    module = captured(program, x)
    run = rewritten(module, PASSES)
    for rewrite in run.journal.rewrites:
        event(rewrite.rule)
    check_same(module, program, x)
    before = str(module.graph)
    assert not rewritten(module, PASSES).journal.rewrites
    assert str(module.graph) == before


@given(programs(), st.sampled_from([("simplify-shapes", "cancel-transposes"), ("default",)]))
def test_random_moves_keep_bits_through_both_passes(
    drawn: tuple[Program, torch.Tensor], passes: tuple[str, ...]
) -> None:
    program, x = drawn
    module = captured(program, x)
    rewritten(module, passes)
    check_same(module, program, x)
