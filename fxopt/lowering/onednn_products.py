"""Matrix products on the CPU: linear layers and pointwise convolutions, each by the library that is quickest for it.

    linear(x, W, b)            ->  ATen for one or two rows, MKL on packed weights for few, oneDNN for many
    conv(x, W, b), 1x1 kernel  ->  the same product, over the channels of each pixel, where there are few pixels

A row is what the weights are multiplied with: a token, a pixel. ATen's product is MKL's on plain weights, as fast as
any where the weights are read once, and it needs no second copy of them. MKL fuses no activation: ATen's stands behind
it, and overwrites its operand (see `in_place.py`). What was measured, on two cores with AVX-512, stands beside each
bound; `fxopt bench` measures it elsewhere.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import fx

from fxopt import ir, ops
from fxopt.lowering import onednn_operators as onednn
from fxopt.lowering.weights import Weights
from fxopt.rewrite import Rewriter

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn

#: A oneDNN call costs some 15 microseconds before it computes, ATen's 3: below this many multiply-adds ATen is quicker
#: (measured with one row of 64 features: 16 against 3 microseconds; of 512 to 1000 features: 35 against 46).
SMALLEST = 1 << 17
#: Up to so many rows a product takes as long as reading its weights, which packing does not change (2048 to 1000
#: features: ATen 169, MKL 175, oneDNN 208 microseconds for two rows; 320, 199, 224 for four).
READ_ONCE = 2
#: Up to so many rows MKL beats oneDNN in a linear layer (768 to 3072 features: 1.93 against 2.09 ms for 128 rows, 15.7
#: against 16.0 for 1024; 96 to 384 features: 0.96 against 1.21 the other way round for 3136).
FEW = 512
#: Up to so many pixels MKL beats oneDNN's fused convolution (512 to 2048 channels, 7x7: 0.43 against 0.45 ms; 160 to
#: 960: 0.09 against 0.13). With more, oneDNN's linear layer does so alone, but not within a network.
FEW_PIXELS = 64
#: Up to so many multiply-adds ATen's product on plain weights beats oneDNN's convolution, which prepares each call (116
#: to 116 channels, 14x14: 44 against 70 microseconds; 144 to 32, 28x28: 39 against 62), in a network as alone.
SMALL = 1 << 22

_IN_LINEAR = frozenset({"none", "relu", "relu6", "clamp", "hardtanh", "silu", "gelu", "gelu_tanh"})


def has_mkl() -> bool:
    """Whether this torch has MKL's products on packed weights."""
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


# -- linear layers ---------------------------------------------------------------------------------------------------


def lower_linears(rewriter: Rewriter) -> None:
    """Linear layers by MKL or oneDNN; those that ATen runs as quickly stay, with the reason."""
    for node in list(rewriter.graph.nodes):
        if node.target not in (ops.linear, aten.linear.default):
            continue
        given = ops.linear_arguments(node)
        refusal = onednn.layer_refusal(given)
        if refusal is None and ir.rank(given["weight"]) != 2:
            refusal = "its weight is a vector"
        features = (ir.shape(given["weight"]) or ())[:1]
        if refusal is None and given["bias"] is not None and ir.shape(given["bias"]) != features:
            refusal = "its bias is not one number for each feature"
        rows = math.prod(int(size) for size in (ir.shape(given["input"]) or ())[:-1])
        if refusal is None and rows <= READ_ONCE:
            refusal = f"of {rows} rows ATen's product is as quick, and needs no packed weights"
        if refusal is None and _multiply_adds(rows, given["weight"]) < SMALLEST:
            refusal = "it is so small that ATen's call is quicker"
        if refusal is None:
            library = "mkl" if _by_mkl(rows, FEW, given["weight"], rewriter) else "onednn"
            build = partial(_linear, rewriter, node, given, library, rows)
            refusal = onednn.reason(rewriter.substitute(node, build, rule=f"{library}-linear"))
        if refusal is not None:
            rewriter.decline(node, refusal, rule="linear")


def _multiply_adds(rows: int, weight: fx.Node) -> int:
    return rows * math.prod(int(size) for size in ir.shape(weight) or (0,))


def _by_mkl(rows: int, bound: int, weight: fx.Node, rewriter: Rewriter) -> bool:
    """Whether MKL multiplies so few rows. Its packed weights serve one number of rows only: a second number takes
    oneDNN's, which serve all."""
    held = ir.tensor(weight)
    assert held is not None
    packed: Weights = rewriter.module.meta["packed"]
    known = {key[1] for key in packed.keys_for(held) if key[0] == "mkl"}
    return has_mkl() and rows <= bound and known <= {rows}


def _linear(rewriter: Rewriter, node: fx.Node, given: dict[str, Any], library: str, rows: int) -> fx.Node:
    value = ir.fake(node)
    assert value is not None
    activation = (given["activation"], given["activation_arguments"])
    return _product(
        rewriter, value, given["input"], given["weight"], given["bias"], given["residual"], activation, library, rows
    )


def _product(
    rewriter: Rewriter,
    value: torch.Tensor,
    source: fx.Node,
    weight: fx.Node,
    bias: fx.Node | None,
    residual: fx.Node | None,
    activation: tuple[str, list[float]],
    library: str,
    rows: int,
) -> fx.Node:
    """activation(source @ weight.T + bias + residual) over the last dimension; `value` is what it gives."""
    name, numbers = activation
    if library == "aten":
        result = rewriter.call(aten.linear.default, source, weight, bias)
    elif library == "mkl":
        result = rewriter.call_as(value, torch.ops.mkl._mkl_linear.default, source, weight, weight, bias, rows)
    elif residual is not None:
        result = rewriter.call_as(
            value, mkldnn._linear_pointwise.binary, source, residual, weight, bias, "add"
        )
        residual = None
    else:
        fused = name in _IN_LINEAR and onednn.fuses(name, numbers)
        epilogue = onednn.epilogue(name, numbers) if fused else onednn.epilogue("none", [])
        result = rewriter.call_as(value, mkldnn._linear_pointwise.default, source, weight, bias, *epilogue)
        name = "none" if fused else name
    if residual is not None:
        result = rewriter.call(aten.add.Tensor, result, residual)
    return onednn.activation(rewriter, result, name, numbers)


