"""Buffers: concats that copy nothing, because each part is written into its slice by what makes it.

    a = conv(...); b = conv(...); y = fxopt.buffer([a, b], dim)            y owns the memory; a and b are slices of it

A buffer is a value like any other, and what it means is `cat`; so nothing that rewrites values has to know of it. What
it says beyond that is who owns memory: `y` does, part by part along `dim`; a part that is a buffer itself has its own
parts in that slice (a concat that grows: one memory for a whole dense block). Parts whose numbers are in `copied` are
copied in, as `cat` would. The memory lives from the first write of a part to the last read of the buffer or a part.

A part is written in place only where nobody can tell: `refusal` says why not. The contract asks it of every part
(check "buffers"), and behind each pass the driver lets `settle` have those parts copied of which it holds no more.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt import effects, ir, ops
from fxopt.edit import Editor
from fxopt.hints import hint

aten = torch.ops.aten

#: Beside elementwise operators, those whose result a kernel can write with any strides.
_WRITE_STRIDED = frozenset(
    {
        *ops.CONVOLUTION_TARGETS,
        *ops.STRING_PADDED_TARGETS,
        ops.convolution,
        ops.linear,
        ops.buffer,
        aten.linear.default,
        aten.matmul.default,
        aten.mm.default,
        aten.addmm.default,
        aten.batch_norm.default,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten.avg_pool1d.default,
        aten.avg_pool2d.default,
        aten.avg_pool3d.default,
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
        aten.upsample_nearest2d.vec,
        aten.upsample_bilinear2d.vec,
    }
)


def writes_strided(node: fx.Node) -> bool:
    """Whether a node computes one fresh tensor, and does nothing else, that a kernel could write into a slice."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, OpOverload):
        return False
    found = effects.of(node)  # a random draw depends on the order of memory
    return (target in _WRITE_STRIDED or torch.Tag.pointwise in target.tags) and found.pure and not found.aliases


def parts(buffer: fx.Node) -> list[fx.Node]:
    """The parts of a buffer in order."""
    return list(ir.argument(buffer, "parts"))


def copied(buffer: fx.Node) -> frozenset[int]:
    """The numbers of the parts that are copied in."""
    return frozenset(ir.argument(buffer, "copied"))


def in_place(buffer: fx.Node) -> list[fx.Node]:
    """The parts that are written in place."""
    left = copied(buffer)
    return [part for number, part in enumerate(parts(buffer)) if number not in left]


def leaves(buffer: fx.Node) -> list[fx.Node]:
    """The parts, those of parts that are buffers on the same dimension among them, in order."""
    found: list[fx.Node] = []
    waiting, dim = [buffer], ir.argument(buffer, "dim")
    while waiting:
        node = waiting.pop()
        nested = node.target is ops.buffer and ir.argument(node, "dim") == dim
        if nested:
            waiting += reversed(parts(node))
        else:
            found.append(node)
    return found


class Owners:
    """Which buffer owns the memory of which part, and which parts may be given to another."""

    def __init__(self, graph: fx.Graph, aliases: effects.Aliases | None = None) -> None:
        self.aliases = effects.Aliases.scan(graph) if aliases is None else aliases
        self.owner: dict[fx.Node, fx.Node] = {}
        self._handed_out = {self.aliases.root(found) for found in graph.output_node().all_input_nodes}

    def refusal(self, part: fx.Node, result: fx.Node) -> str | None:
        """None where `part` may be written into a slice of `result` (a concat or buffer); else why it must be copied.

        Ownership is not asked here: `take` does that.
        """
        if part.op in ("placeholder", "get_attr"):
            return f"{part.name} is {'an input' if part.op == 'placeholder' else 'a constant'}, in memory of its own"
        if effects.of(part).aliases:
            return f"{part.name} is a view ({ir.target_name(part)}), in the memory of what it views"
        if not writes_strided(part):
            return f"{part.name} ({ir.target_name(part)}) gives a tensor of its own"
        before, after = ir.fake(part), ir.fake(result)
        if before is None or after is None:
            return f"nothing is known of the memory of {part.name}"
        if (before.dtype, before.device, before.layout) != (after.dtype, after.device, after.layout):
            return f"{part.name} is {before.dtype} on {before.device}, the concat {after.dtype} on {after.device}"
        if not _same_order(before, after):
            return f"{part.name} has its dimensions in memory in another order than the concat"
        if self.aliases.root(part) in self._handed_out:
            return f"the model hands out {part.name}, whose memory must be its own"
        for value, what in ((part, part.name), (result, "the concat")):
            writer = self.aliases.writer_of(value)
            if writer is not None:
                return f"{writer.name} writes to {what} in place"
        for reader in _readers(part):
            why = effects.strides_matter(reader)
            if why is not None:
                return f"{reader.name} reads {part.name} and {why}"
        return None

    def take(self, part: fx.Node, buffer: fx.Node) -> str | None:
        """Gives a part's memory to a buffer; or says which other one, or which other place in it, has it."""
        other = self.owner.setdefault(part, buffer)
        if other is buffer:
            return None
        return f"{part.name} is in {other.name} already"


