"""Which node of one graph is which node of another, told by what is known and never guessed by likeness.

Three kinds of evidence, best first: the record of the rewrites that led from one graph to the other; the origin that
both nodes carry (module path, source line); the node's own name. A node for which there is none stays alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxopt import ir
from fxopt.journal import Rewrite

#: (pass, rule): what removed, added or replaced nodes.
Step = tuple[str, str]

#: Changes that the record does not have are made by the normal form alone, when shapes become known.
NORMAL_FORM: Step = ("normal form", "shapes became known")


@dataclass(frozen=True)
class Group:
    """Nodes that went and the nodes that came in their place, by name, and the steps that did it, in order."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    steps: tuple[Step, ...]


@dataclass
class Alignment:
    """Two graphs side by side, by node names.

    `pairs` maps a node before to the same node after, `evidence` to why they are the same: "record", "origin",
    "name", or "place" for inputs and results, which a call gives and takes in order. `became` has for every node before
    the nodes after that are read in its place. `groups` are the changes.
    """

    pairs: dict[str, str] = field(default_factory=dict)
    evidence: dict[str, str] = field(default_factory=dict)
    became: dict[str, tuple[str, ...]] = field(default_factory=dict)
    groups: list[Group] = field(default_factory=list)

    def pair(self, before: fx.Node, after: fx.Node, evidence: str) -> None:
        """Says that two nodes are the same one."""
        self.pairs[before.name] = after.name
        self.evidence[before.name] = evidence
        self.became[before.name] = (after.name,)


# -- by the record ---------------------------------------------------------------------------------------------------


class _Ledger:
    """Follows nodes through rewrites. A name may be given again once it is free, so that a node is a number here."""

    def __init__(self, names: Iterable[str]) -> None:
        import networkx

        self.name: list[str] = []
        self.living: dict[str, int] = {}
        self.changed = networkx.Graph()  # joins what went and came in one rewrite
        self.read_as = networkx.DiGraph()  # leads from a node to what is read in its place
        for name in names:
            self._new(name)

    def _new(self, name: str) -> int:
        number = len(self.name)
        self.name.append(name)
        self.living[name] = number
        return number

    def _find(self, name: str) -> int:
        # What the record does not have (a node that the normal form made in between) is met here for the first time.
        return self.living[name] if name in self.living else self._new(name)

    def follow(self, index: int, rewrite: Rewrite) -> None:
        """Takes one rewrite into account."""
        roots = [self._find(root) for root, _ in rewrite.replaced]
        gone = [self._find(name) for name in rewrite.removed]
        for name in rewrite.removed:
            self.living.pop(name, None)
        came = [self._new(name) for name in rewrite.added]
        touched = gone + came
        for number in touched:
            self.changed.add_node(number)
            self.changed.nodes[number].setdefault("steps", []).append(index)
        for other in touched[1:]:
            self.changed.add_edge(touched[0], other)
        for root, (_, name) in zip(roots, rewrite.replaced, strict=True):
            if name and (result := self._find(name)) != root:
                self.read_as.add_edge(root, result)


def by_record(before: fx.GraphModule, after: fx.GraphModule, rewrites: Sequence[Rewrite]) -> Alignment:
    """Aligns a graph with what a sequence of recorded rewrites made of it."""
    import networkx

    found = Alignment()
    first = [node.name for node in before.graph.nodes]
    ledger = _Ledger(first)
    for index, rewrite in enumerate(rewrites):
        ledger.follow(index, rewrite)
    old = {node.name: node for node in before.graph.nodes}
    here = {ledger.living[node.name]: node for node in after.graph.nodes if node.name in ledger.living}
    for number, name in enumerate(first):
        if number in here:
            found.pair(old[name], here[number], "record")
        if number in ledger.read_as:
            heirs = sorted(networkx.descendants(ledger.read_as, number))
            found.became[name] = (*found.became.get(name, ()), *(here[heir].name for heir in heirs if heir in here))
    kept = set(found.pairs.values())
    grouped: set[str] = set()
    for numbers in networkx.connected_components(ledger.changed):
        steps = sorted({step for number in numbers for step in ledger.changed.nodes[number]["steps"]})
        gone = {ledger.name[number] for number in numbers if number < len(first) and number not in here}
        came = {here[number].name for number in numbers if number in here and here[number].name not in kept}
        found.groups.append(_group(gone, came, [(rewrites[i].pass_name, rewrites[i].rule) for i in steps]))
        grouped |= gone | came
    gone = {name for name in old if name not in found.pairs and name not in grouped}
    came = {node.name for node in after.graph.nodes if node.name not in kept and node.name not in grouped}
    for name in gone:
        found.groups.append(_group({name}, (), [NORMAL_FORM]))
    for name in came:
        found.groups.append(_group((), {name}, [NORMAL_FORM]))
    return _in_order(found, before, after)


# -- by origin and name ----------------------------------------------------------------------------------------------


