"""Finding passes and backends: entry points, and what was registered in this process.

Built-in passes come through the same entry-point group as anybody's. An installed plugin makes its passes nameable; it
never joins the default pipeline by being installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from itertools import groupby
from typing import Any

from fxopt.errors import PluginError, UsageError
from fxopt.pipeline import Step
from fxopt.rewrite import Pass

PASS_GROUP = "fxopt.passes"
BACKEND_GROUP = "fxopt.backends"
OWN_DISTRIBUTION = "fxopt"


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


_registered: dict[str, Installed] = {}


def register(current: Pass, *, origin: str = "this process") -> Pass:
    """Makes a pass nameable in this process; returns it, so that it can decorate a definition.

    Raises PluginError where the name is taken, naming both owners.
    """
    if not isinstance(current, Pass):
        raise PluginError(f"{current!r} is not a Pass", hint="register(Pass(name, rules=...))")
    taken = available().get(current.name)
    if taken is not None and taken.current is not current:
        raise PluginError(_two_owners(current.name, taken.origin, origin), hint="rename one of them")
    _registered[current.name] = Installed(current.name, origin, current, default=False)
    return current


def unregister(name: str) -> None:
    """Takes back `register`."""
    _registered.pop(name, None)


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
    """The plugins that could not be loaded, by entry point, and why."""
    return dict(_installed()[1])


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


@cache
def _backends() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=BACKEND_GROUP):
        if point.name in found and found[point.name].value != point.value:
            raise PluginError(
                f"two backends are named {point.name!r}: one of {_owner(found[point.name])}, one of {_owner(point)}",
                hint="uninstall one of them",
            )
        found[point.name] = point
    return found


def backend(name: str) -> Any:
    """The backend of a name. Raises UsageError with the names there are, PluginError where it cannot be loaded."""
    points = _backends()
    if name not in points:
        raise UsageError(f"no backend is named {name!r}", hint="there are: auto, " + ", ".join(points))
    try:
        return points[name].load()
    except Exception as error:
        owner = _owner(points[name])
        raise PluginError(f"the backend {name!r} of {owner} could not be loaded: {error}") from error


def backends() -> tuple[str, ...]:
    """The names of the installed backends."""
    return tuple(_backends())
