"""simplify-shapes: what stays as it is, and why: writes, results, strides, open sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from graphs import FRONT_ENDS, Network, assert_declined, assert_declined_somewhere, compiled_by

PASSES = ("simplify-shapes",)
SHAPE = (2, 4, 6, 3)
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]

RESHAPE, BACK, NOTHING = "reshape-of-reshape", "back-to-shape", "squeeze-nothing"
PART, CONCAT, PIECE, ONE = "part-of-part", "part-of-concat", "one-piece", "concat-of-one"
CONTIGUOUS = "contiguous-of-contiguous"


def written_in_between(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x.mT.reshape(-1, 72)
    x.add_(1)
    return y.reshape(-1, 9, 8) * x.sum()


def written_copy(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.cat((x,), 1)
    x.view(-1).add_(1)
    return y * x


def written_part(m: Any, x: torch.Tensor) -> torch.Tensor:
    part = torch.cat((x[0], x[1]))[:4]
    x.view(-1).add_(1)
    return part * x


def changed_view(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = x.unsqueeze(0).squeeze(0)
    x.unsqueeze_(1)
    return y * 2 + x.sum()


DECLINES: list[tuple[str, Body, str, str]] = [
    (
        "a reshape that copies has another reader",
        lambda m, x: (y := x.mT.reshape(-1, 72)).reshape(-1, 9, 8).sum() * y,
        RESHAPE,
        "which may copy, is also read by mul",
    ),
    (
        "a copy has another reader",
        lambda m, x: (y := x.mT.contiguous()).view(-1, 72).sum() * y,
        RESHAPE,
        "which may copy, is also read by mul",
    ),
    (
        "a reshape that copies is the result in another shape",
        lambda m, x: x.mT.reshape(-1, 72).reshape(-1, 9, 8).expand(-1, -1, -1),
        RESHAPE,
        "hands out the copy",
    ),
    (
        "a reshape would be a view in another order",
        lambda m, x: x.mT.reshape(-1, 72).reshape(-1, 4, 3, 6) + 1,
        BACK,
        "strides would change",
    ),
    ("the memory is written in between", written_in_between, RESHAPE, "add_ may write to a value of the match"),
    (
        "nothing is taken",
        lambda m, x: x[:, :, 1:3][:, :, 5:].sum() + x,
        PART,
        "it takes nothing",
    ),
    (
        "nothing is taken of a concatenation",
        lambda m, x: torch.cat((x[0], x[1]))[3:3].sum() + x,
        CONCAT,
        "it takes nothing",
    ),
    (
        "two parts",
        lambda m, x: torch.cat((x[0], x[1]))[3:5] + 1,
        CONCAT,
        "more than one part",
    ),
    (
        "a part that the concatenation makes wider",
        lambda m, x: torch.cat((x[0], m.wide[None]))[:4] + 1,
        CONCAT,
        "cat makes torch.float32 torch.float64",
    ),
    (
        "an entry that the stack makes wider",
        lambda m, x: torch.stack((x[0, 0], m.wide))[0] + 1,
        CONCAT,
        "stack makes torch.float32 torch.float64",
    ),
    (
        "an empty vector in front, which the concatenation passes over",
        lambda m, x: torch.cat((m.empty, x[0]))[:3] + 1,
        CONCAT,
        "where empty ends in cat is not known",
    ),
    (
        "a part has other strides than the slice",
        lambda m, x: torch.cat((x, torch.exp(x)), 1)[:, :4] + 1,
        CONCAT,
        "strides would change",
    ),
    ("a copy is the result", lambda m, x: torch.cat((x,), 1), ONE, "hands out the copy"),
    ("a stack of one is the result", lambda m, x: torch.stack((x,), 1), ONE, "hands out the copy"),
    ("a view of a copy is the result", lambda m, x: torch.cat((x,), 1).mT, ONE, "hands out the copy"),
    ("a part is the result", lambda m, x: torch.cat((x[0], x[1]))[:4], CONCAT, "hands out the copy"),
    ("a copy whose original is written", written_copy, ONE, "add_ may write to the copy or to its input"),
    ("a part whose original is written", written_part, CONCAT, "add_ may write"),
    (
        "a copy packs what is spread",
        lambda m, x: torch.cat((x[:, ::2],), 1) + 1,
        ONE,
        "strides would change",
    ),
    ("a view is the result", lambda m, x: x.unsqueeze(1).squeeze(1), BACK, "hands out the view"),
    ("a squeeze of nothing is the result", lambda m, x: x.squeeze(1), NOTHING, "hands out the view"),
    ("a split into one is the result", lambda m, x: x.split(4, 1)[0], PIECE, "hands out the view"),
    (
        "contiguous of what others read, too",
        lambda m, x: (y := x.mT.contiguous(memory_format=torch.channels_last)).contiguous() + y,
        CONTIGUOUS,
        "is also read by add",
    ),
    (
        "contiguous of another order is the result",
        lambda m, x: x.mT.contiguous(memory_format=torch.channels_last).contiguous(),
        CONTIGUOUS,
        "hands out the copy",
    ),
]


@both
@pytest.mark.parametrize(("body", "rule", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, rule: str, reason: str, front_end: str) -> None:
    model = Network(lambda m, x: body(m, torch.neg(x)), wide=torch.ones(6, 3).double(), empty=torch.ones(0)).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(SHAPE),), front_end)
    assert_declined(compiled, rule, reason)


OPEN: list[tuple[str, Body, str, str]] = [
    ("a squeeze of everything", lambda m, x: x.squeeze() + 1, NOTHING, "depends on a size that is known only at run"),
    ("a squeeze of the batch", lambda m, x: x.squeeze(0) + 1, NOTHING, "depends on a size that is known only at run"),
    (
        "a squeeze of what was unsqueezed, and of the batch",
        lambda m, x: x.unsqueeze(2).squeeze((0, 2)) + 1,
        BACK,
        "depends on a size that is known only at run time",
    ),
    (
        "a squeeze of the batch in a reshape",
        lambda m, x: x.squeeze(0).reshape(-1, 8, 9) + 1,
        RESHAPE,
        "depends on a size that is known only at run time",
    ),
    ("a slice of the batch", lambda m, x: x[1:][:1] + 1, PART, "along dim 0 is known only at run time"),
    ("an entry by the batch", lambda m, x: x[:, 1:].select(1, x.shape[0] - 3) + 1, PART, "computed at run time"),
    ("a slice by the batch", lambda m, x: x[:, 1:].narrow(1, x.shape[0] - 3, 1) + 1, PART, "computed at run time"),
    ("a part along the batch", lambda m, x: torch.cat((x, x[:1]))[:1] + 1, CONCAT, "along dim 0 is known only at run"),
    (
        "a part behind one of an open size",
        lambda m, x: torch.cat((x.flatten(), m.bias))[-2:] + 1,
        CONCAT,
        "along dim 0 is known only at run",
    ),
    ("one piece along the batch", lambda m, x: x.split(64)[0] + 1, PIECE, "along dim 0 is known only at run time"),
    (
        "two open sizes",
        lambda m, x: (x.flatten(1) @ x.flatten(1).t()).view(1, x.shape[0], x.shape[0]).unsqueeze(0) + 1,
        RESHAPE,
        "more than one size is known only at run time",
    ),
]


@pytest.mark.parametrize(("body", "rule", "reason"), [pytest.param(*row[1:], id=row[0]) for row in OPEN])
def test_declines_what_an_open_batch_decides(body: Body, rule: str, reason: str) -> None:
    model = Network(lambda m, x: body(m, torch.neg(x)), bias=torch.ones(3)).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(3, *SHAPE[1:]),), "export")
    assert_declined_somewhere(compiled, rule, reason)
    for batch in (3, 4) if "computed" in reason else (3, 2, 1, 5):
        x = torch.randn(batch, *SHAPE[1:])
        assert torch.equal(compiled(x), model(x))


def test_a_shape_changed_in_place_behind_a_view_is_nobody_elses() -> None:
    model, x = Network(lambda m, x: changed_view(m, torch.neg(x))).eval(), torch.randn(SHAPE)
    compiled = compiled_by(PASSES, model, (x,), "export")
    for wanted, found in zip(model(x), compiled(x), strict=True):
        assert wanted.shape == found.shape
        assert torch.equal(wanted, found)
