"""fold-constants

    op(W, V, ...)             ->  the constant that it gives        where every tensor that it takes is constant
    zeros(...), arange(...)   ->  the constant that it gives        where it takes only literals
    m = zeros(...); m[i] = c  ->  the constant behind all writes    where it writes only constants

Whole subgraphs go at once: weight standardisation, a table of relative positions indexed by a buffer, a reshaped
LayerScale, a causal mask. The operators are run on the device of their operands, without gradients and autocast.

Legal when: nothing ever writes to an operand or to the result, or all that is written to memory of the graph's own are
constants, and nobody reads it in front of the last write; the result is not handed out (a factory gives a new
tensor in each call, and a view is a view of the model's own tensor); the operator is pure, draws nothing, and only
sizes decide its result's shape; each tensor is plain and dense and has values; no step gives more bytes than its
operands hold together, or than 4 MiB; what it gives has the dtype, device and shape that were inferred. A view in
another order costs nothing, and stays.
Numerics: the same bits, those that the operator gives. NaN and infinities are constants like others.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree as pytree

from fxopt import NoMatch, Pass, Rewriter, effects, ir

from . import _sharing, _written

#: A result of so many bytes is kept whatever it is made of; a larger one only where its operands are as large.
SMALL = 4 * 2**20
_RULE = "constant"


def _run(rewriter: Rewriter) -> None:
    _fold(rewriter)
    if _written.fold(rewriter, _on_constants, SMALL, "written"):
        _fold(rewriter)


def _fold(rewriter: Rewriter) -> None:
    values = _values(rewriter)
    stays: set[fx.Node] = set()
    chosen: list[fx.Node] = []
    # Readers first: what stays reads its operands at run time, so that these have to be kept.
    for node in reversed(values):
        if node.op == "get_attr" or all(user in values and user not in stays for user in node.users):
            continue
        reason = _not_kept(node, values)
        if reason is None:
            chosen.append(node)
        else:
            stays.add(node)
            rewriter.decline(node, reason, rule=_RULE, fits=False)
    places = {ir.identity(values[node]): node for node in reversed(values) if node.op == "get_attr"}
    for node in reversed(chosen):
        _replace(node, values, places, rewriter)


# -- what is constant ------------------------------------------------------------------------------------------------


def _values(rewriter: Rewriter) -> dict[fx.Node, Any]:
    """Every constant of the graph, in its order: of an attribute its tensor, of an operator what it gives."""
    aliases, handed_out = rewriter.aliases, _sharing.handed_out(rewriter.graph)
    values: dict[fx.Node, Any] = {}
    unfit: dict[fx.Node, str] = {}
    for node in rewriter.graph.nodes:
        if node.op == "get_attr":
            held, writer = ir.tensor(node), aliases.writer_of(node)
            if held is None:
                continue
            reason = f"{writer.name} may write to it" if writer is not None else _not_plain(held)
            if reason is None:
                values[node] = held
            else:
                unfit[node] = f"{node.target} is no constant: {reason}"
        elif _is_candidate(node, values) and all(n in values or n in unfit for n in node.all_input_nodes):
            reason = next((unfit[operand] for operand in node.all_input_nodes if operand in unfit), None)
            reason = reason or _told_apart(node, aliases, handed_out) or _not_foldable(node)
            found = reason or _run_once(node, values)
            if isinstance(found, str):
                rewriter.decline(node, found, rule=_RULE)
            else:
                values[node] = found
    return values


def _told_apart(node: fx.Node, aliases: effects.Aliases, handed_out: set[fx.Node]) -> str | None:
    """How somebody could tell one tensor for all calls from a new one in each, or from a view of the model's own."""
    writer = aliases.writer_of(node)
    if writer is not None:
        return f"{writer.name} may write to the result, which is a new tensor in each call"
    if node in handed_out:
        return "the model hands out the result, which is a new tensor in each call, or a view of the model's own"
    return None


