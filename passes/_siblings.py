"""Sibling layers: which layers that read one value can be one wide layer, and what that would save and cost.

What must agree is a layer's `key`. Kernel and activation may differ, at a price: a smaller kernel is padded with zeros,
and an activation stays behind the wide layer. Times are those of fxopt.cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import optimization_hint

from fxopt import NoMatch, cost, effects, ir, ops

from . import _affine

aten = torch.ops.aten

CONVOLUTIONS: tuple[Any, ...] = (*ops.CONVOLUTION_TARGETS, ops.convolution)
LAYERS: tuple[Any, ...] = (*CONVOLUTIONS, *_affine.LINEARS)

#: A layer's kernel costs so many launches of an elementwise one before it computes anything: on a CPU, 15 microseconds
#: were measured in oneDNN, against 3 to 5 in ATen.
LAUNCHES_PER_LAYER = 3
#: An enlarged kernel may cost this part of what merging saves: zeros are multiplied for nothing.
MOST_ZEROS = 0.1

Activation = tuple[str, tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer with constant weights; `channel` is the dimension of its result that has them.

    `kernel` and `padding` are those of a convolution, else empty. `key` names what siblings have in common.
    """

    node: fx.Node
    source: fx.Node
    given: dict[str, Any]
    kernel: tuple[int, ...]
    padding: tuple[int, ...]
    activation: Activation
    key: tuple[tuple[str, Any], ...]

    @property
    def linear(self) -> bool:
        """Whether it is a linear layer."""
        return not self.kernel

    @property
    def rule(self) -> str:
        """The name under which it is merged."""
        return "linears" if self.linear else "convolutions"

    @property
    def channels(self) -> int:
        """How many channels it gives."""
        return _affine.output_channels(self.node)

    @property
    def dim(self) -> int:
        """The dimension of its result that has the channels; an unbatched image has them first."""
        rank = ir.rank(self.source)
        assert rank is not None
        return rank - 1 if self.linear else rank - 1 - len(self.kernel)


def layer(node: fx.Node, source: fx.Node) -> Layer | NoMatch:
    """A reader of `source` as a layer that may have siblings; NoMatch where it may not."""
    linear = _affine.is_linear(node)
    given = ops.linear_arguments(node) if linear else ops.convolution_arguments(node)
    if given["residual"] is not None:
        return NoMatch("a residual is added to it, which would have to be there before its siblings", node)
    if ir.tensor(given["weight"]) is None:
        return NoMatch("its weight is computed at run time", node)
    if given["bias"] is not None and ir.tensor(given["bias"]) is None:
        return NoMatch("its bias is computed at run time", node)
    refusal = _affine.layer_guard(node)
    if refusal is not None:
        return NoMatch(refusal.reason, node)
    groups = 1 if linear else given["groups"]
    if groups != 1:
        return NoMatch(f"it has {groups} groups, whose channels would not lie together in a wide result", node)
    bias, weight = _affine.bias_of(node), _affine.weight_of(node)
    key: list[tuple[str, Any]] = [
        ("layer", "linear" if linear else f"{weight.dim() - 2}d convolution"),
        ("dtype", weight.dtype),
        ("bias dtype", weight.dtype if bias is None else bias.dtype),
        ("device", weight.device),
    ]
    trained = weight.requires_grad  # zeros that fill up what is trained would be trained, too
    key += [
        ("requires_grad", trained),
        ("number of trained biases", int(trained and bias is not None)),
        ("trained kernel", tuple(weight.shape[2:]) if trained else ()),
    ]
    kernel, padding = () if linear else tuple(weight.shape[2:]), tuple(given.get("padding", ()))
    if not linear:
        key += _geometry(given, kernel, padding)
    activation = (given["activation"], tuple(given["activation_arguments"]))
    return Layer(node, source, given, kernel, padding, activation, tuple(key))


def _geometry(given: dict[str, Any], kernel: tuple[int, ...], padding: tuple[int, ...]) -> list[tuple[str, Any]]:
    """What convolutions must agree in. Padded kernels keep their middle where 2*padding - dilation*(kernel - 1) agrees
    and their sizes are all even or all odd."""
    stride, dilation, transposed = given["stride"], given["dilation"], given["transposed"]
    found: list[tuple[str, Any]] = [
        ("transposed", transposed),
        ("stride", tuple(stride)),
        ("dilation", tuple(dilation)),
        ("output padding", tuple(given["output_padding"])),
    ]
    if transposed:
        return [*found, ("kernel", kernel), ("padding", padding)]
    middle = tuple(2 * p - d * (k - 1) for p, d, k in zip(padding, dilation, kernel, strict=True))
    return [*found, ("kernel's middle", middle), ("kernel's parity", tuple(k % 2 for k in kernel))]


def unlike(left: Layer, right: Layer) -> str:
    """What two layers of one input do not agree in."""
    theirs = dict(right.key)
    name, value = next((name, value) for name, value in left.key if theirs.get(name) != value)
    return f"{right.node.name} has the {name} {theirs.get(name)}, not {value}"


def is_wide(node: fx.Node, dim: int) -> bool:
    """Whether a layer is several in one already: it is only read in slices of its channels."""
    users = list(node.users)
    return bool(users) and all(
        user.target is aten.slice.Tensor and ir.argument(user, "dim") in (dim, dim - (ir.rank(node) or 0))
        for user in users
    )


