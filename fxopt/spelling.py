"""One table from the ways a Python program spells an operation to the ATen operator that it is.

`operator_for` takes the target of a traced call (a function of torch or torch.nn.functional, a Tensor method, a Python
operator) and its arguments, and gives the high-level ATen overload that PyTorch's own dispatch would choose, as
torch.export records it; None for what the table does not know.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fxopt.overloads import Call, IsNumber, resolve

aten = torch.ops.aten

_BINARY = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "div",
    operator.floordiv: "floor_divide",
    operator.mod: "remainder",
    operator.pow: "pow",
    operator.matmul: "matmul",
    operator.eq: "eq",
    operator.ne: "ne",
    operator.lt: "lt",
    operator.le: "le",
    operator.gt: "gt",
    operator.ge: "ge",
    operator.and_: "__and__",
    operator.or_: "__or__",
    operator.xor: "__xor__",
    operator.iadd: "add_",
    operator.isub: "sub_",
    operator.imul: "mul_",
    operator.itruediv: "div_",
}
_UNARY = {operator.neg: "neg", operator.invert: "bitwise_not", operator.abs: "abs"}


def _functional() -> dict[Any, Callable[[dict[str, Any]], Call | None]]:
    """torch.nn.functional's Python functions: bound arguments -> ATen call."""

    def unary(op: Any, inplace: Any = None, *names: str) -> Callable[[dict[str, Any]], Call]:
        def spell(a: dict[str, Any]) -> Call:
            chosen = inplace if inplace is not None and a.get("inplace") else op
            return chosen, (a["input"], *(a[name] for name in names)), {}

        return spell

    def softmax(op: Any) -> Callable[[dict[str, Any]], Call | None]:
        return lambda a: None if a["dim"] is None else (op, (a["input"], a["dim"], a["dtype"]), {})

    def pool(op: Any) -> Callable[[dict[str, Any]], Call | None]:
        def spell(a: dict[str, Any]) -> Call | None:
            if a["return_indices"]:
                return None
            stride = a["stride"] if a["stride"] is not None else []
            return op, (a["input"], a["kernel_size"], stride, a["padding"], a["dilation"], a["ceil_mode"]), {}

        return spell

    def statistics(a: dict[str, Any]) -> tuple[Any, ...]:
        return a["input"], a["weight"], a["bias"], a["running_mean"], a["running_var"]

    def batch_norm(a: dict[str, Any]) -> Call:
        return (
            aten.batch_norm.default,
            (*statistics(a), a["training"], a["momentum"], a["eps"], torch.backends.cudnn.enabled),
            {},
        )

    def instance_norm(a: dict[str, Any]) -> Call:
        return (
            aten.instance_norm.default,
            (*statistics(a), a["use_input_stats"], a["momentum"], a["eps"], torch.backends.cudnn.enabled),
            {},
        )

    def layer_norm(a: dict[str, Any]) -> Call:
        return aten.layer_norm.default, (a["input"], a["normalized_shape"], a["weight"], a["bias"], a["eps"]), {}

    def rms_norm(a: dict[str, Any]) -> Call:
        return aten.rms_norm.default, (a["input"], a["normalized_shape"], a["weight"], a["eps"]), {}

    def group_norm(a: dict[str, Any]) -> Call:
        return aten.group_norm.default, (a["input"], a["num_groups"], a["weight"], a["bias"], a["eps"]), {}

    def embedding(a: dict[str, Any]) -> Call | None:
        if a["max_norm"] is not None:
            return None
        padding = -1 if a["padding_idx"] is None else a["padding_idx"]
        if not isinstance(padding, int) or padding < -1:
            return None
        return aten.embedding.default, (a["weight"], a["input"], padding, a["scale_grad_by_freq"], a["sparse"]), {}

    def pad(a: dict[str, Any]) -> Call:
        return aten.pad.default, (a["input"], a["pad"], a["mode"], a["value"]), {}

    def dropout(op: Any, inplace: Any) -> Callable[[dict[str, Any]], Call]:
        return lambda a: (inplace if a["inplace"] else op, (a["input"], a["p"], a["training"]), {})

    def interpolate(a: dict[str, Any]) -> Call | None:
        # Of the modes only this one says how many dimensions the input has; which operator another is waits for that.
        if a["mode"] != "bilinear" or a["antialias"] or a["recompute_scale_factor"]:
            return None
        size, scale = a["size"], a["scale_factor"]
        if isinstance(size, int):
            size = [size, size]
        if isinstance(scale, (int, float)):
            scale = [float(scale), float(scale)]
        if isinstance(size, fx.Node) or isinstance(scale, fx.Node):
            return None
        scales = None if scale is None else [float(s) for s in scale]
        return aten.upsample_bilinear2d.vec, (a["input"], size, bool(a["align_corners"]), scales), {}

    return {
        F.relu: unary(aten.relu.default, aten.relu_.default),
        F.relu6: unary(aten.relu6.default, aten.relu6_.default),
        F.silu: unary(aten.silu.default, aten.silu_.default),
        F.mish: unary(aten.mish.default, aten.mish_.default),
        F.selu: unary(aten.selu.default, aten.selu_.default),
        F.hardswish: unary(aten.hardswish.default, aten.hardswish_.default),
        F.hardsigmoid: unary(aten.hardsigmoid.default, aten.hardsigmoid_.default),
        F.sigmoid: unary(aten.sigmoid.default),
        F.tanh: unary(aten.tanh.default),
        F.hardtanh: unary(aten.hardtanh.default, aten.hardtanh_.default, "min_val", "max_val"),
        F.leaky_relu: unary(aten.leaky_relu.default, aten.leaky_relu_.default, "negative_slope"),
        F.elu: unary(aten.elu.default, aten.elu_.default, "alpha"),
        F.celu: unary(aten.celu.default, aten.celu_.default, "alpha"),
        F.glu: unary(aten.glu.default, None, "dim"),
        F.softmax: softmax(aten.softmax.int),
        F.log_softmax: softmax(aten.log_softmax.int),
        F.max_pool1d: pool(aten.max_pool1d.default),
        F.max_pool2d: pool(aten.max_pool2d.default),
        F.max_pool3d: pool(aten.max_pool3d.default),
        F.adaptive_avg_pool2d: _adaptive(aten.adaptive_avg_pool2d.default),
        F.adaptive_avg_pool3d: _adaptive(aten.adaptive_avg_pool3d.default),
        F.batch_norm: batch_norm,
        F.instance_norm: instance_norm,
        F.layer_norm: layer_norm,
        F.rms_norm: rms_norm,
        F.group_norm: group_norm,
        F.embedding: embedding,
        F.pad: pad,
        F.dropout: dropout(aten.dropout.default, aten.dropout_.default),
        F.dropout1d: dropout(aten.feature_dropout.default, aten.feature_dropout_.default),
        F.dropout2d: dropout(aten.feature_dropout.default, aten.feature_dropout_.default),
        F.alpha_dropout: dropout(aten.alpha_dropout.default, aten.alpha_dropout_.default),
        F.interpolate: interpolate,
        torch.split: _split,
        torch.einsum: lambda a: (aten.einsum.default, (a["args"][0], list(a["args"][1:])), {}),
    }


