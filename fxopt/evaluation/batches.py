"""Labelled batches of a loader: what the model is called with, and the labels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.errors import InputError, UsageError

#: The keys under which a dict's labels are looked for.
LABELS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Batch:
    """A batch: its number from 0, the call's arguments, and int64[N] labels."""

    number: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: torch.Tensor


def batches(data: Iterable[Any], limit: int | None) -> Iterator[Batch]:
    """The batches of a loader: tuples or lists that end in the labels, or dicts that have them under one of LABELS.

    Raises InputError for a batch without labels, or of another structure than the first.
    """
    structure = ""
    for number, batch in enumerate(data if limit is None else itertools.islice(data, limit)):
        found = _said(batch)
        if structure and found != structure:
            raise InputError(
                f"batch {number} is {found}, and those in front of it were {structure}",
                hint="give every batch the same keys, or as many entries",
            )
        structure = found
        yield _batch(number, batch)


def _batch(number: int, batch: Any) -> Batch:
    if isinstance(batch, Mapping):
        key = next((key for key in LABELS if key in batch), None)
        if key is not None:
            rest = {name: value for name, value in batch.items() if name != key}
            return Batch(number, (), rest, _labels(number, batch[key]))
    elif isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return Batch(number, tuple(batch[:-1]), {}, _labels(number, batch[-1]))
    raise InputError(
        f"batch {number} is {_said(batch)}, and has no labels",
        hint=f"give tuples that end in the labels, or dicts with one of {', '.join(LABELS)}",
    )


def _labels(number: int, labels: Any) -> torch.Tensor:
    found = torch.as_tensor(labels)
    if found.dtype.is_floating_point or found.dtype.is_complex or found.dim() != 1:
        raise InputError(
            f"the labels of batch {number} are {found.dtype}{list(found.shape)}",
            hint="give one class number for each example: int64[N]",
        )
    return found.long()


def _said(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict of {', '.join(map(str, batch))}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"


def iterable(data: object) -> Iterable[Any]:
    """`data` itself. Raises UsageError where batches cannot be drawn from it."""
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, torch.Tensor, Mapping)):
        return data
    raise UsageError(
        f"evaluate takes batches with labels, not a {type(data).__name__}",
        hint="give a DataLoader, or another iterable of (inputs..., labels)",
    )
