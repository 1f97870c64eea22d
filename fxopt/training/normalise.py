"""Batch normalisation over the batches of all processes: one collective forwards, one backwards.

    y = (x - mean) / sqrt(variance + eps) * weight + bias        mean and variance of all processes' x
    dx = weight / sqrt(variance + eps) * (dy - sum(dy)/n - xhat * sum(dy * xhat)/n)        sums of all processes

Ioffe and Szegedy, "Batch normalization", 2015. Gradients of weight and bias are those of this process's own batch, as
in torch.nn.SyncBatchNorm: DistributedDataParallel, or whoever adds gradients up, makes one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fxopt.errors import CollectiveError
from fxopt.training import moments
from fxopt.training.moments import Moments, along, over
from fxopt.training.ranks import Ranks


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        ranks: Ranks,
        who: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = _wide(x)
        rough = moments.rough_mean(wide)
        deviations = wide - along(rough, x)
        found = _moments_of_all(moments.of(deviations, rough), ctx.needs_input_grad[0], ranks, who)
        inverse = torch.rsqrt(found.variance + eps)
        rest = found.mean - rough.double()
        ctx.save_for_backward(x, weight, rough, rest, inverse, found.count)
        ctx.ranks, ctx.who, ctx.bias_dtype = ranks, who, None if bias is None else bias.dtype
        scale = inverse if weight is None else inverse * weight.double()
        shift = -rest * scale if bias is None else bias.double() - rest * scale
        result = _affine(deviations, scale, shift)
        ctx.mark_non_differentiable(found.mean, found.squares, found.count)
        return result.to(x.dtype), found.mean, found.squares, found.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        x, weight, rough, rest, inverse, count = ctx.saved_tensors
        wide, dy = _wide(x), _wide(dy)
        standard = _affine(wide - along(rough, x), inverse, -rest * inverse)
        sums = torch.stack([dy.sum(over(dy)), (dy * standard).sum(over(dy))]).double()
        dx = None
        if ctx.needs_input_grad[0]:
            plain, product = ctx.ranks.add(sums.clone().view(-1), f"{ctx.who}, backward").view(2, -1) / count
            scale = inverse if weight is None else inverse * weight.double()
            wide_dx = _affine(dy, scale, -plain * scale)
            dx = wide_dx.addcmul_(standard, along((-product * scale).to(dy.dtype), dy)).to(x.dtype)
        needs = ctx.needs_input_grad
        return (
            dx,
            sums[1].to(weight.dtype) if needs[1] else None,
            sums[0].to(ctx.bias_dtype) if needs[2] else None,
            None,
            None,
            None,
        )


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Half precision as float32, which is what statistics are computed in."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _affine(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """x * scale + shift, float64[C] each: one pass over x.

    What is given is a deviation from a rough mean: the mean itself, rounded to float32, may be off by 1e-4.
    """
    return torch.addcmul(along(shift.to(x.dtype), x), x, along(scale.to(x.dtype), x))


def _moments_of_all(own: Moments, needs_grad: bool, ranks: Ranks, who: str) -> Moments:
    flag = own.count.new_tensor([float(needs_grad)])
    every = ranks.gather(torch.cat([own.mean, own.squares, own.count.view(1), flag]), who)
    channels = len(own.mean)
    means, squares, (counts, needs) = every[:, :channels], every[:, channels:-2], every[:, -2:].unbind(1)
    if bool((needs != needs[0]).any()):
        raise CollectiveError(
            f"{who}: its input requires a gradient in ranks {needs.nonzero().flatten().tolist()} only, and the others "
            "would not join them in the backward pass",
            hint="give every process inputs, and layers in front, that require gradients alike",
        )
    if float(counts.sum()) <= 1:
        raise CollectiveError(
            f"{who}: all processes together have {int(counts.sum())} values per channel, and training needs two",
            hint="give the processes larger batches",
        )
    return moments.combined(counts, means, squares)


def batch_norm(
    x: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    momentum: float,
    eps: float,
    *,
    ranks: Ranks,
    who: str = "batch_norm",
) -> torch.Tensor:
    """Batch norm in training mode of float[N, C, ...] over the batches of all processes, N = 0 in some allowed.

    Running statistics are updated in place, with the unbiased variance, as torch.nn.functional.batch_norm does.
    Raises CollectiveError in every process where another one is gone, or where they do not fit together.
    """
    if x.dim() < 2:
        raise ValueError(f"{who}: expected an input of at least 2 dimensions, got {x.dim()}")
    result, mean, squares, count = _Normalise.apply(x, weight, bias, eps, ranks, who)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            running_var.lerp_(Moments(count, mean, squares).unbiased.to(running_var.dtype), momentum)
    made: torch.Tensor = result
    return made
