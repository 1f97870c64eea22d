"""The CPU's quick default within torch: oneDNN's fused kernels on prepacked weights, channels-last inside.

A convolution or linear layer with its residual and activation becomes one oneDNN call. Activations between such calls
are channels-last; what the model hands out has the strides it always had.

Numerics: reassociates. NaN: oneDNN's fused relu, hardtanh and hardsigmoid turn NaN into a number, where ATen keeps it.
Finite values and infinities are as in ATen. This is the one place that says so; `tests/test_onednn.py` shows it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt import effects, ir, ops
from fxopt.lowering import executor
from fxopt.lowering.backend import Backend, Runner, Setting
from fxopt.lowering.onednn_buffers import lower_buffers
from fxopt.pattern import NoMatch
from fxopt.rewrite import Pass, Rewriter

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn

#: fxopt's activation -> oneDNN's (attr, scalars, algorithm). What is not here stays an ATen operator behind the call.
_UNARY: dict[str, tuple[str, str]] = {
    "none": ("none", ""),
    "relu": ("relu", ""),
    "relu6": ("hardtanh", ""),
    "clamp": ("hardtanh", ""),
    "hardtanh": ("hardtanh", ""),
    "leaky_relu": ("leaky_relu", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "hardswish": ("hardswish", ""),
    "hardsigmoid": ("hardsigmoid", ""),
    "sigmoid": ("sigmoid", ""),
    "tanh": ("tanh", ""),
}
#: A oneDNN call costs some 15 microseconds before it computes, ATen's 3: below this many multiply-adds ATen is quicker
#: (measured with one row of 64 features: 16 against 3 microseconds; of 512 to 1000 features: 35 against 46).
_SMALLEST_LINEAR = 1 << 17
_LINEAR_UNARY = frozenset({"none", "relu", "silu", "gelu", "gelu_tanh", "relu6", "clamp", "hardtanh"})


def _fuses(name: str, numbers: list[float]) -> bool:
    """Whether oneDNN has an activation; it refuses bounds of which the lower is not below the upper when it runs."""
    if name in ("clamp", "hardtanh"):
        return numbers[0] <= numbers[1]
    return name in _UNARY


def _scalars(name: str, numbers: list[float]) -> list[float]:
    return [0.0, 6.0] if name == "relu6" else list(numbers)


def available() -> bool:
    """Whether this torch has oneDNN's fused operators."""
    return torch.backends.mkldnn.is_available() and hasattr(mkldnn, "_convolution_pointwise")


def _declines(module: fx.GraphModule, setting: Setting) -> str | None:
    if not available() or not torch._C._get_mkldnn_enabled():
        return "this torch is built or set without oneDNN"
    if setting.needs_grad:
        return "an input requires grad, and oneDNN's fused kernels have no backward"
    if setting.autocast:
        return "autocast is on, and the kernels were probed without it"
    for node in module.graph.nodes:
        found = ir.fake(node)
        if node.op == "placeholder" and found is not None and found.device.type != "cpu":
            return f"{node.name} is on {found.device}"
        if effects.of(node).writes:
            return f"{node.name} writes in place, which strides could redirect"
    return None


def _dense(node: Any) -> bool:
    found = ir.fake(node)
    return found is not None and found.dtype == torch.float32 and found.device.type == "cpu"


def _dense_layer(given: dict[str, Any]) -> str | None:
    """None where oneDNN takes the layer's operands; else why not."""
    if not _dense(given["input"]) or not _dense(given["weight"]):
        return "oneDNN takes float32 on the CPU here"
    weight = ir.tensor(given["weight"])
    if weight is None:
        return "its weight is computed at run time, and could not be prepacked"
    if given["bias"] is not None and ir.tensor(given["bias"]) is None:
        return "its bias is computed at run time"
    if weight.numel() == 0 or any(size == 0 for size in ir.shape(given["input"]) or ()):
        return "it is empty"
    return None


# -- convolutions ----------------------------------------------------------------------------------------------------


