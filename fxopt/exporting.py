"""Out to torch.export, and in from it.

What goes out is the rewritten graph in plain ATen, as torch.export takes it from a module that runs it node by node.
Its sizes are as open as the capture's, whose guards it keeps.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._prims_common import suggest_memory_format
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from fxopt import hints, ir, ops
from fxopt.capture import Inputs
from fxopt.capture.export import first_lines, quiet
from fxopt.capture.program import line_of_trace
from fxopt.errors import ExportError, FxoptNotice, InputError, UsageError, VerificationError
from fxopt.program import Program
from fxopt.session import Session
from fxopt.trial import seeded


class GraphModel(torch.nn.Module):
    """A graph as a module with a signature of its own.

    It runs node by node, so that torch.export notes in what it takes where each node came from. `flatten` makes the
    placeholders' values of a call's arguments, `unflatten` the call's result of the graph's.
    """

    _run: tuple[fx.Graph, inspect.Signature | None, Callable[..., Sequence[Any]], Callable[[Sequence[Any]], Any]]

    def __init__(
        self,
        module: fx.GraphModule,
        signature: inspect.Signature | None,
        flatten: Callable[..., Sequence[Any]],
        unflatten: Callable[[Sequence[Any]], Any],
    ) -> None:
        super().__init__()
        for node in module.graph.nodes:
            if node.op in ("get_attr", "call_module") and not ir.has_attribute(self, node.target):
                ir.set_attribute(self, node.target, ir.get_attribute(module, node.target))
        for part in self.modules():
            part.training = False
        object.__setattr__(self, "_run", (module.graph, signature, flatten, unflatten))
        self._sign()

    def _sign(self) -> None:
        """Gives this object's `forward` its signature, which torch.export takes the names of the inputs from."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            return GraphModel.forward(self, *args, **kwargs)

        signature = self._run[1]
        if signature is not None:
            forward.__signature__ = signature  # type: ignore[attr-defined]
            object.__setattr__(self, "forward", forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph on the arguments of its signature."""
        graph, _, flatten, unflatten = self._run
        with fx.traceback.preserve_node_meta():
            given = flatten(*args, **kwargs)
            return unflatten(fx.Interpreter(self, graph=graph).run(*given, enable_io_processing=False))

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphModel:
        memo[id(self)] = twin = GraphModel.__new__(GraphModel)
        for name, held in self.__dict__.items():
            if name != "forward":
                twin.__dict__[name] = held if name == "_run" else copy.deepcopy(held, memo)
        twin._sign()
        return twin


# -- in --------------------------------------------------------------------------------------------------------------


def taken(program: ExportedProgram) -> GraphModel:
    """An exported program as a model: the same signature, the same tensors, its guards.

    Raises UsageError where it was exported in training mode, which is part of its graph.
    """
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if _trains(node):
                raise UsageError(
                    f"the program was exported in training mode, as {node.name} ({ir.target_name(node)}) shows: it "
                    f"cannot be compiled as in eval mode",
                    hint=f"call model.eval() before torch.export.export; the node is of "
                    f"{line_of_trace(node.meta.get('stack_trace') or '') or 'an unknown line'}",
                )
    unlifted = program.module()
    spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    signature = inspect.signature(unlifted.forward)
    count = spec.child(0).num_children

    def flatten(*args: Any, **kwargs: Any) -> list[Any]:
        given = signature.bind(*args, **kwargs).arguments
        by_place = tuple(given.values())[:count]
        by_name = dict(list(given.items())[count:])
        return fx._pytree.tree_flatten_spec((by_place, by_name), spec)

    return GraphModel(unlifted, signature, flatten, lambda results: pytree.tree_unflatten(results, out_spec))


def _trains(node: fx.Node) -> bool:
    """Whether a node does what it does in training only: normalises by a batch and updates statistics, or drops out."""
    if ir.schema(node.target) is None:
        return False
    given = ir.arguments(node)
    return given.get("training", given.get("train")) is True and given.get("running_mean", node) is not None


# -- out -------------------------------------------------------------------------------------------------------------


def exported(work: Session) -> ExportedProgram:
    """What a session captured first, rewritten, as an exported program with tensors of its own.

    Raises UsageError where shapes are not known yet, ExportError where torch.export refuses the graph, and
    VerificationError where the result does not give the original's answer.
    """
    made = export(work)
    memo: dict[int, Any] = {}  # what is tied stays tied
    for held in (made.state_dict, made.constants):
        held.update(copy.deepcopy(held, memo))
    return made


def export(work: Session, *, opened: bool = True) -> ExportedProgram:
    """The same with tensors that are the session's own; every size is the example's unless `opened`."""
    program = _open_program(work)
    opened = opened and _serves_one(program, work)
    inputs = _examples(program, opened)
    made = _export(program, inputs, work, opened)
    if work.options.verify:
        _verify(made, inputs, work)
    return made


def _open_program(work: Session) -> Program:
    """The first program; where that was traced, which is rewritten for one signature at a time, one that torch.export
    captures for the same inputs."""
    if not work.programs:
        raise UsageError("nothing is captured yet", hint="call the compiled module once, or give example inputs")
    if not work.programs[0].symbolic:
        return work.programs[0]
    inputs = _stand_ins(work.after, int)
    for program in work.programs[1:]:
        if program.guards.refusal(inputs) is None:
            return program
    return work._capture_checked(inputs, work.options.dynamic_shapes)


def _stand_ins(module: fx.GraphModule, number: Callable[[Any], int]) -> Inputs:
    """Inputs as a graph takes them: random numbers, and ones where they are integers; `number` is that of a size."""
    interface, generator = ir.interface(module), torch.Generator().manual_seed(0)
    leaves = [interface.constants.get(place) for place in range(interface.in_spec.num_leaves)]
    places = [place for place in range(len(leaves)) if place not in interface.constants]
    for place, node in zip(places, module.graph.find_nodes(op="placeholder"), strict=True):
        value = ir.fake(node)
        if value is None:
            raise UsageError("shapes are not known yet", hint="call the compiled module once, or give example inputs")
        made = torch.ones([number(size) for size in value.shape])
        if value.is_floating_point() or value.is_complex():
            made = torch.randn(made.shape, generator=generator)
        made = made.to(value.device, value.dtype)
        leaves[place] = made.contiguous(memory_format=suggest_memory_format(value))
    return Inputs.flatten(*pytree.tree_unflatten(leaves, interface.in_spec))


def _examples(program: Program, opened: bool) -> Inputs:
    """Stand-ins to export a program with: of the sizes that it was captured with, or of the user's own."""
    return _stand_ins(program.module, _number if opened else lambda size: hints.hint(size) or 0)


def is_open(size: Any) -> bool:
    """Whether a size is more than one number."""
    return type(size) is not int and size.node.maybe_as_int() is None


def _number(size: Any) -> int:
    """A size as it was when it was captured: 2, say, in the place of the user's 1."""
    return size if type(size) is int else int(size.node.hint)


def _serves_one(program: Program, work: Session) -> bool:
    """Whether a program says what the model does on a batch of 1, if its batch is open; else a notice says that it does
    not. No guard can say so: to torch.export an open size is at least 2."""
    inputs = _examples(program, opened=True)
    nodes = program.module.graph.find_nodes(op="placeholder")
    batched = [any(map(is_open, (ir.shape(node) or ())[:1])) for node in nodes]
    if not any(batched):
        return True
    single = inputs.with_tensors(
        tuple(tensor[:1] if first else tensor for tensor, first in zip(inputs.tensors, batched, strict=True))
    )
    if program.guards.refusal(single) is not None:
        return True
    try:
        difference = work._disagreement(program.captured, single)
    except InputError:
        return True
    if difference is not None:
        tell(work, f"exported for the example's sizes only: the model takes another branch at batch 1 ({difference})")
    return difference is None


def tell(work: Session, notice: str) -> None:
    """Puts a notice about an export into the report, and before the caller (FxoptNotice)."""
    if notice not in work.report.notices:
        work.report.notices.append(notice)
    warnings.warn(notice, FxoptNotice, stacklevel=4)


def _export(program: Program, inputs: Inputs, work: Session, opened: bool) -> ExportedProgram:
    """The rewritten graph by torch.export. Raises ExportError."""
    if program.guards.autocast:
        raise UsageError(
            "the model was compiled under autocast, and its casts are not in the graph",
            hint="compile and export outside of torch.autocast, or convert the model: model.half()",
        )
    plain, _ = ir.copy(program.module)
    ops.decompose_all(plain)
    shapes = ShapesCollection()
    for tensor, node in zip(inputs.tensors, plain.graph.find_nodes(op="placeholder"), strict=True):
        dims = {dim: Dim.AUTO for dim, size in enumerate(ir.shape(node) or ()) if is_open(size)}
        if dims and opened:
            shapes[tensor] = dims
    for node in plain.graph.nodes:
        node.meta = _provenance(node)

    def flatten(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        given = Inputs.flatten(args, kwargs)
        refusal = program.guards.refusal(given)  # on open sizes, each question becomes a guard of the new program
        if refusal is not None:
            raise InputError(refusal)
        return given.tensors

    out_spec = ir.interface(plain).out_spec
    model = GraphModel(
        plain, _signature(work.original), flatten, lambda results: pytree.tree_unflatten(results, out_spec)
    )
    try:
        with quiet(), torch.inference_mode(False), torch.set_grad_enabled(program.captured.grad):
            chosen: Any = shapes if len(shapes) else None  # torch's annotation lacks ShapesCollection
            return torch.export.export(model, *inputs.call(), strict=False, dynamic_shapes=chosen)
    except Exception as error:
        raise ExportError(f"torch.export does not take the rewritten graph: {first_lines(error)}") from error


def _signature(model: torch.nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None


def _provenance(node: fx.Node) -> dict[str, Any]:
    """Where a node came from, as torch.export writes it down."""
    origins = ir.origins(node)
    if not origins or node.op not in ("call_function", "call_module"):
        return {}
    origin = next((found for found in origins if found.module), origins[0])
    found: dict[str, Any] = {"nn_module_stack": {origin.module: (origin.module, "torch.nn.Module")}}
    line = re.fullmatch(r"(.+):(\d+) (in .+)", origin.line)
    if line is not None:
        found["stack_trace"] = f'  File "{line[1]}", line {line[2]}, {line[3]}\n'
    return found


def _verify(made: ExportedProgram, inputs: Inputs, work: Session) -> None:
    """Raises VerificationError where the program does not give the original's answer on stand-ins; where the original
    refuses them (there may be numbers that it does not take), nothing is compared, and a notice says so."""
    with torch.inference_mode(False), torch.no_grad():
        try:
            expected = work._run_original(inputs)
        except InputError as error:
            tell(work, f"the exported program was not compared: {error.message}")
            return
        module = made.module()

        def run(*tensors: torch.Tensor) -> list[Any]:
            args, kwargs = inputs.with_tensors(tensors).call()
            return pytree.tree_leaves(module(*args, **kwargs))

        with work._kept(module) as kept:
            actual = kept.apart(seeded(run, inputs))
        verdict = work._compare(expected, actual, inputs)
    if not verdict.ok:
        raise VerificationError(f"the exported program gives another answer than the model: {verdict.reason}")
