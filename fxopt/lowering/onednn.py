"""The CPU's quick default within torch: oneDNN's fused kernels and MKL's products, channels-last inside.

A convolution or linear layer with its residual and activation becomes one call of oneDNN, or a product of MKL's, on
weights that are packed once. Activations between such calls are channels-last; what the model hands out has the strides
it always had.

Numerics: reassociates. NaN: oneDNN's fused relu, hardtanh and hardsigmoid turn NaN into a number, where ATen keeps it.
Finite values and infinities are as in ATen. This is the one place that says so; `tests/test_onednn.py` shows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxopt import effects, ir, ops
from fxopt.lowering import executor
from fxopt.lowering.backend import Backend, Runner, Setting
from fxopt.lowering.in_place import overwrite_operands
from fxopt.lowering.onednn_buffers import lower_buffers
from fxopt.lowering.onednn_convolutions import lower_convolutions, pack_convolution
from fxopt.lowering.onednn_products import lower_linears, pack_nothing, pack_product
from fxopt.lowering.onednn_strides import restore_strides
from fxopt.lowering.weights import Weights
from fxopt.rewrite import Pass

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn


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
    aliases = effects.Aliases.scan(module.graph)
    for node in module.graph.nodes:
        if node.target in _LAYERS and any(
            operand.op == "get_attr" and aliases.writer_of(operand) is not None for operand in node.all_input_nodes
        ):
            return f"weights of {node.name} are written, and packed once they would stay as they were"
    writer = _redirected(module.graph, aliases)
    return None if writer is None else f"{writer.name} writes in place, which strides could redirect"


#: Layers whose weights are packed once.
_LAYERS = frozenset({ops.convolution, ops.linear, aten.linear.default, *ops.CONVOLUTION_TARGETS})
#: What these give depends on the dtype and device of their operand, not on its strides.
_STRIDE_FREE = frozenset(
    {aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default}
)


def _redirected(graph: fx.Graph, aliases: effects.Aliases) -> fx.Node | None:
    """A write to what a convolution's layout may reach: with other strides a view of it could become a copy."""
    if not aliases.writers:
        return None
    moved: set[fx.Node] = set()
    for node in graph.nodes:
        layer = node.target is ops.convolution or node.target in ops.CONVOLUTION_TARGETS
        if layer or (node.target not in _STRIDE_FREE and not moved.isdisjoint(node.all_input_nodes)):
            moved.add(node)
    roots = {aliases.root(node) for node in moved if node.op != "output"}
    for writer, found in aliases.writers.items():
        if any(aliases.root(written) in roots for written in found.writes):
            return writer
    return None


PASSES = (
    # In front of convolutions: what becomes a product of ATen's there stays one.
    Pass("onednn-linear", run=lower_linears, layout=True, doc="linear layers as products of MKL or oneDNN"),
    Pass("onednn-convolution", run=lower_convolutions, layout=True, doc="convolutions as fused calls or products"),
    Pass("onednn-strides", run=restore_strides, layout=True, numerics="bitwise", doc="results in their own strides"),
    Pass("onednn-buffers", run=lower_buffers, layout=True, numerics="bitwise", doc="concats that grow in one memory"),
    # Behind buffers: what one concat gives may lie in the memory of another, which its node alone does not show.
    Pass("onednn-in-place", run=overwrite_operands, numerics="bitwise", doc="activations that overwrite their operand"),
)

#: How the argument that an operator takes packed is packed.
_PACKED: dict[tuple[Any, str], Callable[[fx.Node, torch.Tensor, Weights], Any]] = {
    (mkldnn._convolution_pointwise.default, "W"): pack_convolution,
    (mkldnn._convolution_pointwise.binary, "W"): pack_convolution,
    (mkldnn._convolution_transpose_pointwise.default, "W"): pack_convolution,
    (mkldnn._linear_pointwise.default, "W"): pack_product,
    (mkldnn._linear_pointwise.binary, "W"): pack_product,
}
if hasattr(torch.ops.mkl, "_mkl_linear"):
    _PACKED[torch.ops.mkl._mkl_linear.default, "MKL_W"] = pack_product
    _PACKED[torch.ops.mkl._mkl_linear.default, "ORI_W"] = pack_nothing


def _build(module: fx.GraphModule, packed: Weights) -> Runner:
    ops.decompose_all(module)
    reads = _reads(module)

    def pack(reader: fx.Node, argument: str, weight: torch.Tensor) -> Any:
        found = _PACKED.get((reader.target, argument))
        if found is None:
            return None
        special, place = found(reader, weight, packed), ir.place(weight)
        reads[place] -= 1
        if not reads[place]:
            packed.release(weight)
        return special

    run = executor.build(module, pack)

    def call(*tensors: torch.Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            return run(*tensors)

    return call


def _reads(module: fx.GraphModule) -> Counter[object]:
    """How often the memory of each tensor is read."""
    found: Counter[object] = Counter()
    for node in module.graph.nodes:
        operands: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), operands.append)
        found.update(ir.place(held) for operand in operands if (held := ir.tensor(operand)) is not None)
    return found


BACKEND = Backend("onednn", numerics="reassociate", declines=_declines, build=_build, passes=PASSES)
