"""allocate-buffers on random networks, on concats that grow, and on whole networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import event, given
from torch import nn

import fxopt
from concats import Written, captured, dyadic, exact, networks, results_of, rewritten, sharing, strides
from fxopt import buffers, check, cost, ops
from graphs import Network, bits, operations
from zoo import import_torchvision

PASSES = ("allocate-buffers",)
cat = torch.cat


# -- at random -------------------------------------------------------------------------------------------------------


@given(networks())
def test_random_networks_keep_every_bit_and_come_to_rest(network: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = network
    module = captured(model, x)
    expected, before = results_of(module, x), str(module.graph)
    copied = cost.copied_by_concat(module) or 0
    run = rewritten(module, PASSES)
    event(f"buffers: {len(run.journal.rewrites)}")
    assert not check.problems(module)
    assert (cost.copied_by_concat(module) or 0) <= copied
    actual = results_of(module, x)
    for ours, theirs in zip(actual, expected, strict=True):
        assert bits(ours) == bits(theirs)
        assert strides(ours) == strides(theirs)
    assert sharing(actual) == sharing(expected)
    after = str(module.graph)
    assert not rewritten(module, PASSES).journal.rewrites
    assert str(module.graph) == after
    run.editor.undo()
    assert str(module.graph) == before


@given(networks())
def test_memory_that_is_really_shared_gives_the_same_results(network: tuple[nn.Module, torch.Tensor]) -> None:
    """What a buffer says is carried out: parts lie in slices, others read them there, writes happen."""
    model, x = network
    module = captured(model, x)
    expected = results_of(module, x)
    rewritten(module, PASSES)
    event(f"in place: {len(Written(module).owner)}")
    with torch.no_grad():
        actual = Written(module).run(x)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert strides(ours) == strides(theirs)
    assert sharing(actual) == sharing(expected)


# -- concats that grow -----------------------------------------------------------------------------------------------


class DenseBlock(nn.Module):
    """DenseNet's: each layer reads all that came before it, of which each is a few maps."""

    def __init__(self, layers: int, growth: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, growth, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(growth * index), nn.ReLU(), nn.Conv2d(growth * index, growth, 3, padding=1))
            for index in range(1, layers + 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [self.first(x)]
        for layer in self.layers:
            found.append(layer(cat(found, 1)))
        return cat(found, 1)


class Recursive(DenseBlock):
    """The same, joined again and again."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        for layer in self.layers:
            y = cat([y, layer(y)], 1)
        return y


@pytest.mark.parametrize("block", [DenseBlock, Recursive])
def test_a_dense_block_copies_nothing_where_concats_copied_quadratically(block: type[DenseBlock]) -> None:
    unit = 4 * 4 * 64
    before, after, owned = [], [], []
    for layers in (2, 4, 8):
        model, x = exact(block(layers)), dyadic(1, 3, 8, 8)
        module = captured(model, x)
        (expected,) = results_of(module, x)
        before.append((cost.copied_by_concat(module) or 0) // (2 * unit))
        rewritten(module, PASSES)
        after.append(cost.copied_by_concat(module))
        owned.append(len(Written(module).owner))
        with torch.no_grad():
            assert torch.equal(Written(module).run(x)[0], expected)
    rows = [2 + 3 + 1, 2 + 3 + 4 + 5 + 1, sum(range(2, 10)) + 1]
    assert before == rows if block is DenseBlock else [count - 1 for count in rows]
    assert after == [0, 0, 0]
    assert owned[2] - owned[1] == 2 * (owned[1] - owned[0])  # linear


def test_a_dense_block_of_many_layers_is_allocated_in_no_time() -> None:
    module = captured(Recursive(1, 1), torch.randn(1, 3, 2, 2))
    deep = captured(Network(_grows_often, a=nn.Conv2d(1, 1, 1)), torch.randn(1, 1, 2, 2))
    for traced, count in ((module, 1), (deep, 300)):
        assert len(rewritten(traced, PASSES).journal.rewrites) == count
        assert cost.copied_by_concat(traced) == (0 if traced is module else 16)


def _grows_often(m: Any, x: torch.Tensor) -> torch.Tensor:
    for _ in range(300):
        x = cat([x, m.a(x[:, :1])], 1)
    return x


# -- whole networks --------------------------------------------------------------------------------------------------


def compiled_zoo(name: str, size: int, **options: Any) -> fxopt.CompiledModule:
    model = import_torchvision().models.get_model(name, weights=None, **options).eval()
    compiled = fxopt.compile(model, verify=False, backend="aten", strict=True)
    with torch.no_grad():
        x = torch.randn(1, 3, size, size)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    return compiled


def why_copied(compiled: fxopt.CompiledModule) -> list[str]:
    """The reason for each part of a buffer that is copied."""
    graph = compiled.fused_graph.graph
    said = {(entry.node, entry.rule): entry.reason for entry in compiled.report.declines}
    return [
        said[node.name, f"part {number}"]
        for node in graph.find_nodes(op="call_function", target=ops.buffer)
        for number in sorted(buffers.copied(node))
    ]


@pytest.mark.zoo
def test_densenet_copies_nothing() -> None:
    compiled = compiled_zoo("densenet121", 32)
    found = operations(compiled.fused_graph)
    assert (found["cat"], found["fxopt.buffer"]) == (0, 58)  # 62, but for four of one part
    assert cost.copied_by_concat(compiled.captured_graph) is None  # traced without shapes
    assert cost.copied_by_concat(compiled.fused_graph) == 0
    assert why_copied(compiled) == []


@pytest.mark.zoo
def test_googlenet_copies_slices_of_its_merged_siblings_and_nothing_else() -> None:
    compiled = compiled_zoo("googlenet", 64, init_weights=False)
    found = operations(compiled.fused_graph)
    assert (found["cat"], found["fxopt.buffer"]) == (0, 9)
    said = why_copied(compiled)
    assert 0 < len(said) <= 9
    assert all(reason.endswith("is a view (slice), in the memory of what it views") for reason in said)