def by_origin_and_name(before: fx.GraphModule, after: fx.GraphModule) -> Alignment:
    """Aligns any two graphs: by origin where both nodes have one, else by name, inputs and results by place.

    Several nodes of one origin (a module called twice) are told apart by name, or taken in order where there are as
    many on either side; else they stay alone.
    """
    found = Alignment()
    taken: set[str] = set()

    def pair(left: fx.Node, right: fx.Node, evidence: str) -> None:
        if left.name not in found.pairs and right.name not in taken:
            found.pair(left, right, evidence)
            taken.add(right.name)

    by_name = {node.name: node for node in after.graph.nodes}
    _pair_places(before, after, by_name, pair)
    # By origin: the same operator of the same place in the user's code; then of the same module, as front ends may
    # name another line of one call (that of the module's forward, or of whoever called it).
    for place in (_places, _modules):
        left_of, right_of = _by_origin(before, set(found.pairs), place), _by_origin(after, taken, place)
        for key, lefts in left_of.items():
            rights = right_of.get(key, [])
            names = {node.name: node for node in rights}
            if len(lefts) == len(rights) and {node.name for node in lefts} != names.keys():
                for left, right in zip(lefts, rights, strict=True):
                    pair(left, right, "origin")
            else:
                for left in lefts:
                    if left.name in names:
                        pair(left, names[left.name], "origin")
    # By name: where origins do not contradict it. Attributes go by the path that they read.
    targets = {str(node.target): node for node in after.graph.nodes if node.op == "get_attr"}
    for left in before.graph.nodes:
        found_right = targets.get(str(left.target)) if left.op == "get_attr" else by_name.get(left.name)
        if found_right is None or (left.op == "get_attr") != (found_right.op == "get_attr"):
            continue
        if not _modules(left) or not _modules(found_right) or _modules(left) & _modules(found_right):
            pair(left, found_right, "name")
    _group_by_origin(found, before, after)
    return _in_order(found, before, after)


def _pair_places(before: fx.GraphModule, after: fx.GraphModule, by_name: dict[str, fx.Node], pair: Any) -> None:
    """Pairs what a call gives and takes: results, inputs of one name, and the rest in order where there are as many."""
    for left, right in zip(before.graph.find_nodes(op="output"), after.graph.find_nodes(op="output"), strict=False):
        pair(left, right, "place")
    lefts, rights = before.graph.find_nodes(op="placeholder"), after.graph.find_nodes(op="placeholder")
    if {node.name for node in lefts} != {node.name for node in rights} and len(lefts) == len(rights):
        for left, right in zip(lefts, rights, strict=True):
            pair(left, right, "place")
    for left in lefts:
        if left.name in by_name and by_name[left.name].op == "placeholder":
            pair(left, by_name[left.name], "name")


def _places(node: fx.Node) -> frozenset[ir.Origin]:
    """The origins of a node that say something."""
    return frozenset(origin for origin in ir.origins(node) if origin.module or origin.line)


def _modules(node: fx.Node) -> frozenset[str]:
    """The modules that a node comes from; the model itself, which has no path, does not tell its nodes apart."""
    return frozenset(origin.module for origin in ir.origins(node) if origin.module)


def _by_origin(
    module: fx.GraphModule, taken: set[str], place: Callable[[fx.Node], frozenset[Any]]
) -> dict[Any, list[fx.Node]]:
    found: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in module.graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output") and node.name not in taken and place(node):
            found[node.op, str(node.target), place(node)].append(node)
    return found


def _group_by_origin(found: Alignment, before: fx.GraphModule, after: fx.GraphModule) -> None:
    """Groups what is alone on either side by the origins that they share: a fused node has those of all its parts."""
    import networkx

    shared = networkx.Graph()
    taken = set(found.pairs.values())
    for side, module, paired in (("before", before, set(found.pairs)), ("after", after, taken)):
        for node in module.graph.nodes:
            if node.name not in paired and node.op != "get_attr":
                shared.add_node((side, node.name))
                for place in _places(node):
                    shared.add_edge((side, node.name), place)
    for part in networkx.connected_components(shared):
        gone = {entry[1] for entry in part if isinstance(entry, tuple) and entry[0] == "before"}
        came = {entry[1] for entry in part if isinstance(entry, tuple) and entry[0] == "after"}
        if gone and came:
            found.groups.append(_group(gone, came))
            for name in gone:
                found.became[name] = found.groups[-1].after
        else:
            found.groups += [_group({name}, ()) for name in gone]
            found.groups += [_group((), {name}) for name in came]


# -- in order --------------------------------------------------------------------------------------------------------


def _group(gone: Iterable[str], came: Iterable[str], steps: Iterable[Step] = ()) -> Group:
    return Group(tuple(gone), tuple(came), tuple(dict.fromkeys(steps)))


def _in_order(found: Alignment, before: fx.GraphModule, after: fx.GraphModule) -> Alignment:
    """Groups of nodes that are drawn, in graph order; attributes are drawn as part of their readers."""
    left = {node.name: place for place, node in enumerate(before.graph.nodes) if node.op != "get_attr"}
    right = {node.name: place for place, node in enumerate(after.graph.nodes) if node.op != "get_attr"}
    groups = []
    for group in found.groups:
        gone = sorted((name for name in group.before if name in left), key=left.__getitem__)
        came = sorted((name for name in group.after if name in right), key=right.__getitem__)
        if gone or came:
            groups.append(Group(tuple(gone), tuple(came), group.steps))

    def place(group: Group) -> tuple[int, int]:
        last = left[group.before[-1]] if group.before else len(left)
        return last, right[group.after[0]] if group.after else 0

    found.groups = sorted(groups, key=place)
    return found
