"""What fxopt.testing gives to authors of passes: networks that print as they are made, an oracle that notices."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given

import fxopt
from fxopt.testing import Network, Oracle, networks
from fxopt.testing.oracle import bits, run
from harness import captured

NAMES = {"Network": Network}


def results(network: Network) -> list[bytes]:
    """What a network gives, to the bit."""
    return [bits(tensor) for tensor in run(network, network.example_inputs()).tensors]


# -- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "float32"])
def test_a_network_is_what_it_prints(exact: bool) -> None:
    @given(networks(exact=exact))
    def check(network: Network) -> None:
        again = eval(repr(network), NAMES)
        assert repr(again) == repr(network)
        assert results(again) == results(network) == results(copy.deepcopy(network))

    check()


def test_a_network_prints_as_a_program() -> None:
    network = Network(
        "return torch.relu(self.linear(x))", {"linear": "nn.Linear(4, 2)"}, {"x": (3, 4)}, exact=True, seed=3
    )
    assert repr(network).splitlines() == [
        "Network(",
        '    """',
        "        return torch.relu(self.linear(x))",
        '    """,',
        "    layers={",
        '        "linear": "nn.Linear(4, 2)",',
        "    },",
        '    inputs={"x": (3, 4)},',
        "    exact=True, seed=3,",
        ")",
    ]


@pytest.mark.parametrize(
    ("fails", "most_lines"),
    [
        pytest.param(lambda names: "relu" in names and "cat" in names, 4, id="a concat and a ReLU"),
        pytest.param(lambda names: names.count("conv2d") == 2 and "add" in names, 5, id="a sum, and two convolutions"),
        pytest.param(lambda names: "relu_" in names, 4, id="a write that stays a write"),
    ],
)
def test_a_network_shrinks_to_what_matters(fails: Callable[[list[str]], bool], most_lines: int) -> None:
    def shows(network: Network) -> bool:
        graph = captured(network, *network.example_inputs()).graph
        return fails([node.target._opname for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)])

    found = hypothesis.find(networks(), shows, settings=hypothesis.settings(max_examples=1000))
    assert len(found.program.splitlines()) <= most_lines, found


def test_without_writes_nothing_is_done_in_place() -> None:
    @given(networks(writes=False))
    def check(network: Network) -> None:
        inputs = network.example_inputs()
        assert [bits(tensor) for tensor in run(network, inputs).inputs] == list(map(bits, network.example_inputs()))

    check()


def test_shared_weights_are_one_tensor() -> None:
    network = Network(
        "return self.one(x) + self.two(x)",
        {"one": "nn.Linear(4, 4)", "two": "nn.Linear(4, 4)", "two.weight": "self.one.weight"},
        {"x": (2, 4)},
    )
    assert network.two.weight is network.one.weight
    assert not torch.equal(network.two.bias, network.one.bias)


def test_the_float64_twin_has_the_same_numbers_and_no_narrow_casts() -> None:
    network = Network("return self.linear(x.to(torch.float32)).float()", {"linear": "nn.Linear(4, 4)"}, {"x": (2, 4)})
    (x,) = network.example_inputs()
    result = network.widened()(x.double())
    assert result.dtype == torch.float64
    assert torch.equal(network.widened().linear.weight.float(), network.linear.weight)


def test_hypothesis_is_needed_only_to_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = "import sys; sys.modules['hypothesis'] = None; import fxopt.testing; fxopt.testing.Network('return x')"
    subprocess.run([sys.executable, "-c", blocked], check=True, timeout=120)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(fxopt.UsageError, match="hypothesis, which is not installed"):
        networks()


# -- the oracle ------------------------------------------------------------------------------------------------------

NETWORK = """
    v1 = self.linear(x)
    x[0] -= 1
    return {"a": v1, "b": v1[:, :2], "c": v1 + 1, "n": 1}
"""


def _changed(**changes: Any) -> Callable[..., Any]:
    """The network's own results, but for some."""

    def call(network: Network, x: torch.Tensor) -> Any:
        found = network(x)
        return found | {name: change(found, x) for name, change in changes.items()}

    return call


def _writes_a_weight(network: Network, x: torch.Tensor) -> Any:
    found = network(x)
    network.linear.bias += 1
    return found


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        pytest.param(lambda net, x: net(x), "", id="nothing"),
        pytest.param(_changed(c=lambda found, x: found["c"] * 1.01), "output 2 ", id="a value"),
        pytest.param(_changed(c=lambda found, x: found["c"] * (1 + 1e-7)), "", id="not a rounding"),
        pytest.param(_changed(n=lambda found, x: True), "instead of 1", id="a number's type"),
        pytest.param(_changed(c=lambda found, x: found["c"].double()), "dtype torch.float64", id="a dtype"),
        pytest.param(_changed(c=lambda found, x: found["c"].t().contiguous().t()), "strides", id="strides"),
        pytest.param(_changed(d=lambda found, x: found["c"]), "the results are", id="the structure"),
        pytest.param(_changed(c=lambda found, x: found["a"].add_(1)), "output 0 ", id="another result, written"),
        pytest.param(_changed(b=lambda found, x: found["b"].clone(memory_format=torch.preserve_format)),
                     "strides|share memory", id="a view that is a copy"),
        pytest.param(_changed(c=lambda found, x: found["a"].set_(found["c"])), "output 0|share memory",
                     id="two results of one memory"),
        pytest.param(_changed(n=lambda found, x: x.add_(1) is None or 1), "output 4 ", id="a written input"),
        pytest.param(_writes_a_weight, "original's linear.bias was changed", id="a weight"),
    ],
)  # fmt: skip
def test_the_oracle_notices(wrong: Callable[..., Any], said: str) -> None:
    network = Network(NETWORK, {"linear": "nn.Linear(4, 4)"}, {"x": (3, 4)})
    oracle = Oracle(network)
    with torch.no_grad():
        found = oracle.differences(lambda x: wrong(network, x))
    assert bool(found) == bool(said)
    assert re.search(said, "; ".join(found)), found


def test_the_oracle_tells_zeros_of_both_signs_apart_where_bits_count() -> None:
    oracle = Oracle(Network("return x * 1", inputs={"x": (3, 4)}), special=True)
    assert oracle.differences(lambda x: x + 0.0) == []
    assert oracle.differences(lambda x: x + 0.0, same_bits=True) == ["tensor 1 has other bits"]
    assert oracle.differences(lambda x: x.clone(), same_bits=True) == []
