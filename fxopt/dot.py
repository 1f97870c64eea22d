"""A diff as DOT text: two graphs side by side, each node in the look of its status, and the words that describe a node.

Names come from models and may hold anything, markup and quotes among it: all that goes into DOT goes through `_text`.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import graphviz

from fxopt import cost
from fxopt.graphdiff import STATUSES, DiffNode, GraphDiff, Status

_LONGEST = 60
#: Rows that all edges together may cross; a model of many long edges (DenseNet) is neither laid out nor read otherwise.
MOST_ROWS_CROSSED = 3_000

_EPILOGUE_OPERANDS = ("residual",)


@dataclass(frozen=True)
class Look:
    """How a status is shown: never by colour alone, but by a sign and the border's style too."""

    sign: str
    meaning: str
    fill: str
    line: str
    border: str
    width: str


#: Fills are tints of the Okabe-Ito palette, which colour-blind readers tell apart.
LOOKS: dict[Status, Look] = {
    "removed": Look("−", "gone, or part of another", "#fbe3d6", "#b84a00", "dashed", "1.4"),
    "added": Look("+", "new", "#d5efe6", "#00714f", "bold", "2.2"),
    "changed": Look("~", "the same node, changed", "#fdf3c0", "#7a6200", "dotted", "1.8"),
    "kept": Look("=", "as it was", "#f4f5f7", "#8a8f98", "solid", "0.8"),
}


#: What lines in the picture mean.
ARROWS = ("strong lines join nodes that became one", "a dashed arrow leads from them to what they became")


# -- words -----------------------------------------------------------------------------------------------------------


