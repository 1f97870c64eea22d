"""eliminate-common-subexpressions: what is computed twice is computed once, unless somebody could tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxopt
from fxopt import plugins
from fxopt.pipeline import PassManager
from graphs import FRONT_ENDS, Network, assert_declined_somewhere, bits, compiled_by, fired, operations, reasons

PASSES = ("eliminate-common-subexpressions",)
RULE = "same"
SHAPE = (2, 4, 4, 4)
aten = torch.ops.aten
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]


def model_of(body: Body) -> nn.Module:
    parts = {"conv": nn.Conv2d(4, 4, 3, padding=1), "norm": nn.BatchNorm2d(4), "scale": nn.Parameter(torch.randn(4))}
    return Network(body, **parts).eval()


def tied(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.conv(x).relu() + m.conv(x).relu()


def chunked(m: Any, x: torch.Tensor) -> torch.Tensor:
    return x.abs().chunk(2, 1)[0] * x.abs().chunk(2, 1)[1]


def one_handed_out(m: Any, x: torch.Tensor) -> Any:
    return torch.relu(x), torch.relu(x) * 2


def one_handed_out_later(m: Any, x: torch.Tensor) -> Any:
    return torch.relu(x) * 2, torch.relu(x)


def written_before(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    part = y[:, 1:]
    part.add_(1)
    return y.exp() * y.exp()


#: body, and the operations that are left.
MERGES: list[tuple[str, Body, dict[str, int]]] = [
    ("an operator of one value", lambda m, x: x.relu() * x.relu(), {"relu": 1, "mul": 1}),
    ("whole subgraphs", tied, {"conv2d": 1, "relu": 1, "add": 1}),
    ("two spellings of one operator", lambda m, x: F.relu(x) - torch.relu(x), {"relu": 1, "sub": 1}),
    ("equal literals", lambda m, x: (x + 0.5) * x.add(0.5), {"add": 1, "mul": 1}),
    ("lists", lambda m, x: torch.cat([x, x], 1) * torch.cat([x, x], 1), {"cat": 1, "mul": 1}),
    ("one part of several results", chunked, {"abs": 1, "chunk": 1, "mul": 1}),
    ("views that are only read", lambda m, x: x.mT.exp() @ x.mT, {"mT": 1, "exp": 1, "matmul": 1}),
    ("a norm by the batch, which keeps nothing", lambda m, x: batch(x) + batch(x), {"batch_norm": 1, "add": 1}),
    ("three of them", lambda m, x: x.sin() + x.sin() * x.sin(), {"sin": 1, "mul": 1, "add": 1}),
    ("one of two that is handed out", one_handed_out, {"relu": 1, "mul": 1}),
    ("one of two that is handed out later", one_handed_out_later, {"relu": 1, "mul": 1}),
    ("what is read only behind a write", written_before, {"mul": 2, "slice": 1, "add_": 1, "exp": 1}),
    ("a dropout in inference", lambda m, x: drop(x.abs()) * drop(x.abs()), {"abs": 1, "dropout": 1, "mul": 1}),
]


def batch(x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, None, None, training=True)


def drop(x: torch.Tensor) -> torch.Tensor:
    return F.dropout(x, training=False)


@both
@pytest.mark.parametrize(("body", "left"), [pytest.param(*row[1:], id=row[0]) for row in MERGES])
def test_merges(body: Body, left: dict[str, int], front_end: str) -> None:
    x, model = torch.randn(SHAPE), model_of(body)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert set(fired(compiled)) == {RULE}
    assert operations(compiled.fused_graph) == left
    with torch.no_grad():
        expected, actual = pytree.tree_leaves(model(x)), pytree.tree_leaves(compiled(x))
    assert list(map(bits, actual)) == list(map(bits, expected))
    passes = (plugins.named("eliminate-common-subexpressions"),)
    assert not PassManager(passes, strict=True).run(compiled.fused_graph).journal.rewrites


def test_the_first_one_stays() -> None:
    compiled = compiled_by(PASSES, model_of(lambda m, x: x.relu().neg() + x.relu()), (torch.randn(SHAPE),), "symbolic")
    (rewrite,) = compiled.report.rewrites
    assert (rewrite.root, rewrite.result) == ("relu_1", "relu")
    assert [node.name for node in compiled.fused_graph.graph.nodes][1] == "relu"


#: No two of these have a key in common, so that nothing is declined, either.
DIFFERENT: list[tuple[str, Body, str]] = [
    ("1 and 1.0", lambda m, x: (x * 1) + (x * 1.0), "mul"),
    ("1 and True", lambda m, x: aten.mul.Tensor(x, 1) + aten.mul.Tensor(x, True), "mul"),
    ("0.0 and -0.0", lambda m, x: (x + 0.0).reciprocal() - (x + -0.0).reciprocal(), "reciprocal"),
    ("NaN and NaN", lambda m, x: (x * float("nan")).relu() + (x * float("nan")).sigmoid(), "mul"),
    ("alpha", lambda m, x: torch.add(x, x, alpha=2) * torch.add(x, x), "add"),
    ("another operand", lambda m, x: (x * m.scale) + (x * x), "mul"),
    ("another order of operands", lambda m, x: (x - m.scale) * (m.scale - x), "sub"),
    ("another keyword", lambda m, x: F.gelu(x) + F.gelu(x, approximate="tanh"), "gelu"),
    ("random draws", lambda m, x: F.dropout(x, training=True) + F.dropout(x, training=True), "dropout"),
    ("memory that each fills", lambda m, x: empty(x).fill_(1) + empty(x).fill_(2), "empty_like"),
]


def empty(x: torch.Tensor) -> torch.Tensor:
    return aten.empty_like.default(x)


@both
@pytest.mark.parametrize(("body", "name"), [pytest.param(*row[1:], id=row[0]) for row in DIFFERENT])
def test_keeps_apart(body: Body, name: str, front_end: str) -> None:
    compiled = compiled_by(PASSES, model_of(body), (torch.randn(SHAPE),), front_end, verify=False)
    assert fired(compiled) == []
    assert reasons(compiled, RULE) == []
    assert operations(compiled.fused_graph)[name] >= 2


def operand_written(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x.exp()
    x[0].zero_()
    return y + x.exp()


def result_written(m: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = x.exp(), x.exp()
    first.view(-1)[:1].add_(1)
    return first * second


def later_result_written(m: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = x.exp(), x.exp()
    second.view(-1)[:1].add_(1)
    return first * second


def view_reshaped(m: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = x.view(-1), x.view(-1)
    first.unsqueeze_(0)
    return first * second.sum() + second


DECLINES: list[tuple[str, Body, str]] = [
    ("both are handed out", lambda m, x: (x.relu(), x.relu()), "hands out both relu and relu_1"),
    ("views of both are handed out", lambda m, x: (x.relu()[0], x.relu()[1]), "hands out both relu and relu_1"),
    ("two views of one value are handed out", lambda m, x: (x[0], x[0]), "hands out both select and select_1"),
    ("one is handed out, a view of the other, too", lambda m, x: (x.exp(), x.exp().view(-1)), "hands out both exp"),
    (
        "one is handed out since another was merged with it",
        lambda m, x: (x.relu() * 2, x.relu(), x.relu()),
        "hands out both relu and relu_2",
    ),
    (
        "both are handed out through an operator that hands on its input",
        lambda m, x: (drop(x.exp()), drop(x.exp())),
        "hands out both exp and exp_1",
    ),
    ("the operand is written between them", operand_written, "zero_ may write to an operand between exp and exp_1"),
    ("the first result is written", result_written, "add_ may write to exp or exp_1"),
    ("the second result is written", later_result_written, "add_ may write to exp or exp_1"),
]


@both
@pytest.mark.parametrize(("body", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, reason: str, front_end: str) -> None:
    model, x = model_of(body), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert_declined_somewhere(compiled, RULE, reason)
    check_indistinguishable(model, compiled, x)


def test_a_shape_changed_in_place_is_no_other_views() -> None:
    model, x = model_of(view_reshaped), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), "symbolic")
    check_indistinguishable(model, compiled, x)


def test_opaque_calls_are_never_merged() -> None:
    model = Network(lambda m, x: m.lstm(x)[0] + m.lstm(x)[0], lstm=nn.LSTM(4, 4)).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(3, 2, 4),), "symbolic")
    assert operations(compiled.fused_graph)["LSTM"] == 2


def test_operators_of_a_strangers_are_never_merged() -> None:
    with torch.library._scoped_library("fxopt_test", "DEF") as library:
        library.define("count(Tensor x) -> Tensor")
        library.impl("count", lambda x: x * 2, "CompositeExplicitAutograd")
        count = torch.ops.fxopt_test.count.default
        compiled = compiled_by(PASSES, model_of(lambda m, x: count(x) + count(x)), (torch.randn(SHAPE),), "export")
        assert operations(compiled.fused_graph) == {"fxopt_test.count": 2, "add": 1}


def test_what_comes_behind_a_write_is_merged_among_itself() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        x.add_(1)
        return y + x.exp() * x.exp()

    compiled = compiled_by(PASSES, model_of(body), (torch.randn(SHAPE),), "symbolic")
    assert operations(compiled.fused_graph) == {"exp": 2, "add_": 1, "mul": 1, "add": 1}


def test_sizes_are_merged_and_an_activation_of_two_readers_is_fused() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        return y.relu().reshape(y.shape[0], -1) + y.relu().reshape(y.shape[0], -1)

    x = torch.randn(SHAPE)
    compiled = fxopt.compile(model_of(body), (x,), backend="aten", strict=True)
    assert operations(compiled.fused_graph) == {"fxopt.convolution": 1, "reshape": 1, "add": 1}
    assert len(compiled.fused_graph.graph.find_nodes(op="call_function", target=aten.sym_size.int)) == 1


# -- random programs with writes, views and results ------------------------------------------------------------------


def check_indistinguishable(model: nn.Module, compiled: fxopt.CompiledModule, x: torch.Tensor) -> None:
    """The results have the same bits and strides, and share memory, objects and the input as the model's own do."""
    seen = []
    for run in (model, compiled):
        given = x.clone()
        with torch.no_grad():
            leaves = [*pytree.tree_leaves(run(given)), given]
        places = [leaf.untyped_storage().data_ptr() for leaf in leaves]
        objects = [[left is right for right in leaves] for left in leaves]
        memory = [[left == right for right in places] for left in places]
        seen.append(([(bits(leaf), leaf.shape, leaf.stride()) for leaf in leaves], objects, memory))
    assert seen[0] == seen[1]


