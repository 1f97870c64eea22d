"""The processes that train one model: what they tell each other, and errors that say who did not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fxopt.errors import CollectiveError, UsageError


class Ranks:
    """A process group, as all processes of it see it. A copy of a model has the same."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise UsageError(
                "torch.distributed is not initialised in this process",
                hint="call torch.distributed.init_process_group first, in every process (torchrun sets what it needs)",
            )
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise UsageError("this process is not in the process group", hint="build the model in its members only")

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def gather(self, vector: torch.Tensor, who: str) -> torch.Tensor:
        """[W, n]: the vector of each process, in the order of ranks. One collective."""
        found = vector.new_empty(self.size, vector.numel())
        self._collective(lambda: dist.all_gather(list(found.unbind(0)), vector, group=self.group), who)
        return found

    def add(self, vector: torch.Tensor, who: str) -> torch.Tensor:
        """The sum of the vectors of all processes, in place. One collective."""
        self._collective(lambda: dist.all_reduce(vector, group=self.group), who)
        return vector

    def tell(self, said: Any) -> list[Any]:
        """What every process says, in the order of ranks. Pickled, so of processes that trust each other."""
        heard: list[Any] = [None] * self.size
        self._collective(lambda: dist.all_gather_object(heard, said, group=self.group), "telling the others")
        return heard

    def agree(self, said: dict[str, Any], what: str) -> None:
        """Raises CollectiveError in every process where not all of them say the same."""
        heard = self.tell(said)
        for rank, other in enumerate(heard):
            for key in dict.fromkeys((*heard[0], *other)):
                if heard[0].get(key) != other.get(key):
                    raise CollectiveError(
                        f"{what} differs between processes: {key} is {heard[0].get(key)} in rank 0 and "
                        f"{other.get(key)} in rank {rank}",
                        hint="build the same model, in the same mode, in every process",
                    )

    def _collective(self, call: Callable[[], Any], who: str) -> None:
        try:
            call()
        except RuntimeError as error:
            raise CollectiveError(
                f"{who}: rank {self.rank} of {self.size} heard nothing from the others: {str(error).splitlines()[0]}",
                hint="a process has ended or left the group; its own error says why",
            ) from error
