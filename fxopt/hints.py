"""What an open size is likely to be: a number for estimates, never for a guard.

A size that the capture left open has the number that its example brought. A batch of 1 is exported at 2, so the sizes
of the example itself are remembered here, by the environment that the symbols live in.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, optimization_hint

#: Environment of symbols -> symbol -> its number in the user's example.
_REMEMBERED: WeakKeyDictionary[Any, dict[Any, int]] = WeakKeyDictionary()


def remember(sizes: Iterable[tuple[int | torch.SymInt, int]]) -> None:
    """Notes what open sizes are in the user's example, where they were captured with other numbers."""
    for size, number in sizes:
        if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
            _REMEMBERED.setdefault(size.node.shape_env, {})[size.node.expr] = number


def hint(size: object) -> int | None:
    """A size as a number, that of the user's example where it is open; None where only values decide it.

    Adds no guard.
    """
    if type(size) is int:
        return size
    if not isinstance(size, torch.SymInt):
        return None
    remembered = _REMEMBERED.get(size.node.shape_env)
    if remembered is not None:
        expression = size.node.expr
        number = remembered.get(expression) or expression.xreplace(remembered)
        if isinstance(number, int) or number.is_Integer:
            return int(number)
    if size.node._hint is None and free_unbacked_symbols(size):
        return None
    return int(optimization_hint(size))


__all__ = ["hint", "remember"]
