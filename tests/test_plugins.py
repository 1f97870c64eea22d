"""Plugins: entry points and `register`; a broken one is named and takes nothing down; two of one name are refused."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from functools import partial
from importlib.metadata import EntryPoint
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import Backend, Pass, Rewriter, doctor, plugins
from fxopt.pipeline import flat
from graphs import randomised


def nothing(rewriter: Rewriter) -> None:
    """A pass that does nothing."""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes entry points of made-up distributions appear beside the real ones."""
    extra: list[EntryPoint] = []
    real = plugins.entry_points

    def entry_points(*, group: str) -> list[EntryPoint]:
        return [*(point for point in extra if point.group == group), *real(group=group)]

    def install(distribution: str, name: str, value: Any, group: str = plugins.PASS_GROUP) -> None:
        module = ModuleType(f"plugin_{distribution}_{name}")
        if not isinstance(value, Exception):
            module.VALUE = value  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        point = EntryPoint(name, f"{module.__name__}:VALUE", group)
        vars(point).update(dist=SimpleNamespace(name=distribution))
        if isinstance(value, Exception):
            vars(point).update(load=_raiser(value))
        extra.append(point)
        plugins.reload()

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    yield install
    extra.clear()
    plugins.reload()


def _raiser(error: Exception) -> Any:
    def load() -> None:
        raise error

    return load


def convnet() -> nn.Module:
    return randomised(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))


def compiles(**options: Any) -> fxopt.CompiledModule:
    model, given = convnet(), torch.randn(2, 3, 8, 8)
    compiled = fxopt.compile(model, (given,), **options)
    torch.testing.assert_close(compiled(given), model(given), rtol=2e-5, atol=1e-5)
    return compiled


def test_built_in_passes_come_by_the_same_door_and_in_their_order() -> None:
    names = [entry.name for entry in fxopt.passes() if entry.default]
    assert names == [current.name for current in flat(plugins.default_pipeline())]
    assert names.index("fold-batchnorm") < names.index("fuse-conv-activation")
    assert {entry.origin for entry in fxopt.passes() if entry.default} == {"fxopt"}


@pytest.mark.parametrize("value", [Pass("theirs", run=nothing), (Pass("theirs", run=nothing),)], ids=["one", "a tuple"])
def test_an_installed_pass_can_be_named_but_never_joins_by_itself(installed: Any, value: Any) -> None:
    installed("acme", "theirs", value)
    assert "theirs" in {entry.name for entry in fxopt.passes()}
    assert "theirs" not in {result.name for result in compiles().report.passes}
    report = compiles(passes=["default", "theirs"]).report
    assert report.passes[-1].name == "theirs"


def test_a_plugin_that_raises_on_import_is_named_and_takes_nothing_down(installed: Any) -> None:
    installed("acme", "broken", ImportError("no module named gpu"))
    (error,) = plugins.broken().values()
    for word in ("'broken' of acme could not be loaded", "no module named gpu", "pip install --upgrade acme"):
        assert word in str(error)
    compiled = compiles()
    assert any("no module named gpu" in notice for notice in compiled.report.notices)
    assert "fold-batchnorm" in {result.name for result in compiled.report.passes}
    with pytest.raises(fxopt.UsageError, match="plugins that could not be loaded: acme: broken"):
        compiles(passes=["broken"])


def test_strict_raises_for_a_plugin_that_raises_on_import(installed: Any) -> None:
    installed("acme", "broken", ImportError("no module named gpu"))
    with pytest.raises(fxopt.PluginError, match="no module named gpu"):
        compiles(strict=True)


def test_a_plugin_that_is_no_pass_is_named(installed: Any) -> None:
    installed("acme", "odd", 3)
    (error,) = plugins.broken().values()
    assert "gives 3, which is not a Pass" in str(error)
    compiles()


@pytest.mark.parametrize("taken", ["fold-batchnorm", "theirs"], ids=["fxopt's own", "another's"])
def test_two_passes_of_one_name_are_an_error_that_names_both_owners(installed: Any, taken: str) -> None:
    installed("acme", "one", Pass(taken, run=nothing))
    if taken == "theirs":
        installed("globex", "two", Pass(taken, run=nothing))
    with pytest.raises(fxopt.PluginError) as caught:
        compiles()
    said = str(caught.value)
    assert f"two passes are named {taken!r}" in said
    assert "acme" in said
    assert ("globex" if taken == "theirs" else "fxopt") in said
    assert "uninstall one of them" in said


def test_one_pass_under_two_entry_points_is_one_pass(installed: Any) -> None:
    theirs = Pass("theirs", run=nothing)
    installed("acme", "one", theirs)
    installed("acme", "two", theirs)
    compiles(passes=["theirs"])


# -- register --------------------------------------------------------------------------------------------------------


@pytest.fixture
def registered() -> Iterator[Pass]:
    mine = fxopt.register(Pass("mine", run=nothing))
    yield mine
    plugins.unregister("mine")


