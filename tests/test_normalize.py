"""The normal form: one spelling for each operation, pure where nobody can tell, through either front end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxopt
from fxopt import check, ir, normalize
from graphs import FRONT_ENDS, Network, randomised

front_ends = pytest.mark.parametrize("front_end", FRONT_ENDS)
aten = torch.ops.aten


def image() -> torch.Tensor:
    return torch.randn(2, 4, 6, 6)


def traced(model: nn.Module, front_end: str) -> fx.GraphModule:
    return fxopt.trace(model, (image(),)) if front_end == "export" else fxopt.trace(model)


def calls(module: fx.GraphModule) -> list[str]:
    """Every operator of a graph, in order."""
    return [str(node.target).removeprefix("aten.") for node in module.graph.nodes if ir.is_compute(node)]


@front_ends
@pytest.mark.parametrize(
    ("spellings", "operator"),
    [
        pytest.param(
            [lambda m, x: F.relu(x), lambda m, x: torch.relu(x), lambda m, x: x.relu(), lambda m, x: m.relu(x),
             lambda m, x: F.relu(x * 1.5, inplace=True), lambda m, x: (x * 1.5).relu_()],
            "relu.default", id="relu",
        ),
        pytest.param(
            [lambda m, x: x + 2, lambda m, x: 2 + x, lambda m, x: x.add(2), lambda m, x: torch.add(x, 2)],
            "add.Tensor", id="a sum with a number",
        ),
        pytest.param([lambda m, x: x - 2, lambda m, x: x.sub(2), lambda m, x: torch.subtract(x, 2)], "sub.Tensor",
                     id="sub"),
        pytest.param([lambda m, x: 2 - x, lambda m, x: torch.rsub(x, 2)], "rsub.Scalar", id="a number minus"),
        pytest.param([lambda m, x: x * 2, lambda m, x: 2 * x, lambda m, x: torch.multiply(x, 2)], "mul.Tensor",
                     id="mul"),
        pytest.param([lambda m, x: x / 2, lambda m, x: x.div(2), lambda m, x: torch.true_divide(x, 2)], "div.Tensor",
                     id="div"),
        pytest.param([lambda m, x: -x, lambda m, x: x.neg(), lambda m, x: torch.neg(x)], "neg.default", id="neg"),
        pytest.param([lambda m, x: torch.flatten(x, 1), lambda m, x: x.flatten(1), lambda m, x: m.flatten(x)],
                     "flatten.using_ints", id="flatten"),
        pytest.param(
            [lambda m, x: x.view(2, -1), lambda m, x: x.reshape(2, -1), lambda m, x: torch.reshape(x, (2, -1)),
             lambda m, x: x.view((2, -1))],
            "reshape.default", id="view is reshape",
        ),
        pytest.param(
            [lambda m, x: F.batch_norm(x, m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias),
             lambda m, x: m.norm(x),
             lambda m, x: torch.batch_norm(x, m.norm.weight, m.norm.bias, m.norm.running_mean, m.norm.running_var,
                                           False, 0.1, 1e-5, True)],
            "batch_norm.default", id="batch norm",
        ),
        pytest.param(
            [lambda m, x: F.conv2d(x, m.conv.weight, m.conv.bias), lambda m, x: m.conv(x),
             lambda m, x: torch.conv2d(x, m.conv.weight, m.conv.bias)],
            "conv2d.default", id="conv2d",
        ),
        pytest.param([lambda m, x: torch.cat([x, x], 1), lambda m, x: torch.concat((x, x), dim=1),
                      lambda m, x: torch.concatenate([x, x], dim=1)], "cat.default", id="cat"),
        pytest.param(
            [lambda m, x: x.clamp(0, 1), lambda m, x: torch.clip(x, 0, 1), lambda m, x: torch.clamp_min(x, 0),
             lambda m, x: x.clamp_max(1), lambda m, x: torch.clamp_max(x, max=1), lambda m, x: (x * 2).clamp_min_(0)],
            "clamp.default", id="clamp",
        ),
        pytest.param(
            [lambda m, x: F.softmax(x, -1), lambda m, x: x.softmax(-1), lambda m, x: torch.softmax(x, dim=-1)],
            "softmax.int", id="softmax",
        ),
        pytest.param([lambda m, x: F.gelu(x), lambda m, x: m.gelu(x)], "gelu.default", id="gelu"),
        pytest.param([lambda m, x: x.sigmoid(), lambda m, x: torch.special.expit(x)], "sigmoid.default", id="sigmoid"),
        pytest.param([lambda m, x: torch.erf(x), lambda m, x: torch.special.erf(x)], "erf.default", id="erf"),
        pytest.param([lambda m, x: x.abs().log1p(), lambda m, x: torch.special.log1p(x.abs())], "log1p.default",
                     id="log1p"),
        pytest.param([lambda m, x: F.max_pool2d(x, 2), lambda m, x: m.pool(x)], "max_pool2d.default", id="max pool"),
        pytest.param([lambda m, x: x.to(torch.int16), lambda m, x: x.short(), lambda m, x: x.type(torch.int16)],
                     "to.dtype", id="a cast"),
        pytest.param([lambda m, x: F.rms_norm(x, (6,)), lambda m, x: torch.rms_norm(x, (6,)), lambda m, x: m.rms(x)],
                     "rms_norm.default", id="rms norm"),
        pytest.param([lambda m, x: x.mean((2, 3)), lambda m, x: torch.mean(x, dim=[2, 3])], "mean.dim", id="mean"),
    ],
)  # fmt: skip
def test_every_spelling_of_an_operation_is_one_operator(
    front_end: str, spellings: list[Callable[..., Any]], operator: str
) -> None:
    parts: dict[str, nn.Module] = {
        "relu": nn.ReLU(), "flatten": nn.Flatten(), "norm": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 2, 3),
        "pool": nn.MaxPool2d(2), "gelu": nn.GELU(), "rms": nn.RMSNorm(6),
    }  # fmt: skip
    found = set()
    for spelling in spellings:
        model = randomised(Network(spelling, **parts))
        module = traced(model, front_end)
        found.add(calls(module)[-1])
        given = image()
        torch.testing.assert_close(module(given)[0], model(given))
    assert found == {operator}


def _fresh(_: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.relu_()
    y.clamp_(max=1.0)
    return y + 1


def _view_only(_: Any, x: torch.Tensor) -> torch.Tensor:
    return (x * 2).flatten(1).relu_()


def _derived(_: Any, x: torch.Tensor) -> torch.Tensor:
    return (x * 2).relu_().flatten(1).sigmoid_()


@pytest.mark.parametrize(
    ("front_end", "body"),
    [
        pytest.param("export", _fresh, id="a value that only the writes and later readers see"),
        pytest.param("symbolic", _fresh, id="a value that only the writes and later readers see, symbolic"),
        # Without shapes the strides of a view are not known, and the pure twin's may differ.
        pytest.param("export", _view_only, id="a view whose base nobody reads again"),
        pytest.param("export", _derived, id="one write behind another"),
    ],
)
def test_writes_that_nobody_can_tell_become_pure(front_end: str, body: Callable[..., Any]) -> None:
    model = Network(body).eval()
    module = traced(model, front_end)
    assert not [node for node in module.graph.nodes if normalize.twin(node.target)]
    given = image()
    assert torch.equal(module(given)[0], model(given))


def _alias_read(_: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    z = y.reshape(2, -1)
    y.relu_()
    return z


def _input(_: Any, x: torch.Tensor) -> torch.Tensor:
    return x.relu_()


def _parameter(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return x + m.total.add_(1)


def _promotes(_: Any, x: torch.Tensor) -> torch.Tensor:
    y = (x > 0).to(torch.float32).to(torch.bfloat16)
    y.add_(torch.ones(6))  # the pure sum is float32
    return y


@pytest.mark.parametrize(
    ("front_end", "body"),
    [
        pytest.param("export", _alias_read, id="a view is read behind the write"),
        pytest.param("symbolic", _alias_read, id="a view is read behind the write, symbolic"),
        pytest.param("export", _input, id="the write is to an input"),
        pytest.param("symbolic", _input, id="the write is to an input, symbolic"),
        pytest.param("export", _parameter, id="the write is to a buffer"),
        pytest.param("export", _promotes, id="the pure twin would have another dtype"),
    ],
)
def test_writes_that_somebody_can_tell_stay(front_end: str, body: Callable[..., Any]) -> None:
    module = traced(Network(body, total=torch.zeros(1)).eval(), front_end)
    assert any(name.split(".")[0].endswith("_") or "wrap_with" in name for name in calls(module)), calls(module)


#: Changes of a shape in place, with what reads the tensor before and behind.
RESHAPED = {
    "unsqueeze_": lambda m, x: (x * 2).unsqueeze_(0) + 1,
    "read before": lambda m, x: [y := x * 2, y + 1, y.unsqueeze_(0), y + 1][1:],
    "of what was written": lambda m, x: [y := x * 2, y.relu_().transpose_(1, 2), y + 1][1:],
    "twice": lambda m, x: (x * 2).unsqueeze_(0).squeeze_(1).transpose_(0, 1) + 1,
    "of what may be the same tensor": lambda m, x: [y := x * 2, z := y.contiguous(), y.unsqueeze_(0), z + 1][1:],
    "of a part": lambda m, x: [part := x.split(2, 1)[0], part.squeeze_(0), part + 1, x][2:],
    "read through a view": lambda m, x: [y := x * 2, z := y[0], y.unsqueeze_(0), z + 1, y + 1][1:],
}


@front_ends
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", RESHAPED)
def test_a_shape_changed_in_place_is_one_shape_for_each_reader(front_end: str, batch: int, name: str) -> None:
    model, given = Network(RESHAPED[name]).eval(), torch.randn(batch, 4, 6, 6)
    wanted = model(given.clone())
    compiled = fxopt.compile(model, (given,) if front_end == "export" else None, verify=False, strict=True)
    found = compiled(given)
    assert not any("e_." in call for call in calls(compiled.fused_graph))
    for left, right in zip(*(r if isinstance(r, list) else [r] for r in (wanted, found)), strict=True):
        assert left.shape == right.shape
        assert torch.equal(left, right)


@front_ends
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda m, x: x.unsqueeze_(0), id="of the caller's tensor"),
        pytest.param(lambda m, x: x + m.total.unsqueeze_(0), id="of the model's tensor"),
        pytest.param(lambda m, x: (x * 2).resize_(3), id="of memory that a view does not show"),
    ],
)
def test_a_shape_changed_in_place_that_others_see_is_refused(front_end: str, body: Callable[..., Any]) -> None:
    model = Network(body, total=torch.zeros(1)).eval()
    with pytest.raises(fxopt.CaptureError, match=r"in place|cannot capture"):
        traced(model, front_end)


@front_ends
def test_normalising_again_changes_nothing(front_end: str) -> None:
    model = randomised(
        Network(
            lambda m, x: m.head(F.relu(m.norm(m.conv(x)), inplace=True).view(x.shape[0], -1)),
            conv=nn.Conv2d(4, 2, 3, padding="same"), norm=nn.BatchNorm2d(2), head=nn.Linear(72, 3),
        )
    )  # fmt: skip
    module = traced(model, front_end)
    before = str(module.graph)
    normalize.normalize(module)
    assert str(module.graph) == before
    assert not check.problems(module)


@front_ends
@pytest.mark.parametrize(
    ("padding", "kernel", "dilation", "operator"),
    [
        pytest.param("same", 3, 1, "conv2d.default", id="same, even on both sides"),
        pytest.param("same", 3, 2, "conv2d.default", id="same, dilated"),
        pytest.param("valid", 4, 1, "conv2d.default", id="valid"),
        pytest.param("same", 4, 1, "conv2d.padding", id="same, uneven, which no number says"),
    ],
)
def test_padding_by_name_becomes_numbers(
    front_end: str, padding: str, kernel: int, dilation: int, operator: str
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 2, kernel, padding=padding, dilation=dilation)).eval()
    module, given = traced(model, front_end), image()
    assert calls(module) == [operator]
    assert torch.equal(module(given)[0], model(given))


@pytest.mark.parametrize(
    ("target", "pure"),
    [
        pytest.param(aten.add_.Tensor, aten.add.Tensor, id="add_"),
        pytest.param(aten.relu_.default, aten.relu.default, id="relu_"),
        pytest.param(aten.copy_.default, aten.copy.default, id="copy_"),
        pytest.param(aten.__and__.Tensor, None, id="__and__ writes nothing"),
        pytest.param(aten.relu.default, None, id="relu is pure already"),
        pytest.param(torch.relu_, None, id="no operator"),
    ],
)
def test_twins(target: Any, pure: Any) -> None:
    assert normalize.twin(target) is pure
