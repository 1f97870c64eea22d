"""Draws a diff: as DOT, as one self-contained HTML page, and, where graphviz is installed, as SVG, PNG or PDF."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxopt import page
from fxopt.dot import LOOKS, detail_lines, heading, module_text, sides, steps_text, title_text, to_dot
from fxopt.errors import RenderError
from fxopt.graphdiff import DiffNode, GraphDiff, Status

PICTURES = ("svg", "png", "pdf")
SUFFIXES = ("html", *PICTURES, "dot", "json")

#: Seconds that `dot` may take for a picture before it is given up (`FXOPT_DOT_SECONDS` sets another number).
DOT_SECONDS = 60.0


# -- pictures --------------------------------------------------------------------------------------------------------


def draw(diff: GraphDiff, kind: str, *, legend: bool = True) -> bytes:
    """The diff as "svg", "png" or "pdf".

    Raises RenderError where graphviz's program `dot` is missing, fails, or takes too long.
    """
    program = shutil.which("dot")
    if program is None:
        raise RenderError(
            f"a picture as .{kind} is drawn by the program `dot`, which is not installed",
            hint="install the system package graphviz (apt install graphviz, dnf install graphviz, brew install "
            "graphviz; https://graphviz.org/download), or save as .html, .dot or .json, which need nothing",
        )
    seconds = float(os.environ.get("FXOPT_DOT_SECONDS", DOT_SECONDS))
    resolution = ["-Gdpi=96"] if kind == "png" else []
    try:
        done = subprocess.run(
            [program, f"-T{kind}", *resolution],
            input=to_dot(diff, legend=legend).encode(),
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RenderError(
            f"`dot` did not lay out {len(diff.before) + len(diff.after)} nodes in {seconds:g} seconds",
            hint='draw one pass (diff("its-name")), save as .dot and lay it out elsewhere, or give it more time: '
            "FXOPT_DOT_SECONDS",
        ) from error
    if done.returncode != 0 or not done.stdout:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise RenderError(
            f"`dot` failed: {said[0] if said else f'exit status {done.returncode}'}",
            hint="save as .html, .dot or .json instead; graphviz 2.43 and newer are known to work",
        )
    return done.stdout


# -- HTML ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row of the table: what stood on the left, what stands on the right, and what happened between."""

    status: Status
    before: tuple[tuple[str, DiffNode], ...]
    after: tuple[tuple[str, DiffNode], ...]
    by: str


def rows(diff: GraphDiff) -> list[Row]:
    """The two graphs as one aligned list, in the order of their nodes."""
    left = {node.name: (f"before-{place}", node) for place, node in enumerate(diff.before)}
    right = {node.name: (f"after-{place}", node) for place, node in enumerate(diff.after)}
    found: list[tuple[float, float, Row]] = []
    height: dict[str, float] = {}  # of a node after: the place before that it stands beside
    for place, node in enumerate(diff.before):
        if node.status in ("kept", "changed"):
            partner = node.partners[0]
            height[partner] = place
            row = Row(node.status, (left[node.name],), (right[partner],), "; ".join(node.changes))
            found.append((place, 0, row))
    places = {node.name: place for place, node in enumerate(diff.before)}
    for group in diff.groups:
        if group.before:
            status: Status = "added" if group.after else "removed"
            place = places[group.before[-1]]
            height.update(dict.fromkeys(group.after, place))
            row = Row(
                status,
                tuple(left[name] for name in group.before),
                tuple(right[name] for name in group.after),
                steps_text(group.by),
            )
            found.append((place, 0, row))
    alone = {name: group for group in diff.groups if not group.before for name in group.after[-1:]}
    last = -1.0
    for order, node in enumerate(diff.after):
        last = height.get(node.name, last)
        if node.name in alone:
            group = alone[node.name]
            row = Row("added", (), tuple(right[name] for name in group.after), steps_text(group.by))
            found.append((last, order + 1, row))
    return [row for _, _, row in sorted(found, key=lambda entry: entry[:2])]


def to_html(diff: GraphDiff) -> str:
    """The diff as one page that needs nothing else: the picture where `dot` can draw it, and always a table."""
    from markupsafe import Markup

    notes, picture = list(diff.notes), ""
    try:
        drawn = draw(diff, "svg", legend=False).decode()
        picture = Markup(drawn[drawn.index("<svg") :])  # dot has escaped every name in it
    except RenderError as error:
        notes.append(f"no picture, only the table: {error.message}. {error.hint}")
    return page.filled(
        "diff.html",
        diff=diff,
        heading=heading(diff),
        looks=LOOKS,
        counts=diff.counts(),
        compute=diff.compute_nodes(),
        operators=diff.operators(),
        moved={name: numbers for name, numbers in diff.operators().items() if numbers[0] != numbers[1]},
        rows=rows(diff),
        picture=picture,
        notes=notes,
        nodes=_page_nodes(diff),
        title_text=title_text,
        module_text=module_text,
    )


def _page_nodes(diff: GraphDiff) -> dict[str, Any]:
    """What the page's script knows of each node, by id: words to show, words to search, related ids."""
    keys = [{node.name: f"{side}-{place}" for place, node in enumerate(nodes)} for side, nodes in sides(diff)]
    found = {}
    for number, (side, nodes) in enumerate(sides(diff)):
        for node in nodes:
            related = {keys[1 - number][name] for name in node.partners}
            if node.group is not None:
                group = diff.groups[node.group]
                related |= {keys[0][name] for name in group.before} | {keys[1][name] for name in group.after}
            key = keys[number][node.name]
            details = detail_lines(node)
            found[key] = {
                "side": side,
                "status": node.status,
                "title": f"{node.name}: {title_text(node)}",
                "details": details,
                "related": sorted(related - {key}),
                "search": "\n".join([node.name, node.operator, *node.modules, *details]).lower(),
            }
    return found


# -- files -----------------------------------------------------------------------------------------------------------


def kind_of(path: Path) -> str:
    """How a diff is saved under a path. Raises UsageError for a suffix that is none of SUFFIXES."""
    return page.kind_of(path, SUFFIXES, "a diff")


def save(diff: GraphDiff, path: Path) -> Path:
    """Writes the diff as its path's suffix says; returns the path.

    Raises UsageError for a suffix that is none of .html .svg .png .pdf .dot .json, RenderError where `dot` is needed
    and is missing or fails.
    """
    kind = kind_of(path)
    if kind in PICTURES:
        content = draw(diff, kind)
    elif kind == "html":
        content = to_html(diff).encode()
    elif kind == "dot":
        content = to_dot(diff).encode()
    else:
        content = (json.dumps(diff.to_dict(), indent=1) + "\n").encode()
    path.write_bytes(content)
    return path
