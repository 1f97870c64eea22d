"""fold-batchnorm, by the rules of its page: what folds, what declines and why. Brackets name peers' bug reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from graphs import compiled_by, fired, operations, randomised, reasons
from norms import (
    AFTER,
    BEFORE,
    CHAIN,
    CONVS,
    CROSS,
    NORMS,
    TRANSPOSED,
    Case,
    between,
    both,
    f_batch_norm,
    frozen,
    functional,
    image,
    sequence,
    stateless_batch_norm,
    table,
    torch_batch_norm,
)

PASSES = ("fold-batchnorm",)


# -- behind a layer --------------------------------------------------------------------------------------------------

AFTER_LAYER: list[Case] = [
    *(
        (f"conv{d}d", sequence(CONVS[d](4, 6, 3, stride=2, dilation=2, padding=2), NORMS[d](6)), image(d))
        for d in CONVS
    ),
    *(
        (
            f"transposed conv{d}d of as many inputs as outputs scales its second axis [pytorch#180995]",
            sequence(TRANSPOSED[d](4, 4, 3, stride=2), NORMS[d](4)),
            image(d),
        )
        for d in TRANSPOSED
    ),
    (
        "a grouped transposed conv has its outputs per group [ultralytics#25364]",
        sequence(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), nn.BatchNorm2d(6)),
        image(2),
    ),
    (
        "a grouped transposed conv with as many inputs as outputs [ultralytics#25364]",
        sequence(nn.ConvTranspose1d(4, 4, 2, groups=2), nn.BatchNorm1d(4)),
        image(1),
    ),
    ("a grouped conv", sequence(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), image(2)),
    ("a depthwise conv", sequence(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)), image(2)),
    *(
        (
            f"padding_mode={mode}",
            sequence(nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode), nn.BatchNorm2d(6)),
            image(2),
        )
        for mode in ("zeros", "reflect", "replicate", "circular")
    ),
    ("padding=same, even on both sides", sequence(nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)), image(2)),
    ("padding=valid", sequence(nn.Conv1d(4, 6, 2, padding="valid"), nn.BatchNorm1d(6)), image(1)),
    ("padding=same, uneven", sequence(nn.Conv2d(4, 6, 2, padding="same"), nn.BatchNorm2d(6)), image(2)),
    ("a linear layer of rank 2", sequence(nn.Linear(4, 6), nn.BatchNorm1d(6)), (3, 4)),
    ("a linear layer of rank 3 and a norm of one channel", sequence(nn.Linear(4, 6), nn.BatchNorm1d(1)), (3, 1, 4)),
    ("a conv without bias", sequence(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), image(2)),
    ("a linear layer without bias", sequence(nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6)), (3, 4)),
    ("affine=False [pytorch#72049]", sequence(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), image(2)),
    ("SyncBatchNorm in eval mode", sequence(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)), image(2)),
    ("a large eps", sequence(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.5)), image(2)),
    ("F.batch_norm", functional(f_batch_norm, nn.Conv2d(3, 4, 3)), image(2, 3)),
    ("torch.batch_norm", functional(torch_batch_norm, nn.Conv2d(3, 4, 3)), image(2, 3)),
    ("one channel", sequence(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1)), image(2, 3)),
    ("two norms in turn", sequence(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.BatchNorm2d(6)), image(2)),
    ("names that are no identifiers", lambda: _Keyed(), image(2)),
]


class _Keyed(nn.Module):
    """Submodules named by what is no identifier, and by a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"1x1": nn.Conv2d(4, 6, 1), "class": nn.BatchNorm2d(6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.parts["class"](self.parts["1x1"](x))


@both
@table(AFTER_LAYER)
def test_folds_behind(model: Callable[[], nn.Module], shape: tuple[int, ...], front_end: str) -> None:
    compiled = compiled_by(PASSES, randomised(model()), (torch.randn(shape),), front_end)
    assert set(fired(compiled)) == {AFTER}
    assert operations(compiled.fused_graph)["batch_norm"] == 0


def test_folds_the_form_that_export_decomposes_to() -> None:
    model = functional(stateless_batch_norm, nn.Conv2d(3, 4, 3))()
    compiled = compiled_by(PASSES, randomised(model), (torch.randn(image(2, 3)),), "export")
    assert fired(compiled) == [AFTER]


def test_declines_the_decomposed_form_whose_other_results_are_read() -> None:
    def body(m: Any, x: torch.Tensor) -> Any:
        found = torch.ops.aten.native_batch_norm(m.layer(x), m.gain, m.shift, m.mean, m.variance, False, 0.1, 1e-5)
        return found[0] + found[1].sum()

    compiled = compiled_by(PASSES, functional(body, nn.Conv2d(3, 4, 3))(), (torch.randn(image(2, 3)),), "export")
    assert fired(compiled) == []


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_fold_is_rounded_once_to_the_weights_dtype(dtype: torch.dtype, front_end: str) -> None:
    """bf16 folds failed in peers [pytorch#120545, #145623]."""
    model = randomised(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).to(dtype))
    compiled = compiled_by(PASSES, model, (torch.randn(image(2)).to(dtype),), front_end)
    assert fired(compiled) == [AFTER]
    conv, norm = model[0].requires_grad_(False), model[1].requires_grad_(False)
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    held = compiled.state_dict()
    # The same sums in float64, in another order: a second rounding to the dtype would show as one unit.
    weight = (conv.weight.double() * scale.reshape(-1, 1, 1, 1)).to(dtype)
    bias = ((conv.bias.double() - norm.running_mean.double()) * scale + norm.bias.double()).to(dtype)
    noise = 1e-15 if dtype is torch.float64 else 0.0
    torch.testing.assert_close(held["0.weight_folded"], weight, rtol=0, atol=noise)
    torch.testing.assert_close(held["0.bias_folded"], bias, rtol=0, atol=noise)


