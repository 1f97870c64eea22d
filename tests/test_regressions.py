"""Wrong answers and crashes that were found by reading and by adversarial models: each row is one of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from graphs import FRONT_ENDS, TwoInputs

pytestmark = pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice")

front_ends = pytest.mark.parametrize("front_end", FRONT_ENDS)


def compiled(front_end: str, model: nn.Module, *example: Any, **options: Any) -> fxopt.CompiledModule:
    """Compiled on the example, or without one."""
    return fxopt.compile(model, example, **options) if front_end == "export" else fxopt.compile(model, **options)


@front_ends
def test_two_slices_as_arguments_are_two_programs(front_end: str) -> None:
    model = TwoInputs(lambda m, x, part: x[part] * 2)
    x, parts = torch.randn(5, 4), (slice(0, 2), slice(0, 3), slice(1, None, 2))
    fast = compiled(front_end, model, x, parts[0])
    for part in (*parts, *parts):
        assert torch.equal(fast(x, part), model(x, part))
