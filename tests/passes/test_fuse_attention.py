"""fuse-attention: the spellings of softmax(q k^T * scale + mask) v that become one operator."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from attention import INF, MIN, B, Body, D, H, N, flat, joined, k, kernels, outcome, q, scores, v, weighted
from graphs import FRONT_ENDS, fired, operations

PLAIN, MASKED, CAUSAL = "attention", "masked-attention", "causal-attention"
both = pytest.mark.parametrize("front_end", FRONT_ENDS)

FUSES: list[tuple[str, Body, str]] = [
    ("matmul, divided scores", lambda m, x: weighted(x, scores(x)), PLAIN),
    ("no scale", lambda m, x: weighted(x, q(x) @ k(x).transpose(-2, -1)), PLAIN),
    ("multiplied scores", lambda m, x: weighted(x, 0.2 * (q(x) @ k(x).transpose(-2, -1))), PLAIN),
    ("scaled q", lambda m, x: weighted(x, (q(x) * 0.2) @ k(x).transpose(-2, -1)), PLAIN),
    ("scaled k, in front of its transpose", lambda m, x: weighted(x, q(x) @ (k(x) / 3).transpose(-2, -1)), PLAIN),
    ("scaled k, behind its transpose", lambda m, x: weighted(x, q(x) @ (k(x).transpose(-2, -1) * 0.3)), PLAIN),
    ("both scaled, and the scores", lambda m, x: weighted(x, (q(x) * 0.7) @ (k(x) * 0.7).mT / 1.5), PLAIN),
    (
        "scaled before heads are split off",
        lambda m, x: weighted(x, (x * 0.5)[:, :, 0].mul(0.5).transpose(1, 2) @ k(x).mT),
        PLAIN,
    ),
    ("a constant tensor as scale", lambda m, x: weighted(x, q(x) @ k(x).mT * m.scale), PLAIN),
    ("division by a constant tensor", lambda m, x: weighted(x, q(x) @ k(x).mT / m.one), PLAIN),
    ("a negative scale", lambda m, x: weighted(x, q(x) @ k(x).mT * -0.3), PLAIN),
    ("a scale per head", lambda m, x: weighted(x, q(x) @ k(x).mT * m.per_head), PLAIN),
    ("a temperature per head", lambda m, x: weighted(x, q(x) @ k(x).mT / m.per_head + m.bias), MASKED),
    ("a temperature that is computed", lambda m, x: weighted(x, q(x) @ k(x).mT * x.mean().abs()), PLAIN),
    ("mT", lambda m, x: weighted(x, q(x) @ k(x).mT), PLAIN),
    ("adjoint", lambda m, x: weighted(x, q(x) @ k(x).adjoint()), PLAIN),
    ("permute", lambda m, x: weighted(x, q(x) @ k(x).permute(0, 1, 3, 2)), PLAIN),
    ("k transposed once, from (b, n, h, d)", lambda m, x: weighted(x, q(x) @ x[:, :, 1].permute(0, 2, 3, 1)), PLAIN),
    ("swapaxes", lambda m, x: weighted(x, q(x) @ k(x).swapaxes(2, 3)), PLAIN),
    ("bmm", lambda m, x: flat(q(x)).bmm(flat(k(x)).transpose(1, 2)).softmax(-1).bmm(flat(v(x))), PLAIN),
    ("matrices", lambda m, x: (q(x)[0, 0] @ k(x)[0, 0].t() * 0.3).softmax(-1) @ v(x)[0, 0], PLAIN),
    ("matrices and .T", lambda m, x: (q(x)[0, 0] @ k(x)[0, 0].T).softmax(1) @ v(x)[0, 0], PLAIN),
    (
        "baddbmm without its sum",
        lambda m, x: torch.baddbmm(m.nan, flat(q(x)), flat(k(x)).mT, beta=0, alpha=0.2).softmax(-1) @ flat(v(x)),
        PLAIN,
    ),
    (
        "baddbmm with a mask",
        lambda m, x: torch.baddbmm(m.plane, flat(q(x)), flat(k(x)).mT, beta=0.5, alpha=0.2).softmax(-1) @ flat(v(x)),
        MASKED,
    ),
    (
        "einsum",
        lambda m, x: joined(
            torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q(x), k(x)).softmax(-1), v(x))
        ),
        PLAIN,
    ),
    (
        "einsum, heads third",
        lambda m, x: torch.einsum(
            "bhqk,bkhd->bqhd", (torch.einsum("bqhd,bkhd->bhqk", x[:, :, 0], x[:, :, 1]) / 3).softmax(-1), x[:, :, 2]
        ).reshape(B, N, -1),
        PLAIN,
    ),
    (
        "einsum with a mask",
        lambda m, x: torch.einsum(
            "bhqk,bkhd->bqhd",
            (torch.einsum("bqhd,bkhd->bhqk", x[:, :, 0], x[:, :, 1]) + m.bias).softmax(-1),
            x[:, :, 2],
        ),
        MASKED,
    ),
    (
        "einsum with dots",
        lambda m, x: torch.einsum(
            "... i j, ... j d -> ... i d", torch.einsum("...id,...jd->...ij", q(x), k(x)).softmax(-1), v(x)
        ),
        PLAIN,
    ),
    ("einsum, k first", lambda m, x: weighted(x, torch.einsum("bhkd,bhqd->bhqk", k(x), q(x))), PLAIN),
    (
        "einsum, heads last",
        lambda m, x: torch.einsum(
            "bqkh,bkhd->bqhd", torch.einsum("bqhd,bkhd->bqkh", x[:, :, 0], x[:, :, 1]).softmax(2), x[:, :, 2]
        ).reshape(B, N, -1),
        PLAIN,
    ),
    (
        "softmax over the middle, keys first",
        lambda m, x: (v(x).mT @ (k(x) @ q(x).mT).softmax(-2)).transpose(-2, -1).contiguous(),
        PLAIN,
    ),
    ("weights transposed, v first", lambda m, x: (v(x).mT @ scores(x).softmax(-1).mT).mT.contiguous(), PLAIN),
    (
        "F.softmax with its own dtype",
        lambda m, x: joined(F.softmax(scores(x), dim=-1, dtype=torch.float32).type_as(x) @ v(x)),
        PLAIN,
    ),
    ("F.softmax over dim 3", lambda m, x: joined(F.softmax(scores(x), dim=3) @ v(x)), PLAIN),
    ("torch.special.softmax", lambda m, x: joined(torch.special.softmax(scores(x), -1) @ v(x)), PLAIN),
    ("dropout in inference", lambda m, x: joined(F.dropout(scores(x).softmax(-1), 0.5, training=False) @ v(x)), PLAIN),
    ("dropout of nothing", lambda m, x: joined(F.dropout(scores(x).softmax(-1), 0.0, training=True) @ v(x)), PLAIN),
    ("expanded weights", lambda m, x: joined(scores(x).softmax(-1).expand(B, H, N, N) @ v(x)), PLAIN),
    ("contiguous in between", lambda m, x: joined(scores(x).contiguous().softmax(-1).clone() @ v(x)), PLAIN),
    ("batch and heads joined for the second product", lambda m, x: flat(scores(x).softmax(-1)) @ flat(v(x)), PLAIN),
    (
        "batch and heads joined for the first product",
        lambda m, x: joined((flat(q(x)) @ flat(k(x)).mT).view(B, H, N, N).softmax(-1) @ v(x)),
        PLAIN,
    ),
    ("an added plane", lambda m, x: weighted(x, scores(x) + m.plane), MASKED),
    ("a plane in front", lambda m, x: weighted(x, m.plane + scores(x)), MASKED),
    ("an added bias per head", lambda m, x: weighted(x, scores(x) + m.bias), MASKED),
    ("a mask in front of the scale", lambda m, x: weighted(x, (q(x) @ k(x).mT + m.plane) * 0.3), MASKED),
    ("two masks", lambda m, x: weighted(x, scores(x) + m.plane + m.bias), MASKED),
    (
        "a relative position bias from a table",
        lambda m, x: weighted(
            x, scores(x) + m.table[m.index.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        ),
        MASKED,
    ),
    ("one number per key", lambda m, x: weighted(x, scores(x) + m.per_key), MASKED),
    (
        "windows, by a view and back",
        lambda m, x: weighted(
            x, ((scores(x) + m.bias).view(-1, 2, H, N, N) + m.window.unsqueeze(1).unsqueeze(0)).view(-1, H, N, N)
        ),
        MASKED,
    ),
    (
        "scores of (b*h), a mask of (b, h)",
        lambda m, x: flat(((flat(q(x)) @ flat(k(x)).mT).view(B, H, N, N) + m.bias).softmax(-1)) @ flat(v(x)),
        MASKED,
    ),
    ("a causal mask by masked_fill", lambda m, x: weighted(x, scores(x).masked_fill(~m.causal[:N, :N], -INF)), CAUSAL),
    (
        "a causal buffer that is sliced to the sequence",
        lambda m, x: weighted(
            x, scores(x).masked_fill(m.causal.float()[None, None][:, :, : x.shape[1], : x.shape[1]] == 0, float("-inf"))
        ),
        CAUSAL,
    ),
    (
        "a causal mask by where",
        lambda m, x: weighted(x, torch.where(m.causal[:N, :N], scores(x), torch.finfo(x.dtype).min)),
        CAUSAL,
    ),
    (
        "a causal mask by where, the other way round",
        lambda m, x: weighted(x, torch.where(m.future, m.minus, scores(x))),
        CAUSAL,
    ),
    ("an added causal mask", lambda m, x: weighted(x, scores(x) + m.hard), CAUSAL),
    (
        "an added causal mask made on the way",
        lambda m, x: weighted(x, scores(x) + torch.triu(torch.full((N, N), -INF, dtype=x.dtype), 1)),
        CAUSAL,
    ),
    (
        "a causal mask in front of the scale",
        lambda m, x: weighted(x, (q(x) @ k(x).mT).masked_fill(m.future, -INF) * 0.3),
        CAUSAL,
    ),
    ("a causal mask, twice", lambda m, x: weighted(x, (scores(x) + m.hard).masked_fill(m.future, -INF)), CAUSAL),
    ("a causal mask and a bias", lambda m, x: weighted(x, (scores(x) + m.bias).masked_fill(m.future, -INF)), MASKED),
    ("a mask of booleans", lambda m, x: weighted(x, scores(x).masked_fill(~m.leaky, -INF)), MASKED),
    ("a mask of booleans, by -1e9", lambda m, x: weighted(x, scores(x).masked_fill(m.leaky == 0, -1e9)), MASKED),
    ("a mask by the smallest number", lambda m, x: weighted(x, scores(x) + m.lowest), MASKED),
    ("an added mask with a row of the smallest number", lambda m, x: weighted(x, scores(x) + m.emptied_low), MASKED),
    ("a row filled with the smallest number", lambda m, x: weighted(x, scores(x).masked_fill(~m.empty, MIN)), MASKED),
    ("a mask that hides nothing", lambda m, x: weighted(x, scores(x).masked_fill(~(m.leaky | ~m.leaky), -INF)), PLAIN),
    (
        "a mask from the input, by the smallest number",
        lambda m, x: weighted(x, scores(x) + torch.where(x[:, None, None, :, 0, 0, 0] > 0, 0.0, MIN)),
        MASKED,
    ),
    (
        "a mask from the input, 1 - m times a number",
        lambda m, x: weighted(x, scores(x) + (1.0 - (x[:, None, None, :, 0, 0, 0] > 0).to(x.dtype)) * -10000.0),
        MASKED,
    ),
    (
        "a mask from the input, filled with the smallest number",
        lambda m, x: weighted(x, scores(x).masked_fill(x[:, None, None, :, 0, 0, 0] > 0, MIN)),
        MASKED,
    ),
    (
        "a mask from the input, what is kept",
        lambda m, x: weighted(x, torch.where(x[:, None, None, :, 0, 0, 0] > 0, scores(x), MIN)),
        MASKED,
    ),
    (
        "a mask from the input over a causal one",
        lambda m, x: weighted(
            x, scores(x).masked_fill(m.future, -INF) + torch.where(x[:, None, None, :, 0, 0, 0] > 0, 0.0, -10000.0)
        ),
        MASKED,
    ),
    ("queries unlike keys", lambda m, x: weighted(x, q(x)[:, :, :2] @ k(x).mT), PLAIN),
    ("one query", lambda m, x: weighted(x, q(x)[:, :, :1] @ k(x).mT), PLAIN),
    (
        "repeated keys and values of grouped queries",
        lambda m, x: joined(
            (q(x) @ k(x)[:, :1].repeat_interleave(H, dim=1).mT).softmax(-1) @ v(x)[:, :1].expand(B, H, N, D)
        ),
        PLAIN,
    ),
    ("the result as it is", lambda m, x: scores(x).softmax(-1) @ v(x), PLAIN),
    ("the result read twice", lambda m, x: (y := scores(x).softmax(-1) @ v(x)) * y.relu(), PLAIN),
    ("transposed, flattened", lambda m, x: (scores(x).softmax(-1) @ v(x)).transpose(1, 2).flatten(2), PLAIN),
    (
        "permuted, contiguous, reshaped",
        lambda m, x: (scores(x).softmax(-1) @ v(x)).permute(0, 2, 1, 3).contiguous().view(B, N, -1),
        PLAIN,
    ),
    ("a scaled q that is read elsewhere too", lambda m, x: weighted(x, (y := q(x) * 0.3) @ k(x).mT) + joined(y), PLAIN),
    (
        "a transposed k that is read elsewhere too",
        lambda m, x: weighted(x, q(x) @ (y := k(x).mT)) + joined(y.mT),
        PLAIN,
    ),
    ("the same value three times", lambda m, x: joined((q(x) @ q(x).mT).softmax(-1) @ q(x)), PLAIN),
]


@both
@pytest.mark.parametrize(("body", "rule"), [pytest.param(*row[1:], id=row[0]) for row in FUSES])
def test_fuses(body: Body, rule: str, front_end: str) -> None:
    compiled = outcome(body, front_end)
    assert fired(compiled) == [rule]
    left = operations(compiled.fused_graph)
    assert left["scaled_dot_product_attention"] == 1
    assert not set(left) & {"softmax", "special_softmax", "matmul", "bmm", "baddbmm", "einsum", "masked_fill"}
    if front_end == "export":
        assert "_scaled_dot_product_flash_attention_for_cpu" in kernels(compiled, torch.randn(B, N, 3, H, D))
