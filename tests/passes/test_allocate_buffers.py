"""allocate-buffers: whose parts are written in place, and whose are copied and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import fxopt
from concats import captured, rewritten
from fxopt import buffers, ir, ops
from graphs import FRONT_ENDS, Network, TwoInputs, bits, compiled_by, fired, operations, reasons

PASSES = ("allocate-buffers",)
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
cat, relu = torch.cat, torch.relu
Body = Callable[[Any, Any], Any]
IMAGE = (2, 4, 6, 6)


def parts() -> dict[str, Any]:
    return {
        "a": nn.Conv2d(4, 4, 1),
        "b": nn.Conv2d(4, 4, 3, padding=1),
        "same": nn.Conv2d(4, 4, 2, padding="same"),
        "up": nn.ConvTranspose2d(4, 2, 1),
        "norm": nn.BatchNorm2d(4),
        "linear": nn.Linear(6, 6),
        "layer_norm": nn.LayerNorm(6),
        "lstm": nn.LSTM(6, 6),
        "constant": torch.randn(2, 4, 6, 6),
    }


def model_of(body: Body) -> nn.Module:
    return Network(body, **parts()).eval()


def found_in(module: fx.GraphModule) -> list[tuple[list[str], list[int]]]:
    """Of each buffer what makes its parts, and which are copied."""
    def name(part: fx.Node) -> str:
        return "input" if part.op == "placeholder" else ir.target_name(part)

    nodes = sorted(module.graph.find_nodes(op="call_function", target=ops.buffer))
    return [([name(part) for part in buffers.parts(node)], sorted(buffers.copied(node))) for node in nodes]


# -- what is written in place ----------------------------------------------------------------------------------------


def activated(m: Any, x: torch.Tensor) -> torch.Tensor:
    return cat([relu(m.a(x)), torch.sigmoid(m.b(x)), F.gelu(x), x.clamp(0, 1), x + 1, x.clone()], 1)


def reader_of_parts(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Others may read a part: its values, a view of it, in any order."""
    y, z = m.a(x), relu(x)
    return cat([y, z], 1).sum() + m.b(y) + z[:, 1:].mean() + y.reshape(2, -1).sum() + z.transpose(2, 3)


def grows(m: Any, x: torch.Tensor) -> torch.Tensor:
    first = relu(x)
    second = m.a(first)
    third = m.b(cat([first, second], 1)[:, 2:6])
    fourth = m.a(cat([first, second, third], 1)[:, 5:9])
    return cat([first, second, third, fourth], 1)


