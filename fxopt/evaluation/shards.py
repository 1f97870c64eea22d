"""A process's share of the data, and the sums of all processes: exact, without the examples that samplers pad with."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from fxopt.errors import CollectiveError, UsageError
from fxopt.evaluation.tally import Tally
from fxopt.training.ranks import Ranks


@dataclass(frozen=True)
class Share:
    """The batches of one process. Examples behind the first `examples` are padding; None where none is."""

    data: Iterable[Any]
    examples: int | None = None


def share(data: Iterable[Any], ranks: Ranks) -> Share:
    """What this process takes of a loader that every process has.

    Of a dataset with a length it is what torch's DistributedSampler gives, less the padding; of anything else every
    W-th batch. Raises UsageError for a sampler whose order the processes would not have in common.
    """
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return Share(itertools.islice(data, ranks.rank, None, ranks.size))
    sampler = data.sampler
    if data.drop_last:
        raise UsageError("a loader that drops the last batch cannot be shared", hint="leave drop_last out")
    if not isinstance(sampler, DistributedSampler):
        shuffles = isinstance(sampler, RandomSampler) and not sampler.replacement
        plain = shuffles or isinstance(sampler, SequentialSampler)
        if not plain or type(data.batch_sampler) is not BatchSampler:
            raise UsageError(
                f"a loader with a {type(sampler if not plain else data.batch_sampler).__name__} cannot be shared",
                hint="give it a DistributedSampler, or none: every example is taken once",
            )
        sampler = DistributedSampler(data.dataset, ranks.size, ranks.rank, shuffle=False)
        kept = ("batch_size", "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "prefetch_factor")
        data = DataLoader(data.dataset, sampler=sampler, **{name: getattr(data, name) for name in kept})
    # Position j of rank r is r + j*W of the list that was padded to a multiple of W.
    examples = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    return Share(data, None if sampler.drop_last else examples)


def agree(model: torch.nn.Module, ranks: Ranks) -> None:
    """Raises CollectiveError in every process where processes hold models of other weights."""
    said = {"the class": type(model).__qualname__}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
            raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            said[name] = f"{tensor.dtype}{list(tensor.shape)} {hashlib.sha256(raw.numpy().tobytes()).hexdigest()[:12]}"
    ranks.agree(said, "the model")


def joined(
    tallies: dict[str, Tally], examples: int, error: Exception | None, ranks: Ranks
) -> tuple[dict[str, Tally], int]:
    """The sums of all processes. Raises, in every one, the error of this process or one that names another's."""
    heard = ranks.tell((None if error is None else str(error), {name: tally.hits for name, tally in tallies.items()}))
    if error is not None:
        raise error
    for rank, (text, _) in enumerate(heard):
        if text is not None:
            raise CollectiveError(f"rank {rank} of {ranks.size} failed: {text}")
    names = {name: hits for _, found in heard for name, hits in found.items()}  # a process may have no example
    own = [tallies.get(name, Tally(hits)) for name, hits in names.items()]
    numbers = [float(examples), *(number for tally in own for number in tally.numbers())]
    total, *rest = ranks.add(torch.tensor(numbers, dtype=torch.float64), "the sums of the evaluation").tolist()
    size = len(Tally().numbers())
    parts = [rest[start : start + size] for start in range(0, len(rest), size)]
    return {
        name: Tally(hits, int(part[0]), *part[1:]) for (name, hits), part in zip(names.items(), parts, strict=True)
    }, int(total)
