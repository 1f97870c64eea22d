"""fxopt.buffer: what it means, who owns which memory, what the contract catches, what passes leave of a buffer."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

import fxopt
from concats import Written, captured, everything_pays, networks, results_of, rewritten, strides
from fxopt import Pass, Rewriter, buffers, check, cost, ir, ops, plugins
from fxopt.edit import Editor
from fxopt.pipeline import PassManager, flat
from graphs import Network, TwoInputs, only, operations

aten = torch.ops.aten
cat, relu = torch.cat, torch.relu
IMAGE = (2, 4, 3, 3)
Body = Callable[..., Any]


def buffer(tensors: list[torch.Tensor], dim: int = 1, copied: tuple[int, ...] = ()) -> torch.Tensor:
    result: torch.Tensor = torch.ops.fxopt.buffer(tensors, dim, list(copied))
    return result


# -- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [(), (0,), (0, 1)])
def test_a_buffer_is_the_concat_of_its_parts_whatever_is_copied(copied: tuple[int, ...]) -> None:
    x, y = torch.randn(IMAGE), torch.randn(IMAGE)
    assert torch.equal(buffer([x, y], 1, copied), cat([x, y], 1))


def test_gradients_go_through_it() -> None:
    x = torch.randn(IMAGE, requires_grad=True)
    buffer([x, x * 2]).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full(IMAGE, 3.0))


def test_it_decomposes_to_a_concat() -> None:
    module = captured(Network(lambda m, x: buffer([relu(x), x.abs()], -3, (1,))), torch.randn(IMAGE))
    ops.decompose_all(module)
    node = only(module, "cat")
    assert [part.name for part in node.args[0]] == ["relu", "abs_1"]
    assert node.args[1:] == (-3,)


# -- what it says ----------------------------------------------------------------------------------------------------


def nested(m: Any, x: torch.Tensor) -> torch.Tensor:
    inner = buffer([relu(x), x.neg()], 1, (1,))
    return buffer([buffer([inner, x.abs()]), buffer([x.sin(), x.cos()], 2).narrow(2, 0, 3)], 1, (1,)) * 1.5


def test_parts_leaves_and_copies() -> None:
    module = captured(Network(nested), torch.randn(IMAGE))
    inner, middle, _, outer = module.graph.find_nodes(op="call_function", target=ops.buffer)
    assert [part.name for part in buffers.parts(inner)] == ["relu", "neg"]
    assert (buffers.copied(inner), [part.name for part in buffers.in_place(inner)]) == ({1}, ["relu"])
    assert [part.name for part in buffers.leaves(outer)] == ["relu", "neg", "abs_1", "narrow"]
    assert buffers.in_place(outer) == [middle]


def test_leaves_of_a_buffer_that_has_grown_a_thousand_times() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    for _ in range(2000):
        node = graph.call_function(ops.buffer, ([node, graph.call_function(aten.relu.default, (node,))], 1))
    assert len(buffers.leaves(node)) == 2001


# -- the contract ----------------------------------------------------------------------------------------------------


def written(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = relu(x)
    z = buffer([y, x.abs()])
    y[:, 0].mul_(2)
    return z + y.sum()


def written_whole(m: Any, x: torch.Tensor) -> torch.Tensor:
    z = buffer([y := relu(x), x.abs()])
    z[:, 0].mul_(2)
    return z + y.sum()


def in_two(m: Any, x: torch.Tensor) -> torch.Tensor:
    return buffer([y := relu(x), x.abs()]) + buffer([x.neg(), y])


def handed_out_nested(m: Any, x: torch.Tensor) -> Any:
    y = buffer([relu(x), x.abs()])
    return y, buffer([y, x.neg()]) + 1


def another_order(m: Any, x: torch.Tensor) -> torch.Tensor:
    return buffer([relu(x), x.contiguous(memory_format=torch.channels_last).abs()])


def looked_at(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = relu(x)
    return buffer([y, x.abs()]).sum() + y.as_strided((2, 36), (36, 1))


def drawn(m: Any, x: torch.Tensor) -> torch.Tensor:
    return buffer([torch.rand_like(x), torch.bernoulli(x.sigmoid())])


def by_the_batch(m: Any, x: torch.Tensor) -> torch.Tensor:
    mean, variance = m.constant[:, :, 0, 0].abs()
    return buffer([F.batch_norm(x, mean, variance, training=True), relu(x)])


ILLEGAL: list[tuple[str, Body, list[str]]] = [
    ("an input", lambda m, x: buffer([x, relu(x)]), ["part 0", "x is an input|tensors_0 is an input"]),
    ("a constant", lambda m, x: buffer([m.constant, relu(x)]), ["part 0", "constant is a constant"]),
    ("a view", lambda m, x: buffer([relu(x)[:, :2], relu(x)]), ["part 0", "is a view"]),
    ("a view by shape", lambda m, x: buffer([relu(x).reshape(2, 2, 6, 3)[:, :, :3], x.abs()]), ["part 0", "is a view"]),
    ("an operator that writes no slices", lambda m, x: buffer([x.cumsum(1), relu(x)]), ["part 0", "tensor of its own"]),
    ("a random draw", drawn, ["part 1", "bernoulli.* gives a tensor of its own"]),
    ("a norm by the batch, which writes", by_the_batch, ["part 0", "batch_norm.* gives a tensor of its own"]),
    ("another dtype", lambda m, x: buffer([x.double().abs(), relu(x)]), ["part 1", "float32 .*float64"]),
    ("another order of dimensions", another_order, ["part 1", "in another order"]),
    ("a result of the model", lambda m, x: (y := relu(x), buffer([y, x.abs()])), ["part 0", "hands out relu"]),
    (
        "a result through a view",
        lambda m, x: ((y := relu(x))[:, 1:], buffer([y, x.abs()])),
        ["part 0", "hands out relu"],
    ),
    ("a buffer that is a result", handed_out_nested, ["part 0", "hands out buffer"]),
    ("a part that is written", written, ["part 0", "mul_ writes to relu in place"]),
    ("a buffer that is written", written_whole, ["part 0", "mul_ writes to the concat in place"]),
    ("twice in one buffer", lambda m, x: buffer([y := relu(x), y]), ["part 1", "is in it twice"]),
    ("in two buffers", in_two, ["part 1", "relu is in buffer.* already"]),
    ("memory that is looked at", looked_at, ["part 0", "as_strided.* reads relu and reads memory by them"]),
    ("numbers that no part has", lambda m, x: buffer([relu(x), x.abs()], 1, (2,)), [r"copies parts \[2\] of 2"]),
    ("negative numbers", lambda m, x: buffer([relu(x), x.abs()], 1, (-1,)), [r"copies parts \[-1\] of 2"]),
]


@pytest.mark.parametrize(("body", "said"), [pytest.param(*row[1:], id=row[0]) for row in ILLEGAL])
def test_the_contract_catches(body: Body, said: list[str]) -> None:
    module = captured(Network(body, constant=torch.randn(IMAGE)), torch.randn(IMAGE))
    found = check.problems(module)
    assert {name for name, _, _ in found} == {"buffers"}
    assert any(all(re.search(part, sentence) for part in said) for _, sentence, _ in found), found
    with pytest.raises(fxopt.CheckError, match="buffers"):
        rewritten(module, ["eliminate-dead-code"])


LEGAL: list[tuple[str, Body]] = [
    ("fresh parts", lambda m, x: buffer([relu(x), x.abs()])),
    ("one part", lambda m, x: buffer([relu(x)])),
    ("what may not be written in place, but is copied", lambda m, x: buffer([x, relu(x), x[:, :1]], 1, (0, 2))),
    ("in two buffers, one of which copies",
     lambda m, x: buffer([y := relu(x), x.abs()]) + buffer([x.neg(), y], 1, (1,))),
    ("twice in one, once copied", lambda m, x: buffer([y := relu(x), y], 1, (0,))),
    ("a buffer in a buffer", lambda m, x: buffer([buffer([relu(x), x.abs()]), x.neg()])),
    ("a buffer in one along another dim", lambda m, x: buffer([buffer([relu(x), x.abs()]), cat([x, x], 1).neg()], 2)),
    ("parts with other readers", lambda m, x: buffer([y := relu(x), y.abs()]).sum() + y.neg().reshape(2, 36)),
    ("a buffer of channels last", lambda m, x: buffer(
        [(y := x.contiguous(memory_format=torch.channels_last)).abs(), y.neg()])),
    ("a part without elements", lambda m, x: buffer([relu(x), x[:, :0].abs()])),
    ("one channel, one row", lambda m, x: buffer([x[:, :1].abs(), relu(x[:, :2])], 1)[:, :, :1].abs()),
]  # fmt: skip


@pytest.mark.parametrize("body", [pytest.param(row[1], id=row[0]) for row in LEGAL])
def test_the_contract_takes(body: Body) -> None:
    module = captured(Network(body), torch.randn(IMAGE))
    assert not check.problems(module)


# -- passes behind it ------------------------------------------------------------------------------------------------


def siblings(m: Any, x: torch.Tensor) -> torch.Tensor:
    return cat([m.a(x), relu(x), m.b(x)], 1)


def convs() -> dict[str, nn.Module]:
    return {"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1)}


def test_a_part_that_a_later_pass_makes_a_view_is_copied_from_then_on() -> None:
    model, x = Network(siblings, **convs()).eval(), torch.randn(IMAGE)
    module = captured(model, x)
    (expected,) = results_of(module, x)
    first = rewritten(module, ["allocate-buffers"])
    assert not buffers.copied(only(module, "fxopt.buffer"))
    assert not [entry for entry in first.journal.declines.values() if entry.rule.startswith("part")]
    second = rewritten(module, ["merge-siblings"])
    assert [rewrite.pass_name for rewrite in second.journal.rewrites] == ["merge-siblings"]
    assert buffers.copied(only(module, "fxopt.buffer")) == {0, 2}
    said = [entry for entry in second.journal.declines.values() if entry.rule.startswith("part")]
    assert [(entry.pass_name, entry.node, entry.rule) for entry in said] == [
        ("merge-siblings", "buffer", "part 0"),
        ("merge-siblings", "buffer", "part 2"),
    ]
    assert said[0].reason == "288 bytes are copied: slice_1 is a view (slice), in the memory of what it views"
    assert not check.problems(module)
    torch.testing.assert_close(results_of(module, x)[0], expected)
    assert cost.copied_by_concat(module) == 2 * 288


def test_what_was_settled_is_undone_with_the_pass_it_was_settled_for() -> None:
    module = captured(Network(siblings, **convs()).eval(), torch.randn(IMAGE))
    rewritten(module, ["allocate-buffers"])
    before = str(module.graph)
    run = rewritten(module, ["merge-siblings"])
    assert str(module.graph) != before
    run.editor.undo()
    assert str(module.graph) == before
    assert not check.problems(module)


def test_allocation_is_undone() -> None:
    module = captured(Network(siblings, **convs()).eval(), torch.randn(IMAGE))
    before = str(module.graph)
    run = rewritten(module, ["allocate-buffers"])
    run.editor.undo()
    assert str(module.graph) == before


def _shares(rewriter: Rewriter) -> None:
    """What common subexpressions do: the second ReLU is the first."""
    first, second = rewriter.graph.find_nodes(op="call_function", target=aten.relu.default)
    rewriter.substitute(second, lambda: first, rule="shared")


def test_parts_that_become_one_value_are_one_in_place_and_one_copied() -> None:
    module = captured(Network(lambda m, x: buffer([relu(x), relu(x)])), torch.randn(IMAGE))
    run = PassManager((Pass("share", run=_shares),), strict=True).run(module)
    assert len(run.journal.rewrites) == 1
    assert buffers.copied(only(module, "fxopt.buffer")) == {1}


def test_settling_does_nothing_where_all_is_well() -> None:
    module = captured(Network(nested), torch.randn(IMAGE))
    editor = Editor(module)
    assert (buffers.settle(editor), editor.log) == ([], [])


@given(networks(), st.permutations([current.name for current in flat(plugins.default_pipeline())]))
def test_passes_in_any_order_around_allocation_keep_contract_and_memory(
    network: tuple[nn.Module, torch.Tensor], names: list[str]
) -> None:
    model, x = network
    module = captured(model, x)
    expected = results_of(module, x)
    with everything_pays():
        run = rewritten(module, ["allocate-buffers", *names])
    settled = [entry for entry in run.journal.declines.values() if entry.rule.startswith("part ")]
    event(f"settled: {len([entry for entry in settled if entry.pass_name != 'allocate-buffers'])}")
    assert not check.problems(module, tuple(found for found in check.CHECKS if not found.of_captures))
    with torch.no_grad():
        actual = Written(module).run(x)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert strides(ours) == strides(theirs)


# -- specialisations -------------------------------------------------------------------------------------------------


def test_inputs_in_another_order_have_their_parts_copied() -> None:
    """The plan of a capture holds for the strides of its example; a call may bring others."""
    model = TwoInputs(lambda m, x, y: cat([relu(x), y.abs()], 1))
    x, y = torch.randn(IMAGE), torch.randn(IMAGE)
    last = x.contiguous(memory_format=torch.channels_last)
    compiled = fxopt.compile(model.eval(), (x, y), passes=("allocate-buffers",), strict=True)
    assert not buffers.copied(only(compiled.fused_graph, "fxopt.buffer"))
    for pair in ((x, y), (last, y), (x, y), (last, last)):
        assert torch.equal(compiled(*pair), model(*pair))
        assert compiled(*pair).stride() == model(*pair).stride()


@pytest.mark.parametrize("inputs", [None, (torch.randn(IMAGE),)], ids=["symbolic", "export"])
def test_a_compiled_module_with_buffers_is_saved_and_copied(inputs: Any) -> None:
    x = torch.randn(IMAGE)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Joined()).eval()
    compiled = fxopt.compile(model, inputs)
    expected = compiled(x)
    file = io.BytesIO()
    torch.save(compiled, file)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(compiled)):
        assert torch.equal(twin(x), expected)
        assert not buffers.copied(only(twin.fused_graph, "fxopt.buffer"))
        assert operations(twin.graph_module)["cat"] == 1


class Joined(nn.Module):
    """Two steps of one value, joined."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cat([x.abs(), x.neg()], 1)


@pytest.mark.parametrize("backend", ["aten", "onednn"])
def test_a_buffer_that_is_the_result_is_fresh_memory_in_each_call(backend: str) -> None:
    grown = Network(lambda m, x: cat([cat([y := m.a(x), z := m.b(y)], 1), relu(z)], 1), **convs())
    compiled = fxopt.compile(grown.eval(), (torch.randn(IMAGE),), backend=backend)
    assert "fxopt.buffer" in operations(compiled.fused_graph)
    first, second = torch.randn(IMAGE), torch.randn(IMAGE)
    with torch.no_grad():
        found = compiled(first)
        kept = found.clone()
        other = compiled(second)
        assert found.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()
        assert torch.equal(found, kept)
        assert found.untyped_storage().nbytes() == found.numel() * 4
        found.zero_()
        assert torch.equal(compiled(first), kept)


def test_where_nothing_is_known_nothing_is_written_in_place() -> None:
    module = captured(Network(lambda m, x: buffer([relu(x), x.abs()])), torch.randn(IMAGE))
    for node in module.graph.nodes:
        node.meta.pop("val", None)
    assert [number for _, number, _ in buffers.settle(Editor(module))] == [0, 1]
    assert ir.value(only(module, "fxopt.buffer")) is None
