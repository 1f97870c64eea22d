"""fuse-normalisation: layer norm and RMS norm where models write them out, and what is neither."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt import ir
from graphs import FRONT_ENDS, Network, assert_declined, compiled_by, fired, only, operations

#: Casts to the dtype that is there go first.
PASSES = ("drop-identities", "fuse-normalisation")
LQ, LP = "layer-norm-by-quotient", "layer-norm-by-product"
RQ, RP = "rms-norm-by-quotient", "rms-norm-by-product"
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]
EPS = 1e-5
SIZE = 8


def parts(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "weight": nn.Parameter(torch.randn(SIZE, dtype=dtype)),
        "bias": nn.Parameter(torch.randn(SIZE, dtype=dtype)),
        "both": nn.Parameter(torch.randn(3, SIZE, dtype=dtype)),
        "row": torch.randn(1, SIZE, dtype=dtype),
        "wide": torch.randn(SIZE, dtype=torch.float64),
        "eps": torch.tensor(EPS, dtype=dtype),
        "free": nn.LayerNorm(SIZE, elementwise_affine=False),
        "rms": nn.RMSNorm(SIZE, elementwise_affine=False),
        "linear": nn.Linear(SIZE, 3, dtype=dtype),
    }


def model_of(body: Body, dtype: torch.dtype = torch.float32) -> nn.Module:
    return Network(body, **parts(dtype)).eval()


def image(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, SIZE, dtype=dtype) * 3 + 5


def mean(x: torch.Tensor, dim: Any = -1) -> torch.Tensor:
    return x.mean(dim, keepdim=True)


def variance(x: torch.Tensor, dim: Any = -1) -> torch.Tensor:
    return x.var(dim, unbiased=False, keepdim=True)


def by_squares(m: Any, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(dim=-1, keepdim=True) + EPS) * m.weight + m.bias


def bert(m: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer norm of the first BERT for PyTorch."""
    u = x.mean(-1, keepdim=True)
    s = (x - u).pow(2).mean(-1, keepdim=True)
    x = (x - u) / torch.sqrt(s + 1e-12)
    return m.weight * x + m.bias


def t5(m: Any, x: torch.Tensor) -> torch.Tensor:
    """T5LayerNorm of Hugging Face."""
    square = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return m.weight * (x * torch.rsqrt(square + 1e-6))