def grows_by_itself(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = cat([relu(x), m.a(x)], 1)
    y = cat([y, m.b(y[:, :4])], 1)
    return cat([y, m.b(y[:, 8:])], 1)


def grows_in_the_middle(m: Any, x: torch.Tensor) -> torch.Tensor:
    a, b, c, d = relu(x), m.a(x), x.abs(), m.b(x)
    return cat([a, b], 1).sum() + cat([c, a, b, d], 1)


def grows_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Two buffers go into one, the longer where two begin alike."""
    a, b, c, d, e = relu(x), m.a(x), x.abs(), m.b(x), x.neg()
    short, long, other = cat([a, b], 1), cat([a, b, c], 1), cat([d, e], 1)
    return short.sum() + long.sum() + other.sum() + cat([a, b, c, d, e], 1)


def the_same_again(m: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = relu(x), m.a(x)
    return cat([a, b], 1) * cat([a, b], 1).sum()


PLACED: list[tuple[str, Body, list[tuple[list[str], list[int]]]]] = [
    ("layers", lambda m, x: cat([m.a(x), m.b(x), m.up(x)], 1), [(["conv2d", "conv2d", "conv_transpose2d"], [])]),
    ("uneven padding", lambda m, x: cat([m.same(x), m.a(x)], 1), [(["conv2d", "conv2d"], [])]),
    ("norms and pools", lambda m, x: cat([m.norm(x), F.max_pool2d(x, 3, 1, 1), F.avg_pool2d(x, 3, 1, 1)], 1),
     [(["batch_norm", "max_pool2d", "avg_pool2d"], [])]),
    ("steps on each element", activated, [(["relu", "sigmoid", "gelu", "clamp", "add", "clone"], [])]),
    ("products", lambda m, x: cat([m.linear(x), x @ x], 3), [(["linear", "matmul"], [])]),
    ("a concat of one", lambda m, x: cat([relu(x)], 1) + 1, [(["relu"], [])]),
    ("along the batch, from the right", lambda m, x: cat([relu(x), x.abs()], -4), [(["relu", "abs"], [])]),
    ("parts that others read", reader_of_parts, [(["conv2d", "relu"], [])]),
    ("an input among them", lambda m, x: cat([x, relu(x)], 1), [(["input", "relu"], [0])]),
    ("a concat in a concat", lambda m, x: cat([y := cat([relu(x), x.abs()], 1), m.a(x)], 1).sum() + y,
     [(["relu", "abs"], []), (["fxopt.buffer", "conv2d"], [])]),
    ("a concat in one along another dim", lambda m, x: cat([cat([relu(x), x.abs()], 2), cat([x, x.neg()], 2)], 3),
     [(["relu", "abs"], []), (["input", "neg"], [0]), (["fxopt.buffer", "fxopt.buffer"], [])]),
    ("a list that grows", grows, [
        (["relu", "conv2d"], []), (["fxopt.buffer", "conv2d"], []), (["fxopt.buffer", "conv2d"], [])]),
    ("a concat that grows", grows_by_itself, [
        (["relu", "conv2d"], []), (["fxopt.buffer", "conv2d"], []), (["fxopt.buffer", "conv2d"], [])]),
    ("a run in the middle", grows_in_the_middle, [(["relu", "conv2d"], []), (["abs", "fxopt.buffer", "conv2d"], [])]),
    ("runs of several buffers", grows_twice, [
        (["relu", "conv2d"], []), (["fxopt.buffer", "abs"], []), (["conv2d", "neg"], []),
        (["fxopt.buffer", "fxopt.buffer"], [])]),
    ("the same concat again", the_same_again, [(["relu", "conv2d"], []), (["fxopt.buffer"], [])]),
]  # fmt: skip


@both
@pytest.mark.parametrize(("body", "expected"), [pytest.param(*row[1:], id=row[0]) for row in PLACED])
def test_parts_are_written_in_place(body: Body, expected: list[tuple[list[str], list[int]]], front_end: str) -> None:
    model, x = model_of(body), torch.randn(IMAGE)
    compiled = compiled_by(PASSES, model, (x,), front_end)
    assert found_in(compiled.fused_graph) == expected
    assert set(fired(compiled)) == {"buffer"}
    with torch.no_grad():
        assert bits(compiled(x)) == bits(model(x))


# -- what is copied --------------------------------------------------------------------------------------------------


def written(m: Any, x: torch.Tensor) -> torch.Tensor:
    y, z = relu(x), m.a(x)
    result = cat([y, z], 1)
    y[:, 0].mul_(2)
    return result + y.sum()


def written_before(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = relu(x)
    y[:, 0].mul_(2)
    return cat([y, m.a(x)], 1)


def written_whole(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = cat([relu(x), m.a(x)], 1)
    y[:, 0].mul_(2)
    return y + 1


def in_two(m: Any, x: torch.Tensor) -> torch.Tensor:
    y, z = relu(x), m.a(x)
    return cat([y, x.abs()], 1) + cat([z, y], 1)


def looked_at(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = relu(x)
    return cat([y, m.a(x)], 1).sum() + y.as_strided((2, 144), (144, 1))


def opaque(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = relu(x)
    return cat([y, m.a(x)], 1).sum() + m.lstm(y[:, 0])[0]


def along_two_dims(m: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = relu(x), m.a(x)
    return cat([a, b], 2).sum() + cat([a, b, x.abs()], 1)


def a_run_twice(m: Any, x: torch.Tensor) -> torch.Tensor:
    a, b = relu(x), m.a(x)
    return cat([a, b], 1).sum() + cat([a, b, a, b], 1)


def in_a_result(m: Any, x: torch.Tensor) -> Any:
    y = cat([relu(x), m.a(x)], 1)
    return y, cat([y, m.b(x)], 1) + 1


def a_view_of_a_concat(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = cat([relu(x), m.a(x)], 1)
    return cat([y[:, :3], m.b(x)], 1).sum() + y


def channels_last_beside(m: Any, x: torch.Tensor) -> torch.Tensor:
    return cat([x.contiguous(memory_format=torch.channels_last).abs(), relu(x)], 1)


COPIED: list[tuple[str, Body, list[int], str]] = [
    ("an input", lambda m, x: cat([relu(x), x], 1), [1], r"is an input, in memory of its own"),
    ("a constant", lambda m, x: cat([m.constant, relu(x)], 1), [0], "constant is a constant, in memory of its own"),
    ("a view", lambda m, x: cat([m.a(x)[:, 1:], relu(x)], 1), [0], r"is a view \(slice\), in the memory of what it"),
    ("a view of another concat", a_view_of_a_concat, [0], "is a view"),
    ("a view by shape", lambda m, x: cat([m.a(x).reshape(2, 4, 6, 6).flatten(2).unflatten(2, (6, 6)), relu(x)], 1),
     [0], "is a view"),
    ("no operator that writes slices", lambda m, x: cat([m.layer_norm(x), relu(x)], 1), [0], "layer_norm.* tensor of"),
    ("a promoted part", lambda m, x: cat([x.long().abs(), relu(x)], 1), [0], "is torch.int64 on cpu, the concat"),
    ("dimensions in another order", channels_last_beside, [0], "in another order than the concat"),
    ("a result", lambda m, x: (y := relu(x), cat([y, m.a(x)], 1)), [0], "the model hands out relu"),
    ("a result by a view", lambda m, x: ((y := relu(x))[:, 1:3], cat([y, m.a(x)], 1)), [0], "the model hands out relu"),
    ("a result by a reshape", lambda m, x: ((y := relu(x)).reshape(2, -1), cat([y, m.a(x)], 1)), [0], "hands out relu"),
    ("a concat that is a result", in_a_result, [0], "the model hands out buffer"),
    ("a part that is written", written, [0], "mul_ writes to relu in place"),
    ("a part that was written", written_before, [0], "mul_ writes to relu in place"),
    ("a part in memory by which others read", looked_at, [0], "as_strided.* reads relu and reads memory by them"),
    ("a part that an opaque module reads", opaque, [0], "reads select.*|lstm reads relu"),
    ("one value twice", lambda m, x: cat([y := relu(x), y, m.a(x)], 1), [1], "relu is in this concat already"),
    ("a concat along another dim has it", along_two_dims, [0, 1], "relu is in buffer already"),
    ("what another concat joins, twice", a_run_twice, [1], "buffer is in this concat already"),
    ("a value in two concats", in_two, [1], "relu is in buffer already"),
]  # fmt: skip


@both
@pytest.mark.parametrize(("body", "copied", "reason"), [pytest.param(*row[1:], id=row[0]) for row in COPIED])
def test_a_part_is_copied(body: Body, copied: list[int], reason: str, front_end: str) -> None:
    compiled = compiled_by(PASSES, model_of(body), (torch.randn(IMAGE),), front_end)
    last = sorted(compiled.fused_graph.graph.find_nodes(op="call_function", target=ops.buffer))[-1]
    assert sorted(buffers.copied(last)) == copied
    rule = f"part {copied[0]}"
    said = [entry for entry in compiled.report.declines if (entry.node, entry.rule) == (last.name, rule)]
    assert re.search(reason, said[0].reason), said
    with torch.no_grad():
        first, second = torch.randn(IMAGE), torch.randn(IMAGE)
        compiled(first)
        assert_same(compiled(second), compiled.graph_module(second))


def assert_same(ours: Any, theirs: Any) -> None:
    for left, right in zip(torch.utils._pytree.tree_leaves(ours), torch.utils._pytree.tree_leaves(theirs), strict=True):
        assert torch.equal(left, right)


STAYS: list[tuple[str, Body, str]] = [
    ("nothing but inputs", lambda m, x: cat([x, x], 1), "every part would be copied: .* is an input"),
    ("nothing but views", lambda m, x: cat([x[:, :2], relu(x)[:, 2:]], 1), "every part would be copied: slice"),
    ("a concat that is written", written_whole, "every part would be copied: mul_ writes to the concat in place"),
    ("an empty vector", lambda m, x: cat([x.new_zeros(0), relu(x)], 1), "new_zeros is an empty vector, which a concat"),
    (
        "two results of the same parts",
        lambda m, x: (cat([y := relu(x), z := x.abs()], 1), cat([y, z], 1)),
        "every part would be copied: relu is in buffer already; abs_1 is in buffer already",
    ),
]


@both
@pytest.mark.parametrize(("body", "reason"), [pytest.param(*row[1:], id=row[0]) for row in STAYS])
def test_a_concat_stays(body: Body, reason: str, front_end: str) -> None:
    compiled = compiled_by(PASSES, model_of(body), (torch.randn(IMAGE),), front_end)
    assert operations(compiled.fused_graph)["cat"] == 1
    found = reasons(compiled, "buffer")
    assert any(re.search(reason, text) for text in found), found


def test_shapes_are_waited_for() -> None:
    compiled = fxopt.compile(model_of(lambda m, x: cat([relu(x), x.abs()], 1)), passes=PASSES)
    assert [entry.reason for entry in compiled.report.pending] == ["the shape and dtype of relu"]
    compiled(torch.randn(IMAGE))
    assert fired(compiled) == ["buffer"]


def test_what_is_copied_is_counted_for_each_of_an_open_batch() -> None:
    model = model_of(lambda m, x: cat([relu(x), x], 1))
    compiled = fxopt.compile(model, (torch.randn(IMAGE),), passes=PASSES, backend="aten")
    (said,) = [entry.reason for entry in compiled.report.declines if entry.rule == "part 1"]
    assert said.startswith(f"{4 * 4 * 36} bytes for each of a batch are copied: ")


def test_parts_of_a_later_buffer_stay_its_own() -> None:
    """A concat in front of a buffer that is there already does not take what that one owns."""
    body = lambda m, x: (cat([y := relu(x), x.abs()], 1) + torch.ops.fxopt.buffer([x.neg(), y], 1))  # noqa: E731
    module = captured(model_of(body), torch.randn(IMAGE))
    rewritten(module, PASSES)
    assert found_in(module) == [(["relu", "abs"], [0]), (["neg", "relu"], [])]


def test_two_inputs_of_other_dtypes() -> None:
    model = TwoInputs(lambda m, x, y: cat([relu(x), relu(y)], 1)).eval()
    x, y = torch.randn(IMAGE), torch.randn(IMAGE, dtype=torch.float64)
    compiled = compiled_by(PASSES, model, (x, y), "export")
    assert found_in(compiled.fused_graph) == [(["relu", "relu"], [0])]
    assert torch.equal(compiled(x, y), model(x, y))
