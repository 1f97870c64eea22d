"""Whole random networks stay what they are: through the pipeline, both front ends and the quickest backend.

`pytest --graphs 20000 tests/test_random_networks.py` goes through more of them.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import event

import fxopt
from fxopt import plugins
from fxopt.pipeline import only
from fxopt.testing import Network, Oracle, networks
from harness import captured, everything_pays, interpreted, on_random, rewritten

SHARDS = 10

numbers = pytest.mark.parametrize(
    "exact", [True, False], ids=["every number in exact arithmetic", "float32 but for rounding"]
)
shards = pytest.mark.parametrize("shard", range(SHARDS), ids=lambda shard: f"part {shard + 1} of {SHARDS}")


def check_pipeline(network: Network) -> None:
    """Rewritten by the whole pipeline a network gives what it gave, and the pipeline is through with it."""
    oracle = Oracle(network)
    module = captured(network, *oracle.inputs())
    passes = plugins.default_pipeline()
    rewrites = rewritten(module, passes).journal.rewrites
    for rule in {f"{rewrite.pass_name}: {rewrite.rule}" for rewrite in rewrites}:
        event(rule)
    assert not oracle.differences(interpreted(module)), rewrites
    before = str(module.graph)
    assert not rewritten(module, passes).journal.rewrites, "the pipeline has more to do when it runs again"
    assert str(module.graph) == before


@numbers
@shards
def test_the_pipeline_keeps(graphs: int, exact: bool, shard: int) -> None:
    # Half of them do what an estimate advises against: so small are they that it always does.
    with everything_pays() if shard % 2 else nullcontext():
        on_random(networks(exact=exact), graphs // (2 * SHARDS), shard, check_pipeline)


@shards
def test_passes_that_promise_the_same_bits_keep_them(graphs: int, shard: int) -> None:
    passes = only(plugins.default_pipeline(), lambda current: current.numerics == "bitwise")

    def check(network: Network) -> None:
        oracle = Oracle(network, special=True)
        module = captured(network, *oracle.inputs())
        rewrites = rewritten(module, passes, "bitwise").journal.rewrites
        assert not oracle.differences(interpreted(module), same_bits=True), rewrites

    on_random(networks(), graphs // (4 * SHARDS), shard, check)


def compiled(network: Network, front_end: str, **options: Any) -> fxopt.CompiledModule:
    """Compiled without verification, so that nothing is mended on the way."""
    example = network.example_inputs() if front_end == "export" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxopt.FxoptNotice)
        return fxopt.compile(network, example, verify=False, **options)


@numbers
@pytest.mark.parametrize(("front_end", "share"), [("symbolic", 10), ("export", 40)])
def test_compiling_keeps(graphs: int, front_end: str, share: int, exact: bool) -> None:
    def check(network: Network) -> None:
        oracle = Oracle(network)
        fast = compiled(network, front_end)
        for _ in range(2):  # the first call makes the specialisation that the second finds
            assert not oracle.differences(fast), fast.report.rewrites
        event(f"backend: {fast.report.backend}")
        assert all(result.status == "done" for result in (*fast.report.passes, *fast.report.lowering)), fast.report
        assert not [notice for notice in fast.report.notices if "failed" in notice]

    on_random(networks(exact=exact), graphs // (2 * share), share, check)


def test_what_is_trained_keeps_its_gradients(graphs: int) -> None:
    refused = ("does not run, or has none", "cannot be computed")

    def check(network: Network) -> None:
        network.requires_grad_()
        if not list(network.parameters()):
            return
        try:
            tuned = fxopt.compile(network, network.example_inputs(), trainable=True)
        except fxopt.InputError:  # autograd refuses some writes, in the model, too
            event("refused by the model")
            return
        except fxopt.VerificationError as error:
            if not any(said in error.message for said in refused):
                raise
            event("refused")
            return
        assert not [result for result in tuned.report.passes if result.status != "done"]

    with everything_pays(), warnings.catch_warnings():
        warnings.simplefilter("ignore", fxopt.FxoptNotice)
        on_random(networks(), graphs // SHARDS, 0, check)
