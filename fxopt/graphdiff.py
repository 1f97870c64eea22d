"""Two graphs side by side as data: what was removed, added, changed and kept, by which pass, and why.

`of_compiled` shows what compiling did, from the record of its rewrites; `diff` compares any two fx graphs. What comes
out is plain data, which `fxopt.render` draws.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import fx

from fxopt import cost, ir
from fxopt.align import Alignment, Step, by_origin_and_name, by_record
from fxopt.errors import UsageError
from fxopt.nodediff import argument_texts, changes, is_size, lines, module_paths, operator_name
from fxopt.pipeline import both

if TYPE_CHECKING:
    from fxopt.journal import Decline
    from fxopt.looking import Shown

Status = Literal["kept", "changed", "removed", "added"]
STATUSES: tuple[Status, ...] = ("removed", "added", "changed", "kept")

#: The first entry of a diff's JSON, so that a reader can tell what it reads.
FORMAT = "fxopt-diff-1"


@dataclass(frozen=True)
class Parameter:
    """A tensor that a node reads: by which argument, its path in the model, its dtype and shape."""

    argument: str
    path: str
    value: str


@dataclass(frozen=True)
class DiffNode:
    """One node of one side. `partners` are the nodes of the other side that it became, or stands for.

    `arguments` are its literals as (name, text) where they are not the default, `inputs` the nodes that it reads as
    (argument, node), `by` the steps that removed, added or changed it as (pass, rule), `declined` what was not done to
    it, as (pass, rule, reason), `group` the change that it is part of. `compute` says that it is work at run time,
    `size` that it is arithmetic on sizes, which pictures leave out. `flops`, `moved` and `copied` (bytes) estimate its
    work; None where that is not known.
    """

    name: str
    kind: str
    operator: str
    status: Status
    value: str
    modules: tuple[str, ...]
    lines: tuple[str, ...]
    arguments: tuple[tuple[str, str], ...]
    parameters: tuple[Parameter, ...]
    inputs: tuple[tuple[str, str], ...]
    partners: tuple[str, ...]
    evidence: str
    group: int | None
    by: tuple[Step, ...]
    changes: tuple[str, ...]
    declined: tuple[tuple[str, str, str], ...]
    compute: bool
    size: bool
    flops: int | None = None
    moved: int | None = None
    copied: int | None = None


@dataclass(frozen=True)
class Change:
    """Nodes that went and what came in their place, by name, and the steps (pass, rule) that did it."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    by: tuple[Step, ...]


@dataclass(frozen=True)
class PassRow:
    """What one pass did, as in the report."""

    name: str
    status: str
    rewrites: int
    declines: int
    nodes_before: int
    nodes_after: int
    numerics: str
    reason: str
    change: str = ""


