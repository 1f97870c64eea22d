"""The fused operations: fxopt's own operators, whose body in ATen *is* their meaning.

They are `torch.library` operators without a backend kernel (CompositeImplicitAutograd), so they run, infer shapes,
differentiate, pickle and decompose wherever ATen does; a backend replaces them by kernels of its own.

    convolution(x, W, b, r, ...) = activation(conv(x, W, b) + r)
    linear(x, W, b, r, ...)      = activation(x W^T + b + r)
    buffer(parts, dim, copied)   = cat(parts, dim)             the memory that the parts are slices of: fxopt/buffers.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt import ir

aten = torch.ops.aten

#: activation name -> (ATen operator, the operator's arguments behind its input, from the list of floats)
ACTIVATIONS: dict[str, tuple[Any, Callable[[Sequence[float]], tuple[Any, ...]]]] = {
    "relu": (aten.relu.default, lambda _: ()),
    "relu6": (aten.relu6.default, lambda _: ()),
    "clamp": (aten.clamp.default, lambda a: (a[0], a[1])),
    "hardtanh": (aten.hardtanh.default, lambda a: (a[0], a[1])),
    "leaky_relu": (aten.leaky_relu.default, lambda a: (a[0],)),
    "silu": (aten.silu.default, lambda _: ()),
    "gelu": (aten.gelu.default, lambda _: ()),
    "gelu_tanh": (aten.gelu.default, lambda _: ()),
    "hardswish": (aten.hardswish.default, lambda _: ()),
    "hardsigmoid": (aten.hardsigmoid.default, lambda _: ()),
    "sigmoid": (aten.sigmoid.default, lambda _: ()),
    "tanh": (aten.tanh.default, lambda _: ()),
    "elu": (aten.elu.default, lambda a: (a[0], a[1], a[2])),
    "mish": (aten.mish.default, lambda _: ()),
}

#: The ATen operators that an epilogue can take.
ACTIVATION_TARGETS: tuple[Any, ...] = tuple(dict.fromkeys(target for target, _ in ACTIVATIONS.values()))

#: (rank of the weight, transposed) -> convolution
CONVOLUTIONS: dict[tuple[int, bool], Any] = {
    (3, False): aten.conv1d.default,
    (4, False): aten.conv2d.default,
    (5, False): aten.conv3d.default,
    (3, True): aten.conv_transpose1d.default,
    (4, True): aten.conv_transpose2d.input,
    (5, True): aten.conv_transpose3d.input,
}
CONVOLUTION_TARGETS: tuple[Any, ...] = tuple(CONVOLUTIONS.values())
TRANSPOSED_TARGETS: frozenset[Any] = frozenset(op for (_, transposed), op in CONVOLUTIONS.items() if transposed)
#: Convolutions with `padding="same"` that is uneven, which no number spells; folding takes them, fusion does not.
STRING_PADDED_TARGETS: tuple[Any, ...] = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)


def activation_of(node: fx.Node) -> tuple[str, list[float]] | None:
    """The epilogue that does what an activation node does: its name and numbers; None where there is none."""
    given = ir.arguments(node)
    match node.target:
        case aten.clamp.default:
            low, high = given["min"], given["max"]
            numbers = [-math.inf if low is None else low, math.inf if high is None else high]
            name = "clamp"
        case aten.hardtanh.default:
            name, numbers = "hardtanh", [given["min_val"], given["max_val"]]
        case aten.leaky_relu.default:
            name, numbers = "leaky_relu", [given["negative_slope"]]
        case aten.elu.default:
            name, numbers = "elu", [given["alpha"], given["scale"], given["input_scale"]]
        case aten.gelu.default:
            name, numbers = ("gelu" if given["approximate"] == "none" else "gelu_tanh"), []
        case _:
            name = next((key for key, (target, _) in ACTIVATIONS.items() if target is node.target), "")
            numbers = []
    if not name or not all(type(number) in (int, float) for number in numbers):
        return None
    return name, [float(number) for number in numbers]


def _epilogue(result: Any, residual: Any, activation: str, numbers: Sequence[float]) -> Any:
    if residual is not None:
        result = aten.add.Tensor(result, residual)
    if activation == "none":
        return result
    target, extra = ACTIVATIONS[activation]
    if activation == "gelu_tanh":
        return target(result, approximate="tanh")
    return target(result, *extra(numbers))


def _convolution_body(
    input: Any,
    weight: Any,
    bias: Any,
    residual: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    activation: str,
    activation_arguments: Sequence[float],
) -> Any:
    target = CONVOLUTIONS[len(stride) + 2, transposed]
    if transposed:
        result = target(input, weight, bias, stride, padding, output_padding, groups, dilation)
    else:
        result = target(input, weight, bias, stride, padding, dilation, groups)
    return _epilogue(result, residual, activation, activation_arguments)


def _linear_body(
    input: Any, weight: Any, bias: Any, residual: Any, activation: str, activation_arguments: Sequence[float]
) -> Any:
    return _epilogue(aten.linear.default(input, weight, bias), residual, activation, activation_arguments)


def _buffer_body(parts: Any, dim: int, copied: Sequence[int] = ()) -> Any:
    return aten.cat.default(parts, dim)


_LIBRARY = torch.library.Library("fxopt", "DEF")  # lives as long as the process
_LIBRARY.define(
    "convolution(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, int[] stride, int[] padding, "
    "int[] dilation, bool transposed, int[] output_padding, int groups, str activation, "
    "float[] activation_arguments) -> Tensor"
)
_LIBRARY.define(
    "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, str activation, "
    "float[] activation_arguments) -> Tensor"
)
_LIBRARY.define("buffer(Tensor[] parts, int dim, int[] copied=[]) -> Tensor")
_LIBRARY.impl("buffer", _buffer_body, "CompositeImplicitAutograd")
_LIBRARY.impl("convolution", _convolution_body, "CompositeImplicitAutograd")
_LIBRARY.impl("linear", _linear_body, "CompositeImplicitAutograd")

convolution: Any = torch.ops.fxopt.convolution.default
linear: Any = torch.ops.fxopt.linear.default
buffer: Any = torch.ops.fxopt.buffer.default

_BODIES: dict[Any, Callable[..., Any]] = {
    convolution: _convolution_body,
    linear: _linear_body,
    buffer: _buffer_body,
}


def is_fused(node: fx.Node) -> bool:
    """Whether a node is one of fxopt's fused operations."""
    return node.target in _BODIES