def _convolution_refusal(node: fx.Node, given: dict[str, Any]) -> str | None:
    refusal = _dense_layer(given)
    if refusal is not None:
        return refusal
    spatial = len(given["stride"])
    if spatial == 1:
        return "oneDNN's fused convolutions are 2d and 3d"
    if ir.rank(given["input"]) != spatial + 2:
        return "its input is unbatched"
    return None


def _lower_convolutions(rewriter: Rewriter) -> None:
    moved: set[fx.Node] = set()
    for node in list(rewriter.graph.nodes):
        if node.target is not ops.convolution and node.target not in ops.CONVOLUTION_TARGETS:
            _settle_strides(rewriter, node, moved)
            continue
        given = ops.convolution_arguments(node)
        refusal = _convolution_refusal(node, given)
        if refusal is not None:
            rewriter.decline(node, refusal, rule="convolution")
            _settle_strides(rewriter, node, moved)
            continue
        result = rewriter.substitute(node, partial(_convolution, rewriter, node, given), rule="convolution")
        if isinstance(result, NoMatch):
            rewriter.decline(node, result.reason, rule="convolution")
        else:
            moved.add(result)


def _settle_strides(rewriter: Rewriter, node: fx.Node, moved: set[fx.Node]) -> None:
    """Infers again what a node gives, where it reads values in `moved`, whose strides lowering has changed."""
    before = ir.value(node)
    if before is None or node.target in _STRIDED or moved.isdisjoint(node.all_input_nodes):
        return
    after = ir.infer(node)
    if after is not None and _layout(after) != _layout(before):
        rewriter.editor.set_meta(node, "val", after)
        moved.add(node)


def _layout(value: Any) -> list[Any]:
    """The strides of a value, or of each part of a tuple of values."""
    return [tuple(part.stride()) for part in pytree.tree_leaves(value) if isinstance(part, torch.Tensor)]


def _channels_last(rewriter: Rewriter, node: fx.Node) -> fx.Node:
    """The value of `node` in channels-last order: itself where it is so already."""
    found = ir.fake(node)
    assert found is not None
    order = torch.channels_last if found.dim() == 4 else torch.channels_last_3d
    if found.is_contiguous(memory_format=order):
        return node
    for user in node.users:
        if user.target is aten.contiguous.default and user.kwargs.get("memory_format") == order:
            return user
    return rewriter.call(aten.contiguous.default, node, memory_format=order)


