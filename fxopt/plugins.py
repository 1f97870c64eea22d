"""Finding passes and backends: entry points, and what was registered in this process.

Built-in passes come through the same entry-point group as anybody's. An installed plugin makes its passes nameable; it
never joins the default pipeline by being installed. So with backends: one that is installed or registered can be named,
and never changes what "auto" does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from itertools import groupby
from typing import Any, TypeVar

from fxopt.errors import PluginError, UsageError
from fxopt.lowering.backend import Backend
from fxopt.pipeline import Step
from fxopt.rewrite import Pass

PASS_GROUP = "fxopt.passes"
BACKEND_GROUP = "fxopt.backends"
OWN_DISTRIBUTION = "fxopt"
#: The name that stands for fxopt's own choice of a backend.
AUTO = "auto"


@dataclass(frozen=True)
class Installed:
    """A pass that can be named, who provides it, and whether the default pipeline has it.

    `group` tells apart the groups of the default pipeline; a pass of no group has none.
    """

    name: str
    origin: str
    current: Pass
    default: bool
    group: int | None = None


@dataclass(frozen=True)
class InstalledBackend:
    """A backend that can be named, and who provides it. It is loaded where it is asked for."""

    name: str
    origin: str


Plugin = TypeVar("Plugin", Pass, Backend)

_registered: dict[str, Installed] = {}
_registered_backends: dict[str, tuple[InstalledBackend, Backend]] = {}


def register(current: Plugin, *, origin: str = "this process") -> Plugin:
    """Makes a pass or a backend nameable in this process; returns it.

    Raises PluginError where the name is taken, naming both owners.
    """
    if isinstance(current, Backend):
        _register_backend(current, origin)
        return current
    if not isinstance(current, Pass):
        raise PluginError(f"{current!r} is not a Pass or a Backend", hint="register(Pass(name, rules=...))")
    taken = available().get(current.name)
    if taken is not None and taken.current is not current:
        raise PluginError(_two_owners(current.name, taken.origin, origin), hint="rename one of them")
    _registered[current.name] = Installed(current.name, origin, current, default=False)
    return current


def unregister(name: str) -> None:
    """Takes back `register`."""
    _registered.pop(name, None)
    _registered_backends.pop(name, None)


def available() -> dict[str, Installed]:
    """Every pass that can be named, by name, the default pipeline first and in its order.

    Raises PluginError where two installed plugins have one name. Plugins that failed to load are in `broken()`.
    """
    found, _ = _installed()
    return {**found, **_registered}


def passes() -> tuple[Installed, ...]:
    """Every pass that can be named, with who provides it, the default pipeline first and in its order."""
    return tuple(available().values())


def broken() -> dict[str, PluginError]:
    """The plugins that could not be loaded, by entry point, and why.

    Of backends those whose name is taken: others are loaded, or fail to, where they are asked for.
    """
    return {**_installed()[1], **_backends()[1]}


def default_pipeline() -> tuple[Step, ...]:
    """The built-in passes in their order, in groups where one opens the way for another.

    Raises PluginError where fxopt itself is not installed, so that nothing is silently left undone.
    """
    entries = [entry for entry in available().values() if entry.default]
    if not entries:
        raise PluginError(
            "no built-in pass is installed, so nothing would be optimised",
            hint="fxopt runs from a checkout only after: pip install -e .",
        )
    steps: list[Step] = []
    for group, members in groupby(entries, key=lambda entry: entry.group):
        passes = tuple(entry.current for entry in members)
        steps += passes if group is None else [passes]
    return tuple(steps)


def named(name: str) -> Pass:
    """The pass of a name. Raises UsageError with the names there are, or the PluginError of the plugin that broke."""
    found = available().get(name)
    if found is not None:
        return found.current
    failed = broken()
    hint = "there are: " + ", ".join(available())
    if failed:
        hint += "; plugins that could not be loaded: " + ", ".join(failed)
    raise UsageError(f"no pass is named {name!r}", hint=hint)


def _two_owners(name: str, first: str, second: str) -> str:
    return f"two passes are named {name!r}: one of {first}, one of {second}"


@cache
def _installed() -> tuple[dict[str, Installed], dict[str, PluginError]]:
    found: dict[str, Installed] = {}
    failed: dict[str, PluginError] = {}
    # Built-in passes first, whatever order the environment lists distributions in.
    points = sorted(entry_points(group=PASS_GROUP), key=lambda point: _owner(point) != OWN_DISTRIBUTION)
    for point in dict.fromkeys(points):
        owner = _owner(point)
        try:
            loaded = point.load()
        except Exception as error:
            failed[f"{owner}: {point.name}"] = PluginError(
                f"the plugin {point.name!r} of {owner} could not be loaded: {type(error).__name__}: {error}",
                hint=f"pip install --upgrade {owner}, or uninstall it",
            )
            continue
        for group, current in _members(loaded):
            if not isinstance(current, Pass):
                failed[f"{owner}: {point.name}"] = PluginError(
                    f"the plugin {point.name!r} of {owner} gives {current!r}, which is not a Pass"
                )
                continue
            if current.name in found:
                if found[current.name].current is current:
                    continue
                raise PluginError(
                    _two_owners(current.name, found[current.name].origin, owner), hint="uninstall one of them"
                )
            found[current.name] = Installed(current.name, owner, current, owner == OWN_DISTRIBUTION, group)
    return found, failed


def _members(loaded: Any) -> Iterator[tuple[int | None, Any]]:
    """What an entry point gives, one by one; those of an inner tuple with the number of their group."""
    for number, step in enumerate(loaded if isinstance(loaded, (tuple, list)) else (loaded,)):
        if isinstance(step, (tuple, list)):
            yield from ((number, current) for current in step)
        else:
            yield None, step


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def reload() -> None:
    """Looks at the installed plugins again."""
    _installed.cache_clear()
    _backends.cache_clear()


# -- backends --------------------------------------------------------------------------------------------------------


def backends() -> tuple[InstalledBackend, ...]:
    """Every backend that can be named, with who provides it, fxopt's own first."""
    found = {name: InstalledBackend(name, _owner(claims[0])) for name, claims in _backends()[0].items()}
    return tuple({**found, **{name: entry for name, (entry, _) in _registered_backends.items()}}.values())


