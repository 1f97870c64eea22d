"""The IR contract as a tuple of small named checks. `docs/ir.md` is the same list in prose.

A check looks at a whole module and yields a sentence for each place that breaks it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt import buffers, effects, ir, normalize
from fxopt.errors import CheckError

Problem = tuple[fx.Node | None, str]


@dataclass(frozen=True)
class Check:
    """One invariant: its name, what it says, and the function that finds the places that break it.

    What is true of a capture only (`of_captures`) rewriting may undo: removing a reader can make a write pure.
    """

    name: str
    says: str
    problems: Callable[[fx.GraphModule], Iterator[Problem]]
    of_captures: bool = False


def _structure(module: fx.GraphModule) -> Iterator[Problem]:
    nodes = list(module.graph.nodes)
    if not nodes or nodes[-1].op != "output" or sum(node.op == "output" for node in nodes) != 1:
        yield None, "there is not exactly one output, at the end"
    seen_compute = False
    for node in nodes:
        if node.op == "placeholder" and seen_compute:
            yield node, "is an input behind a computation"
        seen_compute |= node.op not in ("placeholder", "get_attr")
    if nodes and nodes[-1].op == "output" and not isinstance(nodes[-1].args[0], (tuple, list)):
        yield nodes[-1], "is not a flat tuple of results"


def _users(module: fx.GraphModule) -> Iterator[Problem]:
    seen: set[fx.Node] = set()
    readers: dict[fx.Node, set[fx.Node]] = {node: set() for node in module.graph.nodes}
    for node in module.graph.nodes:
        for operand in node.all_input_nodes:
            if operand not in seen:
                yield node, f"reads {operand.name}, which comes behind it or is in no graph"
            readers.get(operand, set()).add(node)
        seen.add(node)
    for node, found in readers.items():
        if set(node.users) != found:
            yield node, "has a user list that does not mirror its readers' arguments"


def _names(module: fx.GraphModule) -> Iterator[Problem]:
    names: set[str] = set()
    for node in module.graph.nodes:
        if node.name in names:
            yield node, "has another node's name"
        names.add(node.name)
        if not re.fullmatch(r"[A-Za-z_]\w*", node.name):
            yield node, "has a name that is no identifier"


def _targets(module: fx.GraphModule) -> Iterator[Problem]:
    for node in module.graph.nodes:
        if isinstance(node.target, OpOverload) and node.target in (aten.view.default, aten._unsafe_view.default):
            yield node, "is a view where the normal form has reshape"
        if node.op == "call_function" and not callable(node.target):
            yield node, "calls something that cannot be called"


def _arguments(module: fx.GraphModule) -> Iterator[Problem]:
    for node in module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            continue
        try:
            expected = ir.canonical_arguments(node.target, node.args, dict(node.kwargs))
        except TypeError as error:
            yield node, f"has arguments that its schema does not take: {error}"
            continue
        if expected != (node.args, dict(node.kwargs)):
            yield node, "does not have its arguments where the schema puts them"


def _attributes(module: fx.GraphModule) -> Iterator[Problem]:
    for node in module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            if not re.fullmatch(r"\w+(\.\w+)*", str(node.target)):
                yield node, f"names the attribute {node.target!r}, which is no dotted path"
            elif not ir.has_attribute(module, node.target):
                yield node, f"names the attribute {node.target}, which is not there"


def _one_name(module: fx.GraphModule) -> Iterator[Problem]:
    names: dict[tuple[object, ...], str] = {}
    for node in module.graph.nodes:
        found = ir.tensor(node)
        if found is not None:
            first = names.setdefault(ir.identity(found), node.target)
            if first != node.target:
                yield node, f"reads under the name {node.target} the tensor that is also {first}"


def _functional(module: fx.GraphModule) -> Iterator[Problem]:
    """A write that could be pure must be: asked again of the whole graph, on a copy, only where there are writes."""
    if not any(normalize.twin(node.target) for node in module.graph.nodes):
        return
    twin_module, nodes = ir.copy(module)
    normalize.functionalize(twin_module)
    for node in module.graph.nodes:
        if normalize.twin(node.target) and not normalize.twin(nodes[node].target):
            yield node, "writes in place where its pure twin would do"


def _shapes(module: fx.GraphModule) -> Iterator[Problem]:
    for node in module.graph.nodes:
        if effects.changes_shape(node.target):
            yield node, "changes the shape of a tensor in place, for which one node has two shapes"


def _values(module: fx.GraphModule) -> Iterator[Problem]:
    if ir.fake_mode(module) is None:
        return
    for node in module.graph.nodes:
        if isinstance(node.target, OpOverload) and node._erased is False and node.meta.get("val") is None:
            returns = any("Tensor" in str(result.type) for result in node.target._schema.returns)
            known = all(operand.meta.get("val") is not None for operand in node.all_input_nodes)
            if returns and known and ir.infer(node) is not None:
                yield node, "has no value although shapes are known"


def _origins(module: fx.GraphModule) -> Iterator[Problem]:
    for node in module.graph.nodes:
        if node.op in ("call_function", "call_method", "call_module") and "origin" not in node.meta:
            yield node, "does not say where it came from"


def _training(module: fx.GraphModule) -> Iterator[Problem]:
    for node in module.graph.nodes:
        if node.op == "call_module" and ir.get_attribute(module, node.target).training:
            yield node, "is a module in training mode"


aten = torch.ops.aten

CHECKS: tuple[Check, ...] = (
    Check("structure", "inputs first, one output of a flat tuple last", _structure),
    Check("users", "operands come first, and users mirror arguments", _users),
    Check("names", "names are unique identifiers", _names),
    Check("targets", "each known operation has its one spelling", _targets),
    Check("arguments", "arguments stand where the schema puts them", _arguments),
    Check("attributes", "every attribute that is named is there", _attributes),
    Check("one-name", "one tensor has one name", _one_name),
    Check("functional", "what can be pure is pure", _functional, of_captures=True),
    Check("shapes", "a value has one shape, whoever reads it when", _shapes),
    Check("values", "every value is known once shapes are", _values),
    Check("buffers", "a part is written in place only where nobody can tell", buffers.problems),
    Check("origins", "every operation says where it came from", _origins),
    Check("inference", "opaque modules are in eval mode", _training),
)


def problems(module: fx.GraphModule, checks: tuple[Check, ...] = CHECKS) -> list[tuple[str, str, Any]]:
    """Every breach, as (check, sentence, node), of the first check that finds one: those behind it may rely on it."""
    found: list[tuple[str, str, Any]] = []
    for check in checks:
        if found:
            break
        for node, sentence in check.problems(module):
            found.append((check.name, f"{node.name} {sentence}" if node is not None else sentence, node))
    return found


def check(module: fx.GraphModule, *, after: str = "capture", captured: bool = False) -> None:
    """Raises CheckError with the first breach of the contract; `after` says what was done last, `captured` that it was
    a capture, of which every check is asked."""
    found = problems(module, tuple(check for check in CHECKS if captured or not check.of_captures))
    if found:
        name, sentence, node = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise CheckError(
            f"the graph is not in normal form after {after}: check {name!r}: {sentence}{more}",
            node=node,
            hint="this is a bug in the pass named here, or in fxopt; please report it with the graph",
        )


def summary() -> dict[str, str]:
    """Every check's name and what it says."""
    return {check.name: check.says for check in CHECKS}


__all__ = ["CHECKS", "Check", "check", "effects", "problems", "summary"]
