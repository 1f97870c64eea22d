"""Edits: each is recorded, and undoing restores the same nodes in the same places with the same meta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt import check, ir
from fxopt.edit import Editor

aten = torch.ops.aten


def module() -> fx.GraphModule:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    return fxopt.trace(model, (torch.randn(2, 3, 8, 8),))


def picture(traced: fx.GraphModule) -> list[Any]:
    """All that an edit could change."""
    return [
        (id(node), node.name, node.op, str(node.target), node.args, node.kwargs, sorted(n.name for n in node.users),
         {key: id(value) for key, value in node.meta.items()})
        for node in traced.graph.nodes
    ] + sorted(traced.state_dict())  # fmt: skip


def named(traced: fx.GraphModule, name: str) -> fx.Node:
    return next(node for node in traced.graph.nodes if node.name == name)


def _insert(editor: Editor, traced: fx.GraphModule) -> None:
    norm = named(traced, "batch_norm")
    made = editor.insert("call_function", aten.neg.default, (norm,), before=named(traced, "relu"))
    assert ir.shape(made) == ir.shape(norm)


def _update(editor: Editor, traced: fx.GraphModule) -> None:
    editor.update(named(traced, "relu"), (named(traced, "conv2d"),))


def _replace(editor: Editor, traced: fx.GraphModule) -> None:
    editor.replace_uses(named(traced, "batch_norm"), named(traced, "conv2d"))


def _erase(editor: Editor, traced: fx.GraphModule) -> None:
    editor.replace_uses(named(traced, "batch_norm"), named(traced, "conv2d"))
    editor.erase(named(traced, "batch_norm"))


def _erase_several(editor: Editor, traced: fx.GraphModule) -> None:
    editor.replace_uses(named(traced, "relu"), named(traced, "conv2d"))
    for name in ("relu", "batch_norm"):
        editor.erase(named(traced, name))


def _tensor(editor: Editor, traced: fx.GraphModule) -> None:
    assert editor.add_tensor("0.weight", torch.zeros(3)) == "0.weight_1"
    assert editor.add_tensor("new.deep.name", torch.zeros(3)) == "new.deep.name"


def _meta(editor: Editor, traced: fx.GraphModule) -> None:
    editor.set_meta(named(traced, "relu"), "rank", 4)
    editor.set_meta(named(traced, "relu"), "origin", ())


EDITS: list[Any] = [_insert, _update, _replace, _erase, _erase_several, _tensor, _meta]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__.strip("_").replace("_", " "))
def test_an_edit_can_be_undone(edit: Callable[[Editor, fx.GraphModule], None]) -> None:
    traced = module()
    before, editor = picture(traced), Editor(traced)
    edit(editor, traced)
    assert picture(traced) != before
    editor.undo()
    assert picture(traced) == before
    assert not check.problems(traced)


def test_any_suffix_of_the_edits_can_be_undone() -> None:
    traced = module()
    editor, states, marks = Editor(traced), [], []
    for edit in (_insert, _tensor, _meta, _erase):
        states.append(picture(traced))
        marks.append(editor.mark())
        edit(editor, traced)
    for state, mark in zip(reversed(states), reversed(marks), strict=True):
        editor.undo(mark)
        assert picture(traced) == state


def test_a_node_that_does_not_fit_raises_what_the_operator_raises() -> None:
    traced = module()
    editor = Editor(traced)
    with pytest.raises((RuntimeError, ValueError)):
        editor.insert(
            "call_function", aten.reshape.default, (named(traced, "conv2d"), [7, 7]), before=named(traced, "relu")
        )
    editor.undo()
    assert not check.problems(traced)


def test_arguments_are_put_where_the_schema_has_them() -> None:
    traced = module()
    made = Editor(traced).insert(
        "call_function", aten.add.Tensor, (), {"other": 2, "alpha": 1, "self": named(traced, "conv2d")},
        before=named(traced, "relu"),
    )  # fmt: skip
    assert made.args == (named(traced, "conv2d"), 2)
    assert made.kwargs == {}
