"""fold-constants, rule `written`: memory that the model makes and fills with constants is what it ends as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt import effects, ir
from fxopt.pipeline import PassManager
from fxopt_passes import fold_constants
from graphs import FRONT_ENDS, Network, assert_declined_somewhere, bits, compiled_by

pytestmark = pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice")

PASSES = ("fold-constants",)
SHAPE = (2, 3, 6, 6)
Body = Callable[[Any, Any], Any]
both = pytest.mark.parametrize("front_end", FRONT_ENDS)


def model_of(body: Body) -> nn.Module:
    parts = {"row": nn.Parameter(torch.randn(6)), "count": torch.zeros(6, 6)}
    return Network(body, **parts).eval()


def shifted_windows(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The mask of a Swin transformer's shifted blocks."""
    mask, count = x.new_zeros((6, 6)), 0
    for rows in ((0, -3), (-3, -1), (-1, None)):
        for columns in ((0, -3), (-3, -1), (-1, None)):
            mask[rows[0] : rows[1], columns[0] : columns[1]] = count
            count += 1
    mask = mask.view(2, 3, 2, 3).permute(0, 2, 1, 3).reshape(4, 9)
    mask = mask.unsqueeze(1) - mask.unsqueeze(2)
    mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
    return x.reshape(2, 3, 1, 36) + mask.reshape(9, 36)


def read_as_a_whole_and_in_part(m: Any, x: torch.Tensor) -> torch.Tensor:
    mask = x.new_ones((6, 6))
    part = mask[1:3]
    part.mul_(3)
    mask.select(0, 2).add_(m.row)
    return x * mask + F.pad(part, (0, 0, 1, 3))


FOLDS: list[tuple[str, Body]] = [
    ("the mask of shifted windows", shifted_windows),
    ("a number", lambda m, x: [k := x.new_zeros((6,)), k[2:4].fill_(2.5), x + k][-1]),
    ("a parameter", lambda m, x: [k := x.new_full((6, 6), 0.5), k.select(0, 1).copy_(m.row), x + k][-1]),
    ("arithmetic in place, read as a whole and in part", read_as_a_whole_and_in_part),
    ("written twice", lambda m, x: [k := x.new_zeros((6,)), k[:4].fill_(1), k[3:].fill_(2), x * k][-1]),
    ("infinity", lambda m, x: [k := x.new_zeros((6, 6)), k[1].fill_(float("-inf")), (x + k).softmax(-1)][-1]),
]


@both
@pytest.mark.parametrize("body", [pytest.param(row[1], id=row[0]) for row in FOLDS])
def test_folds(body: Body, front_end: str) -> None:
    model, x = model_of(body), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert bits(compiled(x)) == bits(model(x))
    assert {rewrite.rule for rewrite in compiled.report.rewrites} >= {"written"}
    assert not effects.Aliases.scan(compiled.fused_graph.graph).writers
    again, _ = ir.copy(compiled._session.after)
    assert not PassManager((fold_constants.PASS,), numerics="bitwise").run(again).journal.rewrites


DECLINES: list[tuple[str, Body, str]] = [
    ("it is handed out", lambda m, x: [k := x.new_zeros((6,)), k[2:].fill_(2), (x + k, k)][-1], "hands it out"),
    ("a view is handed out", lambda m, x: [k := x.new_zeros((6,)), k[2:].fill_(2), (x + k, k[1:])][-1], "hands it out"),
    ("the input is written", lambda m, x: [k := x.new_zeros((6,)), k[1:].copy_(x[0, 0, 0, 1:]), x + k][-1],
     "is no constant"),
    (
        "it is read between two writes",
        lambda m, x: [k := x.new_zeros((6,)), k[2:].fill_(2), y := x + k, k[:1].fill_(3), y * k][-1],
        "in front of the last write",
    ),
    ("it is large", lambda m, x: [k := x.new_zeros((1100, 1000)), k[2:].fill_(2), x + k.sum()][-1], "bytes, more than"),
    ("it is random", lambda m, x: [k := x.new_zeros((6,)), k[2:].uniform_(), x + k * 0][-1], "random numbers"),
    ("a buffer that is read as a whole counts",
     lambda m, x: [k := x.new_zeros((7, 6)), k[1:].copy_(m.count), m.count.add_(1), x + k[1:]][-1], "is no constant"),
    ("it may share memory with the input",
     lambda m, x: [k := x.new_zeros((6,)), k[2:].fill_(2), torch.einsum("i,abci->abc", k, x) * 2][-1],
     "beside its result is not known"),
    ("a buffer counts", lambda m, x: [k := x.new_zeros((6, 6)), k[1:].copy_(m.count[1:]), m.count.add_(1), x + k][-1],
     "is no constant"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, reason: str) -> None:
    model, twin, x = model_of(body), model_of(body), torch.randn(SHAPE)
    twin.load_state_dict(model.state_dict())
    compiled = fxopt.compile(model, (x,), passes=PASSES, backend="aten", strict=True)
    assert_declined_somewhere(compiled, "written", reason)
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            found = compiled(x)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            wanted = twin(x)
        for left, right in zip(*(r if isinstance(r, tuple) else (r,) for r in (found, wanted)), strict=True):
            assert torch.equal(left, right)
            assert left.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("backend", ["aten", "onednn"])
def test_declines_what_a_norm_in_training_mode_writes_beside_its_result(backend: str) -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        mean, variance = x.new_zeros(3), x.new_ones(3)
        y = F.batch_norm(x, mean, variance, training=True, momentum=0.5)
        return y * variance + mean

    model, x = model_of(body), torch.randn(5, 3)
    compiled = fxopt.compile(model, (x,), backend=backend, strict=True)
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x))
    assert_declined_somewhere(compiled, "written", "writes to it, and gives something else")


