"""Layers that can stand side by side, and some that cannot: what the tests of merge-parallel-branches share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from graphs import FRONT_ENDS, Network, compiled_by, randomised

PASSES = ("merge-parallel-branches",)
MERGE = "parallel-branches"
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Body = Callable[[Any, Any], Any]
IMAGE = (2, 4, 9, 9)


def parts(**more: Any) -> dict[str, Any]:
    """Layers of four channels that can stand side by side, and some that cannot."""
    return {
        "one": nn.Conv2d(4, 4, 1),
        "one_too": nn.Conv2d(4, 4, 1, bias=False),
        "bare": nn.Conv2d(4, 4, 3, padding=1, bias=False),
        "bare_too": nn.Conv2d(4, 4, 3, padding=1, bias=False),
        "three": nn.Conv2d(4, 4, 3, padding=1),
        "five": nn.Conv2d(4, 4, 5, padding=2),
        "row": nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
        "column": nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
        "long_row": nn.Conv2d(4, 4, (1, 5), padding=(0, 2)),
        "long_column": nn.Conv2d(4, 4, (5, 1), padding=(2, 0)),
        "depthwise": nn.Conv2d(4, 4, 3, padding=1, groups=4),
        "depthwise_one": nn.Conv2d(4, 4, 1, groups=4),
        "grouped": nn.Conv2d(4, 4, 3, padding=1, groups=2),
        "dilated": nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        "dilated_row": nn.Conv2d(4, 4, (1, 3), padding=(0, 2), dilation=(1, 2)),
        "strided": nn.Conv2d(4, 4, 3, padding=1, stride=2),
        "strided_one": nn.Conv2d(4, 4, 1, stride=2),
        "unpadded": nn.Conv2d(4, 4, 3),
        "even": nn.Conv2d(4, 4, 2, padding=1, dilation=2),
        "more": nn.Conv2d(4, 6, 3, padding=1),
        "more_one": nn.Conv2d(4, 6, 1),
        "single": nn.Conv2d(4, 1, 3, padding=1),
        "around": nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        "up": nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2),
        "up_too": nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2, bias=False),
        "up_larger": nn.ConvTranspose2d(4, 4, 5, stride=2, groups=2, padding=1),
        "up_same": nn.ConvTranspose2d(4, 4, 3, padding=1),
        "norm": nn.BatchNorm2d(4),
        "norm_too": nn.BatchNorm2d(4, affine=False),
        "free": nn.BatchNorm2d(4, track_running_stats=False),
        "pool": nn.AvgPool2d(3, stride=1, padding=1),
        "c4": torch.randn(4, 1, 1),
    } | more


def model_of(body: Body, **more: Any) -> nn.Module:
    return randomised(Network(body, **parts(**more)))


def merged_by(body: Body, front_end: str, shape: tuple[int, ...] = IMAGE, **more: Any) -> fxopt.CompiledModule:
    return compiled_by(PASSES, model_of(body, **more), (torch.randn(shape),), front_end)