@both
def test_a_bf16_conv_and_a_float32_norm(front_end: str) -> None:
    model = randomised(nn.Sequential(nn.Conv2d(4, 6, 3).bfloat16(), nn.BatchNorm2d(6)))
    compiled = compiled_by(PASSES, model, (torch.randn(image(2)).bfloat16(),), front_end)
    assert fired(compiled) == [AFTER]
    assert compiled.state_dict()["0.weight_folded"].dtype is torch.bfloat16


# -- in front of a layer ---------------------------------------------------------------------------------------------

BEFORE_LAYER: list[Case] = [
    *((f"conv{d}d", sequence(NORMS[d](4), CONVS[d](4, 6, 3, stride=2)), image(d)) for d in CONVS),
    ("a grouped conv takes its scales per group", sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), image(2)),
    ("a depthwise conv", sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, groups=4)), image(2)),
    ("a conv without bias gets one", sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, bias=False)), image(2)),
    ("a linear layer of rank 2", sequence(nn.BatchNorm1d(4), nn.Linear(4, 6)), (3, 4)),
    ("a linear layer of rank 3 and a norm of one channel", sequence(nn.BatchNorm1d(1), nn.Linear(4, 6)), (3, 1, 4)),
    ("padding=valid", sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="valid")), image(2)),
]
NO_SHIFT = {"running_mean": 0.0, "bias": 0.0, "running_var": 0.5, "weight": -2.0}
BEFORE_LAYER_SCALE_ONLY: list[Case] = [
    (
        "zero padding, where there is no shift",
        lambda: nn.Sequential(frozen(nn.BatchNorm2d(4), **NO_SHIFT), nn.Conv2d(4, 6, 3, padding=1)),
        image(2),
    ),
    *(
        (
            f"a transposed conv{d}d, where there is no shift",
            lambda d=d: nn.Sequential(
                frozen(NORMS[d](4), **NO_SHIFT), TRANSPOSED[d](4, 6, 3, stride=2, padding=1, groups=2)
            ),
            image(d),
        )
        for d in TRANSPOSED
    ),
]


@both
@table(BEFORE_LAYER)
def test_folds_in_front(model: Callable[[], nn.Module], shape: tuple[int, ...], front_end: str) -> None:
    compiled = compiled_by(PASSES, randomised(model()), (torch.randn(shape),), front_end)
    assert fired(compiled) == [BEFORE]
    assert operations(compiled.fused_graph)["batch_norm"] == 0


@both
@table(BEFORE_LAYER_SCALE_ONLY)
def test_folds_a_scale_in_front(model: Callable[[], nn.Module], shape: tuple[int, ...], front_end: str) -> None:
    # Four different scales of both signs: an axis that is confused shows.
    network = model().eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([0.5, -3.0, 2.0, 1.0]))
    compiled = compiled_by(PASSES, network, (torch.randn(shape),), front_end)
    assert fired(compiled) == [BEFORE]
    assert torch.equal(compiled.state_dict()["1.bias"], network[1].bias)


def test_folds_a_scale_in_front_of_uneven_padding_same() -> None:
    model = nn.Sequential(frozen(nn.BatchNorm2d(4), **NO_SHIFT), nn.Conv2d(4, 6, 2, padding="same")).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(image(2)),), "symbolic")
    assert fired(compiled) == [BEFORE]


def test_uneven_padding_same_with_an_open_batch_folds_or_declines_and_never_raises() -> None:
    """torch infers [2, ...] for conv2d.padding on [s, ...] unless it remembers better: nothing to compare."""
    model = nn.Sequential(frozen(nn.BatchNorm2d(4), **NO_SHIFT), nn.Conv2d(4, 6, 2, padding="same")).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(image(2)),), "export")
    unknown = any("the sizes might change" in reason for reason in reasons(compiled, BEFORE))
    assert unknown is not (fired(compiled) == [BEFORE])