# -- what it would cost ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Siblings that would become one layer, those left out, and the seconds that it would save in all.

    `mixed` says that activations differ and stay behind the wide layer. `reasons` has why each left-out one is.
    """

    layers: tuple[Layer, ...]
    mixed: bool
    gain: float
    reasons: dict[Layer, str]


def plans(siblings: Sequence[Layer], handed_out: set[fx.Node]) -> list[Plan] | None:
    """The best way to merge layers of one key: by kernel and activation, by either, or all; None where sizes are not
    known. `handed_out` are those of their nodes whose memory the model's results have."""
    if any(ir.fake(found.node) is None for found in siblings) or ir.fake(siblings[0].source) is None:
        return None
    ways: list[list[Plan]] = []
    for same_kernel, same_activation in ((True, True), (True, False), (False, True), (False, False)):
        parts: dict[Any, list[Layer]] = {}
        for found in siblings:
            part = (found.kernel if same_kernel else None, found.activation if same_activation else None)
            parts.setdefault(part, []).append(found)
        ways.append([_plan(part, handed_out) for part in parts.values()])
        if len(parts) == 1:
            break  # coarser ways are the same
    best = max(ways, key=_gain)
    merged = {found for plan in best for found in plan.layers}
    # What a layer would cost in the coarsest way says more than that it was alone in a finer one.
    why = {found: reason for way in ways for plan in way for found, reason in plan.reasons.items()}
    return [replace(plan, reasons={f: why[f] for f in plan.reasons if f not in merged}) for plan in best]


def _gain(split: Sequence[Plan]) -> float:
    return sum(plan.gain for plan in split)


def _plan(part: list[Layer], handed_out: set[fx.Node]) -> Plan:
    """Of layers that would be merged, those that gain by it. Each but one saves a kernel and a read of the input."""
    device = cost.device_of(part[0].node)
    saved = device.seconds(cost.Cost(read=_bytes(part[0].source), launches=LAUNCHES_PER_LAYER))
    mixed = len({found.activation for found in part}) > 1
    kernel = largest(part)
    costs = {found: _costs(found, kernel, saved, device, mixed, handed_out) for found in part}
    chosen = tuple(found for found in part if costs[found][0] < saved)
    gain = sum(saved - costs[found][0] for found in chosen) - saved
    if len(chosen) < 2 or gain <= 0:
        chosen, gain = (), 0.0
    dearest = max(part, key=lambda found: costs[found][0])
    reasons = {}
    for found in part:
        if found not in chosen:
            dear = found if costs[found][0] >= saved else dearest
            reasons[found] = (
                f"merging saves {_time(saved)} for each layer beside the first, and costs {_time(costs[dear][0])} for "
                f"{dear.node.name} ({costs[dear][1]})"
            )
    return Plan(chosen, mixed and len({found.activation for found in chosen}) > 1, gain, reasons)


def _costs(
    found: Layer, kernel: tuple[int, ...], saved: float, device: cost.Device, mixed: bool, handed_out: set[fx.Node]
) -> tuple[float, str]:
    """What merging costs for one layer, in seconds, and in words."""
    size = _bytes(found.node)
    step = device.seconds(cost.Cost(read=size, written=size, launches=1))
    price, words = 0.0, []
    if mixed and found.activation[0] != "none":
        price += step
        words.append(f"{found.activation[0]} becomes a step of its own")
    elif found.node in handed_out:
        price += step
        words.append("the model hands it out, so that it is copied")
    elif _read_densely(found.node):
        price += step
        words.append("a reader copies its part of the wide result")
    zeros = (prod(kernel) - prod(found.kernel)) * _elements(found.node) * _affine.input_channels(found.node)
    if zeros:
        wasted = device.seconds(cost.Cost(flops=2 * zeros))
        price += wasted if wasted <= MOST_ZEROS * saved else max(wasted, saved)
        sizes = ["x".join(map(str, size)) for size in (found.kernel, kernel)]
        words.append(f"its {sizes[0]} kernel padded to {sizes[1]} multiplies by {zeros:.2g} zeros in {_time(wasted)}")
    return price, ", ".join(words) or "nothing"


def largest(part: Sequence[Layer]) -> tuple[int, ...]:
    """The kernel that takes all of them."""
    return tuple(map(max, zip(*(found.kernel for found in part), strict=True)))


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs"


def _elements(node: fx.Node) -> int:
    return prod(int(optimization_hint(size)) for size in ir.shape(node) or ())


def _bytes(node: fx.Node) -> int:
    dtype = ir.dtype(node)
    return _elements(node) * (0 if dtype is None else dtype.itemsize)


#: Beside elementwise steps, readers that take a slice of channels as it lies.
_STRIDED_READERS: tuple[Any, ...] = (
    aten.cat.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.scaled_dot_product_attention.default,
    *_affine.LINEARS,
)


def _read_densely(node: fx.Node) -> bool:
    """Whether some reader would first copy a slice of channels, to have it in one piece."""
    for user in node.users:
        pointwise = isinstance(user.target, torch._ops.OpOverload) and torch.Tag.pointwise in user.target.tags
        if user.op == "output" or pointwise or user.target in _STRIDED_READERS:
            continue
        if user.op == "call_function" and effects.of(user).aliases and not effects.of(user).opaque:
            if _read_densely(user):
                return True
            continue
        return True
    return False
