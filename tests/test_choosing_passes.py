"""Any pass can be left out, run alone, or run in an order of the user's own: from Python and from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt import cli
from fxopt.compiler import choose_passes
from fxopt.pipeline import flat
from fxopt.testing import Network, Oracle, networks
from graphs import randomised, unmodified
from harness import captured, interpreted, on_random, rewritten

NAMES = [entry.name for entry in fxopt.passes() if entry.default]

NET = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU(), nn.Conv2d(8, 4, 1))
"""

every_pass = pytest.mark.parametrize("name", NAMES)


def model() -> nn.Module:
    return randomised(
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Dropout(), nn.ReLU(), nn.Conv2d(8, 4, 1))
    )


def ran(*, front_end: str = "symbolic", **options: Any) -> list[str]:
    """The names of the passes that a compilation ran, whose answer is right."""
    network, x = model(), torch.randn(2, 3, 8, 8)
    with unmodified(network), torch.no_grad():
        fast = fxopt.compile(network, (x,) if front_end == "export" else None, strict=True, **options)
        torch.testing.assert_close(fast(x), network(x), rtol=2e-5, atol=1e-5)
    return [result.name for result in fast.report.passes]


@every_pass
def test_a_pass_is_left_out(name: str) -> None:
    assert ran(disable=(name,)) == [other for other in NAMES if other != name]


@every_pass
def test_a_pass_runs_alone(name: str) -> None:
    assert ran(passes=(name,)) == ran(passes=name) == [name]


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param({}, NAMES, id="the default order"),
        pytest.param({"passes": "default"}, NAMES, id="the default order by its name"),
        pytest.param({"passes": NAMES[::-1]}, NAMES[::-1], id="backwards"),
        pytest.param({"passes": ("fold-batchnorm", "default")}, ["fold-batchnorm", *NAMES], id="one in front of all"),
        pytest.param({"passes": ("default", "default")}, NAMES * 2, id="all, twice"),
        pytest.param({"passes": (tuple(NAMES),)}, NAMES, id="all as one group"),
        pytest.param({"passes": ("default",), "disable": NAMES[1:]}, NAMES[:1], id="all but one disabled"),
        pytest.param({"passes": ("default", "fold-batchnorm"), "disable": "fold-batchnorm"},
                     [name for name in NAMES if name != "fold-batchnorm"], id="disabled wherever it is named"),
        pytest.param({"passes": ()}, [], id="none"),
        pytest.param({"disable": NAMES}, [], id="all disabled"),
    ],
)  # fmt: skip
def test_passes_run_in_the_order_that_is_asked_for(front_end: str, options: Any, expected: list[str]) -> None:
    assert ran(front_end=front_end, **options) == expected


def test_random_networks_stay_equal_in_any_order_of_any_passes(graphs: int) -> None:
    orders = st.lists(st.sampled_from(NAMES), max_size=2 * len(NAMES))

    def check(drawn: tuple[Network, list[str]]) -> None:
        network, names = drawn
        oracle = Oracle(network)
        module = captured(network, *oracle.inputs())
        passes = [step for step in flat(choose_passes(names)) if step.numerics != "approximate"]
        rewrites = rewritten(module, passes).journal.rewrites
        assert not oracle.differences(interpreted(module)), rewrites

    on_random(st.tuples(networks(exact=True), orders), graphs // 10, 0, check)


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Compiles a network by the command line; the names of the passes that ran, or the exit code and the error."""
    (tmp_path / "net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)

    def names(*options: str) -> Any:
        capsys.readouterr()
        code = cli.run(("compile", "net.py:build", "--json", *options))
        said = json.loads(capsys.readouterr().out)
        return (code, said["error"]["message"]) if code else [entry["name"] for entry in said["report"]["passes"]]

    return names


@every_pass
def test_the_command_line_leaves_a_pass_out(command: Any, name: str) -> None:
    assert command("--disable", name) == [other for other in NAMES if other != name]


@every_pass
def test_the_command_line_runs_a_pass_alone(command: Any, name: str) -> None:
    assert command("--passes", name) == [name]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param(("--passes", ",".join(NAMES[::-1])), NAMES[::-1], id="backwards"),
        pytest.param(("--passes", "fold-batchnorm,default"), ["fold-batchnorm", *NAMES], id="one in front of all"),
        pytest.param(("--passes", "+".join(NAMES)), NAMES, id="all as one group"),
        pytest.param(("--disable", ",".join(NAMES[1:])), NAMES[:1], id="all but one disabled"),
        pytest.param(("--disable", NAMES[0], "--disable", NAMES[1]), NAMES[2:], id="disabled one by one"),
        pytest.param(("--disable", "+".join(NAMES[:2])), NAMES[2:], id="disabled as a group is written"),
        pytest.param(("--passes", ""), [], id="none"),
        pytest.param(("--passes", "default,nosuch"), (2, "no pass is named 'nosuch'"), id="a name that no pass has"),
        pytest.param(("--disable", "nosuch"), (2, "no pass is named 'nosuch'"), id="no pass of this name to disable"),
    ],
)
def test_the_command_line_runs_passes_in_the_order_that_is_asked_for(
    command: Any, options: tuple[str, ...], expected: Any
) -> None:
    assert command(*options) == expected
