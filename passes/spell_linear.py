"""spell-linear

    x @ W^T, mm(x, W^T)          ->  linear(x, W)
    x @ W, mm(x, W)              ->  linear(x, V)                V = W^T, a new constant
    addmm(b, x, W^T)             ->  linear(x, W, b)
    addmm(b, x, W)               ->  linear(x, V, b)             GPT-2's Conv1D
    reshape(linear(reshape(x)))  ->  linear(x), or linear(reshape(x)) in the shape of the result

Linear layers that are written by hand become linear layers, for every pass that looks for one. A bias that is added
behind the product is fold-affine's.

Legal when: W is a constant matrix, plain, dense and floating point; b a constant vector of its outputs, beta and alpha
1; the reshape behind a layer keeps its features last, and nobody else reads the layer; where a reshape in front is
still needed, nobody else reads the old one.
Numerics: reassociates (the same products, which another kernel may sum in another order).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import fx

from fxopt import UNKNOWN, Match, NoMatch, Pass, Rewriter, Rule, call, const, ir, var
from fxopt.pattern import Pattern

from . import _shapes
from ._shapes import TRANSPOSES, order_of

aten = torch.ops.aten

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PRODUCTS = (aten.matmul.default, aten.mm.default)
_RESHAPES = (aten.reshape.default, aten.flatten.using_ints)

X, WEIGHT, BIAS = var("x"), const("weight"), const("bias")
TRANSPOSED = call(TRANSPOSES, WEIGHT, name="transpose", shared=True)


def _weight_guard(match: Match) -> NoMatch | None:
    weight = ir.tensor(match["weight"])
    assert weight is not None
    if type(weight) is not torch.Tensor or weight.layout is not torch.strided:
        return NoMatch(f"the weight is a {type(weight).__name__} of layout {weight.layout}", match.root)
    if weight.dtype not in _FLOATS:
        return NoMatch(f"the weight is {weight.dtype}, not floating point", match.root)
    if weight.dim() != 2:
        return NoMatch(f"the weight has {weight.dim()} dimensions, not 2", match.root)
    transpose = match.get("transpose")
    if transpose is not None and order_of(transpose) != (1, 0):
        return NoMatch(f"{transpose.name} transposes nothing", transpose)
    return None


def _bias_guard(match: Match) -> NoMatch | None:
    refusal = _weight_guard(match)
    if refusal is not None:
        return refusal
    given = ir.arguments(match.root)
    for name in ("beta", "alpha"):
        if type(given[name]) not in (int, float) or given[name] != 1:
            return NoMatch(f"{name} is {given[name]!r}, not 1", match.root)
    weight, bias = ir.tensor(match["weight"]), ir.tensor(match["bias"])
    assert weight is not None
    assert bias is not None
    outputs = weight.shape[0 if "transpose" in match.bindings else 1]
    if tuple(bias.shape) != (outputs,):
        return NoMatch(f"the bias has the shape {tuple(bias.shape)}, not one number per output ({outputs})", match.root)
    return None


def _spell(match: Match, rewriter: Rewriter) -> fx.Node:
    weight = match.node("weight")
    if match.get("transpose") is None:
        weight = _transposed(weight, match.root, rewriter)
    return rewriter.call(aten.linear.default, match["x"], weight, match.get("bias"))


def _transposed(weight: fx.Node, root: fx.Node, rewriter: Rewriter) -> fx.Node:
    """W^T as a constant: the one that another product of W already has, or a new one."""
    held = ir.tensor(weight)
    assert held is not None
    name = f"{weight.target}_transposed"
    for node in rewriter.graph.find_nodes(op="get_attr", sort=True):
        if node < root and str(node.target).startswith(name) and _equal(ir.tensor(node), held.t()):
            return cast(fx.Node, node)
    return rewriter.constant(held.t(), name)


def _equal(left: torch.Tensor | None, right: torch.Tensor) -> bool:
    if left is None or left.requires_grad:  # what is the same now need not be once it is trained
        return False
    same = (left.dtype, left.device, left.shape) == (right.dtype, right.device, right.shape)
    return same and not left.is_meta and torch.equal(left, right)


def _between_guard(match: Match) -> NoMatch | None:
    layer, inner = match.node("layer"), match.node("inner")
    before, flat, made, after = (ir.shape(node) for node in (match["x"], inner, layer, match.root))
    if before is None or flat is None or made is None or after is None:
        return NoMatch(f"{UNKNOWN}whether {match.root.name} keeps the features last", match.root)
    if not ir.same_sizes(after[-1:], made[-1:]):
        return NoMatch(f"{match.root.name} does not keep the features last", match.root)
    wanted = (*after[:-1], flat[-1])
    if ir.same_sizes(before, wanted):
        return None
    others = [user.name for user in inner.users if user is not layer]
    if others:
        return NoMatch(f"{inner.name}, which may copy, is also read by {others[0]}", inner)
    sizes = _shapes.as_argument(wanted, match.root)
    return sizes if isinstance(sizes, NoMatch) else None


def _drop_reshapes(match: Match, rewriter: Rewriter) -> fx.Node:
    x, flat, after = match.node("x"), ir.shape(match.node("inner")), ir.shape(match.root)
    assert flat is not None
    assert after is not None
    wanted = (*after[:-1], flat[-1])
    if not ir.same_sizes(ir.shape(x), wanted):
        x = rewriter.call(aten.reshape.default, x, _shapes.as_argument(wanted, match.root))
    return rewriter.call(aten.linear.default, x, match["weight"], match["bias"])


def _addmm(weight: Pattern) -> Pattern:
    return call(aten.addmm.default, BIAS, X, weight)


PASS = Pass(
    "spell-linear",
    rules=(
        Rule("product-of-transpose", call(_PRODUCTS, X, TRANSPOSED), _spell, _weight_guard),
        Rule("product", call(_PRODUCTS, X, WEIGHT), _spell, _weight_guard),
        Rule("addmm-of-transpose", _addmm(TRANSPOSED), _spell, _bias_guard),
        Rule("addmm", _addmm(WEIGHT), _spell, _bias_guard),
        Rule(
            "linear-between-reshapes",
            call(
                _RESHAPES,
                call(
                    aten.linear.default,
                    call(_RESHAPES, X, name="inner", shared=True),
                    var("weight"),
                    var("bias"),
                    name="layer",
                ),
            ),
            _drop_reshapes,
            _between_guard,
        ),
    ),
    numerics="reassociate",
    doc=__doc__,
)
