"""What work takes on a device, estimated from shapes, and whether a rewrite pays.

The estimate is the roofline (Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for
multicore architectures", CACM 52(4), 2009): a kernel takes as long as its arithmetic at the device's peak rate or as
its bytes at the memory's bandwidth, whichever is longer, and here also the time to launch it. It ranks two ways to
compute one thing. It is not a prediction of either: caches, small sizes and bad kernels are not in it.

A guard estimates a rewrite before its nodes exist:

    wide = cost.layer((n, c, h, w), (o1 + o2, c, 1, 1), (n, o1 + o2, h, w), dtype=torch.float32)
    found = cost.compare([conv1, conv2], [wide])
    if found is None:
        return NoMatch(f"{UNKNOWN}whether one wide convolution is quicker", conv1)
    return None if found.pays else NoMatch(f"it would not pay: {found}", conv1)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from fxopt import ir
from fxopt.hints import hint
from fxopt.work import CONCATS, Call, Cost, Rule, layer_flops, of, rule


@dataclass(frozen=True)
class Device:
    """A device as the roofline sees it: arithmetic and bytes per second, and seconds to launch a kernel."""

    name: str
    flops_per_second: float
    bytes_per_second: float
    seconds_per_launch: float

    @classmethod
    def cpu(cls, threads: int | None = None) -> Device:
        """A modest CPU with so many threads (torch's, where not given).

        40 GFLOP/s a thread is what oneDNN's convolutions reach in float32 on an AVX2 core (75 to 110 were measured on
        two); 10 GB/s a thread, and no more than 40, are usual for reading memory; 5 microseconds lie between a small
        ATen call (3) and a oneDNN one (15).
        """
        threads = torch.get_num_threads() if threads is None else threads
        return cls(f"cpu ({threads} threads)", 40e9 * threads, 10e9 * min(threads, 4), 5e-6)

    @classmethod
    def gpu(cls) -> Device:
        """A data-centre GPU of recent years, in float32: 20 TFLOP/s, 1.5 TB/s, 5 microseconds a launch."""
        return cls("gpu", 20e12, 1.5e12, 5e-6)

    @classmethod
    def like(cls, device: torch.device | None) -> Device:
        """The default figures for a device of torch's."""
        return cls.cpu() if device is None or device.type in ("cpu", "meta") else cls.gpu()

    def seconds(self, work: Cost) -> float:
        """The roofline of one kernel, or of several that are all bound by the same of the two."""
        limit = max(work.flops / self.flops_per_second, work.moved / self.bytes_per_second)
        return limit + work.launches * self.seconds_per_launch


def estimate(node: fx.Node, device: Device | None = None) -> float | None:
    """Seconds that a node takes, by default on the device that its result is on; None where a shape is not known."""
    work = of(node)
    return None if work is None else (device or device_of(node)).seconds(work)


def device_of(node: fx.Node) -> Device:
    """The default figures for the device that a node's result is on."""
    found = ir.fake(node)
    return Device.like(None if found is None else found.device)


#: No work at all.
NOTHING = Cost()


# -- a module --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Total:
    """The work of several nodes, the seconds estimated for each in turn, and on what.

    `unknown` counts the operations that are not in it, because a shape is not known or they are opaque.
    """

    work: Cost = NOTHING
    seconds: float = 0.0
    unknown: int = 0
    device: str = ""

    def __add__(self, other: Total) -> Total:
        seconds, unknown = self.seconds + other.seconds, self.unknown + other.unknown
        return Total(self.work + other.work, seconds, unknown, self.device)

    def __sub__(self, other: Total) -> Total:
        seconds, unknown = self.seconds - other.seconds, self.unknown - other.unknown
        return Total(self.work - other.work, seconds, unknown, self.device)

    def to_dict(self) -> dict[str, Any]:
        """The total for programs: only JSON's types."""
        return {
            "flops": self.work.flops,
            "bytes_moved": self.work.moved,
            "bytes_copied": self.work.copied,
            "launches": self.work.launches,
            "seconds": self.seconds,
            "unknown_operations": self.unknown,
            "device": self.device,
        }


