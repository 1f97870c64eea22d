"""A session as plain data and back: what `torch.save` and `deepcopy` of a compiled module use.

Graphs are written as lists of nodes, operators by name. Values (FakeTensors) are not kept: they are known again at the
next call, when specialisations are made. Reading back is unpickling, with pickle's usual trust.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import optimization_hint

from fxopt import ir, plugins
from fxopt.capture import Captured
from fxopt.program import Options, Program

if TYPE_CHECKING:
    from fxopt.session import Session


class _Reference:
    """A node in another node's arguments, by name."""

    def __init__(self, name: str) -> None:
        self.name = name


def freeze_graph(module: fx.GraphModule) -> dict[str, Any]:
    """A module's nodes, tensors and interface as plain data."""
    nodes = []
    for node in module.graph.nodes:
        target = node.target
        if isinstance(target, OpOverload):
            target = ("operator", target.namespace, target._opname, target._overloadname)
        args, kwargs = _map((node.args, node.kwargs), fx.Node, lambda operand: _Reference(operand.name))
        meta = {key: node.meta[key] for key in ("origin", "rank", "like") if key in node.meta}
        if node.op == "placeholder" and (value := ir.fake(node)) is not None and value.layout is torch.strided:
            meta["like"] = _like(value)
        nodes.append((node.op, target, args, kwargs, node.name, meta))
    held = {
        str(node.target): ir.get_attribute(module, str(node.target))
        for node in module.graph.nodes
        if node.op in ("get_attr", "call_module")
    }
    return {"nodes": nodes, "held": held, "interface": ir.interface(module)}


def _like(value: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]:
    """An input's sizes, strides, dtype and device, open sizes as captured: enough to draw one pass again."""
    sizes, strides = (tuple(map(optimization_hint, numbers)) for numbers in (value.shape, value.stride()))
    return sizes, strides, value.dtype, value.device


def thaw_graph(frozen: dict[str, Any]) -> fx.GraphModule:
    """The module that `freeze_graph` wrote down."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for op, target, args, kwargs, name, meta in frozen["nodes"]:
        if isinstance(target, tuple):
            _, namespace, packet, overload = target
            target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
        args, kwargs = _map((args, kwargs), _Reference, lambda reference: made[reference.name])
        made[name] = graph.create_node(op, target, args, kwargs, name)
        made[name].meta = dict(meta)
    module = ir.new_module(graph, frozen["interface"])
    for path, value in frozen["held"].items():
        ir.set_attribute(module, path, value)
    return module


def _map(value: Any, kind: type, change: Any) -> Any:
    """`value` with every object of a kind changed, inside tuples, lists, dicts and slices."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, tuple) and type(value) is not torch.Size:
        return tuple(_map(part, kind, change) for part in value)
    if isinstance(value, list):
        return [_map(part, kind, change) for part in value]
    if isinstance(value, dict):
        return {key: _map(part, kind, change) for key, part in value.items()}
    if isinstance(value, slice):
        return slice(*(_map(part, kind, change) for part in (value.start, value.stop, value.step)))
    return value


def freeze(session: Session) -> dict[str, Any]:
    """Everything of a session that can be written down."""
    session.packed.restore()
    options = session.options
    return {
        "original": session.original,
        "name": session.name,
        "options": {
            "passes": _named(options.passes),
            "backend": options.backend,
            "numerics": options.numerics,
            "verify": options.verify,
            "dynamic_shapes": options.dynamic_shapes,
            "strict": options.strict,
        },
        "programs": [
            {
                "captured": freeze_graph(program.captured.module),
                "front_end": program.captured.front_end,
                "module": freeze_graph(program.module),
                "guards": program.guards,
                "report": program.report,
                "passes": _named(program.passes),
                "proven": program.proven,
                "refused": program.refused,
            }
            for program in session.programs
        ],
        "before": freeze_graph(session.before),
        "after": freeze_graph(session.after),
        "report": session.report,
        "converted": session.converted,
    }


def _named(held: Any) -> Any:
    """Passes by their names where they are installed, else the objects, which pickle if their functions do."""
    if isinstance(held, tuple):
        return tuple(map(_named, held))
    found = plugins.available().get(held.name)
    return held.name if found is not None and found.current is held else held


def _passes(held: Any) -> Any:
    """The passes that `_named` wrote down, in the same groups."""
    if isinstance(held, tuple):
        return tuple(map(_passes, held))
    return plugins.named(held) if isinstance(held, str) else held


def thaw(state: dict[str, Any]) -> Session:
    """The session that `freeze` wrote down."""
    from fxopt.session import Session

    kept = dict(state["options"])
    kept["passes"] = _passes(kept["passes"])
    session = Session(state["original"], state["name"], Options(**kept))
    for frozen in state["programs"]:
        captured = Captured(thaw_graph(frozen["captured"]), frozen["front_end"])
        session.programs.append(
            Program(
                captured,
                frozen["guards"],
                thaw_graph(frozen["module"]),
                frozen["report"],
                _passes(frozen["passes"]),
                set(frozen["proven"]),
                set(frozen["refused"]),
            )
        )
    session.before, session.after = thaw_graph(state["before"]), thaw_graph(state["after"])
    session.report, session.converted = state["report"], state["converted"]
    return session
