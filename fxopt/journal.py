"""The record of a pipeline: every rewrite that happened, and every one that did not, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxopt import ir


@dataclass(frozen=True)
class Rewrite:
    """One rewrite that happened: which operations were removed and added, in whose place, and where they came from.

    `replaced` has each node that is not read any more with the one that is read instead: `("relu", "convolution")`; a
    node that was only removed has none: `("relu", "")`.
    """

    pass_name: str
    rule: str
    replaced: tuple[tuple[str, str], ...]
    removed: tuple[str, ...]
    added: tuple[str, ...]
    origins: tuple[ir.Origin, ...]

    @property
    def root(self) -> str:
        """The node that was replaced; of several the first."""
        return self.replaced[0][0]

    @property
    def result(self) -> str:
        """What is read instead of `root`."""
        return self.replaced[0][1]


@dataclass(frozen=True)
class Decline:
    """One rewrite that did not happen, and why.

    `pending` says that it waits for the first call's shapes; `fits` that the pattern was there and a guard declined, so
    that a user may want to know without asking.
    """

    pass_name: str
    rule: str
    node: str
    reason: str
    origins: tuple[ir.Origin, ...]
    pending: bool = False
    fits: bool = True


#: A guard's reason that begins with this is not final: shapes decide it at the first call.
UNKNOWN = "unknown until the first call: "


@dataclass
class Journal:
    """What a pipeline did and declined, in order; declines of one rule on one node are kept once, the latest."""

    rewrites: list[Rewrite] = field(default_factory=list)
    declines: dict[tuple[str, str, str], Decline] = field(default_factory=dict)