def amount(number: float, unit: str) -> str:
    """A number with three digits and a prefix: `8.22 GFLOP`, `426 MB`, `-12 kB`, `3.1 µs`."""
    size = abs(number)
    if unit == "s":
        scale, prefix = (1.0, "") if size >= 1 else (1e-3, "m") if size >= 1e-3 or not size else (1e-6, "µ")
    else:
        powers = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
        scale, prefix = next(entry for entry in powers if size >= entry[0] or entry[0] == 1)
    value = number / scale
    digits = f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return f"{digits} {prefix}{unit}"


def change(before: Total, after: Total) -> str:
    """What became less or more, in words: `-38 launches, -12.3 MB, -2.1 ms`; empty where nothing did.

    Operations of unknown work may be on both sides, as long as they are as many.
    """
    if before.unknown != after.unknown or (before.unknown and not before.work.launches):
        return "unknown"
    old, new = before.work, after.work
    launches = new.launches - old.launches
    amounts = (
        (new.flops - old.flops, "FLOP", ""),
        (new.moved - old.moved, "B", " moved"),
        (new.copied - old.copied, "B", " copied"),
        (after.seconds - before.seconds, "s", ""),
    )
    parts = [f"{launches:+d} launch{'' if abs(launches) == 1 else 'es'}"] if launches else []
    parts += [f"{'+' if number > 0 else ''}{amount(number, unit)}{what}" for number, unit, what in amounts if number]
    return ", ".join(parts)


def describe(before: Total, after: Total) -> str:
    """Two totals in a line, and what is not in them; empty where there is no work."""
    old, new = before.work, after.work
    if not old.launches and not new.launches:
        return "work is not estimated: shapes are not known" if before.unknown or after.unknown else ""

    def both(left: str, right: str) -> str:
        return left if left == right else f"{left} -> {right}"

    moved = f"{both(amount(old.moved, 'B'), amount(new.moved, 'B'))} moved"
    if old.copied or new.copied:
        moved += f" ({both(amount(old.copied, 'B'), amount(new.copied, 'B'))} copied)"
    parts = [
        both(amount(before.seconds, "s"), amount(after.seconds, "s")),
        both(amount(old.flops, "FLOP"), amount(new.flops, "FLOP")),
        moved,
        f"{both(str(old.launches), str(new.launches))} launches",
    ]
    if before.unknown or after.unknown:
        left_out = both(str(before.unknown), str(after.unknown))
        parts.append(f"without {left_out} operations whose work is not known")
    return f"estimated on {after.device}: " + "; ".join(parts)


def of_module(module: fx.GraphModule, device: Device | None = None) -> Total:
    """The work of a whole module, by default on the device that its first input or weight is on."""
    return _total(module.graph.nodes, device or _device_of_module(module))


def _device_of_module(module: fx.GraphModule) -> Device:
    values = map(ir.fake, module.graph.nodes)
    first = next((value for value in values if value is not None), None)
    return Device.like(None if first is None else first.device)


def _total(works: Iterable[fx.Node | Cost], device: Device) -> Total:
    work, seconds, unknown = NOTHING, 0.0, 0
    for entry in works:
        found = of(entry) if isinstance(entry, fx.Node) else entry
        if found is None:
            unknown += 1
        elif found.launches:
            work += found
            seconds += device.seconds(found)
    return Total(work, seconds, unknown, device.name)


def copied_by_concat(module: fx.GraphModule) -> int | None:
    """The bytes that a module's concats copy; None where a shape is not known."""
    copied = 0
    for node in module.graph.nodes:
        if is_concat(node):
            found = of(node)
            if found is None:
                return None
            copied += found.copied
    return copied


