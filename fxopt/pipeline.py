"""Runs passes over a module: the contract is checked before, between and after them; what fails is taken back.

A pass that raises, breaks the contract or changes the answer leaves no trace but its line in the report; the rest goes
on. With `strict` it raises instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from fxopt import check, cost, ir
from fxopt.compare import Verdict
from fxopt.driver import apply
from fxopt.edit import Editor
from fxopt.errors import FxoptError, VerificationError
from fxopt.journal import Journal
from fxopt.rewrite import Numerics, Pass

#: What a pipeline of each numerics admits.
_ADMITS: dict[Numerics, tuple[Numerics, ...]] = {
    "bitwise": ("bitwise",),
    "reassociate": ("bitwise", "reassociate"),
    "approximate": ("bitwise", "reassociate", "approximate"),
}

#: One step of a pipeline: a pass, or a group of passes that is repeated until none of them rewrites anything.
Step = Pass | tuple[Pass, ...]

#: A group that has not settled after so many rounds is left as it is, and said so.
MOST_ROUNDS = 10

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

    def then(self, again: PassResult) -> PassResult:
        """This result and that of running the pass again as one: the last word, over the sums of what both did.

        What was saved while shapes were not known cannot be told from what was saved after.
        """
        if not self.rewrites:
            return replace(again, seconds=self.seconds + again.seconds)
        after = None
        if self.work_after is not None and again.work_before is not None and again.work_after is not None:
            after = self.work_after + (again.work_after - again.work_before)
        return replace(
            again,
            rewrites=self.rewrites + again.rewrites,
            nodes_before=self.nodes_before,
            nodes_after=self.nodes_after + again.nodes_after - again.nodes_before,
            seconds=self.seconds + again.seconds,
            work_before=self.work_before,
            work_after=after,
        )

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


def flat(steps: Iterable[Step]) -> tuple[Pass, ...]:
    """The passes of a pipeline in order, those of groups among them."""
    return tuple(current for step in steps for current in (step if isinstance(step, tuple) else (step,)))


def only(steps: Iterable[Step], wanted: Callable[[Pass], bool]) -> tuple[Step, ...]:
    """A pipeline without the passes that are not wanted, and without groups that this leaves empty."""
    kept: list[Step] = []
    for step in steps:
        if isinstance(step, tuple):
            group = tuple(filter(wanted, step))
            kept += [group] if group else []
        elif wanted(step):
            kept.append(step)
    return tuple(kept)


def up_to(steps: Iterable[Step], place: int) -> tuple[Step, ...]:
    """The part in front of the pass at `place` in `flat(steps)`; of that pass's group, the first round."""
    kept: list[Step] = []
    for step in steps:
        size = len(step) if isinstance(step, tuple) else 1
        if size > place:
            return (*kept, *flat([step])[:place])
        kept.append(step)
        place -= size
    return tuple(kept)


@dataclass(frozen=True)
class PassManager:
    """A pipeline and how to run it: passes, and groups of passes that are repeated until none of them rewrites.

    `judge` compares the module with the original after each pass (`each`), or once at the end, where a wrong answer
    makes the passes run again, judged one by one. `strict` raises where a pass fails. `estimate` has the work around
    each pass estimated.
    """

    passes: Sequence[Step]
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
        total = len(flat(self.passes))
        for step in self.passes:
            run.results += self._group(step if isinstance(step, tuple) else (step,), run, total, judged=judged)
        if self.progress is not None:
            self.progress("done", total, total)
        return run

    def _group(self, group: tuple[Pass, ...], run: Run, total: int, *, judged: bool) -> list[PassResult]:
        """One result for each pass of a group. A pass alone runs once; several, until none of them rewrites.

        A pass runs again only where others have rewritten since. One that is skipped or fails is not tried again.
        """
        results: dict[int, PassResult] = {}
        seen: dict[int, int] = {}
        for _ in range(MOST_ROUNDS if len(group) > 1 else 1):
            before = len(run.journal.rewrites)
            for index, current in enumerate(group):
                earlier = results.get(index)
                if earlier is not None and (earlier.status != "done" or seen[index] == len(run.journal.rewrites)):
                    continue
                if self.progress is not None:
                    self.progress(current.name, len(run.results) + index, total)
                result = self._admitted(current) or self._one(current, run, judged=judged)
                results[index] = result if earlier is None else earlier.then(result)
                seen[index] = len(run.journal.rewrites)
            if len(run.journal.rewrites) == before:
                break
        else:
            if len(group) > 1:
                reason = f"its group had not come to rest after {MOST_ROUNDS} rounds"
                results = {index: replace(result, reason=result.reason or reason) for index, result in results.items()}
        return [results[index] for index in range(len(group))]

    def _admitted(self, current: Pass) -> PassResult | None:
        """None where the numerics that were asked for admit a pass; else its result: skipped."""
        if current.numerics in _ADMITS[self.numerics]:
            return None
        reason = f"it promises {current.numerics} only, and {self.numerics} was asked for"
        return PassResult(current.name, current.numerics, "skipped", reason=reason)

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
