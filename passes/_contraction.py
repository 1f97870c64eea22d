"""Products of two tensors as contractions, and what may stand in front of one: transposes, and scales by a number.

A contraction gives each axis a letter, so that matmul, bmm, baddbmm and einsum are one thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxopt import UNKNOWN, NoMatch, ir

aten = torch.ops.aten

#: Evaluates what does not depend on the model's inputs; None for what does.
Constant = Callable[[Any], "torch.Tensor | None"]

PRODUCTS: tuple[Any, ...] = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
_TRANSPOSES = (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
_MATRIX_TRANSPOSES = (aten.mT.default, aten.adjoint.default, aten.t.default, aten.numpy_T.default)


@dataclass(frozen=True)
class Contraction:
    """scale * (left times right), summed over the axes that both have and the result has not, plus share * addend."""

    node: fx.Node
    operands: tuple[fx.Node, fx.Node]
    axes: tuple[str, str]
    result: str
    scale: float = 1.0
    addend: fx.Node | None = None
    share: float = 1.0


def contraction(node: fx.Node) -> Contraction | NoMatch:
    """What a product contracts; it is no match where sizes are broadcast or not known."""
    if node.op != "call_function" or node.target not in PRODUCTS:
        return NoMatch(f"{node.name} is {ir.target_name(node)}, no product of two tensors", node, fits=False)
    given = ir.arguments(node)
    found: Contraction | NoMatch
    if node.target is aten.einsum.default:
        found = _einsum(node, given)
    else:
        left, right = (given[name] for name in _OPERANDS[node.target])
        rank = ir.rank(left)
        if rank is None or ir.rank(right) is None:
            return NoMatch(f"{UNKNOWN}the shapes that {node.name} multiplies", node)
        if rank != ir.rank(right) or rank < 2:
            return NoMatch(f"{node.name} multiplies tensors of {rank} and {ir.rank(right)} dimensions", node)
        batch = "abcdefgh"[: rank - 2]
        found = Contraction(node, (left, right), (f"{batch}nk", f"{batch}km"), f"{batch}nm")
        if node.target is aten.baddbmm.default:
            scale, share = given["alpha"], given["beta"]
            if not (is_number(scale) and is_number(share)):
                return NoMatch(f"{node.name} scales by numbers that are not known", node)
            addend = given["self"] if share != 0 else None
            found = replace(found, scale=float(scale), addend=addend, share=float(share))
    return found if isinstance(found, NoMatch) else _sizes_agree(found) or found


_OPERANDS: dict[Any, tuple[str, str]] = {
    aten.matmul.default: ("self", "other"),
    aten.bmm.default: ("self", "mat2"),
    aten.baddbmm.default: ("batch1", "batch2"),
}


def _einsum(node: fx.Node, given: dict[str, Any]) -> Contraction | NoMatch:
    equation, tensors = given["equation"].replace(" ", ""), given["tensors"]
    terms, arrow, result = equation.partition("->")
    axes = terms.split(",")
    if not arrow or len(axes) != 2 or len(tensors) != 2:
        return NoMatch(f"the equation {equation!r} is none of two tensors with an explicit result", node)
    ranks = [rank for tensor in tensors if (rank := ir.rank(tensor)) is not None]
    if len(ranks) != 2:
        return NoMatch(f"{UNKNOWN}the shapes that {node.name} multiplies", node)
    if "..." in equation:
        hidden = {rank - len(term.replace("...", "")) for term, rank in zip(axes, ranks, strict=True) if "..." in term}
        free = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in equation]
        if len(hidden) != 1 or not all("..." in term for term in (*axes, result)):
            return NoMatch(f"the dots of {equation!r} stand for different dimensions", node)
        dots = "".join(free[: hidden.pop()])
        axes, result = [term.replace("...", dots) for term in axes], result.replace("...", dots)
    if any(len(set(term)) != len(term) for term in (*axes, result)):
        return NoMatch(f"an axis occurs twice in a term of {equation!r}", node)
    return Contraction(node, (tensors[0], tensors[1]), (axes[0], axes[1]), result)


def _sizes_agree(found: Contraction) -> NoMatch | None:
    """None where an axis has one size wherever it occurs: nothing is broadcast."""
    sizes: dict[str, Any] = {}
    for operand, axes in zip(found.operands, found.axes, strict=True):
        shape = ir.shape(operand)
        if shape is None:
            return NoMatch(f"{UNKNOWN}the shape of {operand.name}", found.node)
        for axis, size in zip(axes, shape, strict=True):
            if not ir.same_sizes([sizes.setdefault(axis, size)], [size]):
                return NoMatch(f"{found.node.name} broadcasts a dimension of {operand.name}", found.node)
    return None


# -- permutations and numbers ----------------------------------------------------------------------------------------


def permutation(node: fx.Node) -> list[int] | None:
    """Which axis of its input each axis of a transpose or permute is; None for anything else."""
    rank = ir.rank(node)
    if rank is None or node.op != "call_function":
        return None
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [dim % rank for dim in ir.argument(node, "dims")]
    if node.target in _TRANSPOSES:
        first, second = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
    elif node.target in _MATRIX_TRANSPOSES and (rank == 2 or node.target in _MATRIX_TRANSPOSES[:2]):
        first, second = rank - 2, rank - 1
    else:
        return None
    order[first], order[second] = order[second], order[first]
    return order


def is_number(value: object) -> bool:
    return type(value) in (int, float)


def number(value: Any, constant: Constant) -> float | None:
    """A number: a Python one, or a constant tensor of one element; None for anything else."""
    if isinstance(value, fx.Node):
        found = constant(value)
        if found is None or found.dim() > 1 or found.numel() != 1 or not found.is_floating_point():
            return None
        value = float(found)
    return float(value) if is_number(value) else None


def scaling(node: fx.Node, constant: Constant) -> tuple[fx.Node, float] | None:
    """`x * c` and `x / c` as x and the number to multiply by; None for anything else."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor):
        return None
    source, other = node.args[:2]
    if node.target is aten.mul.Tensor and (not isinstance(source, fx.Node) or number(source, constant) is not None):
        source, other = other, source
    factor = number(other, constant)
    if factor is None or not isinstance(source, fx.Node):
        return None
    if node.target is aten.mul.Tensor:
        return source, factor
    return None if factor == 0 else (source, 1 / factor)