def _adaptive(op: Any) -> Callable[[dict[str, Any]], Call | None]:
    def spell(a: dict[str, Any]) -> Call | None:
        size = a["output_size"]
        if isinstance(size, int):
            size = [size] * (2 if op is aten.adaptive_avg_pool2d.default else 3)
        if any(part is None for part in size):
            return None
        return op, (a["input"], list(size)), {}

    return spell


def _split(a: dict[str, Any]) -> Call:
    sizes = a["split_size_or_sections"]
    if isinstance(sizes, (list, tuple)):
        return aten.split_with_sizes.default, (a["tensor"], list(sizes), a["dim"]), {}
    return aten.split.Tensor, (a["tensor"], sizes, a["dim"]), {}


_TABLE = _functional()
_SIGNATURES = {function: inspect.signature(function) for function in _TABLE if function not in (torch.einsum,)}
# boolean_dispatch hides the signature behind *args.
for _pool, _real in (
    (F.max_pool1d, F.max_pool1d_with_indices),
    (F.max_pool2d, F.max_pool2d_with_indices),
    (F.max_pool3d, F.max_pool3d_with_indices),
):
    _SIGNATURES[_pool] = inspect.signature(_real)
#: What a traced call of these shows as its target.
_ALIASES = {
    getattr(F, "_max_pool1d"): F.max_pool1d,  # noqa: B009 (private, and without a type)
    getattr(F, "_max_pool2d"): F.max_pool2d,  # noqa: B009
    getattr(F, "_max_pool3d"): F.max_pool3d,  # noqa: B009
}


