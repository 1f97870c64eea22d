"""Convolutions on the CPU: oneDNN's fused calls in channels-last order, or matrix products where they are pointwise."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt import effects, ir, ops
from fxopt.lowering import onednn_operators as onednn
from fxopt.lowering import onednn_products as products
from fxopt.lowering.weights import Weights
from fxopt.pattern import NoMatch
from fxopt.rewrite import Rewriter

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn


def _convolution_refusal(node: fx.Node, given: dict[str, Any]) -> str | None:
    refusal = onednn.layer_refusal(given)
    if refusal is not None:
        return refusal
    spatial = len(given["stride"])
    if spatial == 1:
        return "oneDNN's fused convolutions are 2d and 3d"
    if ir.rank(given["input"]) != spatial + 2:
        return "its input is unbatched"
    return None


def lower_convolutions(rewriter: Rewriter) -> None:
    moved: set[fx.Node] = set()
    flat: dict[Any, fx.Node] = {}
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
        library = products.pointwise_library(node, given, rewriter)
        build, rule = partial(_convolution, rewriter, node, given), "convolution"
        if library is not None:
            build = partial(products.pointwise, rewriter, node, given, library, flat)
            rule = f"pointwise-{library}"
        result = rewriter.substitute(node, build, rule=rule)
        if isinstance(result, NoMatch):
            rewriter.decline(node, result.reason, rule=rule)
        else:
            moved.add(result)


def _settle_strides(rewriter: Rewriter, node: fx.Node, moved: set[fx.Node]) -> None:
    """Infers again what a node gives, where it reads values in `moved`, whose strides lowering has changed."""
    before = ir.value(node)
    if before is None or node.target in effects.STRIDED or moved.isdisjoint(node.all_input_nodes):
        return
    after = ir.infer(node)
    if after is not None and _layout(after) != _layout(before):
        rewriter.editor.set_meta(node, "val", after)
        moved.add(node)


def _layout(value: Any) -> list[Any]:
    """The strides of a value, or of each part of a tuple of values."""
    return [tuple(part.stride()) for part in pytree.tree_leaves(value) if isinstance(part, torch.Tensor)]


def _convolution(rewriter: Rewriter, node: fx.Node, given: dict[str, Any]) -> fx.Node:
    source = onednn.channels_last(rewriter, given["input"])
    activation, numbers, residual = given["activation"], given["activation_arguments"], given["residual"]
    geometry = (given["padding"], given["stride"], given["dilation"], given["groups"])
    weights = (given["weight"], given["bias"])
    value = _in_channels_last(node)
    if residual is not None and not given["transposed"]:
        fused = activation in ("none", "relu")
        unary = "relu" if activation == "relu" else None
        sum_of = (source, onednn.channels_last(rewriter, residual))
        result = rewriter.call_as(
            value, mkldnn._convolution_pointwise.binary, *sum_of, *weights, *geometry, "add", 1.0, unary, [], None
        )
        return result if fused else onednn.activation(rewriter, result, activation, numbers)
    fused = residual is None and onednn.fuses(activation, numbers)
    name = activation if fused else "none"
    epilogue = onednn.epilogue(name, numbers if fused else [])
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
    return result if fused else onednn.activation(rewriter, result, activation, numbers)


def _in_channels_last(node: fx.Node) -> torch.Tensor:
    """What a node gives, as oneDNN gives it with prepacked weights: in channels-last order."""
    found, mode = ir.fake(node), ir.fake_mode(ir.module_of(node.graph))
    assert found is not None
    assert mode is not None
    order = torch.channels_last if found.dim() == 4 else torch.channels_last_3d
    with mode:
        return torch.empty(found.shape, dtype=found.dtype, device=found.device).to(memory_format=order)


def pack_convolution(reader: fx.Node, weight: torch.Tensor, packed: Weights) -> Any:
    """A convolution's weight in oneDNN's own layout: made once, kept in `packed`."""
    given = ir.arguments(reader)
    shape = [int(size) for size in ir.shape(given["X"]) or ()]
    padding, stride, dilation = ([*given[key]] for key in ("padding", "stride", "dilation"))
    groups = given["groups"]
    key = (tuple(padding), tuple(stride), tuple(dilation), groups)
    if reader.target is mkldnn._convolution_transpose_pointwise.default:
        extra = list(given["output_padding"])
        reorder = partial(
            mkldnn._reorder_convolution_transpose_weight, weight, padding, extra, stride, dilation, groups, shape
        )
        return packed.once(("transposed", *key, tuple(extra)), weight, reorder)
    reorder = partial(mkldnn._reorder_convolution_weight, weight, padding, stride, dilation, groups, shape)
    return packed.once(("convolution", *key), weight, reorder, partial(_unpacked, weight.shape))


def _unpacked(shape: torch.Size, packed: torch.Tensor) -> torch.Tensor:
    return packed.to_dense().reshape(shape)
