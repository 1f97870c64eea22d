"""What a compilation did: per pass the rewrites, refusals and why, nodes, time, error; and the story of each layer."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from fxopt import cost, ir
from fxopt.compare import Verdict
from fxopt.errors import UsageError
from fxopt.journal import Decline, Journal, Rewrite
from fxopt.pipeline import PassResult, both, compute_nodes

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass
class Report:
    """The record of one compiled program, to print or (`to_dict`) to process.

    `before` and `after` count nodes that are work at run time; `work_before` and `work_after` estimate that work for
    the sizes of the example (see fxopt.cost); `seconds` has wall time per stage.
    """

    model: str
    front_end: str
    backend: str
    before: int
    after: int
    passes: list[PassResult]
    journal: Journal
    notices: list[str] = field(default_factory=list)
    verdict: Verdict | None = None
    verification: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    lowering: list[PassResult] = field(default_factory=list)
    lowering_declines: list[Decline] = field(default_factory=list)
    work_before: cost.Total | None = None
    work_after: cost.Total | None = None

    @property
    def rewrites(self) -> list[Rewrite]:
        """Every rewrite that happened, in order."""
        return self.journal.rewrites

    @property
    def declines(self) -> list[Decline]:
        """Every rewrite that did not happen, and why; those of lowering last."""
        return [*self.journal.declines.values(), *self.lowering_declines]

    @property
    def pending(self) -> list[Decline]:
        """What waits for the first call, which brings shapes."""
        return [decline for decline in self.declines if decline.pending]

    @property
    def estimate(self) -> str:
        """The estimated work before and after in a line; empty where there is none yet."""
        if self.work_before is None or self.work_after is None:
            return ""
        return cost.describe(self.work_before, self.work_after)

    def to_dict(self) -> dict[str, Any]:
        """The report for programs: only JSON's types."""
        return {
            "model": self.model,
            "front_end": self.front_end,
            "backend": self.backend,
            "nodes": {"before": self.before, "after": self.after},
            "work": both(self.work_before, self.work_after),
            "passes": [result.to_dict() for result in self.passes],
            "lowering": [result.to_dict() for result in self.lowering],
            "rewrites": [
                {
                    "pass": rewrite.pass_name,
                    "rule": rewrite.rule,
                    "replaced": [list(pair) for pair in rewrite.replaced],
                    "removed": list(rewrite.removed),
                    "added": list(rewrite.added),
                    "modules": _modules(rewrite.origins),
                }
                for rewrite in self.rewrites
            ],
            "declines": [
                {
                    "pass": decline.pass_name,
                    "rule": decline.rule,
                    "node": decline.node,
                    "reason": decline.reason,
                    "pending": decline.pending,
                    "fits": decline.fits,
                    "modules": _modules(decline.origins),
                }
                for decline in self.declines
            ],
            "notices": list(self.notices),
            "verification": self.verification,
            "verdict": None if self.verdict is None else self.verdict.to_dict(),
            "seconds": {stage: round(value, 4) for stage, value in self.seconds.items()},
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"fxopt: {self.model}", title_justify="left", expand=False)
        for heading, justify in (
            ("pass", "left"),
            ("rewrites", "right"),
            ("declined", "right"),
            ("nodes", "right"),
            ("estimated change", "left"),
            ("ms", "right"),
            ("numerics", "left"),
            ("status", "left"),
        ):
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        for result in (*self.passes, *self.lowering):
            change = f"{result.nodes_before} -> {result.nodes_after}" if result.nodes_before else ""
            status = result.status
            if result.verdict is not None and result.verdict.ok:
                status += f", error {result.verdict.error:.1e}"
            if result.reason:
                status += ": " + result.reason.splitlines()[0]
            table.add_row(
                result.name,
                str(result.rewrites),
                str(result.declines),
                change,
                result.change,
                f"{1000 * result.seconds:.0f}",
                result.numerics,
                Text(status),
            )
        yield table
        times = ", ".join(f"{stage} {value:.2f} s" for stage, value in self.seconds.items())
        nodes = f"{self.before} -> {self.after} nodes"
        yield Text(f"captured by {self.front_end}; {nodes}; backend {self.backend}; {times}")
        if self.estimate:
            yield Text(self.estimate)
        yield Text(f"verified: {self.verdict}" if self.verdict is not None else f"not verified: {self.verification}")
        for reason, count in self.common_reasons():
            yield Text(f"  declined {count}x: {reason}")
        if self.pending:
            yield Text(f"  pending: {len(self.pending)} rewrites wait for the first call's shapes")
        for notice in self.notices:
            yield Text(f"  note: {notice}")

    def common_reasons(self, most: int = 5) -> list[tuple[str, int]]:
        """The most frequent reasons for declines on layers that were left as they were, by pass.

        Names and numbers in which several differ are dots.
        """
        done = {name for rewrite in self.rewrites for name in (*dict(rewrite.replaced), *rewrite.removed)}
        groups: dict[str, list[str]] = {}
        for decline in self.declines:
            if decline.fits and decline.node not in done and not decline.pending:
                alike = re.sub(r"(\S*\d\S* ?)+", "… ", decline.reason).strip()
                groups.setdefault(f"{decline.pass_name}: {alike}", []).append(f"{decline.pass_name}: {decline.reason}")
        counts = [(reasons[0] if len(set(reasons)) == 1 else alike, len(reasons)) for alike, reasons in groups.items()]
        return sorted(counts, key=lambda entry: -entry[1])[:most]

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue().rstrip()