def _is_candidate(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether a node is a call of an operator, or one of several results of a constant one."""
    if node.target is operator.getitem:
        source, place = node.args
        return isinstance(source, fx.Node) and isinstance(values.get(source), (list, tuple)) and type(place) is int
    return node.op == "call_function" and ir.schema(node.target) is not None


def _not_plain(held: torch.Tensor) -> str | None:
    """None for a dense tensor of torch's own class that has values; else what it is instead."""
    if type(held) is not torch.Tensor:
        return f"a {type(held).__name__}"
    if held.layout is not torch.strided or held.is_nested:
        return f"of layout {held.layout}, not dense"
    if held.is_quantized:
        return "quantised"
    if held.is_meta:
        return "on the meta device, without values"
    if held.requires_grad:
        return "training changes it"
    if held.is_conj() or held.is_neg():
        return "a view that is conjugated or negated when it is read"
    return None


def _not_foldable(node: fx.Node) -> str | None:
    """None where an operator gives tensors that depend on nothing but its operands; else why it may not."""
    target: Any = node.target
    if target is operator.getitem:
        return None
    if not _sharing.is_known(target):
        return f"what {target} does beside its result is not known"
    found = effects.of(node)
    if not found.pure:
        return "it draws random numbers" if found.random else "it is there for what it does beside its result"
    if _sharing.owns_memory(target):
        return "it gives memory as it is"
    if not all(str(result.type) in ("Tensor", "List[Tensor]") for result in target._schema.returns):
        return "it gives no tensor"
    return None


def _run_once(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What a node gives on its constant operands; a string that says why it is not taken."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    target: Any = node.target
    try:
        if target is not operator.getitem:
            size, given = _bytes(_inferred(target, args, kwargs)), _bytes([values[n] for n in node.all_input_nodes])
            if size > max(given, SMALL):
                return f"its result has {size} bytes: more than its operands, which have {given}, and than {SMALL}"
        with _plainly():
            found = target(*args, **kwargs)
    except DynamicOutputShapeException:
        return "the values of its operands decide the size of its result"
    except Exception as error:
        return f"run on its constants, it raises {type(error).__name__}: {str(error).splitlines()[0]}"
    return _unlike(node, found) or found


def _on_constants(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """What a node that makes, views or writes memory gives, run on it; a string that says why it is not taken."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    target: Any = node.target
    if target is not operator.getitem and not _sharing.is_known(target):
        return f"what {target} does beside its result is not known"
    try:
        with _plainly():
            found = target(*args, **kwargs)
    except Exception as error:
        return f"run on its constants, {node.name} raises {type(error).__name__}: {str(error).splitlines()[0]}"
    return _unlike(node, found) or found


def _inferred(target: Any, args: Any, kwargs: Any) -> Any:
    """What a call gives, without the numbers."""
    mode = FakeTensorMode()
    args, kwargs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
    with _plainly(), mode:
        return target(*args, **kwargs)


def _bytes(found: Any) -> int:
    return sum(leaf.numel() * leaf.itemsize for leaf in pytree.tree_leaves(found) if _is_tensor(leaf))


def _is_tensor(found: Any) -> bool:
    return isinstance(found, torch.Tensor)


@contextmanager
def _plainly() -> Iterator[None]:
    """No autocast."""
    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _unlike(node: fx.Node, found: Any) -> str | None:
    """How what a node gave is no plain tensor (or several), or not what was inferred; None where it is both."""
    known = pytree.tree_leaves(ir.value(node))
    for index, leaf in enumerate(pytree.tree_leaves(found)):
        if not _is_tensor(leaf):
            return f"it gives a {type(leaf).__name__}"
        reason = _not_plain(leaf)
        if reason is not None:
            return f"its result is {reason}"
        inferred = known[index] if index < len(known) else None
        if inferred is None:
            continue
        same = (inferred.dtype, inferred.device) == (leaf.dtype, leaf.device)
        if not same or not ir.same_sizes(inferred.shape, leaf.shape):
            wanted = f"{ir.describe_value(inferred)} on {inferred.device}"
            return f"it gives {ir.describe_value(leaf)} on {leaf.device} where {wanted} was inferred"
    return None


# -- what is kept ----------------------------------------------------------------------------------------------------


def _not_kept(node: fx.Node, values: dict[fx.Node, Any]) -> str | None:
    """None where a result is worth an attribute; else what stays: several tensors, a permuted or expanded view."""
    held = values[node]
    if not _is_tensor(held):
        return "one of its results stays"
    place = held.untyped_storage().data_ptr()
    operands = pytree.tree_leaves([values[operand] for operand in node.all_input_nodes])
    if any(operand.untyped_storage().data_ptr() == place for operand in operands) and not _in_order(held):
        return "it is a view in another order, which costs nothing"
    return None


def _in_order(held: torch.Tensor) -> bool:
    """Whether strides fall from dimension to dimension: neither permuted nor expanded."""
    strides = [stride for stride, size in zip(held.stride(), held.shape, strict=True) if size > 1]
    return all(left >= right for left, right in pairwise(strides)) and 0 not in strides


def _replace(node: fx.Node, values: dict[fx.Node, Any], places: dict[Any, fx.Node], rewriter: Rewriter) -> None:
    """Lets every reader of a node read the constant: the attribute that is this very tensor, or a new one."""
    held: torch.Tensor = values[node]
    twin = places.get(ir.identity(held))
    inside = _inside(node)
    steps = [step for step in inside if step.op != "get_attr"]
    name = next((str(step.target) for step in inside if step.op == "get_attr"), node.name)

    def build() -> fx.Node:
        if twin is not None and twin < node:
            return twin
        kept = held if twin is None else held.clone()  # an attribute is one name of one tensor
        return rewriter.constant(kept, f"{name.removesuffix('_folded')}_folded", keep_strides=True)

    outcome = rewriter.substitute(node, build, rule=_RULE, nodes=steps)
    if isinstance(outcome, NoMatch):
        rewriter.decline(node, outcome.reason, rule=_RULE)
    else:
        places.setdefault(ir.identity(held), outcome)
        values[outcome] = held


def _inside(node: fx.Node) -> list[fx.Node]:
    """Everything that a constant is computed from, nearest and first operands first."""
    found: dict[fx.Node, None] = {}
    waiting = list(reversed(node.all_input_nodes))
    while waiting:
        step = waiting.pop()
        if step not in found:
            found[step] = None
            waiting += reversed(step.all_input_nodes)
    return list(found)


PASS = Pass("fold-constants", run=_run, numerics="bitwise", doc=__doc__)
