"""What the program for a call depends on beyond its guards: what lowering looks at, and what must be proved once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt import ir
from fxopt.capture import Inputs
from fxopt.lowering.backend import Setting
from fxopt.program import Program


def lowering_key(inputs: Inputs, setting: Setting) -> Any:
    """What the lowering of a program for a call depends on."""
    layouts = [tensor.stride() if tensor.layout is torch.strided else tensor.layout for tensor in inputs.tensors]
    kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs.tensors]
    return (*kinds, *layouts, setting)


def proof_state(program: Program, inputs: Inputs, setting: Setting) -> Any:
    """What a capture may be wrong about although its guards hold: proven once for each."""
    sizes = tuple(min(size, 2) for size in program.guards.dynamic_sizes(inputs))
    orders = tuple(
        (_stride_order(tensor), tensor.is_contiguous(), tensor.dtype, tensor.device) for tensor in inputs.tensors
    )
    kinds = tuple(tensor.dim() for tensor in inputs.tensors)
    grad = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), tuple(t.requires_grad for t in inputs.tensors))
    return (sizes, orders, kinds, grad, setting.autocast)


def _stride_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dimensions from the largest stride to the smallest; () for an empty tensor."""
    if not math.prod(tensor.shape) or tensor.layout is not torch.strided:
        return ()
    strides = tensor.stride()
    return tuple(sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim)))


def call_key(leaves: Sequence[Any], spec: pytree.TreeSpec | None) -> Any:
    """What a call is, to be looked up; `spec` is None where its arguments are tensors by position."""
    parts = [_tensor_key(leaf) if isinstance(leaf, torch.Tensor) else _constant_key(leaf) for leaf in leaves]
    return (
        tuple(parts),
        spec,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        ir.autocast(),
        torch.get_num_threads(),
    )


def _tensor_key(leaf: torch.Tensor) -> Any:
    strides = leaf.stride() if leaf.layout is torch.strided else leaf.layout
    return (leaf.shape, strides, leaf.dtype, leaf.device, leaf.requires_grad)


def _constant_key(leaf: Any) -> Any:
    # By their spelling 0.0 and -0.0 differ, and NaN is one constant; a slice has no hash before Python 3.12.
    return (type(leaf), repr(leaf) if isinstance(leaf, (float, complex, slice)) else leaf)
