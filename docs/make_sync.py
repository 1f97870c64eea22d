"""`make sync`: what one collective instead of two is worth to a synchronised batch norm, and docs/sync-batchnorm.md.

    python docs/make_sync.py

Processes of one gloo group on this machine run a norm forwards and backwards, with one collective each way and with two
(means first, then squares; backwards each sum for itself), in turns, and compute the same. Meanwhile the machine should
do nothing else.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import torch.distributed as dist
from written import fill

from fxopt.bench.system import machine
from fxopt.training.normalise import batch_norm
from fxopt.training.ranks import Ranks
from processes import run

PAGE = Path(__file__).resolve().parent / "sync-batchnorm.md"
BEGIN, END = "<!-- table: written by make sync -->", "<!-- end of table -->"
SHAPES = ((8, 64, 7, 7), (8, 256, 14, 14), (8, 64, 56, 56), (8, 2048, 7, 7))
ROUNDS, CALLS = 9, 20


class Twice(Ranks):
    """Processes that tell each other in two collectives what one could say, each way."""

    def gather(self, vector: torch.Tensor, who: str) -> torch.Tensor:
        """Means first, then squares and counts, as where deviations are taken from the joint mean."""
        half = (vector.numel() - 2) // 2
        means = super().gather(vector[:half].clone(), who)
        return torch.cat([means, super().gather(vector[half:].clone(), who)], 1)

    def add(self, vector: torch.Tensor, who: str) -> torch.Tensor:
        """Each sum for itself."""
        for part in vector.chunk(2):
            super().add(part, who)
        return vector


def milliseconds(rank: int, shape: tuple[int, ...]) -> list[float]:
    """Of one and of two collectives each way, and of torch's batch norm without any: the medians of a call."""
    one, two = Ranks(), Twice()
    x = torch.randn(shape).requires_grad_()
    candidates: list[Callable[[], torch.Tensor]] = [
        lambda: batch_norm(x, None, None, None, None, 0.1, 1e-5, ranks=one),
        lambda: batch_norm(x, None, None, None, None, 0.1, 1e-5, ranks=two),
        lambda: torch.nn.functional.batch_norm(x, None, None, training=True),
    ]
    found: list[list[float]] = [[] for _ in candidates]
    for turn in range(ROUNDS):
        for place in range(len(candidates))[:: -1 if turn % 2 else 1]:
            dist.barrier()
            start = time.perf_counter()
            for _ in range(CALLS):
                candidates[place]().sum().backward()
            found[place].append((time.perf_counter() - start) / CALLS * 1e3)
    return [statistics.median(times) for times in found]


def table() -> str:
    """A row for each shape and number of processes."""
    import make_sync  # the processes find what they run by its module, which __main__ is not

    said = machine()
    lines = [
        f"By `make sync`, on {said['cores']} cores of {said['processor']}, gloo on loopback, a thread a process:",
        "",
        "| processes | input of each | one each way | two | two / one | without any |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for size in (2, 3):
        for shape in SHAPES:
            with tempfile.TemporaryDirectory() as folder:
                one, two, plain = run(size, Path(folder), make_sync.milliseconds, shape)[0]
            text = "x".join(map(str, shape))
            lines.append(f"| {size} | {text} | {one:.2f} ms | {two:.2f} ms | {two / one:.2f} | {plain:.2f} ms |")
    return "\n".join(lines)


def main() -> None:
    """Measures, and writes the page."""
    fill(PAGE, BEGIN, END, table())


if __name__ == "__main__":
    main()
