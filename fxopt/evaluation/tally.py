"""Sums over examples that say all of a comparison: counts and moments of what both models score and of the difference.

They add up, so examples may come in any batches, and from several processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

#: A normal variable is within so many deviations of its mean with 95 %.
NORMAL_95 = 1.959963984540054


@dataclass
class Tally:
    """Of one score: examples, sums of the original's and the compiled one's, of the difference and of its square.

    `hits` where each example scores 0 or 1.
    """

    hits: bool = False
    count: int = 0
    original: float = 0.0
    compiled: float = 0.0
    difference: float = 0.0
    squares: float = 0.0

    def add(self, original: torch.Tensor, compiled: torch.Tensor) -> None:
        """Adds float64[N] scores of the same examples."""
        difference = compiled - original
        self.count += original.numel()
        self.original += float(original.sum())
        self.compiled += float(compiled.sum())
        self.difference += float(difference.sum())
        self.squares += float(difference.square().sum())

    def numbers(self) -> tuple[float, ...]:
        """Everything but `hits`, to be added up over processes."""
        return float(self.count), self.original, self.compiled, self.difference, self.squares

    def interval(self) -> tuple[float, float]:
        """95 % confidence of the mean difference over examples like these, each being compared with itself.

        Of hits it is Agresti and Min's, which adds half an example each way, and one on which both agree ("Simple
        improved confidence intervals for comparing matched proportions", 2005): it is not empty where none differs. Of
        other scores it is the normal one.
        """
        count, total, squares = float(self.count), self.difference, self.squares
        if self.hits:
            count, squares = count + 2, squares + 1
        mean = total / count
        error = math.sqrt(max(squares / count - mean * mean, 0.0) / count)
        return mean - NORMAL_95 * error, mean + NORMAL_95 * error
