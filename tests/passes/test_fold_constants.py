"""fold-constants: what depends on constants alone is computed once, unless somebody could tell."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxopt
from fxopt import ir, plugins
from fxopt.pipeline import PassManager, Run
from fxopt_passes import fold_constants
from graphs import (
    FRONT_ENDS,
    Network,
    assert_declined,
    assert_declined_somewhere,
    bits,
    compiled_by,
    operations,
    reasons,
)
from zoo import import_timm

PASSES = ("fold-constants",)
RULE = "constant"
SHAPE = (2, 3, 4, 4)
aten = torch.ops.aten
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]


def parts() -> dict[str, Any]:
    """Constants of several shapes and dtypes, with everything in them that arithmetic could lose."""
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-40])
    return {
        "weight": nn.Parameter(torch.randn(6, 3, 3, 3)),
        "gamma": nn.Parameter(torch.randn(3)),
        "square": nn.Parameter(torch.randn(4, 4)),
        "table": nn.Parameter(torch.randn(9, 2)),
        "places": torch.randint(0, 9, (4, 4)),
        "far": torch.tensor([99]),
        "mask": torch.tensor([True, False, True, True]),
        "odd": odd,
        "phases": torch.randn(4, dtype=torch.complex64),
    }


def model_of(body: Body, **more: Any) -> nn.Module:
    return Network(body, **(parts() | more)).eval()


def standardised(m: Any, x: torch.Tensor) -> torch.Tensor:
    weight = F.batch_norm(m.weight.reshape(1, 6, -1), None, None, training=True, momentum=0.0, eps=1e-6)
    return F.conv2d(x, weight.reshape_as(m.weight), padding=1)


def positions(m: Any, x: torch.Tensor) -> torch.Tensor:
    bias = m.table[m.places.view(-1)].view(4, 4, 2).permute(2, 0, 1).contiguous().unsqueeze(0)
    return x[:, :2] + bias


def branches(m: Any, x: torch.Tensor) -> torch.Tensor:
    shared = m.square * 2
    return x + shared + (shared + 1)


def attention_mask(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.softmax(x + torch.full((4, 4), float("-inf"), device=x.device).triu(1), dim=-1)


def rewritten(module: torch.fx.GraphModule) -> Run:
    """The pass run on a module, in place."""
    return PassManager((plugins.named("fold-constants"),), strict=True).run(module)


#: body, how many constants are kept, and the operations that are left.
FOLDS: list[tuple[str, Body, int, dict[str, int]]] = [
    ("an operator of one constant", lambda m, x: x + m.square.exp(), 1, {"add": 1}),
    ("an operator of two constants", lambda m, x: x + m.square * m.square.sum(), 1, {"add": 1}),
    ("a scale that is reshaped", lambda m, x: x * m.gamma.view(1, 3, 1, 1), 1, {"mul": 1}),
    ("weight standardisation", standardised, 1, {"conv2d": 1}),
    ("a table of relative positions", positions, 1, {"slice": 1, "add": 1}),
    ("a constant of integers", lambda m, x: x + (m.places * 2 - 1), 1, {"add": 1}),
    ("a cast", lambda m, x: x.double() + m.square.double(), 1, {"to": 1, "add": 1}),
    ("a concatenation", lambda m, x: x + torch.cat([m.square[:2], m.square[2:]]), 1, {"add": 1}),
    ("several results, all read", lambda m, x: x + torch.cat(m.square.exp().chunk(2)), 1, {"add": 1}),
    ("slices of a constant", lambda m, x: x + m.square[:, :1] + m.square[1:2], 2, {"add": 2}),
    ("parts of a constant", lambda m, x: x + m.square.chunk(4, dim=1)[0] + m.square.split(2)[1][:1], 2, {"add": 2}),
    ("an expression that two readers share", branches, 2, {"add": 2}),
    ("a view in another order of what is computed", lambda m, x: x @ (m.square * 2).t(), 1, {"t": 1, "matmul": 1}),
    ("what is computed of a view in another order", lambda m, x: x @ (m.square.t() * 2), 1, {"matmul": 1}),
    ("NaN, infinities and -0.0", lambda m, x: x[:, :, :1, :1] * m.odd.neg(), 1, {"slice": 2, "mul": 1}),
    ("complex numbers", lambda m, x: x * (m.phases * 2), 1, {"mul": 1}),
    ("the constant itself, by another name", lambda m, x: x + m.square.detach() * aten.alias(m.square), 1, {"add": 1}),
    ("what gives back the constant itself", lambda m, x: x + F.dropout(m.square, training=False), 0, {"add": 1}),
]


@both
@pytest.mark.parametrize(("body", "kept", "left"), [pytest.param(*row[1:], id=row[0]) for row in FOLDS])
def test_folds(body: Body, kept: int, left: dict[str, int], front_end: str) -> None:
    x, model = torch.randn(SHAPE), model_of(body)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert sum(name.partition("_folded")[1] != "" for name in compiled.state_dict()) == kept
    assert operations(compiled.fused_graph) == left
    with torch.no_grad():
        expected = model(x)
        assert bits(compiled(x)) == bits(expected)
        assert compiled(x).stride() == expected.stride()
    assert not rewritten(compiled.fused_graph).journal.rewrites


#: torch.export records the call. Symbolic tracing runs it.
FACTORIES: list[tuple[str, Body]] = [
    ("zeros", lambda m, x: x + torch.zeros(4, 4)),
    ("ones", lambda m, x: x + torch.ones(4)),
    ("full", lambda m, x: x + torch.full((4,), 2.5)),
    ("arange", lambda m, x: x + torch.arange(4)),
    ("linspace", lambda m, x: x + torch.linspace(-1, 1, 4)),
    ("eye", lambda m, x: x + torch.eye(4)),
    ("a causal mask", attention_mask),
    ("a grid", lambda m, x: x + torch.arange(4).view(4, 1) * torch.arange(4)),
    ("a frequency table", lambda m, x: x * (m.gamma.new_ones(4) * torch.arange(4.0)).cos()),
]


@both
@pytest.mark.parametrize("body", [pytest.param(row[1], id=row[0]) for row in FACTORIES])
def test_folds_what_literals_give(body: Body, front_end: str) -> None:
    x, model = torch.randn(SHAPE), model_of(body)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert set(operations(compiled.fused_graph)) <= {"add", "mul", "softmax"}
    with torch.no_grad():
        assert bits(compiled(x)) == bits(model(x))


def written_result(m: Any, x: torch.Tensor) -> torch.Tensor:
    counts = torch.zeros(4)
    part = counts[1:]
    part.add_(x.sum())
    return counts * 2 + counts


def written_operand(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x + m.square * 2
    m.square.add_(1)
    return y


def both_handed_out(m: Any, x: torch.Tensor) -> Any:
    return x + 1, m.square * 2


DECLINES: list[tuple[str, Body, str]] = [
    ("an operand that is written", written_operand, "square is no constant: add_ may write to it"),
    ("a result that is handed out", both_handed_out, "hands out the result"),
    ("a view of a result that is handed out", lambda m, x: (x + 1, (m.square * 2)[0]), "hands out the result"),
    ("a view of a constant that is handed out", lambda m, x: (x + 1, m.square.view(16)), "hands out the result"),
    ("random numbers", lambda m, x: x + F.dropout(m.square, 0.5, training=True), "it draws random numbers"),
    ("a factory of random numbers", lambda m, x: x + aten.rand_like.default(m.square), "it draws random numbers"),
    ("memory as it is", lambda m, x: x + aten.empty_like.default(m.square) * 0, "it gives memory as it is"),
    ("a number", lambda m, x: x + m.mask.sum().item(), "it gives no tensor"),
    ("more memory", lambda m, x: x + m.square.repeat(600, 600).sum(), "23040000 bytes: more than its operands"),
    ("a transposed weight", lambda m, x: x @ m.square.t(), "in another order, which costs nothing"),
    ("an expanded weight", lambda m, x: x + m.gamma[:1].expand(4), "in another order, which costs nothing"),
    ("complex numbers that are conjugated", lambda m, x: x * m.phases.conj(), "conjugated or negated"),
]


@both
@pytest.mark.parametrize(("body", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, reason: str, front_end: str) -> None:
    compiled = compiled_by(PASSES, model_of(body), (torch.randn(SHAPE),), front_end, verify=False)
    assert any(reason in found for found in reasons(compiled, RULE)), reasons(compiled, RULE)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(written_result, "add_ may write to the result", id="written"),
        pytest.param(lambda m, x: (x + 1, torch.zeros(4)), "hands out the result", id="handed out"),
        pytest.param(lambda m, x: (x + 1, torch.zeros(4)[1:]), "hands out the result", id="handed out in part"),
    ],
)
def test_declines_what_literals_give_where_it_is(body: Body, reason: str) -> None:
    """Symbolic tracing refuses these models."""
    model, x = model_of(body), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), "export")
    assert_declined(compiled, RULE, reason)
    for _ in range(2):  # the first call must leave nothing to the second
        assert all(map(torch.equal, pytree.tree_leaves(compiled(x)), pytree.tree_leaves(model(x))))


def test_declines_where_values_decide_the_size() -> None:
    model = model_of(lambda m, x: x + m.square[m.mask].sum())
    compiled = compiled_by(PASSES, model, (torch.randn(SHAPE),), "export")
    assert_declined(compiled, RULE, "the values of its operands decide the size of its result")


@both
def test_declines_an_operator_that_raises_which_is_the_calls_to_do(front_end: str) -> None:
    model, x = model_of(lambda m, x: x + F.embedding(m.far, m.table)[0, 0]), torch.randn(SHAPE)
    run = rewritten(fxopt.trace(model, (x,)) if front_end == "export" else fxopt.trace(model))
    assert not run.journal.rewrites
    (decline,) = run.journal.declines.values()
    assert decline.reason == "run on its constants, it raises IndexError: index out of range in self"


def test_a_result_that_is_not_what_was_inferred_declines() -> None:
    """Compiled under one default dtype and first called under another, the capture gives another dtype than before."""
    x, model = torch.randn(SHAPE), model_of(lambda m, x: x + m.places / 2)
    module = fxopt.trace(model, (x,))
    torch.set_default_dtype(torch.float64)
    try:
        run = rewritten(module)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not run.journal.rewrites
    (decline,) = run.journal.declines.values()
    assert decline.reason == "it gives f64[4, 4] on cpu where f32[4, 4] on cpu was inferred"


class Marked(torch.Tensor):
    """A tensor that may mean more than its numbers."""


STRANGE: list[tuple[str, Callable[[], torch.Tensor], str]] = [
    ("a subclass", lambda: torch.randn(4, 4).as_subclass(Marked), "square is no constant: a Marked"),
    ("sparse", lambda: torch.eye(4).to_sparse(), "of layout torch.sparse_coo, not dense"),
    ("quantised", lambda: torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 0, torch.qint8), "quantised"),
    ("on the meta device", lambda: torch.empty(4, 4, device="meta"), "on the meta device"),
    ("a conjugated view", lambda: torch.randn(4, 4, dtype=torch.complex64).conj(), "conjugated or negated"),
]


@pytest.mark.parametrize(("make", "reason"), [pytest.param(*row[1:], id=row[0]) for row in STRANGE])
def test_declines_a_constant_that_is(make: Callable[[], torch.Tensor], reason: str) -> None:
    module = fxopt.trace(model_of(lambda m, x: x + aten.clone.default(m.square), square=torch.zeros(1)))
    ir.delete_attribute(module, "square")
    ir.set_attribute(module, "square", make())
    run = rewritten(module)
    assert not run.journal.rewrites
    assert [reason in decline.reason for decline in run.journal.declines.values()] == [True]


def test_an_operator_of_a_strangers_is_not_run() -> None:
    with torch.library._scoped_library("fxopt_test", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: x * 2, "CompositeExplicitAutograd")
        model = model_of(lambda m, x: x + torch.ops.fxopt_test.double.default(m.square))
        compiled = compiled_by(PASSES, model, (torch.randn(SHAPE),), "export")
        assert_declined(compiled, RULE, "what fxopt_test.double.default does beside its result is not known")


def test_a_checking_operator_is_not_run() -> None:
    model = model_of(lambda m, x: x + (aten._assert_async.default(m.square.sum() * 0 + 1) or 0) + 1)
    compiled = compiled_by(PASSES, model, (torch.randn(SHAPE),), "symbolic")
    assert_declined_somewhere(compiled, RULE, "for what it does beside its result")


@both
def test_a_larger_result_is_kept_where_its_operands_are_as_large(front_end: str) -> None:
    large = torch.randn(1100, 1000)
    model = model_of(lambda m, x: x.sum() + m.large.exp().sum(), large=large)
    assert large.nbytes > fold_constants.SMALL
    compiled = compiled_by(PASSES, model, (torch.randn(SHAPE),), front_end)
    assert operations(compiled.fused_graph) == {"sum": 1, "add": 1}


@both
def test_results_of_two_calls_share_no_memory(front_end: str) -> None:
    model = model_of(lambda m, x: (x + m.square * 2, m.square * 2, m.gamma[1:]))
    compiled = compiled_by(PASSES, model, (torch.randn(SHAPE),), front_end)
    x = torch.randn(SHAPE)
    (_, first, view), (_, second, _) = compiled(x), compiled(x)
    assert first.data_ptr() != second.data_ptr()
    assert view.untyped_storage().data_ptr() == model.gamma.untyped_storage().data_ptr()


def test_a_constant_that_is_a_view_needs_no_memory_and_goes_stale_with_its_weight() -> None:
    model, x = model_of(lambda m, x: x * m.gamma.view(1, 3, 1, 1)), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), "symbolic")
    assert compiled.state_dict()["gamma_folded"].data_ptr() == model.gamma.data_ptr()
    with torch.no_grad():
        model.gamma.mul_(2)
    with pytest.raises(fxopt.StaleWeightsError):
        compiled(x)


@both
def test_a_view_that_is_another_constant_of_the_model_is_read_under_its_own_name(front_end: str) -> None:
    weight = torch.randn(4, 4)
    model = model_of(lambda m, x: x * m.flat + m.whole.view(16)[:4], whole=weight, flat=weight.view(16)[:4])
    compiled = compiled_by(PASSES, model, (torch.randn(SHAPE),), front_end)
    assert list(compiled.state_dict()) == ["flat"]


@both
def test_a_view_that_is_another_constant_read_only_later(front_end: str) -> None:
    weight = torch.randn(4, 4)
    model = model_of(lambda m, x: x * m.whole.view(16)[:4] + m.flat, whole=weight, flat=weight.view(16)[:4])
    compiled = compiled_by(PASSES, model, (torch.randn(SHAPE),), front_end)
    assert operations(compiled.fused_graph) == {"mul": 1, "add": 1}


@both
@pytest.mark.parametrize("order", [(False, True, False), (True, False, True)], ids=["off first", "on first"])
def test_what_autocast_changes_is_computed_for_each_state(front_end: str, order: tuple[bool, ...]) -> None:
    model, x = model_of(lambda m, x: (m.square @ m.square) * x.sum().bfloat16()), torch.randn(SHAPE)
    given = [(x,)] if front_end == "export" else []
    compiled = fxopt.compile(model, *given, passes=PASSES, backend="aten", verify=False, strict=True)
    for on in order:
        with torch.autocast("cpu", torch.bfloat16, enabled=on), torch.no_grad():
            expected = model(x)
            assert expected.dtype == (torch.bfloat16 if on else torch.float32)
            assert compiled(x).dtype == expected.dtype
            assert bits(compiled(x).float()) == bits(expected.float())
    assert "matmul" not in operations(compiled.fused_graph) or (front_end == "symbolic" and order[0])


def test_a_fold_under_inference_mode_serves_gradients_later() -> None:
    model, x = model_of(lambda m, x: x * (m.square * 2)), torch.randn(SHAPE)
    compiled = fxopt.compile(model, passes=PASSES, backend="aten", verify=False)
    with torch.inference_mode():
        compiled = fxopt.compile(model, (x,), passes=PASSES, backend="aten", verify=False)
    wanted = x.clone().requires_grad_()
    compiled(wanted).sum().backward()
    assert torch.equal(wanted.grad, (model.square * 2).detach().expand(SHAPE))


def twin_read_later(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x * m.whole.view(16)[:4] + m.flat


LATER: list[tuple[str, Body]] = [
    ("a view that is another constant, read later", twin_read_later),
    ("the weight of a linear layer", lambda m, x: m.linear(x) * 2),
    ("a norm behind a convolution", lambda m, x: m.norm(m.conv(x))),
    ("siblings", lambda m, x: m.linear(x).exp() * m.other(x)),
]


@both
@pytest.mark.parametrize("body", [pytest.param(row[1], id=row[0]) for row in LATER])
def test_what_any_pass_folds_under_inference_mode_serves_gradients_later(body: Body, front_end: str) -> None:
    weight, parts = torch.randn(4, 4), {"conv": nn.Conv2d(3, 4, 1), "norm": nn.BatchNorm2d(4)}
    linears = {name: nn.Linear(4, 4) for name in ("linear", "other")}
    model, x = Network(body, whole=weight, flat=weight.view(16)[:4], **parts, **linears).eval(), torch.randn(SHAPE)
    with torch.inference_mode():
        compiled = fxopt.compile(model, (x,) if front_end == "export" else None, backend="aten", verify=False)
        compiled(x)
    assert not any(held.is_inference() for held in compiled.state_dict().values())
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(found).sum().backward()
    model(wanted).sum().backward()
    torch.testing.assert_close(found.grad, wanted.grad)


def views(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x * m.gamma.view(1, 3, 1, 1) + m.square[:, 1:2]


def test_a_compiled_module_with_views_copies_and_pickles() -> None:
    model, x = model_of(views), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), "export")
    for twin in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        assert bits(twin(x)) == bits(compiled(x))


def test_standardised_convolutions_take_their_norms() -> None:
    """What the fold is for: behind it, the convolution has a weight that other passes can work on."""
    model = nn.Sequential(_standardised_convolution(), nn.BatchNorm2d(8), nn.ReLU()).eval()
    compiled = fxopt.compile(model, (torch.randn(2, 4, 6, 6),), backend="aten", strict=True)
    assert operations(compiled.fused_graph) == {"fxopt.convolution": 1}


def _standardised_convolution() -> nn.Module:
    import_timm()
    from timm.layers import ScaledStdConv2d

    return ScaledStdConv2d(4, 8, 3)


# -- random expressions ----------------------------------------------------------------------------------------------

UNARY = (torch.neg, torch.exp, torch.relu, torch.sign, lambda a: a.t(), lambda a: a[:, 1:], lambda a: a.flip(0))
BINARY = (torch.add, torch.mul, torch.maximum, lambda a, b: a @ b.t() if a.shape[1] == b.shape[1] else a)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=8))
def test_random_expressions_of_constants_keep_every_bit(steps: list[tuple[int, int, int]]) -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        values = [m.square, m.other]
        for operation, left, right in steps:
            a, b = values[left % len(values)], values[right % len(values)]
            if operation < len(UNARY):
                values.append(UNARY[operation](a))
            elif a.shape == b.shape:
                values.append(BINARY[operation - len(UNARY)](a, b))
        for value in values[2:]:
            x = x + value.sum(0, keepdim=True)[:, :1] + value[:1, -1:]
        return x

    odd = torch.randn(4, 4)
    odd[0] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    model, x = model_of(body, other=odd), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), "symbolic", verify=False)
    with torch.no_grad():
        assert bits(compiled(x)) == bits(model(x))
    assert not rewritten(compiled.fused_graph).journal.rewrites
