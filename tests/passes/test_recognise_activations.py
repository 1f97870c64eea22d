"""recognise-activations: formulas in the spellings that people use become operators; near misses stay what they are."""

from __future__ import annotations

import math
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
from graphs import FRONT_ENDS, Network, TwoInputs, assert_declined, bits, compiled_by, fired, only, operations

PASSES = ("recognise-activations",)
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]
aten = torch.ops.aten
ROOT = math.sqrt(2 / math.pi)

#: rule -> the name of the operator that it gives, and the ways of writing it.
FORMULAS: dict[str, tuple[str, list[Body]]] = {
    "silu": (
        "silu",
        [
            lambda m, x: x * torch.sigmoid(x),
            lambda m, x: torch.sigmoid(x) * x,
            lambda m, x: x.mul(x.sigmoid()),
            lambda m, x: (y := x * 1.5).mul_(y.sigmoid()),
        ],
    ),
    "silu-by-exp": (
        "silu",
        [
            lambda m, x: x / (1 + torch.exp(-x)),
            lambda m, x: x / (torch.exp(-x) + 1.0),
        ],
    ),
    "hardsigmoid": (
        "hardsigmoid",
        [
            lambda m, x: torch.clamp(x + 3, 0, 6) / 6,
            lambda m, x: F.relu6(3 + x) / 6.0,
            lambda m, x: F.relu6(x + 3.0, inplace=True) * (1 / 6),
            lambda m, x: F.hardtanh(x + 3, 0.0, 6.0) / 6,
            lambda m, x: x.add(3.0).clamp_(0.0, 6.0).div_(6.0),
            lambda m, x: 0.16666667 * m.relu6(x + 3),
        ],
    ),
    "hardswish": (
        "hardswish",
        [
            lambda m, x: x * torch.clamp(x + 3, 0, 6) / 6,
            lambda m, x: F.relu6(x + 3) * x / 6.0,
            lambda m, x: x / 6 * F.relu6(x + 3),
            lambda m, x: x * m.relu6(x + 3) * 0.16666666666666666,
        ],
    ),
    "hardsigmoid-times-x": (
        "hardswish",
        [
            lambda m, x: x * F.hardsigmoid(x),
            lambda m, x: x * (F.relu6(x + 3) / 6),
            lambda m, x: F.hardsigmoid(x) * x,
        ],
    ),
    "gelu": (
        "gelu",
        [
            lambda m, x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
            lambda m, x: 0.5 * x * (torch.erf(x / math.sqrt(2.0)) + 1.0),
            lambda m, x: x * (1 + torch.erf(x * 0.70710678)) * 0.5,
            lambda m, x: x * (0.5 * (1 + torch.erf(0.7071067811865475 * x))),
            lambda m, x: x * 0.5 * (1 + torch.erf(x / m.root)),
            lambda m, x: torch.mul(torch.mul(x, 0.5), torch.add(m.one, torch.erf(torch.div(x, math.sqrt(2))))),
            lambda m, x: torch.special.erf(x / math.sqrt(2)).add(1).mul(x).div(2),
        ],
    ),
    "gelu-tanh": (
        "gelu",
        [
            lambda m, x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3)))),
            lambda m, x: 0.5 * x * (1.0 + torch.tanh(ROOT * (x + 0.044715 * torch.pow(x, 3.0)))),
            lambda m, x: x * 0.5 * (1 + torch.tanh(0.7978845608 * (x + x**3 * 0.044715))),
            lambda m, x: 0.5 * x * (torch.tanh(ROOT * (0.044715 * x * x * x + x)) + 1),
            lambda m, x: 0.5 * x * (1 + torch.tanh((x + 0.044715 * (x * (x * x))) * ROOT)),
            lambda m, x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
            lambda m, x: 0.5 * x * (1 + torch.tanh(ROOT * x * (1 + 0.044715 * x.square()))),
            lambda m, x: 0.5 * x * (1 + torch.tanh(0.79788456 * x * (1 + 0.044715 * x**2))),
        ],
    ),
    "mish": (
        "mish",
        [
            lambda m, x: x * torch.tanh(F.softplus(x)),
            lambda m, x: F.softplus(x, threshold=30).tanh() * x,
            lambda m, x: x * torch.tanh(torch.log1p(torch.exp(x))),
            lambda m, x: x * torch.tanh(torch.log(1 + torch.exp(x))),
        ],
    ),
}
SPELLINGS = [
    pytest.param(rule, body, id=f"{rule} {place}")
    for rule, (_, bodies) in FORMULAS.items()
    for place, body in enumerate(bodies)
]


