"""What convolutions and linear layers share in vertical fusion: which activation and which residual join them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from fxopt import Match, NoMatch, ir, ops
from fxopt.journal import UNKNOWN


def activation_guard(match: Match, layer: dict[str, Any]) -> NoMatch | None:
    """The layer has no activation yet, and the fused operation can say this one."""
    if layer["activation"] != "none":
        return NoMatch(f"{match.node('layer').name} already ends in {layer['activation']}", match.root)
    if ops.activation_of(match.node("activation")) is None:
        return NoMatch("the activation's bounds are computed at run time", match.root)
    return None


def activation(match: Match) -> dict[str, Any]:
    """The matched activation as arguments of the fused operation."""
    found = ops.activation_of(match.node("activation"))
    assert found is not None
    return {"activation": found[0], "activation_arguments": found[1]}


def residual_guard(
    match: Match, arguments: Callable[[fx.Node], dict[str, Any]], targets: tuple[Any, ...]
) -> NoMatch | None:
    """The sum is plain, of two values of one shape and dtype, and this layer is the operand computed last."""
    layer, residual = match.node("layer"), match["residual"]
    taken = arguments(layer)
    if taken["activation"] != "none" or taken["residual"] is not None:
        return NoMatch(f"{layer.name} already has an epilogue in front of the sum", layer)
    if not isinstance(residual, fx.Node):
        return NoMatch(f"a number ({residual!r}) is added, not a residual", match.root)
    if residual is layer:
        return NoMatch(f"{layer.name} is added to itself", match.root)
    alpha = ir.argument(match.node("sum"), "alpha")
    if alpha != 1:
        return NoMatch(f"the residual is scaled by alpha={alpha!r}", match.root)
    if ir.fake(layer) is None or ir.fake(residual) is None:
        return NoMatch(f"{UNKNOWN}whether {residual.name} has the shape of {layer.name}", match.root)
    if ir.dtype(layer) != ir.dtype(residual):
        return NoMatch(f"{residual.name} is {ir.dtype(residual)}, {layer.name} {ir.dtype(layer)}", residual)
    if not ir.same_sizes(ir.shape(layer), ir.shape(residual)):
        return NoMatch(f"{residual.name} is broadcast over {layer.name}", residual)
    if _could_take_it(residual, match.root, arguments, targets) and layer < residual:
        return NoMatch(f"{residual.name} is computed later, and takes the sum", residual)
    return None


def _could_take_it(
    other: fx.Node, total: fx.Node, arguments: Callable[[fx.Node], dict[str, Any]], targets: tuple[Any, ...]
) -> bool:
    if other.target not in targets or set(other.users) != {total}:
        return False
    taken = arguments(other)
    return bool(taken["activation"] == "none" and taken["residual"] is None)