def _text(*lines: str) -> str:
    """Lines of any characters as a DOT string that shows them as they are."""
    shown = [re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", line) for line in lines]
    # Graphviz reads entities (&lt;) and escapes (\n, \N) in any label.
    words: str = graphviz.nohtml("\\n".join(graphviz.escape(line.replace("&", "&amp;")) for line in shown))
    return words


def _short(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def module_text(modules: Sequence[str]) -> str:
    """Module paths with their common beginning once: `layer1.0.{conv1, bn1, relu}`."""
    if len(modules) < 2:
        return modules[0] if modules else ""
    parts = [path.split(".") for path in modules]
    common: list[str] = []
    for words in zip(*parts, strict=False):
        if len(set(words)) > 1:
            break
        common.append(words[0])
    rests = [".".join(path[len(common) :]) for path in parts]
    rests = [rest for rest in rests if rest]
    shown = ", ".join(rests[:4]) + (f", {len(rests) - 4} more" if len(rests) > 4 else "")
    if not common:
        return shown
    return f"{'.'.join(common)}.{{{shown}}}" if len(rests) > 1 else f"{'.'.join(common)}.{shown}"


def line_text(line: str) -> str:
    """A source line with the last two parts of its file's path."""
    path, colon, rest = line.rpartition(":")
    return "/".join(Path(path).parts[-2:]) + colon + rest if colon and path else line


def title_text(node: DiffNode) -> str:
    """What a node does, in a few words: an operator with the words among its arguments, or an input's name."""
    if node.kind == "placeholder":
        return f"input {node.lines[0] if node.lines and ':' not in node.lines[0] else node.name}"
    if not node.operator.startswith("fxopt."):
        return node.operator
    # A fused operation says what is fused into it: the operands beyond its own, and arguments that are words.
    words = [name for name, _ in node.inputs if name in _EPILOGUE_OPERANDS]
    words += [text for _, text in node.arguments if re.fullmatch(r"[a-z]\w*", text) and text != "none"]
    return node.operator + (f" ({', '.join(words)})" if words else "")


def detail_lines(node: DiffNode) -> list[str]:
    """All there is to say of a node, for tooltips and the page's details."""
    lines = [f"{LOOKS[node.status].sign} {node.status}: {node.name} = {title_text(node)} {node.value}".rstrip()]
    lines += [f"module: {', '.join(node.modules)}"] if node.modules else []
    lines += [f"your code: {line_text(line)}" for line in node.lines if ":" in line]
    lines += [f"{name} = {text}" for name, text in node.arguments]
    lines += [f"{entry.argument}: {entry.path} {entry.value}".rstrip() for entry in node.parameters]
    lines += [work_text(node)] if node.moved else []
    lines += [f"by {name}" + (f" ({rule})" if rule else "") for name, rule in node.by]
    if node.partners and node.status in ("removed", "added"):
        lines.append(("became " if node.status == "removed" else "stands for ") + ", ".join(node.partners))
    lines += list(node.changes)
    lines += [f"left by {name}: {reason}" for name, _, reason in node.declined]
    lines += [f"aligned by {node.evidence}"] if node.evidence not in ("", "record") else []
    return lines


def work_text(node: DiffNode) -> str:
    """What a node computes and moves, by estimate."""
    parts = [cost.amount(node.flops, "FLOP")] if node.flops else []
    parts += [f"{cost.amount(node.moved, 'B')} moved"] if node.moved else []
    parts += [f"{cost.amount(node.copied, 'B')} of them copied"] if node.copied else []
    return "work: " + ", ".join(parts)


def label_lines(node: DiffNode) -> list[str]:
    """What a node's box says: operator, shape, module path, the tensors that it reads."""
    lines = [f"{LOOKS[node.status].sign} {_short(title_text(node))}"]
    if node.value:
        lines.append(_short(node.value))
    if node.modules:
        lines.append(_short(module_text(node.modules)))
    if node.parameters:
        shapes = [f"{entry.argument} {entry.value[entry.value.find('[') :]}" for entry in node.parameters[:2]]
        lines.append(_short(", ".join(shapes) + (", …" if len(node.parameters) > 2 else "")))
    return lines


# -- DOT -------------------------------------------------------------------------------------------------------------


def to_dot(diff: GraphDiff, *, legend: bool = True) -> str:
    """The diff as DOT: before on the left, after on the right, what belongs together at one height.

    A node's id is `before-3` or `after-3`, its place in that side of the data.
    """
    drawn = graphviz.Digraph("diff")
    drawn.attr(rankdir="TB", newrank="true", nodesep="0.18", ranksep="0.22", fontname="Helvetica", fontsize="20")
    drawn.attr(nslimit="10")  # long edges in a large graph make the last bit of beauty cost minutes
    drawn.attr(label=_text(heading(diff) if legend else ""), labelloc="t", tooltip=_text(" "))
    drawn.attr("node", shape="box", fontname="Helvetica", fontsize="11", margin="0.09,0.05", height="0.3")
    drawn.attr("edge", color="#555b66", arrowsize="0.55", penwidth="0.9")
    names = [
        {node.name: f"{side}-{place}" for place, node in enumerate(nodes) if not node.size}
        for side, nodes in sides(diff)
    ]
    far = _far_edges(diff, names)
    for number, (side, nodes) in enumerate(sides(diff)):
        work = diff.compute_nodes()[number]
        group = {node.name: node.group for node in nodes}
        with drawn.subgraph(name=f"cluster_{side}") as cluster:
            cluster.attr(label=_text(f"{side.upper()}: {work} operations"), labeljust="l", style="rounded")
            cluster.attr(color="#c3c8d0", fontsize="18", margin="14")
            shown = [node for node in nodes if not node.size]
            for node in shown:
                left_out = sum((number, operand, node.name) in far for operand in _operands(node))
                _draw_node(cluster, names[number][node.name], node, left_out)
            for node in shown:
                for argument, operand in node.inputs:
                    if operand in names[number] and (number, operand, node.name) not in far:
                        ends = names[number][operand], names[number][node.name]
                        tooltip = _text(f"{operand} is {argument}")
                        cluster.edge(*ends, tooltip=tooltip, **_edge_look(group, operand, node))
    _draw_between(drawn, diff, names)
    if legend:
        _draw_legend(drawn, diff)
    return str(drawn.source)


def heading(diff: GraphDiff) -> str:
    """The picture's title."""
    before, after = diff.compute_nodes()
    return f"{diff.title}: {diff.subject}, {before} → {after} operations"


def sides(diff: GraphDiff) -> tuple[tuple[str, tuple[DiffNode, ...]], ...]:
    return (("before", diff.before), ("after", diff.after))


def _operands(node: DiffNode) -> list[str]:
    return list(dict.fromkeys(operand for _, operand in node.inputs))


def _far_edges(diff: GraphDiff, names: list[dict[str, str]]) -> set[tuple[int, str, str]]:
    """The longest edges as (side, operand, reader), so many that the rest crosses few enough rows to be laid out.

    The nearest operand of a node is always drawn.
    """
    beside = {right: left for left, right, _ in together(diff)}
    rows: list[dict[str, int]] = [{}, {}]
    edges: list[tuple[int, tuple[int, str, str]]] = []
    length = 0
    for number, (_, nodes) in enumerate(sides(diff)):
        for node in nodes:
            operands = [operand for operand in _operands(node) if operand in names[number]]
            row = max((rows[number][operand] + 1 for operand in operands), default=0)
            row = max(row, rows[0].get(beside.get(node.name, ""), 0)) if number else row
            rows[number][node.name] = row
            spans = sorted((row - rows[number][operand], (number, operand, node.name)) for operand in operands)
            length += sum(span for span, _ in spans)
            edges += spans[1:]
    far = set()
    for span, edge in sorted(edges, reverse=True):
        if length <= MOST_ROWS_CROSSED:
            break
        far.add(edge)
        length -= span
    return far


def _draw_node(cluster: Any, key: str, node: DiffNode, left_out: int) -> None:
    look = LOOKS[node.status]
    more = [f"and {left_out} inputs from further up"] if left_out else []
    cluster.node(
        key,
        id=key,
        **{"class": f"node {node.status}"},
        label=_text(*label_lines(node), *more),
        tooltip=_text(*detail_lines(node)),
        style=f"filled,rounded,{look.border}",
        fillcolor=look.fill,
        color=look.line,
        penwidth=look.width,
    )


def _edge_look(group: dict[str, int | None], operand: str, node: DiffNode) -> dict[str, str]:
    """An edge between two nodes of one change is drawn strong, so that the change is seen as one."""
    if node.group is None or group[operand] != node.group:
        return {}
    return {"color": LOOKS[node.status].line, "penwidth": "2.6"}


def _draw_between(drawn: Any, diff: GraphDiff, names: list[dict[str, str]]) -> None:
    """Puts what belongs together side by side, and an arrow from what went to what came."""
    colour = LOOKS["added"].line
    for left, right, change in together(diff):
        with drawn.subgraph() as level:
            level.attr(rank="same")
            level.node(names[0][left])
            level.node(names[1][right])
        look = {"style": "dashed", "color": colour, "penwidth": "1.3"} if change else {"style": "invis"}
        drawn.edge(names[0][left], names[1][right], weight="0", tooltip=_text(change or " "), **look)
    for node in diff.before:
        # What was dropped (a dropout, say) points to what is read in its place.
        if node.group is not None and not diff.groups[node.group].after:
            for partner in [name for name in node.partners if node.name in names[0] and name in names[1]][:1]:
                drawn.edge(
                    names[0][node.name],
                    names[1][partner],
                    constraint="false",
                    style="dashed",
                    color=LOOKS["removed"].line,
                    tooltip=_text(steps_text(node.by)),
                )


def together(diff: GraphDiff) -> list[tuple[str, str, str]]:
    """Pairs (before, after, change) that stand at one height; `change` is what made one the other, or empty."""
    sizes = [{node.name for node in side if node.size} for side in (diff.before, diff.after)]
    found = [(node.name, node.partners[0], "") for node in diff.before if node.status in ("kept", "changed")]
    replaced = [group for group in diff.groups if group.before and group.after]
    found += [(group.before[-1], group.after[-1], steps_text(group.by) or "replaced") for group in replaced]
    return [pair for pair in found if pair[0] not in sizes[0] and pair[1] not in sizes[1]]


def steps_text(steps: Iterable[tuple[str, str]]) -> str:
    """Steps as words: `fold-batchnorm (norm-after-layer), fuse-conv-activation (activation)`."""
    return ", ".join(f"{name} ({rule})" if rule else name for name, rule in steps)


def _draw_legend(drawn: Any, diff: GraphDiff) -> None:
    counts = diff.counts()
    with drawn.subgraph(name="cluster_legend") as cluster:
        cluster.attr(label="legend", labeljust="l", style="rounded", color="#c3c8d0", fontsize="13")
        keys = []
        for status in STATUSES:
            look = LOOKS[status]
            keys.append(f"legend-{status}")
            cluster.node(
                keys[-1],
                label=_text(f"{look.sign} {status}: {counts[status]}", look.meaning),
                style=f"filled,rounded,{look.border}",
                fillcolor=look.fill,
                color=look.line,
                penwidth=look.width,
            )
        for place, words in enumerate((*ARROWS, *diff.notes)):
            keys.append(f"legend-{place}")
            cluster.node(keys[-1], label=_text(*textwrap.wrap(words, 30)), shape="plaintext")
        for upper, lower in pairwise(keys):
            cluster.edge(upper, lower, style="invis")