def _same_order(part: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether a part is dense, with its dimensions in the order of the whole's strides. What is computed from it has
    then the same strides if it lies in a slice."""
    if part.layout is not torch.strided or any(ir.static(size) == 0 for size in part.shape):
        return part.layout is torch.strided
    strides = [(number, dim) for dim, number in enumerate(map(hint, whole.stride())) if number is not None]
    expected: Any = 1
    for _, dim in sorted(strides):
        if ir.static(part.shape[dim]) != 1 and not ir.same_sizes([part.stride(dim)], [expected]):
            return False
        expected = expected * part.shape[dim]
    return len(strides) == whole.dim()


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a value, or a view of it."""
    for user in node.users:
        if user.op == "output":
            continue
        yield user
        if node in effects.of(user).aliases:
            yield from _readers(user)


def _problems(graph: fx.Graph) -> Iterator[tuple[fx.Node, int, str]]:
    """Every part that is written in place and may not be: its buffer, its number, and why."""
    buffers = list(graph.find_nodes(op="call_function", target=ops.buffer))
    if not buffers:
        return
    owners = Owners(graph)
    for buffer in sorted(buffers):
        seen: set[fx.Node] = set()
        for number, part in enumerate(parts(buffer)):
            if number in copied(buffer):
                continue
            why = owners.refusal(part, buffer) or owners.take(part, buffer)
            if why is None and part in seen:
                why = f"{part.name} is in it twice"
            seen.add(part)
            if why is not None:
                yield buffer, number, why


def problems(module: fx.GraphModule) -> Iterator[tuple[fx.Node | None, str]]:
    """The breaches of the contract of buffers, for `fxopt.check`."""
    for buffer in module.graph.find_nodes(op="call_function", target=ops.buffer):
        count = len(parts(buffer))
        if not all(0 <= number < count for number in copied(buffer)):
            yield buffer, f"copies parts {sorted(copied(buffer))} of {count}"
    for buffer, number, why in _problems(module.graph):
        yield buffer, f"has its part {number} written in place, but {why}"


def settle(editor: Editor) -> list[tuple[fx.Node, int, str]]:
    """Lets every part be copied that a pass has made one that may not be written in place: buffer, number and why."""
    found = list(_problems(editor.graph))
    numbers: dict[fx.Node, set[int]] = {}
    for buffer, number, _ in found:
        numbers.setdefault(buffer, set(copied(buffer))).add(number)
    for buffer, all_copied in numbers.items():
        args: tuple[Any, ...] = (parts(buffer), ir.argument(buffer, "dim"), sorted(all_copied))
        editor.update(buffer, *ir.canonical_arguments(ops.buffer, args, {}))
    return found


def report(part: fx.Node, why: str) -> str:
    """That a part is copied, how much that is, and why, in words."""
    found = ir.fake(part)
    sizes: list[Any] = [] if found is None else list(found.shape)
    numbers = [size for size in map(ir.static, sizes) if size is not None]
    unit = "bytes" if len(numbers) == len(sizes) else "bytes for each of a batch"
    return f"{prod(numbers) * (0 if found is None else found.dtype.itemsize)} {unit} are copied: {why}"