def test_a_factorys_own_operand_is_no_constant_to_others() -> None:
    model = model_of(lambda m, x: [k := x.new_zeros(()), torch.ops.aten.sum.out(x, out=k), x + k][-1])
    x = torch.randn(6)
    compiled = fxopt.compile(model, (x,), passes=PASSES, backend="aten", strict=True, verify=False)
    assert torch.equal(compiled(x), model(x))


def test_declines_what_a_strangers_operator_writes() -> None:
    with torch.library._scoped_library("fxopt_test", "DEF") as library:
        library.define("fill_(Tensor(a!) x) -> Tensor(a!)")
        library.impl("fill_", lambda x: x.fill_(len(calls)), "CompositeExplicitAutograd")
        calls: list[None] = []
        model = model_of(lambda m, x: [k := x.new_zeros(6), torch.ops.fxopt_test.fill_.default(k[2:]), x + k][-1])
        x = torch.randn(6)
        compiled = fxopt.compile(model, passes=PASSES, backend="aten", strict=True, verify=False)
        for _ in range(2):
            assert torch.equal(compiled(x), model(x))
            calls.append(None)
        assert_declined_somewhere(compiled, "written", "fxopt_test.fill_.default does beside its result is not known")


def read_by_two_names(m: Any, x: torch.Tensor) -> torch.Tensor:
    k = x.new_zeros((6, 6))
    k[1:].fill_(2)
    return x * k + k.view(6, 6)


@both
def test_what_is_read_by_two_names_becomes_two_tensors(front_end: str) -> None:
    model, x = model_of(read_by_two_names), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert bits(compiled(x)) == bits(model(x))
    places = [held.data_ptr() for name, held in compiled.state_dict().items() if "folded" in name]
    assert len(set(places)) == len(places) > 1


def test_parts_by_unsafe_split_are_views_that_are_handed_out() -> None:
    model = model_of(lambda m, x: [k := x.new_zeros(6), k[2:].fill_(2), (x + 1, torch.unsafe_split(k, 2)[0])][-1])
    x = torch.randn(SHAPE)
    compiled = fxopt.compile(model, (x,), passes=PASSES, backend="aten")
    compiled(x)[1].fill_(9)
    assert torch.equal(compiled(x)[1], model(x)[1])


def test_what_is_folded_under_inference_mode_serves_gradients_later() -> None:
    model = model_of(lambda m, x: [k := x.new_zeros(6), k[2:].fill_(2), x * k][-1])
    with torch.inference_mode():
        compiled = fxopt.compile(model, (torch.randn(SHAPE),), passes=PASSES)
        compiled(torch.randn(SHAPE))
    given = torch.randn(SHAPE, requires_grad=True)
    compiled(given).sum().backward()
    assert given.grad is not None


def test_a_size_that_the_batch_decides_waits() -> None:
    model = model_of(lambda m, x: [k := x.new_zeros((x.shape[0], 1, 1, 6)), k[:1].fill_(2), x + k][-1])
    x = torch.randn(3, *SHAPE[1:])
    compiled = compiled_by(PASSES, model, (x,), "export")
    assert_declined_somewhere(compiled, "written", "size is not known before it runs")
    for batch in (3, 2, 5):
        given = torch.randn(batch, *SHAPE[1:])
        assert torch.equal(compiled(given), model(given))


def test_what_is_handed_out_is_new_in_each_call() -> None:
    model, x = model_of(DECLINES[0][1]), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), "export")
    first = compiled(x)[1]
    first.fill_(9)
    assert torch.equal(compiled(x)[1], model(x)[1])