def test_a_registered_pass_can_be_named_in_this_process(registered: Pass) -> None:
    assert compiles(passes=["mine"]).report.passes[0].name == "mine"
    assert "mine" not in {result.name for result in compiles().report.passes}
    assert fxopt.register(registered) is registered, "registering it again is no harm"


def test_registering_a_name_that_is_taken_names_both_owners(registered: Pass) -> None:
    for name, owner in (("mine", "this process"), ("fold-batchnorm", "fxopt")):
        with pytest.raises(fxopt.PluginError, match=f"two passes are named '{name}': one of {owner}"):
            fxopt.register(Pass(name, run=nothing), origin="a notebook")


def test_registering_what_is_no_pass_is_refused() -> None:
    with pytest.raises(fxopt.PluginError, match="is not a Pass"):
        fxopt.register(nothing)  # type: ignore[arg-type]


# -- backends --------------------------------------------------------------------------------------------------------


def backend(name: str) -> Backend:
    """The portable backend under another name."""
    return dataclasses.replace(plugins.backend("aten"), name=name)


@pytest.fixture
def backends(installed: Any) -> Any:
    """Installs entry points in the group of backends."""
    return partial(installed, group=plugins.BACKEND_GROUP)


def test_backends_are_listed_with_their_owners(backends: Any) -> None:
    backends("acme", "theirs", backend("theirs"))
    owners = {entry.name: entry.origin for entry in fxopt.backends()}
    assert next(iter(owners)) == "aten"
    assert (owners["aten"], owners["onednn"], owners["theirs"]) == ("fxopt", "fxopt", "acme")


def test_an_installed_backend_can_be_named_but_is_never_chosen_by_itself(backends: Any) -> None:
    chosen = compiles().report.backend
    backends("acme", "theirs", backend("theirs"))
    assert compiles().report.backend == chosen
    assert compiles(backend="theirs").report.backend == "theirs"


def test_a_name_that_no_backend_has_is_an_error_that_lists_them(backends: Any) -> None:
    backends("acme", "theirs", backend("theirs"))
    with pytest.raises(fxopt.UsageError, match="no backend is named 'their'") as caught:
        compiles(backend="their")
    assert "there are: auto, aten, " in str(caught.value)
    assert "theirs" in str(caught.value)


def test_two_backends_of_one_name_are_an_error_that_names_both_owners(backends: Any) -> None:
    backends("acme", "theirs", backend("theirs"))
    backends("globex", "theirs", backend("theirs"))
    with pytest.raises(fxopt.PluginError, match="two backends are named 'theirs': one of acme, one of globex"):
        compiles(backend="theirs")
    compiles()  # nobody asked for it


@pytest.mark.parametrize("taken", ["onednn", "aten", "auto"])
def test_a_name_of_fxopts_own_stays_fxopts(backends: Any, taken: str) -> None:
    backends("acme", taken, backend(taken))
    said = f"two backends are named {taken!r}: one of fxopt, one of acme"
    report = compiles(backend=taken).report
    assert report.backend == ("onednn" if taken == "auto" else taken)
    assert any(said in notice and "uninstall acme" in notice for notice in report.notices)
    with pytest.raises(fxopt.PluginError, match=said):
        compiles(strict=True)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        pytest.param(ImportError("no gpu"), "'theirs' of acme could not be loaded: ImportError: no gpu", id="raises"),
        pytest.param(3, "'theirs' of acme is 3, which is not a fxopt.Backend", id="is none"),
        pytest.param("other", "'theirs' of acme calls itself 'other'", id="has another name"),
    ],
)
def test_a_backend_that_cannot_be_used_is_named_where_it_is_asked_for(
    backends: Any, monkeypatch: pytest.MonkeyPatch, value: Any, said: str
) -> None:
    backends("acme", "theirs", backend(value) if isinstance(value, str) else value)
    with pytest.raises(fxopt.PluginError, match=said):
        compiles(backend="theirs")
    compiles()
    theirs = [entry for entry in fxopt.backends() if entry.name == "theirs"]
    monkeypatch.setattr(plugins, "backends", lambda: theirs)
    (found,) = doctor._backends()
    assert found.status == "broken"
    assert "acme" in found.detail


def test_a_registered_backend_can_be_named_in_this_process() -> None:
    mine = fxopt.register(backend("mine"))
    try:
        assert fxopt.register(mine) is mine, "registering it again is no harm"
        assert compiles(backend="mine").report.backend == "mine"
        for name, owner in (("mine", "this process"), ("onednn", "fxopt"), ("auto", "fxopt")):
            with pytest.raises(fxopt.PluginError, match=f"two backends are named '{name}': one of {owner}"):
                fxopt.register(backend(name), origin="a notebook")
    finally:
        plugins.unregister("mine")
    with pytest.raises(fxopt.UsageError):
        compiles(backend="mine")
