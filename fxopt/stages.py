"""A compiled module's graph in front of and behind one pass, found by running the pipeline again up to there.

Passes are deterministic, and the captured graph is kept; only what the passes made is not kept at every step. Where
running again does other than the report says, the stage says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import optimization_hint

from fxopt import ir, normalize, plugins
from fxopt.errors import UsageError
from fxopt.journal import Decline, Rewrite
from fxopt.lowering.backend import Backend, set_concrete_values
from fxopt.lowering.weights import Weights
from fxopt.pipeline import PassManager, PassResult, flat, only, up_to
from fxopt.program import lower
from fxopt.rewrite import Pass
from fxopt.session import Session


@dataclass
class Stage:
    """One graph that became another, the record of how, and what a reader has to know about it."""

    before: fx.GraphModule
    after: fx.GraphModule
    rewrites: Sequence[Rewrite] = ()
    declines: Sequence[Decline] = ()
    notes: list[str] = field(default_factory=list)


def whole(session: Session) -> Stage:
    """From the captured graph to the rewritten one."""
    report = session.report
    stage = Stage(session.before, session.after, report.rewrites, report.declines)
    if not session.programs:
        stage.notes.append(f"there is no graph yet: {report.verification}")
    if report.front_end == "symbolic":
        stage.before = _with_sizes(session) or session.before
    if report.pending:
        stage.notes.append(f"{len(report.pending)} rewrites wait for the first call's shapes")
    return stage


def one_pass(session: Session, name: str) -> Stage:
    """From what a pass was given to what it made. Raises UsageError where the pipeline has no pass of this name."""
    report, passes = session.report, flat(session.options.passes)
    lowering = plugins.backend(report.backend).passes if report.lowering else ()
    known = [current.name for current in (*passes, *lowering)]
    if name not in known:
        raise UsageError(f"no pass of this compilation is named {name!r}", hint=f"there are: {', '.join(known)}")
    place = known.index(name)
    current = (*passes, *lowering)[place]
    if place < len(passes):
        module, results = _start(session), report.passes
        done = {result.name for result in results if result.status == "done"}
        earlier = only(up_to(session.options.passes, place), lambda current: current.name in done)
        PassManager(earlier, numerics="approximate").run(module)
    else:
        module, results = _start_lowering(session, name), report.lowering
    reported = next((result for result in results if result.name == name), PassResult(name, ""))
    before, _ = ir.copy(module)
    if reported.status != "done":
        return Stage(before, module, notes=[f"{name} was {reported.status}: {_first_line(reported.reason)}"])
    stage = _run(current, before, module, reported)
    if known.count(name) > 1:
        stage.notes.append(f"{name} runs {known.count(name)} times; this is the first")
    return stage


def _run(current: Pass, before: fx.GraphModule, module: fx.GraphModule, reported: PassResult) -> Stage:
    run = PassManager((current,), numerics="approximate").run(module)
    journal, result = run.journal, run.results[0]
    stage = Stage(before, module, journal.rewrites, list(journal.declines.values()))
    if result.status != "done":
        stage.notes.append(f"run again for this picture, the pass {result.status}: {_first_line(result.reason)}")
    elif result.rewrites != reported.rewrites:
        stage.notes.append(
            f"run again for this picture, the pass made {result.rewrites} rewrites; when compiled, {reported.rewrites}"
        )
    return stage


# -- where a pass starts from ----------------------------------------------------------------------------------------


def _start(session: Session) -> fx.GraphModule:
    """What the first pass was given; where shapes became known only later, with these, as if known from the start."""
    known = all(ir.value(node) is not None for node in session.before.graph.find_nodes(op="placeholder"))
    module = None if known else _with_sizes(session)
    if module is None:
        return ir.copy(session.before)[0]
    normalize.normalize(module)
    return module


def _with_sizes(session: Session) -> fx.GraphModule | None:
    """The captured graph with the sizes of the call that finished it; None before that."""
    examples = _examples(session.after)
    if examples is None:
        return None
    module, _ = ir.copy(session.before)
    set_concrete_values(module, examples)
    return module


def _examples(module: fx.GraphModule) -> list[torch.Tensor] | None:
    """Tensors like the inputs that the graph's values were inferred for, open sizes as captured; None where unknown.

    A module that was loaded has no values any more, but `meta["like"]` (see `fxopt.frozen`).
    """
    found: list[torch.Tensor] = []
    for node in module.graph.find_nodes(op="placeholder"):
        value, like = ir.fake(node), node.meta.get("like")
        if value is not None and value.layout is torch.strided:
            sizes, strides = (tuple(map(optimization_hint, part)) for part in (value.shape, value.stride()))
            like = (sizes, strides, value.dtype, value.device)
        if like is None:
            return None
        found.append(torch.empty_strided(like[0], like[1], dtype=like[2], device=like[3]))
    return found


def _start_lowering(session: Session, name: str) -> fx.GraphModule:
    """The rewritten graph, lowered by the backend's passes in front of one, for the sizes that it was captured with."""
    backend: Backend = plugins.backend(session.report.backend)
    module, _ = ir.copy(session.after)
    examples = _examples(module)
    if examples is None:
        raise UsageError(
            f"the sizes that {name!r} lowered the graph for are not known any more",
            hint="call the compiled module once, or compile it again",
        )
    set_concrete_values(module, examples)
    normalize.normalize(module)
    place = [current.name for current in backend.passes].index(name)
    earlier = replace(backend, passes=backend.passes[:place], build=lambda *_: tuple)
    lower(session.programs[0], module, earlier, Weights(), session.options)
    return module


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