# -- pointwise convolutions ------------------------------------------------------------------------------------------


def pointwise_library(node: fx.Node, given: dict[str, Any], rewriter: Rewriter) -> str | None:
    """The library that multiplies the channels of each pixel; None where it is no such product, or oneDNN's
    convolution is quicker."""
    weight = ir.shape(given["weight"]) or ()
    once = [*given["stride"], given["groups"], *weight[2:]]
    if given["transposed"] or any(number != 1 for number in once) or any(given["padding"]) or len(weight) != 4:
        return None
    found = ir.fake(given["input"])
    assert found is not None
    rows = found.shape[0] * math.prod(found.shape[2:])
    if rows <= READ_ONCE:
        return "aten"
    if _by_mkl(rows, FEW_PIXELS, given["weight"], rewriter):
        return "mkl"
    return "aten" if _multiply_adds(rows, given["weight"]) <= SMALL else None


def pointwise(
    rewriter: Rewriter, node: fx.Node, given: dict[str, Any], library: str, flat: dict[Any, fx.Node]
) -> fx.Node:
    """A pointwise convolution as a product over the channels of each pixel; `flat` has the weights as matrices."""
    found = ir.fake(node)
    assert found is not None
    batch, channels, *spatial = (int(size) for size in found.shape)
    rows = batch * math.prod(spatial)
    weight = _matrix(rewriter, node, given["weight"], flat)
    if math.prod(spatial) == 1:
        sizes: list[int] = [rows, channels]

        def inside(value: fx.Node) -> fx.Node:
            return rewriter.call(aten.reshape.default, value, [rows, -1])

        def outside(value: fx.Node) -> fx.Node:
            return rewriter.call(aten.reshape.default, value, [batch, channels, *spatial])

    else:
        sizes = [batch, *spatial, channels]

        def inside(value: fx.Node) -> fx.Node:
            value = onednn.channels_last(rewriter, value)
            if value.target is aten.permute.default and ir.argument(value, "dims") == [0, 3, 1, 2]:
                return value.all_input_nodes[0]  # of another product
            return rewriter.call(aten.permute.default, value, [0, 2, 3, 1])

        def outside(value: fx.Node) -> fx.Node:
            return rewriter.call(aten.permute.default, value, [0, 3, 1, 2])

    mode = ir.fake_mode(rewriter.module)
    assert mode is not None
    with mode:
        value = torch.empty(sizes, dtype=found.dtype, device=found.device)
    source, residual = inside(given["input"]), given["residual"]
    residual = None if residual is None else inside(residual)
    activation = (given["activation"], given["activation_arguments"])
    return outside(
        _product(rewriter, value, source, weight, given["bias"], residual, activation, library, rows)
    )


def _matrix(rewriter: Rewriter, node: fx.Node, weight: fx.Node, flat: dict[Any, fx.Node]) -> fx.Node:
    """A kernel of one tap as the matrix that it is, in the same memory: one constant for each weight."""
    held = ir.tensor(weight)
    assert held is not None
    key = ir.identity(held)
    if key not in flat:
        flat[key] = rewriter.constant(held.detach().flatten(1), f"{weight.target}_matrix", keep_strides=True)
    return flat[key]


# -- packing ---------------------------------------------------------------------------------------------------------


def pack_product(reader: fx.Node, weight: torch.Tensor, packed: Weights) -> Any:
    """The weights of a product in its library's own layout: made once, kept in `packed`."""
    given = ir.arguments(reader)
    if reader.target is torch.ops.mkl._mkl_linear.default:
        rows = given["batch_size"]
        reorder = partial(torch.ops.mkl._mkl_reorder_linear_weight, weight, rows)
        finite = math.isfinite(weight.sum())  # of all numbers, then; else a product with zero would be none
        unpack = partial(_unpacked, weight.shape, rows) if finite else None
        return packed.once(("mkl", rows), weight, reorder, unpack, exact=finite)
    rows = math.prod(int(size) for size in (ir.shape(given["X"]) or ())[:-1])
    return packed.once(("linear",), weight, partial(mkldnn._reorder_linear_weight, weight, rows), torch.Tensor.to_dense)


def pack_nothing(reader: fx.Node, weight: torch.Tensor, packed: Weights) -> Any:
    """MKL's product takes the plain weights, too, for other numbers of rows than its own. Only their shape is read."""
    return weight.new_empty(()).expand(weight.shape)


def _unpacked(shape: torch.Size, rows: int, packed: torch.Tensor) -> torch.Tensor:
    """What MKL packed: its product with the identity, so many rows at a time (exact where all numbers are finite)."""
    features, inputs = shape
    stand_in = torch.empty(()).expand(shape)
    found = torch.empty(inputs, features)
    for start in range(0, inputs, rows):
        block = torch.zeros(rows, inputs)
        stop = min(start + rows, inputs)
        block[: stop - start].diagonal(start).fill_(1.0)
        found[start:stop] = torch.ops.mkl._mkl_linear(block, packed, stand_in, None, rows)[: stop - start]
    return found.t()
