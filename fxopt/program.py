"""A program: one capture, rewritten once, and lowered for each input signature that it fits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import fx

from fxopt import buffers, check, cost, effects, ir, normalize, plugins
from fxopt.capture import Captured, Inputs
from fxopt.edit import Editor
from fxopt.errors import FxoptError, InputError
from fxopt.guards import Guards
from fxopt.journal import Decline, Journal
from fxopt.lowering.backend import Backend, Runner, Setting, set_concrete_values
from fxopt.lowering.weights import Weights
from fxopt.pipeline import Judge, PassManager, PassResult, Progress, Step, only
from fxopt.report import Report, compute_nodes
from fxopt.rewrite import Numerics


@dataclass(frozen=True)
class Options:
    """What the caller of `fxopt.compile` chose."""

    passes: tuple[Step, ...]
    backend: str = "auto"
    numerics: Numerics = "reassociate"
    verify: bool | str = True
    dynamic_shapes: str | None = "batch"
    strict: bool = False
    progress: Progress | None = None


@dataclass
class Program:
    """A capture and its rewritten twin.

    `captured.module` is never changed after capture; `module` is the rewritten graph, valid for every input that
    `guards` admit, and `passes` are those that it owes itself to. A symbolic capture has no values yet: it is rewritten
    again, for concrete shapes, per signature. `refused` names the backends that once gave another answer for it;
    `lowered` has its living specialisations by what lowering looks at.
    """

    captured: Captured
    guards: Guards
    module: fx.GraphModule
    report: Report
    passes: tuple[Step, ...]
    proven: set[Any] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    lowered: WeakValueDictionary[Any, Specialisation] = field(default_factory=WeakValueDictionary)

    @property
    def symbolic(self) -> bool:
        """Whether shapes wait for each signature."""
        return self.captured.front_end == "symbolic"


#: Passes that ended so run again where shapes become known; what failed or was rolled back does not.
KEPT = ("done", "skipped")


def make_program(
    captured: Captured, model: str, options: Options, seconds: dict[str, float], judge: Judge | None = None
) -> Program:
    """Rewrites a copy of a captured module by the options' passes."""
    module, _ = ir.copy(captured.module)
    start = time.perf_counter()
    run = PassManager(
        options.passes,
        numerics=options.numerics,
        strict=options.strict,
        judge=judge,
        each=judge is not None and options.verify == "each",
        progress=options.progress,
        estimate=True,
    ).run(module)
    prune_attributes(module)
    seconds = {**seconds, "rewrite": time.perf_counter() - start}
    report = Report(
        model,
        captured.front_end,
        options.backend,
        compute_nodes(captured.module),
        compute_nodes(module),
        run.results,
        run.journal,
        notices=list(captured.notices) + [str(error) for error in plugins.broken().values()],
        seconds=seconds,
        work_before=cost.of_module(captured.module),
        work_after=run.work,
    )
    lost = {result.name for result in run.results if result.status not in KEPT}
    kept = only(options.passes, lambda current: current.name not in lost)
    guards = replace(Guards.of(captured), autocast=ir.autocast() if run.journal.rewrites else None)
    return Program(captured, guards, module, report, kept)


def prune_attributes(module: fx.GraphModule) -> None:
    """Drops the tensors that no node reads any more."""
    used = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    held = [name for name, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())]
    for name in held:
        parts = name.split(".")
        if not any(".".join(parts[:end]) in used for end in range(1, len(parts) + 1)):
            ir.delete_attribute(module, name)


# -- one signature ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Specialisation:
    """A program lowered for one signature: what to call, and the record of the lowering.

    `reads` are the tensors that it reads as they are; what it reads only as packed is not among them.
    """

    program: Program
    run: Runner
    backend: str
    module: fx.GraphModule
    lowering: list[PassResult]
    declines: list[Decline]
    reads: list[torch.Tensor]


def concrete_module(program: Program, inputs: Inputs, options: Options) -> tuple[fx.GraphModule, Report]:
    """The rewritten graph with the values it has on inputs of exactly these shapes.

    A symbolic program is rewritten again, now that shapes are known; the first time with its work estimated. Raises
    InputError where the model's own checks refuse the inputs.
    """
    captured = _with_values(program.captured.module, inputs) if program.symbolic else program.captured.module
    module, _ = ir.copy(program.module)
    set_concrete_values(module, inputs.tensors)
    normalize.normalize(module)
    buffers.settle(Editor(module))  # by these inputs' strides a part may lie in memory in another order than planned
    if not program.symbolic:
        return module, program.report
    first = not program.proven
    run = PassManager(program.passes, numerics=options.numerics, strict=options.strict, estimate=first).run(module)
    prune_attributes(module)
    report = _joined(program.report, run.results, run.journal, compute_nodes(module))
    if first:
        normalize.normalize(captured)  # calls that tracing left whole are of unknown work
        report = replace(report, work_before=cost.of_module(captured), work_after=run.work)
    return module, report