def backend(name: str) -> Backend:
    """The backend of a name.

    Raises UsageError with the names there are; PluginError, with the owner, where two plugins have the name, or where
    it cannot be loaded or is no backend of that name.
    """
    if name in _registered_backends:
        return _registered_backends[name][1]
    claims = _backends()[0].get(name)
    if claims is None:
        there_are = ", ".join((AUTO, *(entry.name for entry in backends())))
        raise UsageError(f"no backend is named {name!r}", hint=f"there are: {there_are}")
    if len(claims) > 1:
        raise PluginError(_two_backends(name, *map(_owner, claims[:2])), hint="uninstall one of them")
    owner = _owner(claims[0])
    try:
        loaded = claims[0].load()
    except Exception as error:
        raise PluginError(
            f"the backend {name!r} of {owner} could not be loaded: {type(error).__name__}: {error}",
            hint=f"pip install --upgrade {owner}, or uninstall it",
        ) from error
    if not isinstance(loaded, Backend):
        raise PluginError(f"the backend {name!r} of {owner} is {loaded!r}, which is not a fxopt.Backend")
    if loaded.name != name:
        raise PluginError(
            f"the backend {name!r} of {owner} calls itself {loaded.name!r}",
            hint="its entry point has to have the backend's own name",
        )
    return loaded


def _register_backend(current: Backend, origin: str) -> None:
    taken = {AUTO: "fxopt"} | {entry.name: entry.origin for entry in backends()}
    held = _registered_backends.get(current.name)
    if current.name in taken and (held is None or held[1] is not current):
        raise PluginError(_two_backends(current.name, taken[current.name], origin), hint="rename one of them")
    _registered_backends[current.name] = (InstalledBackend(current.name, origin), current)


def _two_backends(name: str, first: str, second: str) -> str:
    return f"two backends are named {name!r}: one of {first}, one of {second}"


@cache
def _backends() -> tuple[dict[str, list[EntryPoint]], dict[str, PluginError]]:
    """The entry points that claim each name, and those that claim one of fxopt's own, which stays fxopt's."""
    found: dict[str, list[EntryPoint]] = {}
    failed: dict[str, PluginError] = {}
    for point in sorted(entry_points(group=BACKEND_GROUP), key=lambda point: _owner(point) != OWN_DISTRIBUTION):
        owner, claims = _owner(point), found.get(point.name, [])
        if any(claim.value == point.value for claim in claims):
            continue
        if point.name == AUTO or (claims and _owner(claims[0]) == OWN_DISTRIBUTION):
            failed[f"{owner}: {point.name}"] = PluginError(
                _two_backends(point.name, OWN_DISTRIBUTION, owner), hint=f"fxopt's own is used; uninstall {owner}"
            )
            continue
        found[point.name] = [*claims, point]
    return found, failed