@dataclass(frozen=True)
class GraphDiff:
    """A graph before and after, aligned. `save` draws it; `to_dict` has all of it for programs.

    `alignment` counts the pairs of nodes by what they were paired by: "record", "origin", "name" or "place". `work` has
    the totals of the estimated work before and after (see fxopt.cost), `estimate` says them in a line.
    """

    title: str
    subject: str
    before: tuple[DiffNode, ...]
    after: tuple[DiffNode, ...]
    groups: tuple[Change, ...]
    alignment: dict[str, int]
    notes: tuple[str, ...]
    passes: tuple[PassRow, ...]
    work: dict[str, Any] = field(default_factory=dict)
    estimate: str = ""

    def counts(self) -> dict[str, int]:
        """How many nodes were removed, added, changed and kept."""
        found = Counter(node.status for node in self.after)
        found["removed"] = sum(node.status == "removed" for node in self.before)
        return {status: found[status] for status in STATUSES}

    def operators(self) -> dict[str, tuple[int, int]]:
        """Work at run time by operator: how many nodes before and after, the most changed first."""
        sides = [Counter(node.operator for node in side if node.compute) for side in (self.before, self.after)]
        found = {name: (sides[0][name], sides[1][name]) for name in {**sides[0], **sides[1]}}
        return dict(sorted(found.items(), key=lambda entry: (-abs(entry[1][0] - entry[1][1]), entry[0])))

    def compute_nodes(self) -> tuple[int, int]:
        """How many nodes are work at run time, before and after."""
        return sum(node.compute for node in self.before), sum(node.compute for node in self.after)

    def to_dict(self) -> dict[str, Any]:
        """The diff for programs: only JSON's types."""
        before, after = self.compute_nodes()
        plain = {
            "format": FORMAT,
            **asdict(self),
            "counts": self.counts(),
            "operators": self.operators(),
            "compute_nodes": {"before": before, "after": after},
        }
        return dict(json.loads(json.dumps(plain)))

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> GraphDiff:
        """The diff that `to_dict` wrote down. Raises UsageError for anything else."""
        if plain.get("format") != FORMAT:
            raise UsageError(f"this is not a diff: format is {plain.get('format')!r}", hint=f"it should be {FORMAT!r}")

        def node(entry: dict[str, Any]) -> DiffNode:
            held = {name: _tuples(part) for name, part in entry.items()}
            held["parameters"] = tuple(Parameter(**part) for part in entry["parameters"])
            return DiffNode(**held)

        return cls(
            plain["title"],
            plain["subject"],
            tuple(map(node, plain["before"])),
            tuple(map(node, plain["after"])),
            tuple(Change(**{name: _tuples(part) for name, part in entry.items()}) for entry in plain["groups"]),
            dict(plain["alignment"]),
            tuple(plain["notes"]),
            tuple(PassRow(**entry) for entry in plain["passes"]),
            dict(plain.get("work", {})),
            plain.get("estimate", ""),
        )

    def save(self, path: str | Path) -> Path:
        """Writes a picture, a page or the data, by the name's suffix: .html .svg .png .pdf .dot .json

        .html, .dot and .json need nothing; .svg, .png and .pdf need graphviz's program `dot`.
        Raises UsageError for another suffix, RenderError where `dot` is missing or fails.
        """
        from fxopt import render

        return render.save(self, Path(path))

    def __str__(self) -> str:
        before, after = self.compute_nodes()
        counts = ", ".join(f"{count} {status}" for status, count in self.counts().items())
        text = [f"{self.title}, {self.subject}: {before} -> {after} nodes; {counts}"]
        text += [f"  {name}: {old} -> {new}" for name, (old, new) in self.operators().items() if old != new]
        text += [f"  {self.estimate}"] if self.estimate else []
        return "\n".join([*text, *(f"  note: {note}" for note in self.notes)])


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


# -- two graphs ------------------------------------------------------------------------------------------------------


def diff(before: fx.Graph | fx.GraphModule, after: fx.Graph | fx.GraphModule) -> GraphDiff:
    """What differs between any two torch.fx graphs, to look at (`.save("diff.html")`) or to process (`.to_dict()`).

    Nodes are aligned by `meta["origin"]` where both have it, else by name, and never by likeness; each node of the
    result says which it was. Raises UsageError for what is not an fx graph.
    """
    left, right = _module(before), _module(after)
    names = [type(side).__name__ if isinstance(side, fx.GraphModule) else "graph" for side in (before, after)]
    title = names[0] if names[0] == names[1] else f"{names[0]} and {names[1]}"
    return assemble(left, right, by_origin_and_name(left, right), title=title, subject="two graphs")


def _module(given: object) -> fx.GraphModule:
    if isinstance(given, fx.GraphModule):
        return given
    if isinstance(given, fx.Graph):
        # A graph alone has no tensors to show: its attributes are only names.
        return given.owning_module if given.owning_module is not None else ir.new_module(copy.deepcopy(given))
    raise UsageError(
        f"fxopt.diff compares two torch.fx graphs, not {type(given).__name__}",
        hint="take .fused_graph of a compiled module, fxopt.trace(model) or torch.fx.symbolic_trace(model)",
    )


def of_compiled(compiled: Shown, pass_name: str | None = None) -> GraphDiff:
    """What compiling did to a model's graph: all of it, or what one pass did. Aligned by the record of the rewrites.

    Raises UsageError where the pipeline has no such pass.
    """
    from fxopt import stages

    session = compiled._session
    report = session.report
    stage = stages.whole(session) if pass_name is None else stages.one_pass(session, pass_name)
    rows = [
        PassRow(
            result.name,
            result.status,
            result.rewrites,
            result.declines,
            result.nodes_before,
            result.nodes_after,
            result.numerics,
            result.reason,
            result.change,
        )
        for result in (*report.passes, *report.lowering)
    ]
    return assemble(
        stage.before,
        stage.after,
        by_record(stage.before, stage.after, stage.rewrites),
        title=report.model,
        subject="before and after all passes" if pass_name is None else f"before and after {pass_name}",
        declines=stage.declines,
        passes=tuple(rows),
        notes=stage.notes,
        totals=(report.work_before, report.work_after) if pass_name is None else (None, None),
    )