@both
def test_folds_in_front_of_a_layer_that_is_fused_already(front_end: str) -> None:
    """Before the first call the norm waits for its rank, and the layer takes its activation meanwhile."""
    passes = ("fold-batchnorm", "fuse-linear-activation", "fuse-conv-activation")
    for layer, shape in ((nn.Linear(4, 6), (3, 4)), (nn.Conv1d(4, 6, 3), image(1))):
        model = randomised(nn.Sequential(nn.BatchNorm1d(4), layer, nn.ReLU()))
        compiled = compiled_by(passes, model, (torch.randn(shape),), front_end)
        assert sorted(fired(compiled)) == ["activation", BEFORE]
        assert sum(operations(compiled.fused_graph).values()) == 1


@both
def test_folds_on_both_sides_of_one_layer(front_end: str) -> None:
    model = randomised(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    compiled = compiled_by(PASSES, model, (torch.randn(image(2)),), front_end)
    assert sorted(fired(compiled)) == [AFTER, BEFORE]


# -- across a ReLU, and norm after norm ------------------------------------------------------------------------------

CROSSING: list[Case] = [
    ("a padded conv2d", sequence(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1)), image(2)),
    ("a conv1d", sequence(nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 6, 3)), image(1)),
    ("a grouped conv3d", sequence(nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 6, 3, groups=2)), image(3)),
    ("a transposed conv", sequence(nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3, stride=2)), image(2)),
    ("a linear layer", sequence(nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 6)), (3, 4)),
    ("a linear layer of rank 3, one channel", sequence(nn.BatchNorm1d(1), nn.ReLU(), nn.Linear(4, 6)), (3, 1, 4)),
]


@both
@table(CROSSING)
def test_the_scale_crosses_a_relu(model: Callable[[], nn.Module], shape: tuple[int, ...], front_end: str) -> None:
    compiled = compiled_by(PASSES, randomised(model(), positive=True), (torch.randn(shape),), front_end)
    assert fired(compiled) == [CROSS]
    left = operations(compiled.fused_graph)
    assert (left["batch_norm"], left["add"], left["relu"]) == (0, 1, 1)


@both
def test_crossing_leaves_nothing_in_front_where_there_is_no_shift(front_end: str) -> None:
    norm = frozen(nn.BatchNorm2d(4), running_var=3.0)
    model = nn.Sequential(norm, nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1)).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(image(2)),), front_end)
    assert operations(compiled.fused_graph) == {"relu": 1, "conv2d": 1}


@both
@pytest.mark.parametrize("first", [True, False], ids="first affine={}".format)
@pytest.mark.parametrize("second", [True, False], ids="second affine={}".format)
def test_a_norm_behind_a_norm_is_one_norm(first: bool, second: bool, front_end: str) -> None:
    norms = nn.BatchNorm2d(4, affine=first), nn.BatchNorm2d(4, affine=second, eps=0.1)
    compiled = compiled_by(PASSES, randomised(nn.Sequential(*norms)), (torch.randn(image(2)),), front_end)
    assert fired(compiled) == [CHAIN]
    assert operations(compiled.fused_graph) == {"batch_norm": 1}


# -- weights that are shared -----------------------------------------------------------------------------------------


def tied() -> nn.Module:
    first, second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    second.weight = first.weight
    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(4))


class _Twice(nn.Module):
    """One conv, called twice, with one norm or a norm each."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(norms))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norms[-1](self.conv(F.relu(self.norms[0](self.conv(x)))))


SHARED: list[tuple[str, Callable[[], nn.Module]]] = [
    ("a conv and its norm called twice [pytorch#104593]", lambda: _Twice(1)),
    ("a conv called twice, with a norm each [pytorch#197539]", lambda: _Twice(2)),
    ("two convs with tied weights [pytorch#124808]", tied),
    (
        "a weight that is also an operand elsewhere",
        between(lambda m, x: m.norm(m.conv(x)) * m.conv.weight.sum()),
    ),
]


@both
@pytest.mark.parametrize("model", [pytest.param(row[1], id=row[0]) for row in SHARED])
def test_shared_weights_are_folded_into_new_tensors(model: Callable[[], nn.Module], front_end: str) -> None:
    network = randomised(model())
    compiled = compiled_by(PASSES, network, (torch.randn(image(2)),), front_end)
    assert set(fired(compiled)) == {AFTER}
    assert operations(compiled.fused_graph)["batch_norm"] == 0
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(compiled(x), network(x))


@both
def test_a_conv_without_its_norm_at_one_of_two_calls_keeps_its_weight(front_end: str) -> None:
    network = randomised(between(lambda m, x: m.norm(m.conv(x)) + m.conv(x))())
    compiled = compiled_by(PASSES, network, (torch.randn(image(2)),), front_end)
    assert fired(compiled) == [AFTER]
    assert torch.equal(compiled.state_dict()["conv.weight"], network.conv.weight)
