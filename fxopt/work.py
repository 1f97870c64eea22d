"""What one node computes and moves: arithmetic, bytes and kernel launches, by a table of operators.

A multiply-add is two operations; a function of each element is one or a few (a gelu 8), a norm or softmax a few. Bytes
are what a kernel must read and write if nothing stays in a cache between two nodes: each operand once, each result
once, weights among the operands. A view costs nothing. An operator that the table does not have reads its inputs and
writes its outputs.

    @rule("conv2d", "my_operator")           # by the operator's name, whatever its overload
    def _convolution(call: Call) -> Cost:
        return call.cost(2 * prod(call.result) * prod(call.sizes("weight")[1:]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxopt import buffers, ir
from fxopt.hints import hint


@dataclass(frozen=True, slots=True)
class Cost:
    """Work: floating-point operations, bytes read and written, kernel launches. Costs add up.

    `copied` are those of the bytes written that an operation wrote which only moves data (cat, clone, pad).
    """

    flops: int = 0
    read: int = 0
    written: int = 0
    copied: int = 0
    launches: int = 0

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.read + other.read,
            self.written + other.written,
            self.copied + other.copied,
            self.launches + other.launches,
        )

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.flops - other.flops,
            self.read - other.read,
            self.written - other.written,
            self.copied - other.copied,
            self.launches - other.launches,
        )


class Unknown(Exception):
    """A shape or an operator is not known, so neither is the cost."""


class Call:
    """A node as a rule sees it: sizes are numbers. What is not known raises Unknown."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments by their schema's names."""
        return ir.arguments(self.node)

    def tensor(self, name: str) -> torch.Tensor:
        """What is known of a tensor argument."""
        return _tensor(self.arguments[name])

    def sizes(self, name: str) -> tuple[int, ...]:
        """The sizes of a tensor argument."""
        return _sizes(self.tensor(name))

    @cached_property
    def results(self) -> list[torch.Tensor]:
        """What is known of the results."""
        value = ir.value(self.node)
        if value is None:
            raise Unknown
        return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]

    @cached_property
    def result(self) -> tuple[int, ...]:
        """The sizes of the first result; () where it is a number."""
        return _sizes(self.results[0]) if self.results else ()

    @cached_property
    def read(self) -> int:
        """The bytes of all operands, each once."""
        return read_by(self.node.all_input_nodes)

    @cached_property
    def written(self) -> int:
        """The bytes of all results."""
        return sum(map(nbytes, self.results))

    def cost(self, flops: int = 0, *, read: int | None = None, copies: bool = False) -> Cost:
        """One launch that computes so much, reads `read` bytes (all operands) and writes its results."""
        copied = self.written if copies else 0
        return Cost(flops, self.read if read is None else read, self.written, copied, 1)


def _sizes(value: torch.Tensor) -> tuple[int, ...]:
    return tuple(map(_number, value.shape))


def _number(size: object) -> int:
    found = hint(size)
    if found is None:
        raise Unknown
    return found


def _tensor(node: Any) -> torch.Tensor:
    found = ir.fake(node)
    if found is None:
        found = ir.tensor(node)
    if found is None:
        raise Unknown
    return found


def nbytes(value: torch.Tensor) -> int:
    """The bytes that a tensor's elements take; what `expand` repeats counts once."""
    if value.layout is not torch.strided:
        raise Unknown
    pairs = zip(value.shape, value.stride(), strict=True)
    return value.dtype.itemsize * prod(_number(size) for size, stride in pairs if type(stride) is not int or stride)


