"""Every rewrite on random chains of layers: exact arithmetic, rounding, idempotence, undoing.

A chain (chains.py) is captured symbolically and given values, which is quick; the front ends are compared elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import fx, nn

import fxopt
from chains import ACTIVATIONS, PIECEWISE, Chain, Spec, specs
from fxopt import ir, plugins
from fxopt.pipeline import flat, only
from graphs import Network, operations, randomised
from harness import captured, rewritten

# -- running ---------------------------------------------------------------------------------------------------------


def result_of(module: fx.GraphModule, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        (found,) = fx.Interpreter(module).run(x)
    return found


def strides(value: torch.Tensor) -> list[int]:
    """The strides that mean something: those of more than one element."""
    return [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1]


BUILTIN = [current.name for current in flat(plugins.default_pipeline())]
FOLDS = ("fold-affine", "fold-batchnorm")


def check_exact(spec: Spec, passes: Sequence[str]) -> None:
    model = Chain(spec)
    x = model.example_input()
    module = captured(model, x)
    expected = result_of(module, x)
    assert torch.equal(expected, model(x))
    run = rewritten(module, [plugins.named(name) for name in passes])
    for rewrite in run.journal.rewrites:
        event(f"{rewrite.pass_name}: {rewrite.rule}")
    actual = result_of(module, x)
    assert strides(actual) == strides(expected)
    assert torch.equal(actual, expected)


@given(specs("dyadic", list(PIECEWISE)))
def test_the_pipeline_keeps_every_bit_in_exact_arithmetic(spec: Spec) -> None:
    check_exact(spec, BUILTIN)


@given(specs("dyadic", list(PIECEWISE)), st.sampled_from(FOLDS))
def test_a_fold_alone_keeps_every_bit_in_exact_arithmetic(spec: Spec, name: str) -> None:
    check_exact(spec, [name])


@given(specs("random", list(ACTIVATIONS)))
def test_passes_that_promise_the_same_bits_keep_them(spec: Spec) -> None:
    names = [name for name in BUILTIN if plugins.named(name).numerics == "bitwise"]
    assert {"drop-identities", "eliminate-dead-code"} < set(names) < set(BUILTIN)
    check_exact(spec, names)


@given(specs("integer", ["relu", "clamp", "hardtanh"]))
def test_onednn_keeps_every_bit_of_small_integers(spec: Spec) -> None:
    """float32 below 2**24, where oneDNN's kernels, unlike float64's, are what runs."""
    model = Chain(spec)
    x = model.example_input()
    with torch.no_grad():
        expected = model(x)
        assert float(expected.abs().max()) < 2**24
        compiled = fxopt.compile(model, backend="onednn", verify=False, strict=True)
        actual = compiled(x)
    event(f"mkldnn calls: {sum('mkldnn' in kind for kind in operations(lowered(compiled)))}")
    assert strides(actual) == strides(expected)
    assert torch.equal(actual, expected)


def lowered(compiled: fxopt.CompiledModule) -> fx.GraphModule:
    """The graph that a call runs."""
    return next(iter(compiled._ready.values())).module


@given(specs("random", list(ACTIVATIONS)), st.sampled_from(["aten", "onednn"]))
def test_rounding_is_no_worse_than_twice_eagers(spec: Spec, backend: str) -> None:
    # One sample's luck with its own rounding is no measure: a sum near zero in front of an activation magnifies it.
    model = Chain(replace(spec, batch=256))
    x = model.example_input()
    with torch.no_grad():
        expected = model(x).double()
        exact = copy.deepcopy(model).double()(x.double())
        actual = fxopt.compile(model, backend=backend, verify=False, strict=True)(x).double()
    size = max(float(exact.abs().max()), 2.0**-7)
    eager, ours = (float((found - exact).abs().max()) / size for found in (expected, actual))
    assert ours <= 2 * eager + 4 * torch.finfo(torch.float32).eps


# -- idempotence and undoing -----------------------------------------------------------------------------------------


@given(st.sampled_from(BUILTIN), specs("random", list(ACTIVATIONS)))
def test_a_pass_is_idempotent(name: str, spec: Spec) -> None:
    model = Chain(spec)
    module = captured(model, model.example_input())
    current = plugins.named(name)
    rewritten(module, [current])
    before = str(module.graph)
    assert not rewritten(module, [current]).journal.rewrites
    assert str(module.graph) == before


@given(specs("random", list(ACTIVATIONS)))
def test_the_pipeline_is_idempotent(spec: Spec) -> None:
    model = Chain(spec)
    module = captured(model, model.example_input())
    rewritten(module, plugins.default_pipeline())
    before = str(module.graph)
    assert not rewritten(module, plugins.default_pipeline()).journal.rewrites
    assert str(module.graph) == before


def image_of(module: fx.GraphModule) -> list[Any]:
    """Everything that undoing must bring back."""
    nodes = list(module.graph.nodes)
    held = [(node.name, node.target, node.args, dict(node.kwargs), dict(node.meta), set(node.users)) for node in nodes]
    return [str(module.graph), nodes, held, sorted(ir.tensors(module))]


@given(specs("random", list(ACTIVATIONS)))
def test_undoing_every_edit_restores_the_graph(spec: Spec) -> None:
    model = Chain(spec)
    x = model.example_input()
    module = captured(model, x)
    before, expected = image_of(module), result_of(module, x)
    tensors = dict(module.named_buffers()) | dict(module.named_parameters())
    run = rewritten(module, plugins.default_pipeline())
    run.editor.undo()
    assert image_of(module) == before
    assert list(dict(module.named_buffers()) | dict(module.named_parameters())) == list(tensors)
    assert torch.equal(result_of(module, x), expected)
    assert not run.editor.log


# -- found by the above ----------------------------------------------------------------------------------------------


def test_a_norm_that_a_fused_layer_reads_twice_stays() -> None:
    """Fused, `layer(y) + y` is one reader of the norm's result y, which needs it still for the sum."""
    # Where the sum itself becomes the layer there is nothing left to keep.
    passes = only(plugins.default_pipeline(), lambda current: current.name != "merge-parallel-branches")
    parts = {"norm": nn.BatchNorm1d(4), "layer": nn.Linear(4, 4), "conv": nn.Conv1d(4, 4, 1)}
    for layer, shape in (("layer", (3, 4)), ("conv", (3, 4, 5))):
        model = randomised(
            Network(lambda m, x, layer=layer: (y := m.norm(x)) + getattr(m, layer)(y), **parts)  # type: ignore[misc]
        )
        module = captured(model, torch.randn(shape))
        rewritten(module, passes)
        run = rewritten(module, passes)
        assert not run.journal.rewrites
        assert any("also adds batch_norm to its result" in found.reason for found in run.journal.declines.values())
