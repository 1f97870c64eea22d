"""Whole random networks stay what they are: through both front ends, every pass and the quickest backend.

`python tests/test_random_networks.py FIRST LAST` goes through more seeds than the tests do.
"""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import fxopt
from fxopt.compare import compare
from fxopt.testing import RandomNetwork, random_network


def sharing(results: list[Any]) -> list[list[int]]:
    """Which results share memory with which."""
    places = [result.untyped_storage().data_ptr() for result in results]
    return [[other for other, held in enumerate(places) if held == place] for place in places]


def differences(net: RandomNetwork, x: torch.Tensor, front_end: str, *, exact: bool) -> list[str]:
    """What a compiled network does differently; verification is off, so that nothing is mended on the way."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", fxopt.FxoptNotice)
        expected = pytree.tree_leaves(net(x.clone()))
        fast = fxopt.compile(net, (x,) if front_end == "export" else None, verify=False)
        pytree.tree_leaves(fast(x.clone()))
        actual = pytree.tree_leaves(fast(x.clone()))

    def reference() -> list[Any]:
        with torch.no_grad():
            return pytree.tree_leaves(copy.deepcopy(net).double()(x.double()))

    verdict = compare(expected, actual, reference=reference, bitwise=exact)
    found = [] if verdict.ok else [verdict.reason]
    if sharing(expected) != sharing(actual):
        found.append(f"results share memory otherwise: {sharing(actual)} instead of {sharing(expected)}")
    found += [f"{result.name} {result.status}: {result.reason}" for result in fast.report.passes if result.reason]
    return found + [notice for notice in fast.report.notices if "failed" in notice]


@pytest.mark.parametrize("exact", [True, False], ids=["the same bits in exact arithmetic", "float32 within rounding"])
@pytest.mark.parametrize("first", range(0, 60, 20), ids=lambda first: f"seeds {first} to {first + 19}")
def test_random_networks_traced_symbolically_stay_equal(first: int, exact: bool) -> None:
    for seed in range(first, first + 20):
        net, (x,) = random_network(seed, exact=exact)
        assert not differences(net, x, "symbolic", exact=exact), f"random_network({seed}, exact={exact})\n{net}"


@pytest.mark.parametrize("exact", [True, False], ids=["the same bits in exact arithmetic", "float32 within rounding"])
def test_random_networks_captured_by_export_stay_equal(exact: bool) -> None:
    for seed in range(500, 510):
        net, (x,) = random_network(seed, exact=exact)
        assert not differences(net, x, "export", exact=exact), f"random_network({seed}, exact={exact})\n{net}"


def test_a_seed_gives_one_network() -> None:
    first, second = random_network(7), random_network(7)
    assert first[0].extra_repr() == second[0].extra_repr()
    assert torch.equal(first[1][0], second[1][0])


def main(first: int, last: int) -> None:
    """Goes through seeds, printing those that differ."""
    wrong = 0
    for seed in range(first, last):
        for front_end in ("symbolic", "export"):
            exact = seed % 2 == 0
            net, (x,) = random_network(seed, size=14, exact=exact)
            found = differences(net, x, front_end, exact=exact)
            if found:
                wrong += 1
                print(seed, front_end, exact, *found, sep="\n  ")
    print(f"{last - first} networks, both front ends: {wrong} differ")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