def read_by(operands: Iterable[fx.Node]) -> int:
    """The bytes of some values, tuples of tensors among them; numbers count nothing."""
    total = 0
    for operand in operands:
        value = ir.value(operand) if operand.op != "get_attr" else _tensor(operand)
        if value is None:
            raise Unknown
        total += sum(nbytes(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return total


# -- one node --------------------------------------------------------------------------------------------------------

Rule = Callable[[Call], Cost]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Makes a function the rule of the operators of these names (`conv2d`; `namespace.name` where it is not ATen's)."""

    def enter(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def of(node: fx.Node) -> Cost | None:
    """What a node computes and moves; None where a shape is not known, or the node is opaque."""
    if not ir.is_compute(node) or node.target is torch._assert:
        return Cost()
    target = node.target
    if not isinstance(target, OpOverload):
        return None
    returns = target._schema.returns
    if not returns:
        return Cost()  # an assertion
    name = ir.target_name(node)
    found = _RULES.get(name) or _RULES.get(name.removesuffix("_"))
    try:
        if found is not None:
            return found(Call(node))
        if returns[0].alias_info is not None and not returns[0].alias_info.is_write:
            return Cost()  # a view
        return _other(Call(node), target)
    except Unknown:
        return None


#: Operations per element of the result, where it is not one.
_PER_ELEMENT = {
    **dict.fromkeys(("exp", "log", "sin", "cos", "tanh", "erf", "sigmoid", "pow", "hardswish", "elu", "celu"), 4),
    **dict.fromkeys(("silu", "selu", "softplus", "log_sigmoid"), 5),
    **dict.fromkeys(("gelu", "mish"), 8),
    **dict.fromkeys(("clone", "copy", "fill", "zero"), 0),
    "prelu": 1, "glu": 5, "addcmul": 2, "addcdiv": 2, "lerp": 3,
    "upsample_bilinear2d": 8, "upsample_bicubic2d": 40, "upsample_linear1d": 4, "upsample_trilinear3d": 16,
}  # fmt: skip
#: Operations per element of the first operand.
_PER_INPUT_ELEMENT = {
    **dict.fromkeys(("sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin"), 1),
    **dict.fromkeys(("prod", "cumsum", "any", "all"), 1),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), 1),
    **dict.fromkeys(("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"), 1),
    **dict.fromkeys(("norm", "linalg_vector_norm", "logsumexp"), 2),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), 2),
    **dict.fromkeys(("var", "std", "var_mean", "rms_norm"), 4),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), 5),
    **dict.fromkeys(("layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "instance_norm"), 8),
}


def _other(call: Call, target: OpOverload) -> Cost:
    """An operator without a rule of its own: so much for each element of what it reads or writes."""
    name = target._opname.removesuffix("_")
    if name in _PER_INPUT_ELEMENT:
        source = next((operand for operand in call.node.all_input_nodes), None)
        return call.cost(_PER_INPUT_ELEMENT[name] * (prod(_sizes(_tensor(source))) if source is not None else 0))
    each = _PER_ELEMENT.get(name, 1 if torch.Tag.pointwise in target.tags else 0)
    return call.cost(each * prod(call.result))


def activation_flops(name: str) -> int:
    """Operations per element of an epilogue's activation, by its name in `fxopt.ops` or oneDNN's."""
    if name in ("none", "", None):
        return 0
    return _PER_ELEMENT.get({"gelu_tanh": "gelu", "swish": "silu"}.get(name, name), 1)


# -- layers ----------------------------------------------------------------------------------------------------------


def layer_flops(
    source: Iterable[Any], weight: Iterable[Any], result: Iterable[Any], *, transposed: bool = False
) -> int:
    """Operations of a convolution or linear layer by its sizes: two for each weight that a result is made of."""
    outer = source if transposed else result
    return 2 * prod(map(_number, outer)) * prod(map(_number, list(weight)[1:]))


@rule(
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution", "linear",
    "fxopt.convolution", "fxopt.linear",
    "mkldnn._convolution_pointwise", "mkldnn._convolution_transpose_pointwise", "mkldnn._linear_pointwise",
    "mkl._mkl_linear",
)  # fmt: skip
def _layer(call: Call) -> Cost:
    given = call.arguments
    source, weight = ("X", "ORI_W" if "ORI_W" in given else "W") if "X" in given else ("input", "weight")
    transposed = given.get("transposed", "transpose" in ir.target_name(call.node))
    flops = layer_flops(call.sizes(source), call.sizes(weight), call.result, transposed=transposed)
    names = [given.get(name, "none") for name in ("activation", "unary_attr", "attr")]
    binary = "other" in given  # there `attr` is the operation that takes the other operand
    each = sum(map(activation_flops, names[:2] if binary else names))
    each += binary or given.get("residual") is not None
    return call.cost(flops + each * prod(call.result))


@rule("mm", "bmm", "matmul", "mv", "dot", "addmm", "baddbmm", "addmv", "addbmm")
def _matmul(call: Call) -> Cost:
    left = next(name for name in ("mat1", "batch1", "mat", "self") if name in call.arguments)
    inner = call.sizes(left)[-1]
    added = prod(call.result) if "beta" in call.arguments else 0
    return call.cost(2 * prod(call.result) * inner + added)


@rule("einsum")
def _einsum(call: Call) -> Cost:
    equation = call.arguments["equation"].replace(" ", "")
    terms, operands = equation.partition("->")[0].split(","), call.arguments["tensors"]
    if "." in equation or len(operands) > 2:
        raise Unknown
    size: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        size.update(zip(term, _sizes(_tensor(operand)), strict=True))
    return call.cost(len(operands) * prod(size.values()))


@rule("scaled_dot_product_attention")
def _attention(call: Call) -> Cost:
    query, key, value = (call.sizes(name) for name in ("query", "key", "value"))
    scores = prod(query[:-1]) * key[-2]
    return call.cost(scores * (2 * query[-1] + 2 * value[-1] + 5))


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(call: Call) -> Cost:
    if "params" not in call.arguments or "batch_sizes" in call.arguments:
        raise Unknown
    matrices = [sizes for sizes in (_sizes(_tensor(weight)) for weight in call.arguments["params"]) if len(sizes) == 2]
    return call.cost(2 * prod(call.sizes("input")[:-1]) * sum(map(prod, matrices)))


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "max_pool2d_with_indices", "max_pool3d_with_indices",
)  # fmt: skip
def _pool(call: Call) -> Cost:
    kernel = call.arguments["kernel_size"]
    kernel = [_number(size) for size in (kernel if isinstance(kernel, (list, tuple)) else [kernel])]
    spatial = int(ir.target_name(call.node).partition("pool")[2][0])
    return call.cost(prod(call.result) * prod(kernel * spatial if len(kernel) == 1 else kernel))


