"""Runs passes over a module: the contract is checked before, between and after them; what fails is taken back.

A pass that raises, breaks the contract or changes the answer leaves no trace but its line in the report; the rest goes
on. With `strict` it raises instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from fxopt import check, cost, ir
from fxopt.compare import Verdict
from fxopt.edit import Editor
from fxopt.errors import FxoptError, VerificationError
from fxopt.rewrite import Journal, Numerics, Pass, apply

#: What a pipeline of each numerics admits.
_ADMITS: dict[Numerics, tuple[Numerics, ...]] = {
    "bitwise": ("bitwise",),
    "reassociate": ("bitwise", "reassociate"),
    "approximate": ("bitwise", "reassociate", "approximate"),
}

#: Runs the module as it is on the example inputs and compares with the original.
Judge = Callable[[fx.GraphModule], Verdict]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class PassResult:
    """What one pass did. `status` is done, skipped, failed or rolled back; `seconds` wall time.

    `work_before` and `work_after` are the module's estimated work around the pass, where that was asked for.
    """

    name: str
    numerics: str
    status: str = "done"
    rewrites: int = 0
    declines: int = 0
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    reason: str = ""
    verdict: Verdict | None = None
    work_before: cost.Total | None = None
    work_after: cost.Total | None = None

    @property
    def change(self) -> str:
        """What the pass saved by estimate, in words; "unknown" where shapes were not known, empty where nothing."""
        if self.work_before is None or self.work_after is None or not self.rewrites:
            return ""
        return cost.change(self.work_before, self.work_after)

    def to_dict(self) -> dict[str, Any]:
        """The result for programs."""
        return {
            "name": self.name,
            "numerics": self.numerics,
            "status": self.status,
            "rewrites": self.rewrites,
            "declines": self.declines,
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "seconds": round(self.seconds, 4),
            "reason": self.reason,
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "work": both(self.work_before, self.work_after),
        }


def both(before: cost.Total | None, after: cost.Total | None) -> dict[str, Any] | None:
    """Work before and after for programs."""
    if before is None or after is None:
        return None
    return {"before": before.to_dict(), "after": after.to_dict()}


@dataclass
class Run:
    """One run of a pipeline: the edits (to undo), the journal, each pass's result; the work so far, by estimate."""

    editor: Editor
    journal: Journal = field(default_factory=Journal)
    results: list[PassResult] = field(default_factory=list)
    work: cost.Total | None = None


def compute_nodes(module: fx.GraphModule) -> int:
    """How many nodes of a module are work at run time."""
    return sum(map(ir.is_compute, module.graph.nodes))


@dataclass(frozen=True)
class PassManager:
    """A tuple of passes and how to run them.

    `judge` compares the module with the original after each pass (`each`), or once at the end, where a wrong answer
    makes the passes run again, judged one by one. `strict` raises where a pass fails. `estimate` has the work around
    each pass estimated.
    """

    passes: Sequence[Pass]
    numerics: Numerics = "reassociate"
    strict: bool = False
    judge: Judge | None = None
    each: bool = False
    progress: Progress | None = None
    estimate: bool = False

    def run(self, module: fx.GraphModule) -> Run:
        """Runs every pass over `module`, in place.

        Raises CheckError if the module is not in normal form to begin with; with `strict`, what a pass raises, and
        VerificationError for the pass that changes the answer.
        """
        check.check(module, after="what came before the passes")
        run = self._sweep(module, judged=self.each)
        if self.judge is not None and not self.each and run.journal.rewrites:
            verdict = self.judge(module)
            if not verdict.ok:
                run.editor.undo()
                run = self._sweep(module, judged=True)
        return run

    def _sweep(self, module: fx.GraphModule, *, judged: bool) -> Run:
        run = Run(Editor(module), work=cost.of_module(module) if self.estimate else None)
        for index, current in enumerate(self.passes):
            if self.progress is not None:
                self.progress(current.name, index, len(self.passes))
            if current.numerics not in _ADMITS[self.numerics]:
                reason = f"it promises {current.numerics} only, and {self.numerics} was asked for"
                run.results.append(PassResult(current.name, current.numerics, "skipped", reason=reason))
                continue
            run.results.append(self._one(current, run, judged=judged))
        if self.progress is not None:
            self.progress("done", len(self.passes), len(self.passes))
        return run

    def _one(self, current: Pass, run: Run, *, judged: bool) -> PassResult:
        module, mark = run.editor.module, run.editor.mark()
        rewrites, declines = len(run.journal.rewrites), dict(run.journal.declines)
        start = time.perf_counter()
        nodes = compute_nodes(module)
        result = PassResult(current.name, current.numerics, nodes_before=nodes, work_before=run.work)
        try:
            apply(current, run.editor, run.journal)
            check.check(module, after=f"the pass {current.name!r}")
            if judged and self.judge is not None and len(run.journal.rewrites) > rewrites:
                verdict = self.judge(module)
                result = replace(result, verdict=verdict)
                if not verdict.ok:
                    raise VerificationError(
                        f"the pass changes the answer: {verdict.reason}",
                        pass_name=current.name,
                        hint=f"disable=({current.name!r},) leaves it out; please report it",
                    )
        except FxoptError as error:
            if self.strict:
                raise
            run.editor.undo(mark)
            del run.journal.rewrites[rewrites:]
            run.journal.declines = declines
            status = "rolled back" if isinstance(error, VerificationError) else "failed"
            result = replace(result, status=status, reason=str(error))
        seconds = time.perf_counter() - start
        if run.work is not None and len(run.journal.rewrites) > rewrites:
            run.work = cost.of_module(module)
        made = [entry for entry in run.journal.declines.values() if entry.pass_name == current.name and entry.fits]
        return replace(
            result,
            rewrites=len(run.journal.rewrites) - rewrites,
            declines=len(made),
            nodes_after=compute_nodes(module),
            seconds=seconds,
            work_after=run.work,
        )