def convolution_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of any convolution node (ATen's or the fused one) under the fused operation's names.

    `stride`, `padding`, `dilation` and `output_padding` have one entry per spatial dimension.
    """
    given = ir.arguments(node)
    if node.target is convolution:
        return given
    spatial = next(rank for (rank, _), op in CONVOLUTIONS.items() if op is node.target) - 2

    def each(name: str, default: int) -> list[int]:
        numbers = given.get(name, default)
        numbers = list(numbers) if isinstance(numbers, (list, tuple)) else [numbers]
        return numbers * spatial if len(numbers) == 1 else numbers

    return {
        "input": given["input"],
        "weight": given["weight"],
        "bias": given["bias"],
        "residual": None,
        "stride": each("stride", 1),
        "padding": each("padding", 0),
        "dilation": each("dilation", 1),
        "transposed": node.target in TRANSPOSED_TARGETS,
        "output_padding": each("output_padding", 0),
        "groups": given["groups"],
        "activation": "none",
        "activation_arguments": [],
    }


def linear_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a linear node (ATen's or the fused one) under the fused operation's names."""
    given = ir.arguments(node)
    return {"residual": None, "activation": "none", "activation_arguments": []} | given


def decompose(node: fx.Node) -> fx.Node:
    """Replaces a fused node by the ATen nodes of its body, each with the fused node's origin; returns the last."""
    graph = node.graph
    body = _BODIES[node.target]
    tracer = fx.proxy.GraphAppendingTracer(graph)

    previous = node.prev
    with graph.inserting_before(node):
        result = body(*pytree.tree_map_only(fx.Node, lambda operand: fx.Proxy(operand, tracer), node.args)).node
    step = previous.next
    while step is not node:
        step.meta["origin"] = ir.origins(node)
        step.args, step.kwargs = ir.canonical_arguments(cast(Any, step.target), step.args, step.kwargs)
        ir.update_value(step)
        step = step.next
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return cast(fx.Node, result)


def decompose_all(module: fx.GraphModule) -> None:
    """Replaces every fused node of a module by plain ATen."""
    for node in list(module.graph.nodes):
        if is_fused(node):
            decompose(node)
