"""recognise-activations

    x * sigmoid(x), x / (1 + exp(-x))                            ->  silu(x)
    clamp(x + 3, 0, 6) / 6                                       ->  hardsigmoid(x)          relu6, hardtanh
    x * clamp(x + 3, 0, 6) / 6, x * hardsigmoid(x)               ->  hardswish(x)
    x/2 * (1 + erf(x / sqrt(2)))                                 ->  gelu(x)
    x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))            ->  gelu(x, approximate="tanh")
    x * tanh(softplus(x)), x * tanh(log(1 + exp(x)))             ->  mish(x)

Products in any order and nesting, powers as products, division as multiplication; sums in either order.

Legal when: nothing inside has another reader; each number is what it stands for, to the precision of the dtype (of
float32 for float16 and bfloat16); x is floating point, and the result has its dtype; softplus has beta 1 and a
threshold behind which tanh is 1.
Numerics: reassociates: the same real function, rounded in other places. What overflows on the way is not promised:
x * clamp(x + 3, 0, 6) is infinite where hardswish(x) still is x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt import UNKNOWN, Match, NoMatch, Pass, Rewriter, Rule, any_of, call, ir, var
from fxopt.pattern import Pattern

from ._product import near, numbers_guard, plus, product

aten = torch.ops.aten
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: From here on tanh(softplus(x)) and tanh(x) are 1 to the last bit of float64.
_TANH_IS_ONE = 20


def _guard(match: Match) -> NoMatch | None:
    x = match.node("x")
    dtype = ir.dtype(x)
    if dtype is None or ir.dtype(match.root) is None:
        return NoMatch(f"{UNKNOWN}the dtype of {x.name}", match.root)
    if dtype not in _FLOATS:
        return NoMatch(f"{x.name} is {dtype}, not floating point", match.root)
    if ir.dtype(match.root) != dtype:
        return NoMatch(f"the result is {ir.dtype(match.root)}, {x.name} {dtype}", match.root)
    return numbers_guard(match, dtype)


def _mish_guard(match: Match) -> NoMatch | None:
    softplus = match.get("softplus")
    if softplus is not None:
        beta, threshold = ir.argument(softplus, "beta"), ir.argument(softplus, "threshold")
        if beta != 1:
            return NoMatch(f"{softplus.name} has beta={beta!r}, not 1", softplus)
        if isinstance(threshold, fx.Node) or not threshold >= _TANH_IS_ONE:
            return NoMatch(f"{softplus.name} is linear from {threshold} on, where its tanh is not 1 yet", softplus)
    return _guard(match)


def _as(target: Any, **options: Any) -> Any:
    """A rewrite that calls an operator on x."""

    def rewrite(match: Match, rewriter: Rewriter) -> fx.Node:
        return rewriter.call(target, match["x"], **options)

    return rewrite


def _tanh(value: Pattern) -> Pattern:
    return call(aten.tanh.default, value)


X = var("x")
SHIFTED = plus(X, near("3"))
#: clamp(x + 3, 0, 6)
UP_TO_SIX = any_of(
    call(aten.relu6.default, SHIFTED),
    call(aten.clamp.default, SHIFTED, near("0"), near("6")),
    call(aten.hardtanh.default, SHIFTED, near("0"), near("6")),
)
ERF = call(aten.erf.default, product(X, constant=near("1/sqrt(2)")))
CUBIC = any_of(
    product(plus(X, product(X, X, X, constant=near("0.044715"))), constant=near("sqrt(2/pi)")),
    product(plus(product(X, X, constant=near("0.044715")), near("1")), X, constant=near("sqrt(2/pi)")),
)
SOFTPLUS = any_of(
    call(aten.softplus.default, X, name="softplus"),
    call(aten.log1p.default, call(aten.exp.default, X)),
    call(aten.log.default, plus(call(aten.exp.default, X), near("1"))),
)

PASS = Pass(
    "recognise-activations",
    rules=(
        Rule("silu", product(call(aten.sigmoid.default, X), X), _as(aten.silu.default), _guard),
        Rule(
            "silu-by-exp",
            call(aten.div.Tensor, X, plus(call(aten.exp.default, call(aten.neg.default, X)), near("1"))),
            _as(aten.silu.default),
            _guard,
        ),
        Rule(
            "hardsigmoid-times-x",
            product(call(aten.hardsigmoid.default, X), X),
            _as(aten.hardswish.default),
            _guard,
        ),
        Rule("hardswish", product(UP_TO_SIX, X, constant=near("1/6")), _as(aten.hardswish.default), _guard),
        Rule("hardsigmoid", product(UP_TO_SIX, constant=near("1/6")), _as(aten.hardsigmoid.default), _guard),
        Rule("gelu", product(plus(ERF, near("1")), X, constant=near("1/2")), _as(aten.gelu.default), _guard),
        Rule(
            "gelu-tanh",
            product(plus(_tanh(CUBIC), near("1")), X, constant=near("1/2")),
            _as(aten.gelu.default, approximate="tanh"),
            _guard,
        ),
        Rule("mish", product(_tanh(SOFTPLUS), X), _as(aten.mish.default), _mish_guard),
    ),
    numerics="reassociate",
    doc=__doc__,
)