def _with_values(module: fx.GraphModule, inputs: Inputs) -> fx.GraphModule:
    """A captured module with the values that it has on these inputs.

    What a module's own check said of its input's rank while tracing must hold for them: else InputError.
    """
    concrete, _ = ir.copy(module)
    try:
        set_concrete_values(concrete, inputs.tensors)
    except FxoptError:
        raise
    except Exception as error:
        raise InputError(
            f"the model does not take these inputs: {str(error).splitlines()[0]}", hint=describe(inputs)
        ) from error
    for node in concrete.graph.nodes:
        proved, found = node.meta.get("rank"), ir.fake(node)
        if proved is not None and found is not None and found.dim() != proved:
            raise InputError(
                f"expected a value of {proved} dimensions here, got {found.dim()} ({ir.describe_value(found)})",
                node=node,
                hint=f"the call was given {describe(inputs)}",
            )
    return concrete


def describe(inputs: Inputs) -> str:
    """The inputs of a call in words."""
    return ", ".join(
        f"{name}: {ir.describe_value(leaf) if isinstance(leaf, torch.Tensor) else repr(leaf)}"
        for name, leaf in zip(inputs.names, inputs.leaves, strict=True)
    )


def _joined(report: Report, results: list[PassResult], journal: Journal, after: int) -> Report:
    """The report of the first run and of the run with shapes as one: per pass the sum, of declines the last word."""
    again = {result.name: result for result in results}
    merged = [first.then(again[first.name]) if first.name in again else first for first in report.passes]
    rewrites = [*report.journal.rewrites, *journal.rewrites]
    gone = {name for rewrite in rewrites for name in rewrite.removed}
    declines = {key: d for key, d in report.journal.declines.items() if not d.pending and d.node not in gone}
    both = Journal(rewrites, {**declines, **journal.declines})
    return replace(report, passes=merged, journal=both, after=after)


def lower(
    program: Program, module: fx.GraphModule, backend: Backend, packed: Weights, options: Options
) -> Specialisation:
    """Lowers a concrete module (in place) by a backend's passes and builds what to call."""
    for node in module.graph.nodes:
        values = [ir.fake(operand) for operand in node.all_input_nodes]
        node.meta["operand_strides"] = tuple(None if v is None else tuple(v.stride()) for v in values)
    module.meta["packed"] = packed  # what is packed already decides which kernel takes a weight
    results: list[PassResult] = []
    declines: list[Decline] = []
    if backend.passes:
        run = PassManager(backend.passes, numerics="approximate", strict=options.strict).run(module)
        results, declines = run.results, list(run.journal.declines.values())
        failed = next((result for result in results if result.status != "done"), None)
        if failed is not None:
            raise FxoptError(f"lowering by {backend.name} failed in {failed.name}: {failed.reason}")
    check.check(module, after=f"lowering by {backend.name}")
    tensors = {ir.place(tensor): tensor for tensor in ir.tensors(module).values()}
    runner = backend.build(module, packed)
    reads = [tensor for place, tensor in tensors.items() if place not in packed.only_packed]
    reads += [tensor for _, tensor in of_leaves(module)]
    return Specialisation(program, runner, backend.name, module, results, declines, reads)


def of_leaves(module: fx.GraphModule) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of torch's own modules that stay whole; what else an opaque module holds it may write itself."""
    for node in module.graph.nodes:
        if node.op == "call_module" and not effects.of(node).opaque:
            for name, tensor in ir.get_attribute(module, node.target).named_parameters():
                yield f"{node.target}.{name}", tensor


def choose_backend(name: str, numerics: str, module: fx.GraphModule, setting: Setting) -> tuple[Backend, list[str]]:
    """The backend for one specialisation, and why a better or asked-for one was passed over."""
    portable: Backend = plugins.backend("aten")
    wanted = ["onednn"] if name == "auto" else [name]
    notices = []
    for candidate in wanted:
        backend: Backend = plugins.backend(candidate)
        if numerics == "bitwise" and backend.numerics != "bitwise":
            notices.append(f"backend {candidate} passed over: it does not promise the same bits")
            continue
        refusal = backend.declines(module, setting)
        if refusal is None:
            return backend, notices
        notices.append(f"backend {candidate} passed over: {refusal}")
    return portable, notices