def operator_for(
    kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_number: IsNumber
) -> Call | None:
    """The ATen call for a traced call; None where the table does not know it.

    `kind` is the fx op (call_function or call_method); `is_number` says whether a node gives a number, not a tensor.
    """
    if kind == "call_method":
        return _method(target, args, kwargs, is_number)
    target = _ALIASES.get(target, target)
    if target in _TABLE:
        if target is torch.einsum:
            return _TABLE[target]({"args": args}) if not kwargs else None
        try:
            bound = _SIGNATURES[target].bind(*args, **kwargs)
        except TypeError:
            return None
        bound.apply_defaults()
        return _TABLE[target](dict(bound.arguments))
    if target in _BINARY and len(args) == 2:
        return _binary(_BINARY[target], args[0], args[1], is_number)
    if target in _UNARY and len(args) == 1:
        return resolve(_UNARY[target], args, {}, is_number)
    if _is_builtin(target):
        return resolve(target.__name__, args, kwargs, is_number)
    return None


#: Where torch keeps its C++ functions; a function's name there is its operator's.
_BUILTINS = tuple(getattr(torch._C, home) for home in ("_VariableFunctions", "_nn", "_linalg", "_special", "_fft"))


def _is_builtin(target: Any) -> bool:
    """A C++ function of torch: `torch.flatten`, `F.gelu`."""
    name = getattr(target, "__name__", "")
    return inspect.isbuiltin(target) and any(getattr(home, name, None) == target for home in _BUILTINS)


def _tensor_like(value: Any, is_number: IsNumber) -> bool:
    return isinstance(value, fx.Node) and not is_number(value)


def _binary(name: str, left: Any, right: Any, is_number: IsNumber) -> Call | None:
    if _tensor_like(left, is_number):
        return resolve(name, (left, right), {}, is_number)
    if not _tensor_like(right, is_number):
        return None
    if name in ("add", "mul", "eq", "ne", "__and__", "__or__", "__xor__"):
        return resolve(name, (right, left), {}, is_number)
    if name == "sub":
        return aten.rsub.Scalar, (right, left), {}
    if name == "pow":
        return aten.pow.Scalar, (left, right), {}
    mirrored = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}
    if name in mirrored:
        return resolve(mirrored[name], (right, left), {}, is_number)
    return None


_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "bool": torch.bool,
    "byte": torch.uint8,
    "char": torch.int8,
    "short": torch.int16,
    "int": torch.int32,
    "long": torch.int64,
}
_METHOD_NAMES = {"size": None, "dim": None, "to": "to", "__getitem__": None}
_PYTHON_METHODS: dict[str, Any] = {"split": torch.split}


def _method(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], is_number: IsNumber) -> Call | None:
    if name in _PYTHON_METHODS:
        return operator_for("call_function", _PYTHON_METHODS[name], args, kwargs, is_number)
    if name == "size" and len(args) == 2 and not kwargs:
        return aten.sym_size.int, args, {}
    if name == "where" and len(args) == 3 and not kwargs:
        return operator_for("call_function", torch.where, (args[1], args[0], args[2]), {}, is_number)
    if name in _CASTS and len(args) == 1 and not kwargs:
        return aten.to.dtype, (args[0], _CASTS[name]), {}
    if name == "type" and len(args) == 2 and isinstance(args[1], torch.dtype) and not kwargs:
        return aten.to.dtype, args, {}
    if name in _METHOD_NAMES and _METHOD_NAMES[name] is None:
        return None
    return resolve(name, args, kwargs, is_number)
