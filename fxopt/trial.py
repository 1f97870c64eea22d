"""Runs that only compare: on copies of the inputs, from one seed, and of a model in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from fxopt import agreement
from fxopt.capture import Inputs


def seeded(run: Callable[..., Any], inputs: Inputs) -> list[Any]:
    """What `run` gives on copies of the inputs, with one and the same seed each time; then the inputs as it left them.

    A model may write to its inputs, and only the real call may show that; what else writes to them is wrong.
    """
    copies = [agreement.copied(tensor) for tensor in inputs.tensors]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        results = list(run(*copies))
    return [*results, *(copies[index].detach() for index in _compared(inputs))]


def left(inputs: Inputs) -> list[str]:
    """The names of the inputs that stand behind the results of `seeded`."""
    return [inputs.tensor_names[index] for index in _compared(inputs)]


def _compared(inputs: Inputs) -> list[int]:
    return [
        index
        for index, tensor in enumerate(inputs.tensors)
        if tensor.layout is torch.strided and not tensor.is_quantized
    ]


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """A copy of a model with its floating-point tensors in float64: each is copied once, as what it becomes."""
    known: dict[int, Any] = {}
    for held in (*model.parameters(), *model.buffers()):
        if type(held) in (torch.nn.Parameter, torch.Tensor) and held.is_floating_point():
            wide = held.detach().double()
            wide = wide.clone() if wide.data_ptr() == held.data_ptr() else wide
            known[id(held)] = torch.nn.Parameter(wide, held.requires_grad) if type(held) is torch.nn.Parameter else wide
    return copy.deepcopy(model, known).double()