def model_of(body: Body) -> nn.Module:
    return Network(body, relu6=nn.ReLU6(), root=torch.tensor(2.0).sqrt(), one=torch.tensor(1.0)).eval()


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Numbers on every piece of the functions, the largest ones where products of them are still finite."""
    large = torch.tensor([-0.0, 0.0, -100.0, 100.0, 1000.0, -1000.0], dtype=torch.float64)
    return torch.cat([large, torch.linspace(-12, 12, 494, dtype=torch.float64)]).reshape(5, 100).to(dtype)


@both
@pytest.mark.parametrize(("rule", "body"), SPELLINGS)
def test_recognises(rule: str, body: Body, front_end: str) -> None:
    model, x = model_of(body), torch.randn(4, 7)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert fired(compiled)[-1] == rule
    (found,) = [n for n in compiled.fused_graph.graph.nodes if ir.is_compute(n) and ir.target_name(n) != "mul"]
    assert ir.target_name(found) == FORMULAS[rule][0]
    if found.target is aten.gelu.default:
        assert ir.argument(found, "approximate") == ("tanh" if rule == "gelu-tanh" else "none")
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rule", "body"), SPELLINGS)
def test_rounds_no_worse_than_the_formula(rule: str, body: Body, dtype: torch.dtype) -> None:
    if dtype is not torch.float32 and "root" in body.__code__.co_names:
        pytest.skip("the constant is float32")
    model, x = model_of(body), numbers(dtype)
    if dtype is torch.float16:
        x = x.clamp(-30, 30)  # beyond, the formulas overflow
    compiled = fxopt.compile(model, passes=PASSES, verify=False, strict=True, backend="aten")
    actual, expected = compiled(x).double(), model(x).double()
    assert fired(compiled)[-1] == rule
    reference = model_of(body).double()(x.double())
    exact = torch.where(reference.isfinite(), reference, expected)
    ours, eager = (float(((found - exact).abs() / exact.abs().clamp_min(1)).max()) for found in (actual, expected))
    assert ours <= 2 * eager + 2 * torch.finfo(dtype).eps


EXACT = [
    (F.hardsigmoid, FORMULAS["hardsigmoid"][1][:5]),
    (F.hardswish, [*FORMULAS["hardswish"][1], *FORMULAS["hardsigmoid-times-x"][1]]),
]


@given(st.sampled_from([(function, body) for function, bodies in EXACT for body in bodies]), st.data())
def test_is_equal_in_exact_arithmetic(spelling: tuple[Callable[..., Any], Body], data: st.DataObject) -> None:
    """Of multiples of 3/2, (x + 3)/6 is one of 1/4."""
    function, body = spelling
    halves = data.draw(st.lists(st.integers(-40, 40), min_size=1))
    x = torch.tensor([1.5 * half for half in halves], dtype=torch.float64)
    model = model_of(body)
    compiled = fxopt.compile(model, passes=PASSES * 2, verify=False, strict=True, backend="aten")
    assert torch.equal(compiled(x), function(x))
    assert torch.equal(compiled(x), model(x))
    assert operations(compiled.fused_graph) == {function.__name__: 1}


def test_infinities_are_what_the_formulas_do_not_define() -> None:
    """-inf * sigmoid(-inf) is NaN: finite values are what is promised."""
    assert math.isnan(float(torch.tensor(-math.inf) * torch.tensor(-math.inf).sigmoid()))


def shared(m: Any, x: torch.Tensor) -> torch.Tensor:
    gate = torch.sigmoid(x)
    return x * gate + gate


def written(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = torch.neg(x)
    gate = torch.sigmoid(x)
    x.view(-1).add_(1)
    return x * gate


GELU, TANH = "gelu", "gelu-tanh"
DECLINES: list[tuple[str, Body, str, str]] = [
    ("sigmoid(1.702 x), which is no silu", lambda m, x: x * torch.sigmoid(1.702 * x), "silu", "two different values"),
    ("a gate of another value", lambda m, x: x * torch.sigmoid(x + 1), "silu", "two different values"),
    ("the gate is read twice", shared, "silu", "is also read by"),
    ("the gate is handed out", lambda m, x: (x * (y := torch.sigmoid(x)), y), "silu", "is a result of the model"),
    ("x is written in between", written, "silu", "add_ may write"),
    ("2 x sigmoid(x)", lambda m, x: 2 * x * torch.sigmoid(x), "silu", "is not 1"),
    ("x over 2 + exp(-x)", lambda m, x: x / (2 + torch.exp(-x)), "silu-by-exp", "is not 1"),
    ("x over 1 + exp(x)", lambda m, x: x / (1 + torch.exp(x)), "silu-by-exp", "not neg"),
    ("x over exp(-x) + 2 * 1", lambda m, x: x / torch.add(torch.exp(-x), m.one, alpha=2), "silu-by-exp", "2 is not 1"),
    ("integers", lambda m, x: (i := (x * 9).long()) * torch.sigmoid(i), "silu", "torch.int64, not floating point"),
    ("clamp(x + 2.9999, 0, 6) / 6", lambda m, x: torch.clamp(x + 2.9999, 0, 6) / 6, "hardsigmoid", "2.9999 is not 3"),
    ("clamp(x + 3, 0.001, 6) / 6", lambda m, x: torch.clamp(x + 3, 1e-3, 6) / 6, "hardsigmoid", "0.001 is not 0"),
    ("clamp(x + 3, 0) / 6", lambda m, x: torch.clamp(x + 3, 0) / 6, "hardsigmoid", "None is not 6"),
    ("clamp(x + 3, 0, 6) / 6.001", lambda m, x: torch.clamp(x + 3, 0, 6) / 6.001, "hardsigmoid", "is not 1/6"),
    ("clamp(x - 3, 0, 6) / 6", lambda m, x: torch.clamp(x - 3, 0, 6) / 6, "hardsigmoid", "sub is sub, not add"),
    ("clamp(x + 3, 0, 6) / y", lambda m, x: F.relu6(x + 3) / x.exp(), "hardsigmoid", "not a product"),
    ("division by zero", lambda m, x: torch.clamp(x + 3, 0, 6) / 0, "hardsigmoid", "not a product"),
    ("a shift that is an operand", lambda m, x: F.relu6(x + x.exp()) / 6, "hardsigmoid", "exp is not 3"),
    ("keras's hardsigmoid", lambda m, x: torch.clamp(0.2 * x + 0.5, 0, 1), "hardsigmoid", ""),
    ("erf(x / 1.414)", lambda m, x: 0.5 * x * (1 + torch.erf(x / 1.414)), GELU, "0.707213.* is not 1/sqrt"),
    ("erf(x)", lambda m, x: 0.5 * x * (1 + torch.erf(x)), GELU, "not a product"),
    ("x (1 + erf)", lambda m, x: x * (1 + torch.erf(x / math.sqrt(2))), GELU, "is not 1/2"),
    ("x/2 (1 - erf)", lambda m, x: 0.5 * x * (1 - torch.erf(x / math.sqrt(2))), GELU, "not add"),
    ("erf by tanh's constants", lambda m, x: 0.5 * x * (1 + torch.erf(ROOT * (x + 0.044715 * x**3))), TANH, "not tanh"),
    ("tanh by erf's constants", lambda m, x: 0.5 * x * (1 + torch.tanh(x / math.sqrt(2))), GELU, "not erf"),
    (
        "0.0447 for 0.044715",
        lambda m, x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.0447 * x**3))),
        TANH,
        "0.0447 is not 0.044715",
    ),
    (
        "0.798 for sqrt(2/pi)",
        lambda m, x: 0.5 * x * (1 + torch.tanh(0.798 * (x + 0.044715 * x**3))),
        TANH,
        r"0.798 is not sqrt\(2/pi\) = 0.797884",
    ),
    (
        "x**2 for x**3",
        lambda m, x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**2))),
        TANH,
        "a product of 2 values, not 3",
    ),
    (
        "x**2.5",
        lambda m, x: 0.5 * x * (1 + torch.tanh(ROOT * (x + 0.044715 * x**2.5))),
        TANH,
        "a product of 1 values, not 3",
    ),
    ("softplus of beta 2", lambda m, x: x * torch.tanh(F.softplus(x, 2)), "mish", "beta=2.*, not 1"),
    ("softplus linear from 1 on", lambda m, x: x * torch.tanh(F.softplus(x, 1, 1)), "mish", "linear from 1"),
    ("tanh(softplus(-x))", lambda m, x: x * torch.tanh(F.softplus(-x)), "mish", "two different values"),
]


@both
@pytest.mark.parametrize(("body", "rule", "reason"), [pytest.param(*row[1:], id=row[0]) for row in DECLINES])
def test_declines(body: Body, rule: str, reason: str, front_end: str) -> None:
    model, x = model_of(body), torch.randn(4, 7)
    compiled = compiled_by(PASSES, model, (x,), front_end, verify=False)
    if reason:
        assert_declined(compiled, rule, reason)
    assert not fired(compiled)
    results = [found if isinstance(found, tuple) else (found,) for found in (compiled(x), model(x))]
    assert all(bits(left) == bits(right) for left, right in zip(*results, strict=True))


def test_float64_asks_for_all_of_its_digits() -> None:
    model = model_of(lambda m, x: 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))).double()
    compiled = compiled_by(PASSES, model, (torch.randn(4, 7, dtype=torch.float64),), "export")
    assert_declined(compiled, TANH, r"0.7978845608 is not sqrt\(2/pi\) = 0.79788456080286.* precision of torch.float64")


def test_a_wider_constant_declines() -> None:
    """A float64 constant and a float32 number, both without dimensions, give float64."""
    model = Network(lambda m, x: x * (1 + torch.erf(x / math.sqrt(2))) * m.part, part=torch.tensor(0.5).double()).eval()
    compiled = compiled_by(PASSES, model, (torch.tensor(0.3),), "export")
    assert_declined(compiled, GELU, "the result is torch.float64, .* torch.float32")
    compiled = compiled_by(PASSES, model, (torch.randn(3),), "export")
    assert fired(compiled) == [GELU]


def test_a_constant_that_is_written_declines() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * (1 + torch.erf(x / math.sqrt(2))) * m.part
        m.part.add_(1)
        return y

    compiled = fxopt.compile(Network(body, part=torch.tensor(0.5)).eval(), (torch.randn(3),), passes=PASSES)
    assert fired(compiled) == []


def test_a_constant_with_dimensions_is_no_number() -> None:
    model = Network(lambda m, x: x * (1 + torch.erf(x / math.sqrt(2))) * m.part, part=torch.full((1, 1, 1), 0.5)).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(3),), "export")
    assert_declined(compiled, GELU, "a product of 3 values, not 2")


@both
def test_squeeze_and_excite_keeps_its_gate(front_end: str) -> None:
    model = TwoInputs(lambda m, x, y: x * torch.sigmoid(y)).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(3, 4), torch.randn(3, 4)), front_end)
    assert_declined(compiled, "silu", "two different values")


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(lambda y: y * 1.0001, id="one by one"),
        pytest.param(lambda y: y * y, id="each doubling the factors"),
        pytest.param(lambda y: y**3, id="each trebling them"),
    ],
)
def test_a_long_product_is_left_alone_at_once(step: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(600):
            x = step(x)
        return x

    compiled = fxopt.compile(Network(body).eval(), passes=PASSES, strict=True)
    assert fired(compiled) == []


def test_waits_for_the_dtype() -> None:
    compiled = fxopt.compile(model_of(lambda m, x: x * torch.sigmoid(x)), passes=PASSES)
    assert [decline.reason for decline in compiled.report.pending] == ["the dtype of x"]
    compiled(torch.randn(3))
    assert fired(compiled) == ["silu"]


@both
def test_a_layer_takes_the_activation_that_was_recognised(front_end: str) -> None:
    model = Network(lambda m, x: (y := m.conv(x)) * F.relu6(y + 3) / 6, conv=nn.Conv2d(3, 4, 3)).eval()
    compiled = compiled_by(("default",), model, (torch.randn(2, 3, 5, 5),), front_end)
    assert operations(compiled.fused_graph) == {"fxopt.convolution": 1}
    assert ir.argument(only(compiled.fused_graph, "fxopt.convolution"), "activation") == "hardswish"