def llama(m: Any, x: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm of Hugging Face."""
    dtype = x.dtype
    x = x.to(torch.float32)
    square = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(square + 1e-6)
    return m.weight * x.to(dtype)


NORMS: list[tuple[str, Body, list[str], str]] = [
    ("var and sqrt", lambda m, x: (x - mean(x)) / torch.sqrt(variance(x) + EPS), [LQ], "layer_norm"),
    ("var by its correction", lambda m, x: (x - mean(x)) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt(), [LQ],
     "layer_norm"),
    ("var by a correction of 0.0", lambda m, x: (x - mean(x)) / (x.var(-1, correction=0.0, keepdim=True) + EPS).sqrt(),
     [LQ], "layer_norm"),
    ("the power 1/2", lambda m, x: (x - mean(x)) / (EPS + variance(x)) ** 0.5, [LQ], "layer_norm"),
    ("the power -1/2", lambda m, x: (x - mean(x)) * (variance(x) + EPS) ** -0.5, [LP], "layer_norm"),
    ("rsqrt", lambda m, x: torch.rsqrt(variance(x) + EPS) * (x - mean(x)), [LP], "layer_norm"),
    ("the inverse of sqrt", lambda m, x: (x - mean(x)) * (variance(x) + EPS).sqrt().reciprocal(), [LP], "layer_norm"),
    ("1 over sqrt", lambda m, x: (x - mean(x)) * (1 / torch.sqrt(variance(x) + EPS)), [LP], "layer_norm"),
    ("var and an eps of the model", lambda m, x: (x - mean(x)) / torch.sqrt(variance(x) + m.eps), [LQ], "layer_norm"),
    ("an eps of 0", lambda m, x: (x - mean(x)) / torch.sqrt(variance(x) + 0), [LQ], "layer_norm"),
    ("squares of the difference", by_squares, [LQ, "weight", "bias"], "layer_norm"),
    ("squares by square()", lambda m, x: (d := x - mean(x)) / torch.sqrt(mean(d.square()) + EPS), [LQ], "layer_norm"),
    ("squares by **", lambda m, x: (d := x - mean(x)) / torch.sqrt(mean(d**2) + EPS), [LQ], "layer_norm"),
    ("each part written out again", lambda m, x: (x - mean(x)) / torch.sqrt(mean((x - mean(x)) ** 2) + EPS), [LQ],
     "layer_norm"),
    ("BERT's", bert, [LQ, "weight", "bias"], "layer_norm"),
    ("the weight first", lambda m, x: m.weight * (x - mean(x)) / torch.sqrt(variance(x) + EPS) + m.bias,
     [LQ, "bias"], "layer_norm"),
    ("the weight in the middle", lambda m, x: m.bias + (x - mean(x)) * m.weight * torch.rsqrt(variance(x) + EPS),
     [LP, "bias"], "layer_norm"),
    ("a bias alone", lambda m, x: (x - mean(x)) / torch.sqrt(variance(x) + EPS) + m.bias, [LQ, "bias"], "layer_norm"),
    ("two dimensions", lambda m, x: (x - mean(x, (-1, -2))) / torch.sqrt(variance(x, (1, 2)) + EPS) * m.both,
     [LQ, "weight"], "layer_norm"),
    ("a weight behind a norm without", lambda m, x: m.weight * m.free(x) + m.bias, ["weight", "bias"], "layer_norm"),
    ("RMS by rsqrt", lambda m, x: x * torch.rsqrt(mean(x * x) + EPS), [RP], "rms_norm"),
    ("RMS by sqrt", lambda m, x: x / torch.sqrt(mean(x**2) + EPS) * m.weight, [RQ, "weight"], "rms_norm"),
    ("RMS by the power -1/2", lambda m, x: (mean(x.square()) + EPS) ** -0.5 * x, [RP], "rms_norm"),
    ("RMS, the weight first", lambda m, x: m.weight * x * torch.rsqrt(mean(x.pow(2)) + EPS), [RP], "rms_norm"),
    ("RMS, the weight first, by sqrt", lambda m, x: m.weight * x / (mean(x.pow(2)) + EPS).sqrt(), [RQ], "rms_norm"),
    ("a weight behind an RMS norm without", lambda m, x: m.rms(x) * m.weight, ["weight"], "rms_norm"),
    ("T5's", t5, [RP, "weight"], "rms_norm"),
    ("Llama's", llama, [RP, "weight"], "rms_norm"),
]  # fmt: skip
#: Those that mean float64 when the model is float64.
IN_ANY_DTYPE = [row for row in NORMS if row[0] not in ("T5's", "Llama's")]
rows = pytest.mark.parametrize(("body", "rules", "operator"), [pytest.param(*row[1:], id=row[0]) for row in NORMS])


@both
@rows
def test_fuses(body: Body, rules: list[str], operator: str, front_end: str) -> None:
    model, x = model_of(body), image()
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert [rule for rule in fired(compiled) if rule != "identity"] == rules
    assert operations(compiled.fused_graph) == {operator: 1}
    torch.testing.assert_close(compiled(x), model(x))


def test_takes_its_parts_over() -> None:
    compiled = compiled_by(PASSES, model_of(bert), (image(),), "export")
    given = ir.arguments(only(compiled.fused_graph, "layer_norm"))
    assert (given["normalized_shape"], given["eps"]) == ([SIZE], 1e-12)
    assert (given["weight"].target, given["bias"].target) == ("weight", "bias")


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 1.0), (3.0, 100.0)])
@pytest.mark.parametrize(("body", "rules", "operator"), [pytest.param(*row[1:], id=row[0]) for row in IN_ANY_DTYPE])
def test_rounds_no_worse_than_the_formula(
    body: Body, rules: list[str], operator: str, scale: float, offset: float
) -> None:
    """Where the mean dwarfs what is left of x, both lose the same digits."""
    model, x = model_of(body), torch.randn(64, 3, SIZE) * scale + offset
    compiled = fxopt.compile(model, passes=PASSES, verify=False, strict=True, backend="aten")
    with torch.no_grad():
        actual, expected, exact = compiled(x).double(), model(x).double(), model_of(body).double()(x.double())
    size = float(exact.abs().max())
    ours, eager = (float((found - exact).abs().max()) / size for found in (actual, expected))
    assert ours <= 2 * eager + 8 * torch.finfo(torch.float32).eps


@given(st.sampled_from(IN_ANY_DTYPE), st.integers(0, 99))
def test_is_the_same_in_float64_to_its_last_digits(row: tuple[str, Body, list[str], str], seed: int) -> None:
    """The kernels average by running means, which divide; so even of whole numbers the last digit may differ."""
    _, body, rules, _ = row
    model = model_of(body, torch.float64)
    x = torch.randint(-8, 9, (4, 3, SIZE), generator=torch.Generator().manual_seed(seed)).double()
    x[..., 0] += 20 * torch.arange(3)  # no row of equal numbers, which an eps of 0 divides by 0
    x[..., 1] += 9.5
    compiled = fxopt.compile(model, passes=PASSES * 2, verify=False, strict=True, backend="aten")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-13, atol=1e-13)
    assert [rule for rule in fired(compiled) if rule != "identity"] == rules


@given(st.integers(0, 3), st.lists(st.integers(-8, 8), min_size=4, max_size=4), st.sampled_from([RP, RQ]))
def test_rms_norm_is_equal_in_exact_arithmetic(power: int, signs: list[int], rule: str) -> None:
    """Of +-2^p, the mean square is 4^p; with an eps of 3 * 4^p it is 4^(p + 1), whose root is a power of two."""
    x = torch.tensor([[2.0**power * (1 if sign > 0 else -1) for sign in signs]] * 2, dtype=torch.float64)
    eps = 3.0 * 4.0**power
    model = Network(
        (lambda m, x: x * torch.rsqrt(mean(x * x) + eps) * m.part)
        if rule == RP
        else (lambda m, x: x / torch.sqrt(mean(x * x) + eps) * m.part),
        part=torch.tensor([0.5, -2.0, 3.0, 1.0], dtype=torch.float64),
    ).eval()
    compiled = fxopt.compile(model, passes=PASSES, verify=False, strict=True, backend="aten")
    assert torch.equal(compiled(x), model(x))
    assert fired(compiled) == [rule, "weight"]


def shared(m: Any, x: torch.Tensor) -> torch.Tensor:
    u = mean(x)
    return (x - u) / torch.sqrt(variance(x) + EPS) + u


def written(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = torch.neg(x)
    root = torch.rsqrt(mean(x * x) + EPS)
    x.view(-1).add_(1)
    return x * root


def convnext(m: Any, x: torch.Tensor) -> torch.Tensor:
    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    return (x - u) / torch.sqrt(s + EPS)


DECLINES: list[tuple[str, Body, str, str]] = [
    ("the mean is read by others", shared, LQ, "is also read by"),
    ("x is written in between", written, RP, "add_ may write"),
    ("the unbiased variance", lambda m, x: (x - mean(x)) / torch.sqrt(x.var(-1, keepdim=True) + EPS), LQ, "unbiased"),
    ("a correction of 1", lambda m, x: (x - mean(x)) / (x.var(-1, correction=1, keepdim=True) + EPS).sqrt(), LQ,
     "correction is 1"),
    ("a correction that is left out", lambda m, x: (x - mean(x)) / (
        torch.ops.aten.var.correction(x, [-1], keepdim=True) + EPS).sqrt(), LQ, "correction is None"),
    ("std, as in the annotated transformer", lambda m, x: (x - mean(x)) / (x.std(-1, keepdim=True) + EPS), LQ, "not"),
    ("eps outside the root", lambda m, x: (x - mean(x)) / (variance(x).sqrt() + EPS), LQ, "not"),
    ("the mean of squares less the square of the mean",
     lambda m, x: (x - mean(x)) / torch.sqrt(mean(x * x) - mean(x) ** 2 + EPS), LQ, "not"),
    ("eps is an operand", lambda m, x: (x - mean(x)) / torch.sqrt(variance(x) + mean(x).abs()), LQ, "eps is abs"),
    ("eps is infinite", lambda m, x: (x - mean(x)) / torch.sqrt(variance(x) + float("inf")), LQ, "eps is inf"),
    ("eps is negative", lambda m, x: (x - mean(x)) / torch.sqrt(variance(x) + -1e-9), LQ, "eps is -1e-09"),
    ("alpha before eps", lambda m, x: (x - mean(x)) / torch.sqrt(torch.add(variance(x), EPS, alpha=2)), LQ,
     "2 is not 1"),
    ("alpha before the mean", lambda m, x: torch.sub(x, mean(x), alpha=2) / torch.sqrt(variance(x) + EPS), LQ,
     "2 is not 1"),
    ("dimension 1, as in ConvNeXt", convnext, LQ, r"along \[1\] of 3 dimensions, not the last"),
    ("the batch too", lambda m, x: (x - mean(x, (0, 2))) / torch.sqrt(variance(x, (0, 2)) + EPS), LQ, "not the last"),
    ("the mean along one, the variance along two", lambda m, x: (x - mean(x)) / torch.sqrt(variance(x, (1, 2)) + EPS),
     LQ, "do not run along the same"),
    ("the variance's mean along two",
     lambda m, x: (x - mean(x)) / torch.sqrt(mean((x - mean(x, (1, 2))) ** 2) + EPS), LQ, "do not run along the same"),
    ("all dimensions, unnamed", lambda m, x: x * torch.rsqrt(x.pow(2).mean(None, keepdim=True) + EPS), RP,
     "do not run along the same"),
    ("a mean that drops its dimension", lambda m, x: x / torch.sqrt((x * x).mean(0) + EPS), RQ, "False is not True"),
    ("the mean of another value", lambda m, x: (x - mean(x * 2)) / torch.sqrt(variance(x) + EPS), LQ, "two different"),
    ("the variance of another value", lambda m, x: (x - mean(x)) / torch.sqrt(variance(x * 2) + EPS), LQ,
     "two different"),
    ("RMS of another value", lambda m, x: x * torch.rsqrt(mean(x.abs() * x) + EPS), RP, "two different"),
    ("a mean in float64", lambda m, x: x * torch.rsqrt((x * x).mean(-1, True, dtype=torch.float64) + EPS).float(), RP,
     "not"),
    ("a mean by its dtype", lambda m, x: x * torch.rsqrt((x * x).mean(-1, True, dtype=torch.float32) + EPS), RP,
     "accumulates in torch.float32"),
    ("1.001 times it", lambda m, x: 1.001 * x * torch.rsqrt(mean(x * x) + EPS), RP, "1.001 is not 1"),
    ("the mean of 1.001 squares", lambda m, x: x * torch.rsqrt(mean(1.001 * x * x) + EPS), RP, "1.001 is not 1"),
    ("a weight of two dimensions inside", lambda m, x: m.row * x / torch.sqrt(mean(x * x) + EPS), RQ,
     r"\[1, 8\], not \[8\]"),
    ("a wider weight inside", lambda m, x: m.wide * x / torch.sqrt(mean(x * x) + EPS), RQ,
     "the weight is torch.float64"),
    ("a weight of two dimensions", lambda m, x: m.free(x) * m.row, "weight", r"\[1, 8\], not \[8\]"),
    ("a weight per position", lambda m, x: m.free(x) * m.both, "weight", r"\[3, 8\], not \[8\]"),
    ("a wider weight", lambda m, x: m.free(x) * m.wide, "weight", "the weight is torch.float64"),
    ("a bias of two dimensions", lambda m, x: m.free(x) + m.row, "bias", r"\[1, 8\], not \[8\]"),
    ("a bias behind an RMS norm", lambda m, x: m.rms(x) + m.bias, "bias", "rms_norm is rms_norm, not layer_norm"),
    ("a bias and alpha", lambda m, x: torch.add(m.free(x), m.bias, alpha=2), "bias", "2 is not 1"),
    ("a weight that is computed", lambda m, x: m.free(x) * x.sum(), "weight", "computed at run time"),
    ("a weight behind a bias", lambda m, x: F.layer_norm(x, (SIZE,), None, m.bias) * m.weight, "weight", "not"),
    ("the norm is read twice", lambda m, x: (y := m.free(x)) * m.weight + y, "weight", "is also read by"),
]  # fmt: skip


@both
@pytest.mark.parametrize(("body", "rule", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, rule: str, reason: str, front_end: str) -> None:
    model, x = model_of(body), image()
    compiled = compiled_by(PASSES, model, (x,), front_end, verify=False)
    assert_declined(compiled, rule, reason)
    with torch.no_grad():
        assert torch.equal(compiled(x).nan_to_num(), model(x).nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_declines_where_the_formula_accumulates_in_less(dtype: torch.dtype) -> None:
    """In float16 the squares of 300 overflow in the formula, not in the operator."""
    for body, rule in ((t5_in_its_dtype, RP), (by_squares, LQ)):
        compiled = compiled_by(PASSES, model_of(body, dtype), (image(dtype),), "symbolic")
        assert_declined(compiled, rule, f"accumulates in {dtype}")


def t5_in_its_dtype(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


@both
def test_llama_in_bfloat16_accumulates_in_float32(front_end: str) -> None:
    """Its weight stays outside, behind the rounding to bfloat16."""
    model, x = model_of(llama, torch.bfloat16), image(torch.bfloat16)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert operations(compiled.fused_graph) == {"to": 2, "rms_norm": 1, "mul": 1}
    assert ir.dtype(only(compiled.fused_graph, "rms_norm")) is torch.float32
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_declines_sizes_that_are_open() -> None:
    model = model_of(lambda m, x: x * torch.rsqrt(mean(x * x, (0, 1, 2)) + EPS))
    compiled = compiled_by(PASSES, model, (image(),), "export")
    assert_declined(compiled, RP, "are not all fixed")


def test_declines_a_value_without_dimensions() -> None:
    model = model_of(lambda m, x: x * torch.rsqrt(mean(x * x) + EPS))
    compiled = compiled_by(PASSES, model, (torch.tensor(2.0),), "export")
    assert_declined(compiled, RP, "has no dimensions")


def test_declines_what_is_not_dense_in_its_order() -> None:
    """The formula keeps the strides of a permuted image, the operator makes its result contiguous."""
    model = model_of(lambda m, x: _normalised(x.permute(0, 2, 1)))
    compiled = compiled_by(PASSES, model, (torch.randn(2, SIZE, 3),), "export")
    assert_declined(compiled, LQ, "strides would change")


def _normalised(x: torch.Tensor) -> torch.Tensor:
    return (x - mean(x)) / torch.sqrt(variance(x) + EPS)


def test_a_constant_that_is_written_declines() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.free(x) * m.row[0]
        m.eps.add_(1)
        return y / torch.sqrt(mean(y * y) + m.eps)

    compiled = fxopt.compile(model_of(body), (image(),), passes=PASSES)
    assert fired(compiled) == []


def test_waits_for_shapes() -> None:
    compiled = fxopt.compile(model_of(t5_in_its_dtype), passes=PASSES)
    assert {decline.reason for decline in compiled.report.pending} == {"the shape of x"}
    waiting = fxopt.compile(model_of(lambda m, x: m.free(x) * m.weight), passes=PASSES)
    assert [decline.reason for decline in waiting.report.pending] == ["the dtype of layer_norm"]


@both
def test_a_norm_keeps_its_weight_in_front_of_a_layer(front_end: str) -> None:
    compiled = compiled_by(("default",), model_of(lambda m, x: m.linear(bert(m, x))), (image(),), front_end)
    assert operations(compiled.fused_graph) == {"layer_norm": 1, "linear": 1}
