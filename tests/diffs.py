"""What the tests of diffs share: a diff in lines, and what holds for every one."""

from __future__ import annotations

from fxopt.graphdiff import GraphDiff


def said(diff: GraphDiff) -> list[str]:
    """A diff as lines: a sign and an operator each, before nodes first."""
    signs = {"removed": "-", "added": "+", "changed": "~", "kept": "="}
    before = [f"{signs[node.status]} {node.operator}" for node in diff.before if node.status != "kept"]
    return [*before, *(f"{signs[node.status]} {node.operator}" for node in diff.after if node.compute)]


def sound(diff: GraphDiff) -> None:
    """What holds for every diff: names lead somewhere, partners are mutual, every change is in one group."""
    sides = [{node.name: node for node in side} for side in (diff.before, diff.after)]
    for number, side in enumerate(sides):
        for node in side.values():
            assert {name for _, name in node.inputs} <= side.keys(), node
            assert set(node.partners) <= sides[1 - number].keys(), node
            for partner in node.partners:
                assert node.name in sides[1 - number][partner].partners
            groups = [group for group in diff.groups if node.name in (group.before, group.after)[number]]
            assert len(groups) == (node.status in ("removed", "added")), node
            assert bool(node.changes) == (node.status == "changed")
    assert sum(diff.counts().values()) == len(diff.after) + diff.counts()["removed"]
