"""Count, mean and sum of squared deviations of shards, and of all of them together.

    n = sum n_i,   mean = sum n_i mean_i / n,   M2 = sum M2_i + sum n_i (mean_i - mean)^2

Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979. A shard's
own moments are computed in two passes, the second corrected for the first's rounding (the same authors, "Algorithms
for computing the sample variance", 1983). Sums of squares would not do: at a mean of 1000, float32 leaves nothing of a
variance of 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Moments:
    """Of each channel: how many values, float64[C] mean, float64[C] sum of squared deviations from it (M2)."""

    count: torch.Tensor
    mean: torch.Tensor
    squares: torch.Tensor

    @property
    def variance(self) -> torch.Tensor:
        """M2 / n: the variance that normalises."""
        return self.squares / self.count

    @property
    def unbiased(self) -> torch.Tensor:
        """M2 / (n - 1): the variance that running statistics follow."""
        return self.squares / (self.count - 1)


def over(x: torch.Tensor) -> list[int]:
    """The dimensions that a batch norm takes its statistics over: all but the channels, dimension 1."""
    return [dim for dim in range(x.dim()) if dim != 1]


def along(vector: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A vector of channels, shaped to be broadcast over x."""
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def rough_mean(x: torch.Tensor) -> torch.Tensor:
    """[C]: the mean in x's own dtype, which rounding may put off; zero of no values."""
    return x.mean(over(x)) if x.numel() else x.new_zeros(x.shape[1])


def of(deviations: torch.Tensor, rough: torch.Tensor) -> Moments:
    """The moments of float[N, C, ...], given as deviations from its rough mean; of no values they are zero."""
    channels = deviations.shape[1]
    count = rough.new_tensor(deviations.numel() // max(channels, 1), dtype=torch.float64)
    if not deviations.numel():
        nothing = torch.zeros_like(rough, dtype=torch.float64)
        return Moments(count, nothing, nothing)
    rest = deviations.mean(over(deviations)).double()
    squares = deviations.square().sum(over(deviations)).double() - count * rest.square()
    return Moments(count, rough.double() + rest, squares.clamp_min(0))


def combined(counts: torch.Tensor, means: torch.Tensor, squares: torch.Tensor) -> Moments:
    """The moments of all shards: float64[W] counts, float64[W, C] means and sums of squared deviations."""
    count = counts.sum()
    weights = counts.unsqueeze(1)
    mean = (weights * means).sum(0) / count
    between = (weights * (means - mean).square()).sum(0)
    return Moments(count, mean, squares.sum(0) + between)