OPERATIONS: tuple[Callable[..., Any], ...] = (
    lambda a, b: a.neg(),
    lambda a, b: a.neg(),
    lambda a, b: a.relu(),
    lambda a, b: a * 2,
    lambda a, b: a * 2.0,
    lambda a, b: a + b,
    lambda a, b: a.t(),
    lambda a, b: a[1:2].expand(3, 3),
    lambda a, b: a.reshape(3, 3),
    lambda a, b: drop(a),
    lambda a, b: a.clone(),
    lambda a, b: a.add_(1),
    lambda a, b: a.mul_(b),
    lambda a, b: a[0].zero_().sum() + b,
)
Step = st.tuples(st.integers(0, len(OPERATIONS) - 1), st.integers(0, 5), st.integers(0, 5))


def program(steps: list[tuple[int, int, int]], results: list[int]) -> nn.Module:
    """Each step takes two of the last six values; the results are some of all."""

    def body(m: Any, x: torch.Tensor) -> Any:
        values = [x, m.square]
        for operation, left, right in steps:
            recent = values[-6:]
            a, b = recent[left % len(recent)], recent[right % len(recent)]
            values.append(OPERATIONS[operation](a, b))
        return tuple(values[-1 - index % len(values)] for index in results)

    return Network(body, square=torch.randn(3, 3)).eval()


@settings(max_examples=150)
@given(st.lists(Step, min_size=2, max_size=12), st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_nobody_can_tell_a_program_from_its_merged_form(steps: list[Any], results: list[int]) -> None:
    model, x = program(steps, results), torch.randn(3, 3)
    try:
        copy.deepcopy(model)(x.clone())
    except RuntimeError:  # it writes to an expanded value
        return
    compiled = fxopt.compile(copy.deepcopy(model), passes=(*PASSES, "fold-constants"), backend="aten", strict=True)
    for rewrite in compiled.report.rewrites:
        event(rewrite.pass_name)
    for _ in range(2):  # a write to a buffer shows in the second call
        check_indistinguishable(model, compiled, x)