# -- what only moves data --------------------------------------------------------------------------------------------

#: Operators that join parts along a dimension.
CONCATS = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "fxopt.buffer"})


@rule(
    *(CONCATS - {"fxopt.buffer"}), "clone", "pad", "constant_pad_nd", "repeat", "tile", "roll", "flip",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle",
)  # fmt: skip
def _copy(call: Call) -> Cost:
    return call.cost(copies=True)


@rule("copy")
def _copy_into(call: Call) -> Cost:
    return call.cost(read=nbytes(call.tensor("src")), copies=True)


@rule("fxopt.buffer")
def _buffer(call: Call) -> Cost:
    """A concat most of whose parts were written in place by what made them: only the others are copied."""
    numbers = buffers.copied(call.node)
    copied = sum(nbytes(_tensor(part)) for number, part in enumerate(buffers.parts(call.node)) if number in numbers)
    return Cost(0, copied, copied, copied, 1 if numbers else 0)


@rule("index", "index_select", "gather", "take", "take_along_dim", "embedding")
def _gather(call: Call) -> Cost:
    indices = call.node.all_input_nodes[1:]
    return call.cost(read=call.written + read_by(indices))


@rule("reshape", "flatten", "ravel", "reshape_as", "view_as", "unflatten")
def _reshape(call: Call) -> Cost:
    source = _tensor(call.node.args[0])
    try:
        _meta(source).view(call.result)
    except RuntimeError:
        return call.cost(read=nbytes(source), copies=True)
    return Cost()


def _meta(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(_sizes(value), tuple(map(_number, value.stride())), dtype=value.dtype, device="meta")


@rule("contiguous", "to", "_to_copy", "type_as")
def _convert(call: Call) -> Cost:
    source, result = _tensor(call.node.args[0]), call.results[0]
    same_kind = source.dtype == result.dtype and source.device == result.device
    if same_kind and ir.target_name(call.node) != "_to_copy" and not call.arguments.get("copy"):
        layouts = [tuple(map(_number, value.stride())) for value in (source, result)]
        if layouts[0] == layouts[1]:
            return Cost()
    return call.cost(read=nbytes(source), copies=same_kind)


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def _dropout(call: Call) -> Cost:
    return call.cost(2 * prod(call.result)) if call.arguments["train"] else Cost()


__all__ = ["CONCATS", "Call", "Cost", "Unknown", "layer_flops", "nbytes", "of", "read_by", "rule"]