def assemble(
    before: fx.GraphModule,
    after: fx.GraphModule,
    alignment: Alignment,
    *,
    title: str,
    subject: str,
    declines: Iterable[Decline] = (),
    passes: tuple[PassRow, ...] = (),
    notes: Iterable[str] = (),
    totals: tuple[cost.Total | None, cost.Total | None] = (None, None),
) -> GraphDiff:
    """The data of a diff, from two aligned graphs; their work is estimated where it is not given as `totals`."""
    declined: dict[str, list[tuple[str, str, str]]] = {}
    for decline in declines:
        reason = f"waits for the first call: {decline.reason}" if decline.pending else decline.reason
        declined.setdefault(decline.node, []).append((decline.pass_name, decline.rule, reason))
    group_of: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for number, group in enumerate(alignment.groups):
        group_of[0].update(dict.fromkeys(group.before, number))
        group_of[1].update(dict.fromkeys(group.after, number))
    right = {node.name: node for node in after.graph.nodes}
    differences = {
        node.name: changes(node, right[alignment.pairs[node.name]], alignment)
        for node in before.graph.nodes
        if node.name in alignment.pairs
    }
    stands_for: dict[str, list[str]] = {}
    for node in before.graph.nodes:
        for name in _partners(node.name, alignment, group_of[0]):
            stands_for.setdefault(name, []).append(node.name)
    origin_of = {new: old for old, new in alignment.pairs.items()}

    def describe(node: fx.Node, side: int) -> DiffNode:
        old = node.name if side == 0 else origin_of.get(node.name)
        difference = differences.get(old) if old is not None else None
        status: Status = ("removed", "added")[side] if difference is None else "changed" if difference else "kept"
        number = group_of[side].get(node.name)
        partners = _partners(node.name, alignment, group_of[0]) if side == 0 else stands_for.get(node.name, ())
        arguments, parameters, inputs = argument_texts(node)
        work = cost.of(node) if ir.is_compute(node) else None
        return DiffNode(
            name=node.name,
            kind=node.op,
            operator=operator_name(node),
            status=status,
            value=ir.describe_value(ir.value(node)) if ir.value(node) is not None else "",
            modules=module_paths(node),
            lines=lines(node),
            arguments=arguments,
            parameters=tuple(Parameter(*entry) for entry in parameters),
            inputs=inputs,
            partners=tuple(partners),
            evidence=alignment.evidence.get(old, "") if old is not None else "",
            group=number,
            by=() if number is None else alignment.groups[number].steps,
            changes=difference or (),
            declined=tuple(declined.get(node.name, ())) if status != "removed" else (),
            compute=ir.is_compute(node),
            size=is_size(node),
            flops=None if work is None else work.flops,
            moved=None if work is None else work.moved,
            copied=None if work is None else work.copied,
        )

    def side(module: fx.GraphModule, number: int) -> tuple[DiffNode, ...]:
        return tuple(describe(node, number) for node in module.graph.nodes if node.op != "get_attr")

    drawn = {node.name for node in before.graph.nodes if node.op != "get_attr"}
    evidence = Counter(how for name, how in alignment.evidence.items() if name in drawn)
    old, new = totals[0] or cost.of_module(before), totals[1] or cost.of_module(after)
    return GraphDiff(
        title,
        subject,
        side(before, 0),
        side(after, 1),
        tuple(Change(group.before, group.after, group.steps) for group in alignment.groups),
        dict(sorted(evidence.items())),
        (*notes, *_open_sizes(before)),
        passes,
        both(old, new) or {},
        cost.describe(old, new),
    )


def _open_sizes(module: fx.GraphModule) -> list[str]:
    """What the names of open sizes in shapes stand for, by the input that brings them."""
    found: dict[str, str] = {}
    for node in module.graph.find_nodes(op="placeholder"):
        for dimension, size in enumerate(ir.shape(node) or ()):
            if ir.static(size) is None:
                name = next((origin.line for origin in ir.origins(node) if origin.line), node.name)
                found.setdefault(str(size), f"{size} is any size: that of {name} along dimension {dimension}")
    return list(found.values())


def _partners(name: str, alignment: Alignment, group_of: dict[str, int]) -> tuple[str, ...]:
    """What a node before is after: itself, what its group became, or what is read in its place."""
    if name in alignment.pairs:
        return (alignment.pairs[name],)
    number = group_of.get(name)
    came = alignment.groups[number].after if number is not None else ()
    return came or alignment.became.get(name, ())


__all__ = ["Change", "DiffNode", "GraphDiff", "Parameter", "PassRow", "assemble", "diff", "of_compiled"]
