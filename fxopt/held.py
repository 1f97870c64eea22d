"""Which tensors a compiled model holds: the caller's, those that rewriting made, and how they are let go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import fx

from fxopt import ir
from fxopt.program import Program, of_leaves


def callers(original: torch.nn.Module, programs: Sequence[Program]) -> Iterator[torch.Tensor]:
    """The tensors of the model as it is: the caller has them, too."""
    yield from (*original.parameters(), *original.buffers())
    for program in programs:
        yield from ir.tensors(program.captured.module).values()
        yield from (tensor for _, tensor in of_leaves(program.captured.module))


def rewritten(program: Program, *modules: fx.GraphModule) -> list[fx.GraphModule]:
    """The modules that hold tensors which rewriting made, `modules` among them."""
    return [program.module, *modules, *(made.module for made in program.lowered.values())]


def shared(original: torch.nn.Module, programs: Sequence[Program], after: fx.GraphModule) -> dict[str, torch.Tensor]:
    """The tensors that must stay as they are: those of the captures, whose memory is the caller's, and folded ones.

    A write to one that was folded would not be seen now, but by the captures and comparisons still to come.
    """
    found: dict[str, torch.Tensor] = {}
    for program in programs:
        written = program.captured.written_attributes()
        for module in (program.captured.module, program.module, after):
            for name, tensor in (*ir.tensors(module).items(), *of_leaves(module)):
                if name not in written and not tensor.is_inference():
                    found.setdefault(name, tensor)
    # Training moves running statistics without raising their version: only the count of batches tells.
    for name, tensor in original.named_buffers() if programs else ():
        if name.endswith("num_batches_tracked") and not tensor.is_inference():
            found.setdefault(name, tensor)
    return found


def drop(programs: Sequence[Program], *modules: fx.GraphModule) -> None:
    """Lets go of the tensors of all graphs, and of `modules`; what a specialisation reads it has bound."""
    for program in programs:
        for module in (program.captured.module, program.module, *(made.module for made in program.lowered.values())):
            ir.drop_values(module)
    for module in modules:
        ir.drop_values(module)
