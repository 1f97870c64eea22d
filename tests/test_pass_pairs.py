"""Each pass alone, and each ordered pair of passes, keeps random networks; each pass does all it can in one go.

The passes are those of the default pipeline, so that a new one joins by itself. A pair is tried where its first pass
rewrites: else it is the second alone.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import event
from torch import fx

import fxopt
from fxopt import ir, plugins
from fxopt.rewrite import Pass
from fxopt.testing import Network, Oracle, networks
from harness import captured, interpreted, on_random, rewritten

PASSES = [entry.current for entry in fxopt.passes() if entry.default]
SHARDS = 10


def after(module: fx.GraphModule, current: Pass) -> tuple[fx.GraphModule, list[Any]]:
    """A copy that a pass has rewritten, and its rewrites."""
    twin, _ = ir.copy(module)
    return twin, rewritten(twin, [current], "approximate").journal.rewrites


@pytest.mark.parametrize("exact", [True, False], ids=["exactly", "but for rounding"])
@pytest.mark.parametrize("shard", range(SHARDS), ids=lambda shard: f"part {shard + 1} of {SHARDS}")
def test_passes_alone_and_in_pairs_keep(graphs: int, exact: bool, shard: int) -> None:
    def check(network: Network) -> None:
        oracle = Oracle(network)
        module = captured(network, *oracle.inputs())
        passes = [current for current in PASSES if not exact or current.numerics != "approximate"]
        for first in passes:
            once, rewrites = after(module, first)
            if not rewrites:
                continue
            found = oracle.differences(interpreted(once), same_bits=first.numerics == "bitwise")
            assert not found, f"{first.name}: {rewrites}"
            assert not after(once, first)[1], f"{first.name} has more to do when it runs again"
            for second in passes:
                twice, more = after(once, second)
                if more:
                    event(f"{first.name}, then {second.name}")
                    assert not oracle.differences(interpreted(twice)), f"{first.name}, then {second.name}: {more}"

    on_random(networks(exact=exact, max_steps=6), graphs // (10 * SHARDS), shard, check)


def test_random_networks_have_something_for_every_pass() -> None:
    """A pass that no network shows anything to rewrite would pass every other test."""
    idle = {current.name for current in PASSES}

    def check(network: Network) -> None:
        if idle:
            module = captured(network, *network.example_inputs())
            rewrites = rewritten(module, plugins.default_pipeline(), "approximate").journal.rewrites
            idle.difference_update(rewrite.pass_name for rewrite in rewrites)

    on_random(networks(max_steps=12), 500, 0, check)
    assert not idle
