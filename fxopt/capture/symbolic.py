"""Symbolic capture: torch.fx runs the model on proxies, and each call is recorded as the ATen operator that it is.

No inputs are needed and no sizes are frozen. What looks at a value or a size while it runs cannot be taken this way;
neither can what writes to a tensor or draws at random outside the proxies: tracing stops with CaptureError.
"""

from __future__ import annotations

import inspect
import threading
from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt import check, effects, ir, normalize
from fxopt.capture.program import ROOT, Captured, FlatModel, Inputs, strip_root, user_line_of_error
from fxopt.capture.tracer import NoHiddenEffects, Tracer
from fxopt.errors import CaptureError

_TRACING = threading.Lock()  # torch.fx patches nn.Module while it traces


def required_inputs(model: torch.nn.Module) -> Inputs:
    """Stand-ins for a call that gives the required arguments only; those with a default keep it.

    Raises CaptureError where forward takes `*args` or lacks a readable signature.
    """
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError) as error:
        raise CaptureError(
            f"the signature of forward cannot be read: {error}", hint="give example inputs: fxopt.compile(model, (x,))"
        ) from error
    required = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise CaptureError(
                "forward takes *args, so what it is called with cannot be known",
                hint="give example inputs: fxopt.compile(model, (x,))",
            )
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            required.append(parameter)
    stand_in = torch.empty(0, device="meta")
    positional = tuple(stand_in for parameter in required if parameter.kind is not parameter.KEYWORD_ONLY)
    keyword = {parameter.name: stand_in for parameter in required if parameter.kind is parameter.KEYWORD_ONLY}
    flat = Inputs.flatten(positional, keyword)
    names = [parameter.name for parameter in required if parameter.kind is not parameter.KEYWORD_ONLY]
    return Inputs(flat.leaves, flat.spec, (*names, *keyword))


def capture_symbolic(model: torch.nn.Module, inputs: Inputs | None = None) -> Captured:
    """Captures a private copy of a model without running it.

    `inputs`, if given, says only which arguments a call has (structure and constants). Raises CaptureError where the
    model cannot be traced.
    """
    inputs = required_inputs(model) if inputs is None else inputs
    tensor_names = [
        name for name, leaf in zip(inputs.names, inputs.leaves, strict=True) if isinstance(leaf, torch.Tensor)
    ]
    flat = FlatModel(model, inputs)
    tracer = Tracer()
    own = [(path, m) for path, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]
    held = [(path, slots, dict(slots)) for path, m in own for slots in (m._buffers, m._parameters)]
    names = tuple(_placeholder_name(name) for name in tensor_names)
    try:
        with _TRACING, torch.enable_grad(), NoHiddenEffects():  # type: ignore[no-untyped-call]
            graph = tracer.trace_model(flat, names)
    except Exception as error:
        raise CaptureError(
            f"the model cannot be traced symbolically: {error}",
            line=user_line_of_error(error),
            hint="give example inputs, fxopt.compile(model, (x,)): torch.export then sees shapes and values",
        ) from error
    _refuse_kept_proxies(model)
    for path, slots, before in held:
        _settle_assignments(tracer, path, slots, before)
    for name, proxy in zip(tensor_names, graph.find_nodes(op="placeholder"), strict=True):
        proxy.meta["origin"] = (ir.Origin("", name),)
    assert flat.structure.spec is not None
    module = ir.new_module(graph, ir.Interface(inputs.spec, flat.structure.spec, tuple(tensor_names), inputs.constants))
    _attach(module, tracer.root, tracer)
    _refuse_shared_constants(module)
    normalize.normalize(module)
    check.check(module, after="symbolic capture", captured=True)
    return Captured(module, "symbolic")


def _refuse_kept_proxies(model: torch.nn.Module) -> None:
    """A forward that stores what it computes in an attribute reads it again later: tracing would freeze the first."""
    for path, module in model.named_modules():
        for name, held in module.__dict__.items():
            if isinstance(held, fx.Proxy):
                raise CaptureError(
                    f"forward keeps a computed value in {path + '.' if path else ''}{name}",
                    hint="give example inputs, or return the value instead of keeping it",
                )


def _refuse_shared_constants(module: fx.GraphModule) -> None:
    """A tensor that forward makes without its inputs (`torch.zeros(3)`) is new in each call, but one constant of a
    trace: nobody may write to it, nor have it in hand to write to it."""
    aliases = effects.Aliases.scan(module.graph)
    handed_out = {_viewed(leaf) for leaf in module.graph.output_node().all_input_nodes}
    for node in module.graph.find_nodes(op="get_attr"):
        if not node.target.startswith("_tensor_constant"):
            continue
        writer = aliases.writer_of(node)
        if writer is not None or node in handed_out:
            raise CaptureError(
                f"forward {'hands out' if writer is None else 'writes to'} a tensor that it makes without its inputs",
                node=writer,
                hint="give example inputs: torch.export makes it anew in each call",
            )


def _viewed(node: fx.Node) -> fx.Node:
    """The value that a chain of views begins with."""
    while isinstance(node.target, OpOverload) and node.target.is_view:
        node = node.all_input_nodes[0]
    return node


def _settle_assignments(tracer: Tracer, path: str, slots: dict[str, Any], before: dict[str, Any]) -> None:
    """`self.count += 1` is a write, which the graph has, and an assignment of what was written: that is taken back.

    Raises CaptureError for any other assignment: only one call's would be seen.
    """
    for name in dict.fromkeys((*before, *slots)):
        now, was = slots.get(name), before.get(name)
        if now is was:
            continue
        node = now.node if isinstance(now, fx.Proxy) else None
        while node is not None and node.op == "call_function" and normalize.twin(node.target) is not None:
            node = cast(fx.Node, node.args[0])
        if node is None or node.op != "get_attr" or node.target != tracer.name_of(was):
            raise CaptureError(
                f"forward assigns {path + '.' if path else ''}{name}",
                hint="write it in place: self.count += 1, or self.count.copy_(...)",
            )
        slots[name] = was


def _placeholder_name(name: str) -> str:
    return "".join(character if character.isalnum() else "_" for character in name).strip("_") or "input"


def _attach(module: fx.GraphModule, root: torch.nn.Module, tracer: fx.Tracer) -> None:
    """Moves the attributes that the graph names from the traced root to the IR module, under the model's own names."""
    for node in module.graph.nodes:
        if node.op == "output":
            leaves = cast(Any, node.args[0])
            node.args = (tuple(leaves) if isinstance(leaves, (list, tuple)) else (leaves,),)
        if node.op not in ("get_attr", "call_module"):
            continue
        held = ir.get_attribute(root, node.target)
        name = strip_root(node.target)
        path = ir.attribute_path(module, name or ROOT)  # the model itself may be a module that stays whole
        if isinstance(held, torch.Tensor) and not isinstance(held, torch.nn.Parameter):
            held = held.detach()
        elif isinstance(held, torch.nn.Parameter):
            held = torch.nn.Parameter(held.detach(), requires_grad=False)
        if not ir.has_attribute(module, path):
            ir.set_attribute(module, path, held)
        node.target = path
        node.meta.setdefault("origin", (ir.Origin(name.rpartition(".")[0], ""),))
