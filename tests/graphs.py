"""What the tests of rewrites share: models of one line, compiling by one pass through either front end, the outcome."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

import fxopt
from fxopt import ir
from fxopt.testing.oracle import bits

FRONT_ENDS = ("symbolic", "export")


class Network(nn.Module):
    """Named parts and a forward over them: `Network(lambda m, x: m.norm(m.conv(x)), conv=..., norm=...)`.

    Parts are modules, parameters, or plain tensors (buffers).
    """

    def __init__(self, body: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.body = body

    def forward(self, x: Any) -> Any:
        """Runs the body."""
        return self.body(self, x)


class TwoInputs(Network):
    """A `Network` whose body takes two tensors."""

    def forward(self, x: Any, y: Any) -> Any:
        """Runs the body."""
        return self.body(self, x, y)


def randomised(model: nn.Module, *, positive: bool = False) -> nn.Module:
    """The model in eval mode, its norms with statistics and weights that a fold can get wrong."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            if not positive:
                with torch.no_grad():
                    module.weight[::2] *= -1
    return model.eval()


def snapshot(model: nn.Module) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Every tensor of a model by name, and a copy of it."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, tensor, tensor.detach().clone()) for name, tensor in held]


@contextmanager
def unmodified(model: nn.Module) -> Iterator[None]:
    """The model has the same tensors with the same bits, and the same mode, behind the block."""
    before, mode = snapshot(model), model.training
    yield
    after = {name: tensor for name, tensor, _ in snapshot(model)}
    assert list(after) == [name for name, _, _ in before], "the model has other tensors than before"
    for name, tensor, copied in before:
        assert after[name] is tensor, f"{name} is another tensor than before"
        assert bits(tensor) == bits(copied), f"{name} was written"
    assert model.training is mode


def compiled_by(
    passes: Sequence[Any],
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    front_end: str,
    *,
    verify: bool = True,
) -> fxopt.CompiledModule:
    """The model compiled by some passes, run once on `inputs`; strict, and the model itself is left as it was."""
    given = tuple(map(copy.copy, inputs))
    with unmodified(model):
        options: dict[str, Any] = {"passes": tuple(passes), "backend": "aten", "strict": True, "verify": verify}
        if front_end == "symbolic":
            compiled = fxopt.compile(model, **options)
        else:
            compiled = fxopt.compile(model, given, **options)
        with torch.no_grad():
            compiled(*[tensor.clone() for tensor in inputs])
    return compiled


def fired(compiled: fxopt.CompiledModule) -> list[str]:
    """The rules that fired, in order."""
    return [rewrite.rule for rewrite in compiled.report.rewrites]


def reasons(compiled: fxopt.CompiledModule, rule: str) -> list[str]:
    """Why a rule declined, wherever it did."""
    return [decline.reason for decline in compiled.report.declines if decline.rule == rule]


def operations(module: fx.GraphModule) -> Counter[str]:
    """How often each operation is in a graph."""
    return Counter(ir.target_name(node) for node in module.graph.nodes if ir.is_compute(node))


def assert_declined(compiled: fxopt.CompiledModule, rule: str, reason: str) -> None:
    """A rule did nothing anywhere, and once for this reason (a regular expression)."""
    assert rule not in fired(compiled), f"{rule} fired: {compiled.report.rewrites}"
    assert_declined_somewhere(compiled, rule, reason)


def assert_declined_somewhere(compiled: fxopt.CompiledModule, rule: str, reason: str) -> None:
    """A rule declined at one node for this reason, whatever it did elsewhere."""
    found = reasons(compiled, rule)
    assert any(re.search(reason, text) for text in found), f"{rule} declined for other reasons: {found}"


def only(module: fx.GraphModule, name: str) -> fx.Node:
    """The one node of an operation."""
    (found,) = [node for node in module.graph.nodes if ir.is_compute(node) and ir.target_name(node) == name]
    return found
