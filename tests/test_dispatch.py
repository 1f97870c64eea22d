"""What a compiled graph costs beside its kernels: nanoseconds to microseconds a node, against a function by hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxopt

#: Seconds that a node may take longer than in a function written by hand.
LIMIT = 3e-6
STEPS = 100


def by_hand(x: torch.Tensor) -> torch.Tensor:
    for _ in range(STEPS):
        x = torch.sin(torch.relu(x + 1.5))
    return x


class Chain(nn.Module):
    """Three cheap operations a step, on a few numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return by_hand(x)


def seconds(functions: list[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> list[float]:
    """Of each function the shortest of a few medians, taken in turns."""
    rounds = []
    for _ in range(5):
        medians = []
        for function in functions:
            taken = []
            for _ in range(20):
                start = time.perf_counter()
                function(x)
                taken.append(time.perf_counter() - start)
            medians.append(statistics.median(taken))
        rounds.append(medians)
    return [min(column) for column in zip(*rounds, strict=True)]


@pytest.mark.parametrize("backend", ["aten", "onednn"])
def test_a_node_costs_less_than_three_microseconds_more_than_by_hand(backend: str) -> None:
    x = torch.randn(4)
    compiled = fxopt.compile(Chain().eval(), (x,), passes=(), backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(x), by_hand(x))
        ours, theirs = seconds([compiled, by_hand], x)
    assert (ours - theirs) / (3 * STEPS) < LIMIT, f"{1e6 * ours:.0f} and {1e6 * theirs:.0f} microseconds"


def test_a_call_costs_less_than_thirty_microseconds() -> None:
    x = torch.randn(4)
    compiled = fxopt.compile(nn.ReLU().eval(), (x,), passes=(), backend="aten")
    with torch.no_grad():
        compiled(x)
        ours, theirs = seconds([compiled, torch.relu], x)
    assert ours - theirs < 30e-6
