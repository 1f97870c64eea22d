"""fuse-attention: where an attention stays as it is, and the reason that is given."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fxopt
from attention import (
    INF,
    MIN,
    PASSES,
    B,
    Body,
    D,
    H,
    N,
    filled,
    flat,
    joined,
    k,
    model_of,
    q,
    scores,
    v,
    weighted,
    weighted_over,
)
from graphs import FRONT_ENDS, assert_declined, compiled_by, fired

both = pytest.mark.parametrize("front_end", FRONT_ENDS)
OPEN = "is NaN here and 0 in the operator"


def drawn(x: Any, low: float) -> Any:
    """A mask that is computed from the input: 0 or `low` for each key."""
    return torch.where(x[:, None, None, :, 0, 0, 0] > 9, 0.0, low)


KEPT: list[tuple[str, Body, str]] = [
    ("the weights are a result", lambda m, x: ((w := scores(x).softmax(-1)) @ v(x), w), "is a result of the model"),
    (
        "the weights are read twice",
        lambda m, x: (w := scores(x).softmax(-1)) @ v(x) + w.mean(),
        "the weights are read by",
    ),
    (
        "the weights are read by no product",
        lambda m, x: scores(x).softmax(-1).relu() @ v(x),
        "reads the weights, and is no product",
    ),
    ("the scores are read twice", lambda m, x: (s := scores(x)).softmax(-1) @ v(x) + s.mean(), "is also read by"),
    (
        "the masked scores are read twice",
        lambda m, x: (s := scores(x) + m.plane).softmax(-1) @ v(x) + s.mean(),
        "is also read by",
    ),
    ("softmax of no product", lambda m, x: q(x).softmax(-1) @ k(x).mT, "is transpose, no product"),
    (
        "softmax of a constant",
        lambda m, x: m.plane.expand(B, H, N, N).contiguous().softmax(-1) @ v(x),
        "is expand, no product",
    ),
    ("softmax of the input", lambda m, x: x.softmax(-1) @ x.mT, "does not read a product"),
    ("softmax of an activation of a product", lambda m, x: weighted(x, scores(x).relu()), "is relu, no product"),
    ("an added mask from the input", lambda m, x: weighted(x, scores(x) + x[:, None, None, :, 0, 0, 0]), OPEN),
    (
        "booleans from the input, by minus infinity",
        lambda m, x: weighted(x, scores(x).masked_fill(x[:, None, None, :, 0, 0, 0] > 9, -INF)),
        OPEN,
    ),
    (
        "booleans from the input, by -1e9",
        lambda m, x: weighted(x, scores(x).masked_fill(x[:, None, None, :, 0, 0, 0] > 9, -1e9)),
        "plus a score is not",
    ),
    (
        "a computed mask of minus infinity",
        lambda m, x: weighted(x, scores(x) + torch.where(x[:, None, None, :, 0, 0, 0] > 9, -INF, 0.0)),
        OPEN,
    ),
    ("a constant that empties a row", lambda m, x: weighted(x, scores(x) + m.emptied), "empties a whole row"),
    (
        "booleans that empty a row",
        lambda m, x: weighted(x, scores(x).masked_fill(~m.empty, -INF)),
        "empties a whole row",
    ),
    (
        "two masks that empty a row together",
        lambda m, x: weighted(x, scores(x).masked_fill(m.leaky, -INF).masked_fill(~m.leaky, -INF)),
        "empties a whole row",
    ),
    (
        "a row filled with -1e9",
        lambda m, x: weighted(x, scores(x).masked_fill(~m.empty, -1e9)),
        "fills a whole row, and -1000000000.0 plus",
    ),
    (
        "scores replaced by a number that scores can reach",
        lambda m, x: weighted(x, scores(x).masked_fill(~m.leaky, -10000.0)),
        "-10000.0 in the place of a score",
    ),
    (
        "scores replaced by plus infinity",
        lambda m, x: weighted(x, scores(x).masked_fill(~m.leaky, INF)),
        "inf in the place of a score",
    ),
    (
        "a negative scale behind minus infinity",
        lambda m, x: weighted(x, scores(x).masked_fill(~m.leaky, -INF) * -1),
        "inf in the place of a score",
    ),
    (
        "a negative scale behind an added minus infinity",
        lambda m, x: weighted(x, (scores(x) + m.hard) * -1),
        "holds NaN or infinity",
    ),
    ("a mask of NaN", lambda m, x: weighted(x, scores(x) + m.nan), "holds NaN or infinity"),
    (
        "masks that leave the range together",
        lambda m, x: weighted(x, scores(x) + m.lowest + torch.where(x[:, None, None, :, 0, 0, 0] > 9, MIN, 0.0)),
        "leave the range",
    ),
    (
        "scores that are broadcast over a mask",
        lambda m, x: weighted_over(x, ((q(x)[:1] @ k(x)[:1].mT) + m.bias.expand(B, H, N, N)).softmax(-1)),
        "is expand, no product",
    ),
    (
        "scores replaced by more than one number",
        lambda m, x: weighted(x, torch.where(m.future, (m.plane.abs() + 1) * -1e10, scores(x))),
        "is where, no product",
    ),
    ("a scale that is infinite", lambda m, x: weighted(x, scores(x) * INF), "the scale is inf"),
    (
        "a computed mask that is written",
        lambda m, x: (mask := drawn(x, 1.0), mask[..., 0].fill_(-INF), weighted(x, scores(x) + mask))[2],
        OPEN,
    ),
    ("a computed mask that overflows on the way", lambda m, x: weighted(x, scores(x) + drawn(x, MIN) * 2 * 0.1), OPEN),
    (
        "a computed mask that overflows by alpha",
        lambda m, x: weighted(x, scores(x) + torch.add(drawn(x, 0.0), drawn(x, MIN / 2), alpha=8)),
        OPEN,
    ),
    ("a computed mask that may be NaN", lambda m, x: weighted(x, scores(x) + drawn(x, math.nan)), OPEN),
    (
        "a wider scale",
        lambda m, x: joined(((q(x) * m.wide[0, :1]) @ k(x).double().mT).softmax(-1).to(x.dtype) @ v(x)),
        "have the dtypes",
    ),
    ("one number for all scores", lambda m, x: weighted(x, scores(x) + m.scale), "has no dimensions"),
    ("integers that are added", lambda m, x: weighted(x, scores(x) + m.whole), "not floating point"),
    (
        "a mask that is written",
        lambda m, x: (weighted(x, scores(x) + m.plane), m.plane.add_(1))[0],
        "may write to|may be -inf",
    ),
    (
        "a constant that is written in part",
        lambda m, x: (mask := filled(x)) is None or weighted(x, scores(x) + mask),
        OPEN,
    ),
    ("a mask scaled by alpha", lambda m, x: weighted(x, torch.add(scores(x), m.plane, alpha=2)), "no product"),
    ("q is written in between", lambda m, x: (s := scores(x), x.mul_(2), weighted(x, s))[2], "may write to"),
    (
        "dropout in training",
        lambda m, x: joined(F.dropout(scores(x).softmax(-1), 0.5, training=True) @ v(x)),
        "in training mode",
    ),
    (
        "a mask in front of a scale per head",
        lambda m, x: weighted(x, (q(x) @ k(x).mT + m.plane) * m.per_head),
        "in front of a scale per query",
    ),
    (
        "baddbmm in front of a scale that is computed",
        lambda m, x: torch.baddbmm(m.plane, flat(q(x)), flat(k(x)).mT).mul(x.mean()).softmax(-1) @ flat(v(x)),
        "in front of a scale per query",
    ),
    (
        "a view in front of a scale per head",
        lambda m, x: weighted(x, (flat(q(x)) @ flat(k(x)).mT).view(B, H, N, N) * m.per_head),
        "in front of a scale per query",
    ),
    ("a scale per key", lambda m, x: weighted(x, q(x) @ k(x).mT * m.per_key), "is mul, no product"),
    ("division of a number by the scores", lambda m, x: weighted(x, m.per_head / scores(x)), "is div, no product"),
    ("a division by zero", lambda m, x: weighted(x, scores(x) / 0.0), "is div, no product"),
    ("a scale that overflows", lambda m, x: weighted(x, (q(x) * 1e300) @ (k(x) * 1e300).mT), "the scale is inf"),
    (
        "softmax over the queries",
        lambda m, x: weighted_over(x, scores(x).softmax(-2)),
        "does not multiply each query's weights",
    ),
    ("softmax over the heads", lambda m, x: weighted_over(x, scores(x).softmax(1)), "does not run over the keys"),
    (
        "the weights times the keys' transpose",
        lambda m, x: scores(x).softmax(-1).mT @ q(x)[:, :, :N],
        "does not multiply each query's weights",
    ),
    ("the weights times themselves", lambda m, x: (w := scores(x).softmax(-1)) @ w, "does more than multiply"),
    (
        "einsum that sums the queries up",
        lambda m, x: torch.einsum("bhij,bhjd->bhd", scores(x).softmax(-1), v(x)),
        "does not multiply each query's weights",
    ),
    (
        "one v for all heads",
        lambda m, x: torch.einsum("bhij,bjd->bhid", scores(x).softmax(-1), x[:, :, 2, 0]),
        "does not multiply each query's weights",
    ),
    (
        "weights that only give a dtype",
        lambda m, x: v(x).type_as(scores(x).softmax(-1)) @ k(x).mT,
        "reads the weights, and is no product",
    ),
    (
        "a sum with the second product",
        lambda m, x: torch.baddbmm(flat(q(x)), flat(scores(x).softmax(-1)), flat(v(x))),
        "does more than multiply",
    ),
    (
        "softmax over all scores of a head",
        lambda m, x: scores(x).reshape(B, H, N * N).softmax(-1).view(B, H, N, N) @ v(x),
        "reshapes the queries or keys of the scores",
    ),
    (
        "weights that are reshaped",
        lambda m, x: scores(x).softmax(-1).reshape(B, H, N // 2, 2 * N) @ torch.cat([v(x), v(x)], 2),
        "reshapes the queries or keys of the weights",
    ),
    (
        "a softmax over dim 1 of scores that were regrouped",
        lambda m, x: flat(scores(x)).softmax(1) @ flat(v(x)),
        "does not run over the keys",
    ),
    ("k is broadcast over the heads", lambda m, x: weighted(x, q(x) @ k(x)[:, :1].mT), "broadcasts a dimension"),
    ("v is broadcast over the heads", lambda m, x: scores(x).softmax(-1) @ v(x)[:, :1], "broadcasts a dimension"),
    ("keys without a batch", lambda m, x: (q(x) @ m.plane[:D]).softmax(-1) @ v(x), "tensors of 4 and 2 dimensions"),
    (
        "einsum of three",
        lambda m, x: weighted(x, torch.einsum("bhid,bhjd,ij->bhij", q(x), k(x), m.plane)),
        "none of two tensors",
    ),
    (
        "einsum that sums over two axes",
        lambda m, x: weighted_over(
            x, torch.einsum("bhid,bhjd->bij", q(x), k(x)).softmax(-1)[:, None].expand(B, H, N, N)
        ),
        "no product|does not run over",
    ),
    (
        "einsum of a diagonal",
        lambda m, x: torch.einsum("bii,bid->bid", flat(scores(x)).softmax(-1), flat(v(x))),
        "occurs twice",
    ),
    (
        "einsum with dots on one side",
        lambda m, x: weighted(x, torch.einsum("bh...d,bhjd->bh...j", q(x), k(x))),
        "stand for different dimensions",
    ),
    (
        "a mask on scores with heads last",
        lambda m, x: torch.einsum(
            "bqkh,bkhd->bqhd",
            (torch.einsum("bqhd,bkhd->bqkh", x[:, :, 0], x[:, :, 1]) + m.per_head[0]).softmax(2),
            x[:, :, 2],
        ),
        "not in the order",
    ),
    ("three batch dimensions", lambda m, x: ((y := q(x)[None]) @ y.mT).softmax(-1) @ y, "the batch has 3 dimensions"),
    (
        "masks of different batches",
        lambda m, x: weighted(
            x,
            ((scores(x) + m.bias.expand(B, H, N, N).clone()).view(2, 1, H, N, N) + m.window[:, None, None]).view(
                B, H, N, N
            ),
        ),
        "different batch sizes",
    ),
    (
        "features of v unlike those of q",
        lambda m, x: scores(x).softmax(-1) @ v(x)[..., :2],
        "the head dimensions 4 and 2",
    ),
    (
        "few keys, and rows that are not contiguous",
        lambda m, x: weighted(x, q(x) @ k(x).mT.contiguous()),
        "rows of .* are not contiguous",
    ),
    (
        "fewer keys than features, and strides that count",
        lambda m, x: (q(x) @ k(x)[:, :, :2].mT).softmax(-1) @ v(x)[:, :, :2],
        "the strides would change",
    ),
    (
        "softmax in float64",
        lambda m, x: joined(F.softmax(scores(x), -1, dtype=torch.float64).to(x.dtype) @ v(x)),
        "is torch.float64, where the operator",
    ),
    (
        "scores in half precision",
        lambda m, x: joined(scores(x).half().softmax(-1).float() @ v(x)),
        "is torch.float16, where the operator",
    ),
    (
        "a wider mask",
        lambda m, x: joined((scores(x) + m.wide).softmax(-1).to(x.dtype) @ v(x)),
        "is torch.float64, where the operator",
    ),
    ("a wider v", lambda m, x: joined(scores(x).softmax(-1).double() @ v(x).double()), "have the dtypes"),
    (
        "no keys that could be attended to",
        lambda m, x: (q(x) @ k(x)[:, :, :0].mT).softmax(-1) @ v(x)[:, :, :0],
        "the scores are empty",
    ),
]


@both
@pytest.mark.parametrize(("body", "reason"), [pytest.param(*row[1:], id=row[0]) for row in KEPT])
def test_declines(body: Body, reason: str, front_end: str) -> None:
    x = torch.randn(B, N, 3, H, D)
    written = "may write" in reason
    if not written:
        compiled = compiled_by(PASSES, model_of(body), (x,), front_end, verify=False)
    else:
        inputs = () if front_end == "symbolic" else ((x,),)
        compiled = fxopt.compile(model_of(body), *inputs, passes=PASSES, backend="aten", verify=False, strict=True)
        compiled(x.clone())
    assert not fired(compiled)
    assert_declined(compiled, "attention", reason)


def test_a_scale_per_head_that_is_wider_than_q_declines() -> None:
    model = model_of(lambda m, x: joined((scores(x) * m.per_head).softmax(-1).to(x.dtype) @ v(x)))
    compiled = compiled_by(PASSES, model, (torch.randn(B, N, 3, H, D).half(),), "symbolic")
    assert_declined(compiled, "attention", "the scale per_head is torch.float32, not torch.float16")