def _modules(origins: tuple[ir.Origin, ...]) -> list[str]:
    return list(dict.fromkeys(origin.module for origin in origins))


# -- explanations ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explanation:
    """What became of a layer (a module path) or node: what it was, what was done, what was not and why, what it is.

    `absent` are the passes that were skipped, failed, or rolled back as a whole, whatever they would have done here.
    """

    subject: str
    before: tuple[str, ...]
    rewrites: tuple[Rewrite, ...]
    declines: tuple[Decline, ...]
    after: tuple[str, ...]
    lines: tuple[str, ...]
    absent: tuple[PassResult, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The explanation for programs."""
        return {
            "subject": self.subject,
            "before": list(self.before),
            "after": list(self.after),
            "lines": list(self.lines),
            "rewrites": [
                {"pass": r.pass_name, "rule": r.rule, "removed": list(r.removed), "added": list(r.added)}
                for r in self.rewrites
            ],
            "declines": [
                {"pass": d.pass_name, "rule": d.rule, "node": d.node, "reason": d.reason, "pending": d.pending}
                for d in self.declines
            ],
            "absent": [{"pass": r.name, "status": r.status, "reason": r.reason} for r in self.absent],
        }

    def __str__(self) -> str:
        lines = [self.subject]
        lines += [f"  {line}" for line in self.lines if line]
        lines.append("  was: " + ("; ".join(self.before) or "nothing of its own"))
        for rewrite in self.rewrites:
            became = ", ".join(result for _, result in rewrite.replaced if result) or "nothing"
            lines.append(f"  {rewrite.pass_name} ({rewrite.rule}): {', '.join(rewrite.removed)} -> {became}")
        for decline in self.declines:
            when = "pending" if decline.pending else "declined"
            lines.append(f"  {decline.pass_name} ({decline.rule}): {when} at {decline.node}: {decline.reason}")
        lines += [f"  {r.name}: {r.status} as a whole: {r.reason.splitlines()[0]}" for r in self.absent]
        lines.append("  is:  " + ("; ".join(self.after) or "nothing: it was folded away or removed"))
        return "\n".join(lines)


def explain(subject: str, before: fx.GraphModule, after: fx.GraphModule, report: Report) -> Explanation:
    """The story of a module path (and what is inside it) or of a node.

    Raises UsageError, with the nearest names, where nothing has that name.
    """

    journal = report.journal

    def concerns(origins: tuple[ir.Origin, ...]) -> bool:
        return any(origin.module == subject or origin.module.startswith(subject + ".") for origin in origins)

    def of(module: fx.GraphModule, names: set[str]) -> tuple[fx.Node, ...]:
        return tuple(
            node
            for node in module.graph.nodes
            if (ir.is_compute(node) and concerns(ir.origins(node))) or node.name in names
        )

    names = {subject}
    for rewrite in journal.rewrites:
        became = {root: result for root, result in rewrite.replaced if result}  # what was only removed has no result
        heirs = {became[name] for name in names & became.keys()}
        names |= heirs or (set(became.values()) if names & set(rewrite.removed) else set())
    was, is_now = of(before, {subject}), of(after, names)
    rewrites = tuple(
        rewrite
        for rewrite in journal.rewrites
        if concerns(rewrite.origins) or any(names & set(pair) for pair in rewrite.replaced)
    )
    if not was and not is_now and not rewrites:
        known = sorted({origin.module for node in before.graph.nodes for origin in ir.origins(node) if origin.module})
        raise UsageError(f"the model has no layer or node named {subject!r}", hint=_nearest(subject, known))
    gone = {name for rewrite in journal.rewrites for name in rewrite.removed}
    declines = tuple(
        decline
        for decline in report.declines
        if (concerns(decline.origins) or decline.node in names) and decline.node not in gone
        # Patterns that are not there are news only where nothing happened.
        and (decline.fits or not rewrites)
    )
    lines = tuple(dict.fromkeys(origin.line for node in was for origin in ir.origins(node) if origin.line))
    absent = tuple(result for result in report.passes if result.status != "done")
    return Explanation(
        subject, tuple(map(_describe, was)), rewrites, declines, tuple(map(_describe, is_now)), lines[:3], absent
    )


def _nearest(subject: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(subject, known, n=5, cutoff=0.3) or known[:5]
    return "there are: " + ", ".join(close) + (" ..." if len(known) > len(close) else "")


def _describe(node: fx.Node) -> str:
    value = ir.value(node)
    return f"{node.name} = {ir.target_name(node)}" + (f" {ir.describe_value(value)}" if value is not None else "")


__all__ = ["Explanation", "Report", "compute_nodes", "explain"]
