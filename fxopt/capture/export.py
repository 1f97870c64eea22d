"""Capture by torch.export: the model runs once on fake tensors, so shapes and values steer its control flow.

The guards that this leaves are kept and asked of every new signature; nothing about a branch is assumed.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO, cast

import torch
from torch import fx
from torch._prims_common import suggest_memory_format
from torch.export import Dim
from torch.export import _trace as export_trace
from torch.export.graph_signature import InputKind, OutputKind

from fxopt import check, hints, ir, normalize
from fxopt.capture.program import Captured, FlatModel, Inputs, line_of_trace, strip_root, user_line_of_error
from fxopt.edit import Editor
from fxopt.errors import CaptureError, UsageError


def capture_export(
    model: torch.nn.Module, inputs: Inputs, dynamic_shapes: str | None = "batch", *, grad: bool = True
) -> Captured:
    """Captures a private copy of a model on example inputs.

    `dynamic_shapes`: "batch" leaves the first dimension of every tensor open, "all" every dimension, None none. A first
    dimension of 1 would be frozen, so it is exported at 2 where the model takes that. `grad` is whether gradients are
    on meanwhile: with them on, a region that the model itself puts under no_grad is kept as one. Raises CaptureError
    where torch.export refuses the model, with the user's own line.
    """
    if dynamic_shapes not in ("batch", "all", None):
        raise UsageError(
            f"dynamic_shapes is {dynamic_shapes!r}", hint='it is "batch" (first dimensions open), "all", or None'
        )
    notices: list[str] = []
    if dynamic_shapes is not None:
        doubled = _doubled(inputs)
        if doubled is not inputs:
            try:
                captured = _export(model, doubled, dynamic_shapes, grad, notices)
            except CaptureError:
                notices.append("the model does not take a batch of 2; it was captured for this batch size only")
                return _export(model, inputs, None, grad, notices)
            _remember_sizes(captured.module, inputs)
            return captured
    return _export(model, inputs, dynamic_shapes, grad, notices)


def _doubled(inputs: Inputs) -> Inputs:
    """The inputs with every first dimension of 1 doubled; the same object where there is none."""
    if not any(tensor.dim() > 0 and tensor.shape[0] == 1 for tensor in inputs.tensors):
        return inputs
    with torch.no_grad():
        return inputs.with_tensors(
            tuple(
                torch.cat([tensor, tensor]) if tensor.dim() > 0 and tensor.shape[0] == 1 else tensor
                for tensor in inputs.tensors
            )
        )


def _remember_sizes(module: fx.GraphModule, inputs: Inputs) -> None:
    """Estimates are for the sizes that the user gave, not for the doubled ones."""
    for node, tensor in zip(module.graph.find_nodes(op="placeholder"), inputs.tensors, strict=True):
        hints.remember(zip(ir.shape(node) or (), tensor.shape, strict=False))


def _dynamic(inputs: Inputs, dynamic_shapes: str | None) -> Any:
    if dynamic_shapes is None or not inputs.tensors:
        return None
    last = 1 if dynamic_shapes == "batch" else 1_000
    return (tuple(dict.fromkeys(range(min(tensor.dim(), last)), Dim.AUTO) for tensor in inputs.tensors),)


class _WithoutDumps:
    """The error stream without the partial graph that torch.export prints beside its error."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes what the model's own code writes."""
        if sys._getframe(1).f_code.co_filename == export_trace.__file__:
            return len(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def quiet() -> Iterator[None]:
    """torch.export logs, warns about and prints what its errors say again."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental", "torch._export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(cast(TextIO, _WithoutDumps(sys.stderr))):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _export(
    model: torch.nn.Module, inputs: Inputs, dynamic_shapes: str | None, grad: bool, notices: list[str]
) -> Captured:
    flat = FlatModel(model, inputs)
    try:
        with quiet(), torch.set_grad_enabled(grad), _packed_norms(model):
            program = torch.export.export(
                flat, inputs.tensors, strict=False, dynamic_shapes=_dynamic(inputs, dynamic_shapes)
            )
    except Exception as error:
        raise CaptureError(
            f"torch.export cannot capture the model: {first_lines(error)}",
            line=user_line_of_error(error),
            hint="make the branch depend on shapes or on configuration instead of on tensor values "
            "(torch.where, torch.cond), or compile the submodules that can be captured",
        ) from error
    assert flat.structure.spec is not None
    module = _unlift(program, flat, inputs)
    normalize.normalize(module)
    _drop_packing(module)
    check.check(module, after="capture by torch.export", captured=True)
    bounds = {str(symbol): _bounds(span) for symbol, span in program.range_constraints.items() if span.is_int}
    return Captured(module, "export", tuple(program._guards_code), bounds, notices, grad)


@contextmanager
def _packed_norms(model: torch.nn.Module) -> Iterator[None]:
    """The CPU's batch norm packs its result; the fake one that export runs keeps its input's strides, and would lose a
    `contiguous()` behind it. Each norm of the private copy packs for the time being."""

    def pack(norm: torch.nn.Module, inputs: tuple[Any, ...], result: Any) -> Any:
        if isinstance(result, torch.Tensor) and result.device.type == "cpu" and result.layout is torch.strided:
            return result.contiguous(memory_format=suggest_memory_format(inputs[0]))
        return result

    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    hooks = [norm.register_forward_hook(pack) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drop_packing(module: fx.GraphModule) -> None:
    """Takes out what `_packed_norms` made: with the strides that the norm really gives, it does nothing."""
    editor = Editor(module)
    for node in list(module.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)):
        norm, before, after = node.args[0], ir.fake(node.args[0]), ir.fake(node)
        alone = norm.target is torch.ops.aten.batch_norm.default and len(norm.users) == 1 and bool(node.kwargs)
        if alone and before is not None and after is not None and ir.same_sizes(before.stride(), after.stride()):
            editor.replace_uses(node, norm)
            editor.erase(node)


def first_lines(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: " + " ".join(line.strip() for line in lines[:3])


def _bounds(span: Any) -> tuple[int, int | None]:
    return int(span.lower) if _finite(span.lower) else 0, int(span.upper) if _finite(span.upper) else None


def _finite(bound: Any) -> bool:
    return bool(getattr(bound, "is_finite", True)) and "oo" not in str(bound)


def _unlift(program: torch.export.ExportedProgram, flat: FlatModel, inputs: Inputs) -> fx.GraphModule:
    """The exported graph with its lifted parameters as attributes again: one pass, from the signature."""
    graph = fx.Graph()
    nodes: dict[fx.Node, Any] = {}
    tensor_names = [
        name for name, leaf in zip(inputs.names, inputs.leaves, strict=True) if isinstance(leaf, torch.Tensor)
    ]
    interface = ir.Interface(inputs.spec, cast(Any, flat.structure.spec), tuple(tensor_names), inputs.constants)
    module = ir.new_module(graph, interface)
    lifted = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    _refuse_unknown(program)
    first = _first_names(flat)
    names = iter(tensor_names)
    # Inputs first: an attribute is read where the first placeholder behind it stood.
    for node in program.graph.nodes:
        if node.op == "placeholder" and lifted[node.name].kind is InputKind.USER_INPUT:
            nodes[node] = graph.placeholder(node.name)
            nodes[node].meta = {"val": node.meta.get("val"), "origin": (ir.Origin("", next(names)),)}
    for node in program.graph.nodes:
        if node in nodes:
            continue
        if node.op == "placeholder":
            nodes[node] = _attribute(module, program, lifted[node.name], node, first) if node.users else None
        elif node.op == "get_attr":
            ir.set_attribute(module, node.target, ir.get_attribute(program.graph_module, node.target))
            nodes[node] = graph.get_attr(node.target)
            nodes[node].meta = {"origin": _origin(node)}
        elif node.op == "output":
            graph.output(tuple(fx.map_arg(node.args[0], nodes.__getitem__)))
        else:
            target = node.target
            name = target._opname if hasattr(target, "_opname") else node.name
            args, kwargs = fx.map_arg((node.args, node.kwargs), nodes.__getitem__)
            twin = graph.create_node(node.op, target, args, kwargs, name)
            twin.meta = {"val": node.meta.get("val"), "origin": _origin(node)}
            nodes[node] = twin
    module.meta["fake_mode"] = next(
        (
            node.meta["val"].fake_mode
            for node in program.graph.nodes
            if ir.is_fake(node.meta.get("val"))
        ),
        None,
    )
    for node in graph.nodes:
        if node.op == "get_attr" and node.meta.get("val") is None:
            ir.update_value(node)
    return module


def _refuse_unknown(program: torch.export.ExportedProgram) -> None:
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.CUSTOM_OBJ, InputKind.TOKEN):
            raise CaptureError(f"the model holds an object that fxopt does not know: {spec.target}")
    for out in program.graph_signature.output_specs:
        if out.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"torch.export gave a result of kind {out.kind.name}, which fxopt does not know")


def _first_names(flat: FlatModel) -> dict[tuple[object, ...], str]:
    """A tensor of several names goes by the first, as in symbolic capture."""
    held = (*flat.named_parameters(remove_duplicate=False), *flat.named_buffers(remove_duplicate=False))
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in held:
        first.setdefault(ir.identity(tensor), name)
    return first


def _attribute(
    module: fx.GraphModule,
    program: torch.export.ExportedProgram,
    spec: Any,
    node: fx.Node,
    first: dict[tuple[object, ...], str],
) -> fx.Node:
    held = program.constants.get(spec.target) if spec.target in program.constants else program.state_dict[spec.target]
    name = strip_root(first.get(ir.identity(held), spec.target) if isinstance(held, torch.Tensor) else spec.target)
    path = ir.attribute_path(module, name)
    if isinstance(held, torch.nn.Parameter):
        held = torch.nn.Parameter(held.detach(), requires_grad=False)
    elif isinstance(held, torch.Tensor):
        held = held.detach()
    else:
        raise CaptureError(f"the model holds {spec.target}, a {type(held).__name__}, which fxopt does not know")
    ir.set_attribute(module, path, held)
    found = module.graph.get_attr(path)
    found.meta = {"val": node.meta.get("val"), "origin": (ir.Origin(name.rpartition(".")[0], ""),)}
    return found


def _origin(node: fx.Node) -> tuple[ir.Origin, ...]:
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0]
    if path.startswith("_empty"):
        path = ""
    return (ir.Origin(strip_root(path), line_of_trace(node.meta.get("stack_trace") or "")),)
