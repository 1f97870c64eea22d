"""How tests rewrite a network the quick way: traced symbolically, given values, run node by node."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import fx

from fxopt import cost, ir, normalize
from fxopt.capture import capture_symbolic, private_copy
from fxopt.lowering.backend import set_concrete_values
from fxopt.pipeline import PassManager, Run
from fxopt.rewrite import Numerics


def captured(model: torch.nn.Module, *inputs: torch.Tensor) -> fx.GraphModule:
    """A model in normal form, traced symbolically and given the values that it has for these inputs."""
    module, _ = ir.copy(capture_symbolic(private_copy(model)).module)
    set_concrete_values(module, inputs)
    normalize.normalize(module)
    return module


def rewritten(module: fx.GraphModule, passes: Sequence[Any], numerics: Numerics = "reassociate") -> Run:
    """Runs passes over a module; what fails raises."""
    return PassManager(tuple(passes), numerics=numerics, strict=True).run(module)


class _Watched(fx.Interpreter):
    """Runs a graph; what PyTorch gives must be what was inferred for each node."""

    def run_node(self, node: fx.Node) -> Any:
        found, inferred = super().run_node(node), ir.fake(node)
        if inferred is not None and isinstance(found, torch.Tensor):
            assert _kind(found) == _kind(inferred), f"{node.name} is {_kind(found)}, not {_kind(inferred)} as inferred"
        return found


def _kind(value: torch.Tensor) -> tuple[Any, ...]:
    strides = [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1]
    return (tuple(value.shape), value.dtype, strides)


def interpreted(module: fx.GraphModule) -> Callable[..., Any]:
    """A module of the IR as something to call, node by node."""
    return lambda *inputs: ir.interface(module).out_spec.unflatten(list(_Watched(module).run(*inputs)))


@contextmanager
def everything_pays() -> Iterator[None]:
    """No rewrite is left undone because an estimate says that it would not pay, as it does of most on tiny tensors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost.Comparison, "pays", property(lambda self: True))
        patch.setattr("fxopt_passes.eliminate_concat.FEWEST_CHANNELS", 1)
        yield


def on_random(networks: st.SearchStrategy[Any], count: int, seed: int, check: Callable[[Any], None]) -> None:
    """Checks `count` networks: the same ones for the same seed, others by HYPOTHESIS_PROFILE=long. A failing one is
    shrunk and printed."""

    @hypothesis.settings(max_examples=count)
    @hypothesis.given(network=networks)
    def body(network: Any) -> None:
        check(network)

    if hypothesis.settings().derandomize:
        body = hypothesis.seed(seed)(body)
    body()