def _convolution(rewriter: Rewriter, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    source = _channels_last(rewriter, given["input"])
    activation, numbers, residual = given["activation"], given["activation_arguments"], given["residual"]
    geometry = (given["padding"], given["stride"], given["dilation"], given["groups"])
    weights = (given["weight"], given["bias"])
    value = _in_channels_last(node)
    if residual is not None and not given["transposed"]:
        fused = activation in ("none", "relu")
        unary = "relu" if activation == "relu" else None
        sum_of = (source, _channels_last(rewriter, residual))
        result = rewriter.call_as(
            value, mkldnn._convolution_pointwise.binary, *sum_of, *weights, *geometry, "add", 1.0, unary, [], None
        )
        return result if fused else _activation(rewriter, result, activation, numbers)
    fused = residual is None and _fuses(activation, numbers)
    name = activation if fused else "none"
    attr, algorithm = _UNARY[name]
    epilogue = (attr, _scalars(name, numbers) if fused else [], algorithm)
    if given["transposed"]:
        padding, *rest = geometry
        target = mkldnn._convolution_transpose_pointwise.default
        result = rewriter.call_as(
            value, target, source, *weights, padding, given["output_padding"], *rest, *epilogue
        )
    else:
        target = mkldnn._convolution_pointwise.default
        result = rewriter.call_as(value, target, source, *weights, *geometry, *epilogue)
    if residual is not None:
        result = rewriter.call(aten.add.Tensor, result, residual)
    return result if fused else _activation(rewriter, result, activation, numbers)


def _in_channels_last(node: fx.Node) -> torch.Tensor:
    """What a node gives, as oneDNN gives it with prepacked weights: in channels-last order."""
    found, mode = ir.fake(node), ir.fake_mode(ir.module_of(node.graph))
    assert found is not None
    assert mode is not None
    order = torch.channels_last if found.dim() == 4 else torch.channels_last_3d
    with mode:
        return torch.empty(found.shape, dtype=found.dtype, device=found.device).to(memory_format=order)


def _activation(rewriter: Rewriter, node: fx.Node, name: str, numbers: list[float]) -> fx.Node:
    if name == "none":
        return node
    target, extra = ops.ACTIVATIONS[name]
    if name == "gelu_tanh":
        return rewriter.call(target, node, approximate="tanh")
    return rewriter.call(target, node, *extra(numbers))


# -- linear layers ---------------------------------------------------------------------------------------------------


def _lower_linears(rewriter: Rewriter) -> None:
    for node in list(rewriter.graph.nodes):
        if node.target not in (ops.linear, aten.linear.default):
            continue
        given = ops.linear_arguments(node)
        refusal = _dense_layer(given)
        if refusal is None and (ir.rank(given["input"]) or 0) < 2:
            refusal = "its input is a vector"
        if refusal is None and _multiply_adds(given) < _SMALLEST_LINEAR:
            refusal = "it is so small that ATen's call is quicker"
        if refusal is not None:
            rewriter.decline(node, refusal, rule="linear")
            continue
        result = rewriter.substitute(node, partial(_linear, rewriter, node, given), rule="linear")
        if isinstance(result, NoMatch):
            rewriter.decline(node, result.reason, rule="linear")


def _multiply_adds(given: dict[str, Any]) -> int:
    rows = [int(size) for size in (ir.shape(given["input"]) or ())[:-1]]
    weight = ir.shape(given["weight"]) or (0,)
    return math.prod(rows) * math.prod(int(size) for size in weight)


def _linear(rewriter: Rewriter, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    source, weights, residual = given["input"], (given["weight"], given["bias"]), given["residual"]
    activation, numbers = given["activation"], given["activation_arguments"]
    value = ir.fake(node)
    assert value is not None
    if residual is not None:
        result = rewriter.call_as(value, mkldnn._linear_pointwise.binary, source, residual, *weights, "add")
        return _activation(rewriter, result, activation, numbers)
    fused = activation in _LINEAR_UNARY and _fuses(activation, numbers)
    name = activation if fused else "none"
    attr, algorithm = _UNARY[name]
    epilogue = (attr, _scalars(name, numbers) if fused else [], algorithm)
    result = rewriter.call_as(value, mkldnn._linear_pointwise.default, source, *weights, *epilogue)
    return result if fused else _activation(rewriter, result, activation, numbers)


# -- layout ----------------------------------------------------------------------------------------------------------

#: Beside opaque nodes, operators whose meaning depends on the strides of what they read.
_STRIDED = (aten.as_strided.default, aten.view_as_complex.default, aten.view_as_real.default, aten.view.dtype)


def _restore_strides(rewriter: Rewriter) -> None:
    """What the model hands out, and what opaque or stride-reading nodes take, has the strides it has without lowering.

    `meta["operand_strides"]` holds those, set before the passes. Where a view is handed out, it is the value that it
    views whose strides are restored, so that results which share memory go on sharing it.
    """
    restored: dict[fx.Node, fx.Node] = {}
    for node in list(rewriter.graph.nodes):
        opaque = effects.of(node).opaque or node.op == "call_module" or node.target in _STRIDED
        if node.op == "output" or opaque:
            for operand in node.all_input_nodes:
                _restore(rewriter, node, operand, restored)


def _restore(rewriter: Rewriter, reader: fx.Node, operand: fx.Node, restored: dict[fx.Node, fx.Node]) -> None:
    """Gives `reader` its operand in the strides that it expects, restored where the operand is computed, not viewed."""
    views = [reader]
    viewed = effects.of(operand).aliases
    while viewed and operand.op == "call_function":
        if ir.fake(viewed[0]) is None and not effects.of(viewed[0]).aliases:
            break  # one of several results (of a sort), which is computed and no view
        views.append(operand)
        reader, operand = operand, viewed[0]
        viewed = effects.of(operand).aliases
    found = ir.fake(operand)
    wanted = dict(zip(reader.all_input_nodes, reader.meta.get("operand_strides", ()), strict=False)).get(operand)
    if found is None or wanted is None or operand.op != "call_function" or not _needs_copy(found, wanted):
        return
    if operand in restored:
        rewriter.editor.replace_uses(operand, restored[operand], [reader])
    else:
        restored[operand] = _restride(rewriter, reader, operand, wanted)
        restored[restored[operand]] = restored[operand]
    for view in reversed(views):
        after = None if view.op == "output" else ir.infer(view)
        if after is not None:
            rewriter.editor.set_meta(view, "val", after)


def _needs_copy(found: torch.Tensor, wanted: tuple[int, ...]) -> bool:
    return any(
        have != want for have, want, size in zip(found.stride(), wanted, found.shape, strict=True) if size != 1
    )


def _restride(rewriter: Rewriter, reader: fx.Node, operand: fx.Node, strides: tuple[int, ...]) -> fx.Node:
    order = sorted(range(len(strides)), key=lambda dim: (strides[dim], -dim), reverse=True)
    back = [order.index(dim) for dim in range(len(order))]

    def build() -> fx.Node:
        if order == sorted(order):
            return rewriter.call(aten.clone.default, operand, memory_format=torch.contiguous_format)
        permuted = rewriter.call(aten.permute.default, operand, order)
        dense = rewriter.call(aten.clone.default, permuted, memory_format=torch.contiguous_format)
        return rewriter.call(aten.permute.default, dense, back)

    return rewriter.insert_between(operand, reader, build, rule="restore-strides")


PASSES = (
    Pass("onednn-convolution", run=_lower_convolutions, layout=True, doc="convolutions as fused oneDNN calls"),
    Pass("onednn-linear", run=_lower_linears, layout=True, doc="linear layers as fused oneDNN calls"),
    Pass("onednn-strides", run=_restore_strides, layout=True, numerics="bitwise", doc="results in their own strides"),
    Pass("onednn-buffers", run=lower_buffers, layout=True, numerics="bitwise", doc="concats that grow in one memory"),
)


# -- building --------------------------------------------------------------------------------------------------------


def _build(module: fx.GraphModule, packed: dict[Any, Any]) -> Runner:
    ops.decompose_all(module)

    def pack(reader: fx.Node, attribute: fx.Node, weight: torch.Tensor) -> Any:
        if getattr(reader.target, "namespace", "") != "mkldnn":
            return None
        given = ir.arguments(reader)
        if given.get("W") is not attribute:
            return None
        key, reorder = _packing(reader, given, weight)
        held = packed.get(key)
        if held is None:
            # The plain weight is kept beside the packed one, so that its identity cannot be taken by another.
            packed[key] = held = (weight, reorder())
        return held[1]

    run = executor.build(module, pack)

    def call(*tensors: torch.Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            return run(*tensors)

    return call


def _packing(reader: fx.Node, given: dict[str, Any], weight: torch.Tensor) -> tuple[Any, Any]:
    shape = [int(size) for size in ir.shape(given["X"]) or ()]
    if reader.target in (mkldnn._linear_pointwise.default, mkldnn._linear_pointwise.binary):
        rows = math.prod(shape[:-1])
        return ("linear", ir.identity(weight)), lambda: mkldnn._reorder_linear_weight(weight, rows)
    geometry = [list(given[key]) for key in ("padding", "stride", "dilation")]
    groups = given["groups"]
    key = (ir.identity(weight), *map(tuple, geometry), groups)
    padding, stride, dilation = geometry
    if reader.target is mkldnn._convolution_transpose_pointwise.default:
        extra = list(given["output_padding"])
        return ("transposed", *key, tuple(extra)), lambda: mkldnn._reorder_convolution_transpose_weight(
            weight, padding, extra, stride, dilation, groups, shape
        )
    return ("convolution", *key), lambda: mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, shape
    )


BACKEND = Backend("onednn", numerics="reassociate", declines=_declines, build=_build, passes=PASSES)
