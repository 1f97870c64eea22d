"""merge-siblings: what stays as it is, and the reason that is given."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphs import FRONT_ENDS, Network, assert_declined_somewhere, compiled_by, fired, reasons
from siblings import ALONE, CONVS, FUSED, IMAGE, LINEARS, ROWS, Body, conv, dyadic, exact, joined, linear

both = pytest.mark.parametrize("front_end", FRONT_ENDS)



def _write_between(m: Any, x: torch.Tensor) -> torch.Tensor:
    first, part = m.a(x), x[:, :1]
    part.mul_(2)
    return torch.cat([first, m.b(x)], 1)


def _write_later(m: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = m.a(x), m.b(x)
    part = first[:, 0]
    total = first.sum(1)
    part.mul_(2)
    return total + first.sum(1) + second.sum(1)


def _sliced(m: Any, x: torch.Tensor) -> torch.Tensor:
    both = m.a(x)
    return torch.cat([both[..., :2], m.b(x), both[..., 2:]], -1)


def _same_layer_kinds(**options: Any) -> dict[str, Any]:
    return {"a": conv(3, 3, padding=1), "b": conv(3, 3, **{"padding": 1, **options})}

DECLINES: list[Any] = [
    pytest.param(lambda m, x: m.a(x)[..., :3].sum(1) + m.b(x)[..., :3].sum(1), _same_layer_kinds(stride=(1, 2)),
                 IMAGE, "the stride \\(1, 2\\), not \\(1, 1\\)", id="another stride"),
    pytest.param(lambda m, x: m.a(x)[..., :2, :1] + m.b(x)[..., :2, :1], _same_layer_kinds(dilation=2),
                 IMAGE, "the dilation \\(2, 2\\), not \\(1, 1\\)", id="another dilation"),
    pytest.param(lambda m, x: m.a(x)[..., :2, :1] + m.b(x)[..., :2, :1], _same_layer_kinds(padding=0),
                 IMAGE, "the kernel's middle \\(-2, -2\\), not \\(0, 0\\)", id="another padding"),
    pytest.param(lambda m, x: m.a(x)[..., :2, :2] + m.b(x)[..., :2, :2],
                 {"a": conv(3, 2, dilation=2), "b": conv(3, 3, dilation=2, padding=1)},
                 IMAGE, "the kernel's parity \\(1, 1\\), not \\(0, 0\\)", id="an even kernel and an odd one"),
    pytest.param(lambda m, x: m.a(x).sum(1) + m.b(x).sum(1), _same_layer_kinds(groups=1) | {
                 "b": nn.ConvTranspose2d(4, 3, 3, padding=1)},
                 IMAGE, "the transposed True, not False", id="a transposed one"),
    pytest.param(lambda m, x: m.a(x)[..., :9, :9].sum(1) + m.b(x)[..., :9, :9].sum(1),
                 {"a": nn.ConvTranspose2d(4, 3, 2, stride=2), "b": nn.ConvTranspose2d(4, 3, 2, 2, output_padding=1)},
                 IMAGE, "the output padding \\(1, 1\\), not \\(0, 0\\)", id="another output padding"),
    pytest.param(lambda m, x: m.a(x)[..., :9, :9].sum(1) + m.b(x)[..., :9, :9].sum(1),
                 {"a": nn.ConvTranspose2d(4, 3, 1), "b": nn.ConvTranspose2d(4, 3, 3, padding=1)},
                 IMAGE, "the kernel \\(3, 3\\), not \\(1, 1\\)", id="transposed kernels of two sizes"),
    pytest.param(lambda m, x: m.a(x)[..., :5, :5].sum(1) + m.b(x)[..., :5, :5].sum(1),
                 {"a": nn.ConvTranspose2d(4, 3, 3), "b": nn.ConvTranspose2d(4, 3, 3, padding=1)},
                 IMAGE, "the padding \\(1, 1\\), not \\(0, 0\\)", id="transposed paddings of two sizes"),
    pytest.param(lambda m, x: m.a(x).sum(1) + m.b(x).sum(1), {"a": conv(4, groups=2), "b": conv(4, groups=2)},
                 IMAGE, "it has 2 groups", id="groups"),
    pytest.param(lambda m, x: m.a(x).sum() + m.b(x).sum(), {"a": nn.Conv2d(4, 4, 1), "b": nn.Linear(5, 4)},
                 IMAGE, "the layer linear, not 2d convolution", id="a linear layer beside a convolution"),
    pytest.param(lambda m, x: (m.a(x) + x).sum(1) + m.b(x).sum(1), {"a": conv(4), "b": conv(4)},
                 IMAGE, "a residual is added to it", id="a residual"),
    pytest.param(lambda m, x: F.conv2d(x, m.w * 2).sum(1) + m.b(x).sum(1), {"w": torch.ones(3, 4, 1, 1), "b": conv(4)},
                 IMAGE, "its weight is computed", id="a weight that is computed"),
    pytest.param(lambda m, x: F.conv2d(x, m.w, m.v * 2).sum(1) + m.b(x).sum(1),
                 {"w": torch.ones(3, 4, 1, 1), "v": torch.ones(3), "b": conv(4)},
                 IMAGE, "its bias is computed", id="a bias that is computed"),
    pytest.param(_write_between, {"a": conv(3), "b": conv(3)}, IMAGE, "may write to", id="a write between them"),
    pytest.param(_write_later, {"a": conv(3), "b": conv(3)}, IMAGE, "may write to", id="a later write to one"),
    pytest.param(lambda m, x: m.c(m.a(x)).sum(1) + m.c(m.b(x)).sum(1),
                 {"a": conv(512, channels=1), "b": conv(512, channels=1), "c": conv(1, 3, channels=512)},
                 (2, 1, 20, 20), "a reader copies its part", id="copies that readers make cost more than is saved"),
    pytest.param(lambda m, x: (m.a(x), m.b(x)), {"a": conv(512, channels=1), "b": conv(512, channels=1)},
                 (2, 1, 20, 20), "the model hands it out", id="copies for the caller cost more than is saved"),
    pytest.param(lambda m, x: m.a(x).relu() * m.b(x), {"a": linear(4096), "b": linear(4096)},
                 (64, 4), "relu becomes a step of its own", id="an activation of its own costs more than is saved"),
    pytest.param(lambda m, x: m.a(x).sum(1) + m.b(x).sum(1), {"a": conv(16), "b": conv(16, 3, padding=1)},
                 (2, 4, 30, 30), "its 1x1 kernel padded to 3x3 multiplies by", id="zeros cost more than is saved"),
    pytest.param(_sliced, {"a": linear(4), "b": linear(3)}, ROWS, "several layers in one", id="a layer that is sliced"),
]  # fmt: skip


@both
@pytest.mark.parametrize(("body", "parts", "shape", "reason"), DECLINES)
def test_declines(body: Body, parts: dict[str, Any], shape: tuple[int, ...], reason: str, front_end: str) -> None:
    compiled = compiled_by(FUSED, exact(Network(body, **parts)), (dyadic(*shape),), front_end)
    assert not {CONVS, LINEARS} & set(fired(compiled))
    said = [*reasons(compiled, CONVS), *reasons(compiled, LINEARS)]
    assert any(re.search(reason, text) for text in said), said


def test_declines_a_weight_that_is_not_finite() -> None:
    model = exact(Network(joined, a=conv(3), b=conv(3)))
    nn.init.constant_(model.a.weight, float("nan"))  # type: ignore[arg-type]
    compiled = compiled_by(ALONE, model, (dyadic(*IMAGE),), "export", verify=False)
    assert_declined_somewhere(compiled, CONVS, "holds NaN or infinity")
    assert not fired(compiled)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda m, x: m.a(x) + m.b(x + 1), id="of two values"),
        pytest.param(lambda m, x: F.linear(m.y, x[0]).sum() + m.a(x).sum(), id="one reads it as its weight"),
        pytest.param(lambda m, x: m.b(m.a(x)), id="one reads the other"),
        pytest.param(lambda m, x: m.a(x) + m.a(x + 1), id="one layer called twice"),
    ],
)
def test_layers_that_are_no_siblings(body: Body) -> None:
    model = exact(Network(body, a=linear(4), b=linear(4), y=torch.ones(3, 4)))
    compiled = compiled_by(ALONE, model, (dyadic(*ROWS),), "export")
    assert not compiled.report.rewrites
    assert not compiled.report.declines
