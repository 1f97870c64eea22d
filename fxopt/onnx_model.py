"""Out to ONNX: the program that `fxopt.exporting` gives, through torch.onnx."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.utils import _pytree as pytree

from fxopt import effects, exporting
from fxopt.capture.export import first_lines, quiet
from fxopt.capture.program import line_of_trace
from fxopt.errors import ExportError, UsageError
from fxopt.session import Session

#: Bytes of weights that go into an ONNX file; more go beside it, because protobuf ends at 2 GiB.
MOST_INSIDE = 1_800_000_000

_SIZE = r"L(?:\[[^]]+\])+\.size\(\)\[\d+\]"
#: A guard that shapes say by themselves: a size is a number, or another size.
_SAID_BY_SHAPES = re.compile(rf"{_SIZE} == (?:\d+|{_SIZE})")


def write(work: Session, path: str | Path, opset: int | None) -> None:
    """Writes what a session captured first, rewritten, as an ONNX model.

    Raises UsageError where a package is missing, ExportError where torch.onnx does not take the graph or would lose a
    part of it, and what `exporting.export` raises.
    """
    for name in ("onnx", "onnxscript"):
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise UsageError(f"ONNX needs the package {name}", hint="pip install 'fxopt[onnx]'") from error
    made = exporting.export(work)
    unsaid = [guard for guard in made._guards_code if not _SAID_BY_SHAPES.fullmatch(guard)]
    if unsaid:
        exporting.tell(work, f"in ONNX for the example's sizes only: ONNX cannot ask whether {unsaid[0]}")
        made = exporting.export(work, opened=False)
    _refuse_writes(made, work)
    names = _output_names(made)
    try:
        with quiet():
            converted = torch.onnx.export(
                made,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=list(_tensors(made)),
                output_names=names,
                dynamic_shapes=_axis_names(made),
            )
    except Exception as error:
        raise _refused(error, made) from error
    assert converted is not None
    size = sum(tensor.nbytes for tensor in (*made.state_dict.values(), *made.constants.values()))
    converted.save(str(path), external_data=size > MOST_INSIDE)


def _refuse_writes(made: ExportedProgram, work: Session) -> None:
    """Raises ExportError where a model writes to what outlives the call: torch.onnx would drop that without a word."""
    if not any(effects.Aliases.scan(program.module.graph).writers for program in work.programs):
        return
    for output in made.run_decompositions({}).graph_signature.output_specs:
        if output.kind is not OutputKind.USER_OUTPUT:
            raise ExportError(f"the model writes to {output.target}, which an ONNX model cannot keep")


def _refused(error: Exception, made: ExportedProgram) -> ExportError:
    """What torch.onnx says, of which node, and the user's line."""
    name, last = "", error
    while isinstance(last.__cause__, Exception):
        last = last.__cause__
        found = re.match(r"Error when translating node %(\w+)", str(last))
        name = found[1] if found else name
    nodes = {node.name: node for node in made.graph.nodes}
    node = nodes.get(name) or nodes.get(name.strip("_"))  # torch.onnx has decomposed `linalg_eigh` to `_linalg_eigh`
    return ExportError(
        f"torch.onnx cannot export {name or 'the graph'}: {first_lines(last)}",
        line=line_of_trace(node.meta.get("stack_trace") or "") if node is not None else None,
    )


def _tensors(made: ExportedProgram) -> dict[str, torch.Tensor]:
    """The tensors that a program is called with, by name; what else it is called with is no input of an ONNX model."""
    nodes = made.graph.find_nodes(op="placeholder")
    given = {node.name: node.meta.get("val") for node in nodes if node.name in made.graph_signature.user_inputs}
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}


def _output_names(made: ExportedProgram) -> list[str]:
    """The names of the tensors that a program gives: those of its structure, or output, or output_0 and output_1.

    Raises ExportError where it gives anything but tensors and None, which ONNX leaves out.
    """
    spec, taken = made.call_spec.out_spec, set(made.graph_signature.user_inputs)
    found, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(range(spec.num_leaves), spec))
    names: list[str] = []
    for (path, _), output in zip(found, made.graph_signature.output_specs, strict=True):
        if isinstance(output.arg, ConstantArgument):
            if output.arg.value is not None:
                raise ExportError(f"the model gives {output.arg.value!r}, and an ONNX model gives tensors only")
            continue
        name = re.sub(r"\W+", "_", pytree.keystr(path)).strip("_")
        name = name if name and not name[0].isdigit() else f"output_{name}".rstrip("_")
        while name in taken:
            name += "_"
        taken.add(name)
        names.append(name)
    return names


def _axis_names(made: ExportedProgram) -> list[dict[int, str]]:
    """For each tensor that a program takes, the names of the open sizes that no tensor before it has."""
    found: list[dict[int, str]] = []
    known: set[str] = set()
    for name, value in _tensors(made).items():
        found.append({})
        for dim, size in enumerate(value.shape):
            if exporting.is_open(size) and str(size) not in known:
                found[-1][dim] = f"{name}_{dim}" if known or dim else "batch"
                known.add(str(size))
    return found
