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


@front_ends
@pytest.mark.parametrize(
    "views",
    [
        pytest.param(lambda whole: (whole[:2], whole[:2]), id="one tensor given twice"),
        pytest.param(lambda whole: (whole[:2], whole[1:]), id="two views that overlap"),
    ],
)
def test_a_write_to_one_input_is_a_write_to_another_that_shares_its_memory(front_end: str, views: Any) -> None:
    def write_between(m: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        result = m.conv(y)
        x.add_(1)
        return result.relu(), x

    model = TwoInputs(write_between, conv=nn.Conv2d(3, 3, 1)).eval()
    fast = compiled(front_end, model, torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))
    fast(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))  # what is proven is not asked again
    whole = torch.randn(3, 3, 4, 4)
    for result, expected in zip(fast(*views(whole.clone())), model(*views(whole.clone())), strict=True):
        torch.testing.assert_close(result, expected)