def is_concat(node: fx.Node) -> bool:
    """Whether a node joins tensors along a dimension."""
    return node.op == "call_function" and ir.target_name(node) in CONCATS


# -- before there are nodes ------------------------------------------------------------------------------------------


#: Sizes as `ir.shape` gives them.
Sizes = Iterable[int | torch.SymInt] | None


def layer(
    source: Sizes,
    weight: Sizes,
    result: Sizes,
    *,
    dtype: torch.dtype | None = torch.float32,
    transposed: bool = False,
    also_read: Sizes = (),
) -> Cost | None:
    """The work of one convolution or linear layer from its sizes; None where one is not known.

    `weight` is as the layer has it, with its own dimension 1 (channels / groups); `also_read` are the sizes of one more
    operand (a residual).
    """
    shapes = [_numbers(sizes) for sizes in (source, weight, result)]
    extra = _numbers(also_read)
    if dtype is None or extra is None or any(sizes is None for sizes in shapes):
        return None
    first, second, last = (sizes or () for sizes in shapes)
    flops = layer_flops(first, second, last, transposed=transposed)
    more = prod(extra) if extra else 0
    read = prod(first) + prod(second) + more
    return Cost(flops + more, dtype.itemsize * read, dtype.itemsize * prod(last), 0, 1)


def elementwise(result: Sizes, operands: int = 1, *, dtype: torch.dtype | None = torch.float32) -> Cost | None:
    """The work of one operation on each element, of operands as large as the result; None where a size is not known."""
    sizes = _numbers(result)
    if sizes is None or dtype is None:
        return None
    size = dtype.itemsize * prod(sizes)
    return Cost(prod(sizes), operands * size, size, 0, 1)


def copy(result: Sizes, *, dtype: torch.dtype | None = torch.float32) -> Cost | None:
    """The work of copying a tensor of these sizes (a concat, a clone); None where a size is not known."""
    sizes = _numbers(result)
    if sizes is None or dtype is None:
        return None
    size = dtype.itemsize * prod(sizes)
    return Cost(0, size, size, size, 1)


def _numbers(sizes: Sizes) -> tuple[int, ...] | None:
    found = [hint(size) for size in sizes] if sizes is not None else [None]
    numbers = tuple(number for number in found if number is not None)
    return numbers if len(numbers) == len(found) else None


@dataclass(frozen=True)
class Comparison:
    """Two ways to compute one thing, in estimated seconds."""

    before: Total
    after: Total

    @property
    def pays(self) -> bool:
        """Whether the second is the quicker by estimate."""
        return self.after.seconds < self.before.seconds

    def __str__(self) -> str:
        before, after = 1e6 * self.before.seconds, 1e6 * self.after.seconds
        return f"an estimated {after:.3g} µs instead of {before:.3g} on {self.after.device}"


def compare(
    before: Iterable[fx.Node | Cost | None], after: Iterable[fx.Node | Cost | None], device: Device | None = None
) -> Comparison | None:
    """Estimates what is there against what would come; None where the work of a part is not known.

    Each is a sequence of nodes and of costs from plain sizes (`layer`, `elementwise`, `copy`), each a kernel of its
    own. By default on the device of the first node.
    """
    old, new = list(before), list(after)
    if device is None:
        device = next((device_of(entry) for entry in (*old, *new) if isinstance(entry, fx.Node)), Device.cpu())
    if any(entry is None for entry in (*old, *new)):
        return None
    sides = [_total([entry for entry in side if entry is not None], device) for side in (old, new)]
    return None if any(side.unknown for side in sides) else Comparison(*sides)


__all__ = [
    "Call",
    "Comparison",
    "Cost",
    "Device",
    "Rule",
    "Total",
    "amount",
    "change",
    "compare",
    "copied_by_concat",
    "copy",
    "describe",
    "device_of",
    "elementwise",
    "estimate",
    "is_concat",
    "layer",
    "of",
    "of_module",
    "rule",
]
