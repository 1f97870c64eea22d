"""fold-batchnorm, by the rules of its page: what folds, what declines and why. Brackets name peers' bug reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import fxopt
from graphs import (
    FRONT_ENDS,
    Network,
    assert_declined,
    compiled_by,
    fired,
    operations,
    randomised,
    reasons,
)

PASSES = ("fold-batchnorm",)
AFTER, BEFORE, CHAIN, CROSS = "norm-after-layer", "norm-before-layer", "norm-after-norm", "norm-and-relu-before-layer"
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
both = pytest.mark.parametrize("front_end", FRONT_ENDS)
Case = tuple[str, Callable[[], nn.Module], tuple[int, ...]]


def table(cases: list[Any]) -> pytest.MarkDecorator:
    """Parametrises by rows whose first entry is the id."""
    names = ("model", "shape", "rule", "reason")[: len(cases[0]) - 1]
    return pytest.mark.parametrize(names, [pytest.param(*row[1:], id=row[0]) for row in cases])


def sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def image(rank: int, channels: int = 4, size: int = 6) -> tuple[int, ...]:
    return (2, channels, *[size] * rank)


def functional(norm: Callable[..., Any], layer: nn.Module, channels: int = 4) -> Callable[[], nn.Module]:
    """A layer and a functional norm with statistics of its own."""
    return lambda: Network(
        norm,
        layer=layer,
        mean=torch.randn(channels),
        variance=torch.rand(channels) + 0.5,
        gain=torch.randn(channels),
        shift=torch.randn(channels),
    )


def f_batch_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(m.layer(x), m.mean, m.variance, m.gain, m.shift)


def torch_batch_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.batch_norm(m.layer(x), m.gain, m.shift, m.mean, m.variance, False, 0.1, 1e-5, True)


def stateless_batch_norm(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten._native_batch_norm_legit_no_training(
        m.layer(x), m.gain, m.shift, m.mean, m.variance, 0.1, 1e-5
    )[0]


def frozen(norm: Any, **statistics: float) -> Any:
    """A norm of given statistics: weight, bias, running_mean, running_var, each one number for all channels."""
    with torch.no_grad():
        for name, value in statistics.items():
            getattr(norm, name).fill_(value)
    return norm


def filled(conv: Any, weight: float) -> Any:
    """A conv whose weights are one number."""
    with torch.no_grad():
        conv.weight.fill_(weight)
    return conv


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


# -- declines --------------------------------------------------------------------------------------------------------


class _Loud(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).abs()


class _LoudNorm(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * 2)


def hooked(kind: str, index: int, hook: Callable[..., Any]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
        getattr(model[index], f"register_{kind}")(hook)
        return model

    return build


def between(body: Callable[[Any, torch.Tensor], Any], **parts: Any) -> Callable[[], nn.Module]:
    return lambda: Network(body, **({"conv": nn.Conv2d(4, 6, 3), "norm": nn.BatchNorm2d(6)} | parts))


def write_to_result(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    y += 1
    return m.norm(y)


def write_to_alias(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    y.view(-1).mul_(2)
    return m.norm(y)


def write_to_input(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    x.mul_(2)
    return m.norm(y)


def write_to_weight(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(F.conv2d(x, m.weight))
    m.weight.mul_(2)
    return y


def statistics(m: Any, x: torch.Tensor, training: bool = False) -> torch.Tensor:
    return F.batch_norm(m.layer(x), m.mean, m.variance, m.gain, m.shift, training=training)


def batch_statistics(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(m.layer(x), None, None, m.gain, m.shift, training=True)


def holding(index: int, name: str, value: float, *layers: nn.Module) -> Callable[[], nn.Module]:
    """A sequence, one entry of one tensor of which is `value` (after randomising)."""

    def build() -> nn.Module:
        model = randomised(nn.Sequential(*layers))
        tensor = getattr(model[index], name)
        with torch.no_grad():
            tensor.view(-1)[-1] = value
        return model

    return build


def pair(**options: Any) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(4, 6, 3, **options), nn.BatchNorm2d(6)


NAN, INF = math.nan, math.inf
READ = "is also read by"
DECLINES: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], str, str]] = [
    (
        "training mode",
        functional(lambda m, x: statistics(m, x, True), nn.Conv2d(3, 4, 3)),
        image(2, 3),
        AFTER,
        "writes, draws at random, or is not known",
    ),
    (
        "training mode without statistics",
        functional(batch_statistics, nn.Conv2d(3, 4, 3)),
        image(2, 3),
        AFTER,
        "training mode",
    ),
    (
        "track_running_stats=False [pytorch#93837]",
        sequence(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)),
        image(2),
        AFTER,
        "training mode",
    ),
    (
        "track_running_stats=False in front [pytorch#93837]",
        sequence(nn.BatchNorm2d(4, track_running_stats=False), nn.Conv2d(4, 6, 3)),
        image(2),
        BEFORE,
        "training mode",
    ),
    (
        "track_running_stats=False across a ReLU",
        sequence(nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Conv2d(4, 6, 3)),
        image(2),
        CROSS,
        "training mode",
    ),
    (
        "a chain whose first norm is by the batch",
        sequence(nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4)),
        image(2),
        CHAIN,
        "training mode",
    ),
    (
        "a chain whose second norm is by the batch",
        sequence(nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)),
        image(2),
        CHAIN,
        "training mode",
    ),
    # readers
    ("the conv's result is read twice", between(lambda m, x: (y := m.conv(x)) + m.norm(y)), image(2), AFTER, READ),
    (
        "the conv's result is a result of the model",
        between(lambda m, x: (m.norm(y := m.conv(x)), y)),
        image(2),
        AFTER,
        "is a result of the model",
    ),
    (
        "the norm in front is read twice",
        between(lambda m, x: m.conv(y := m.norm(x)).sum() + y, norm=nn.BatchNorm2d(4)),
        image(2),
        BEFORE,
        READ,
    ),
    (
        "the norm in front is a result of the model",
        between(lambda m, x: (m.conv(y := m.norm(x)), y), norm=nn.BatchNorm2d(4)),
        image(2),
        BEFORE,
        "is a result of the model",
    ),
    (
        "the ReLU in between is read twice",
        between(lambda m, x: m.conv(y := F.relu(m.norm(x))).sum() + y, norm=frozen(nn.BatchNorm2d(4))),
        image(2),
        CROSS,
        READ,
    ),
    (
        "the first norm of a chain is read twice",
        between(lambda m, x: (y := m.norm(x)) + m.second(y), norm=nn.BatchNorm2d(4), second=nn.BatchNorm2d(4)),
        image(2),
        CHAIN,
        READ,
    ),
    # writes
    ("a write to the conv's result", between(write_to_result), image(2), AFTER, "is add, not conv"),
    ("a write to an alias of the conv's result", between(write_to_alias), image(2), AFTER, "is also read by|may write"),
    ("a write to the conv's input in between", between(write_to_input), image(2), AFTER, "mul_ may write to a value"),
    (
        "a write to the conv's weight, behind",
        between(write_to_weight, weight=torch.randn(6, 4, 3, 3)),
        image(2),
        AFTER,
        "mul_ may write to weight",
    ),
    # modules that are not what they seem
    ("a hook on the conv", hooked("forward_hook", 0, lambda m, a, y: y * 9999), image(2), AFTER, "is mul, not conv"),
    (
        "a pre-hook on the norm [pytorch#105445]",
        hooked("forward_pre_hook", 1, lambda m, a: (a[0].abs(),)),
        image(2),
        AFTER,
        "abs.* is abs, not conv",
    ),
    ("an overridden forward of the conv", sequence(_Loud(4, 6, 3), nn.BatchNorm2d(6)), image(2), AFTER, "is abs, not"),
    ("an overridden forward of the norm", sequence(nn.Conv2d(4, 6, 3), _LoudNorm(6)), image(2), AFTER, "is mul, not"),
    (
        "spectral norm",
        lambda: nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
        image(2),
        AFTER,
        "the weight is .*, computed at run time",
    ),
    (
        "weight norm",
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)),
        image(2),
        AFTER,
        "the weight is .*, computed at run time",
    ),
    (
        "a norm whose statistics are computed",
        functional(lambda m, x: F.batch_norm(m.layer(x), m.mean + 1, m.variance), nn.Conv2d(3, 4, 3)),
        image(2, 3),
        AFTER,
        "the norm's running mean is .*, computed at run time",
    ),
    (
        "a conv whose bias is computed",
        functional(
            lambda m, x: F.batch_norm(F.conv2d(x, m.layer.weight, m.shift + 1), m.mean, m.variance), nn.Conv2d(3, 4, 3)
        ),
        image(2, 3),
        AFTER,
        "the bias is .*, computed at run time",
    ),
    # channels
    (
        "a linear layer of rank 3 [pytorch/ao#4116]",
        sequence(nn.Linear(4, 6), nn.BatchNorm1d(6)),
        (2, 6, 4),
        AFTER,
        "3 dimensions: the norm runs along dim 1, the features are last",
    ),
    (
        "a linear layer of rank 3 behind a norm [pytorch/ao#4116]",
        sequence(nn.BatchNorm1d(4), nn.Linear(4, 6)),
        (2, 4, 4),
        BEFORE,
        "3 dimensions: the norm runs along dim 1, the features are last",
    ),
    (
        "a linear layer of rank 3 behind a norm and a ReLU",
        sequence(frozen(nn.BatchNorm1d(4)), nn.ReLU(), nn.Linear(4, 6)),
        (2, 4, 4),
        CROSS,
        "the features are last",
    ),
    (
        "an unbatched conv1d, whose length is the norm's channels",
        sequence(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)),
        (4, 8),
        AFTER,
        "unbatched",
    ),
    (
        "an unbatched conv2d, whose height is the norm's channels",
        functional(f_batch_norm, nn.Conv2d(3, 4, 3)),
        (3, 6, 8),
        AFTER,
        "unbatched",
    ),
    (
        "a norm in front of an unbatched conv2d",
        functional(lambda m, x: m.layer(F.batch_norm(x, m.mean, m.variance)), nn.Conv2d(4, 3, 3)),
        (4, 4, 6),
        BEFORE,
        "unbatched",
    ),
    # values
    *(
        (f"the conv's {name} holds {value}", holding(0, name, value, *pair()), image(2), AFTER, f"the {name} holds NaN")
        for name, value in (("weight", NAN), ("weight", INF), ("bias", NAN), ("bias", -INF))
    ),
    *(
        (
            f"the norm's {name} holds {value}",
            holding(1, name, value, *pair()),
            image(2),
            AFTER,
            f"the norm's {name} holds NaN or",
        )
        for name, value in (("weight", INF), ("bias", NAN), ("running_mean", INF), ("running_var", NAN))
    ),
    (
        "a variance that makes the scale infinite",
        holding(1, "running_var", 0.0, nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.0)),
        image(2),
        AFTER,
        "not finite",
    ),
    ("a negative variance", holding(1, "running_var", -1.0, *pair()), image(2), AFTER, "not finite"),
    (
        "an infinite scale in front",
        holding(0, "running_var", 0.0, nn.BatchNorm2d(4, eps=0.0), nn.Conv2d(4, 6, 3)),
        image(2),
        BEFORE,
        "not finite",
    ),
    (
        "an infinite scale in a chain",
        holding(0, "running_var", 0.0, nn.BatchNorm2d(4, eps=0.0), nn.BatchNorm2d(4)),
        image(2),
        CHAIN,
        "leave the range|not finite",
    ),
    (
        "a weight that would overflow",
        lambda: nn.Sequential(filled(nn.Conv2d(4, 6, 3), 1e20), frozen(nn.BatchNorm2d(6), weight=1e20)),
        image(2),
        AFTER,
        "leave the range",
    ),
    (
        "a bias that would overflow",
        lambda: nn.Sequential(holding(0, "bias", 1e20, *pair())()[0], frozen(nn.BatchNorm2d(6), weight=1e20)),
        image(2),
        AFTER,
        "leave the range",
    ),
    (
        "a bias in front that would overflow",
        lambda: nn.Sequential(frozen(nn.BatchNorm2d(4), bias=1e38), filled(nn.Conv2d(4, 6, 3), 1.0)),
        image(2),
        BEFORE,
        "leave the range",
    ),
    (
        "weights that would all vanish",
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), frozen(nn.BatchNorm2d(6), weight=1e-38, bias=1.0)),
        image(2),
        AFTER,
        "vanish among the subnormal",
    ),
    (
        "a chain whose scale would overflow",
        lambda: nn.Sequential(frozen(nn.BatchNorm2d(4), weight=1e20), frozen(nn.BatchNorm2d(4), weight=1e20)),
        image(2),
        CHAIN,
        "leave the range",
    ),
    # in front of a layer
    (
        "a shift in front of zero padding",
        holding(0, "bias", 1.0, nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)),
        image(2),
        BEFORE,
        "pads with zeros",
    ),
    (
        "a shift in front of uneven padding=same",
        holding(0, "bias", 1.0, nn.BatchNorm2d(4), nn.Conv2d(4, 6, 2, padding="same")),
        image(2),
        BEFORE,
        "pads with zeros",
    ),
    (
        "a shift in front of a transposed conv, even without padding",
        holding(0, "bias", 1.0, nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3)),
        image(2),
        BEFORE,
        "taps vary by position",
    ),
    (
        "a reflected border stands between the norm and the conv",
        sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
        image(2),
        BEFORE,
        "pad is pad, not batch_norm",
    ),
    # across a ReLU
    (
        "a negative scale does not cross a ReLU",
        holding(0, "weight", -1.0, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3)),
        image(2),
        CROSS,
        "only positive ones cross",
    ),
    (
        "a scale of zero does not cross a ReLU",
        holding(0, "weight", 0.0, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3)),
        image(2),
        CROSS,
        "only positive ones cross",
    ),
    (
        "a shift that is too large for what stays in front of the ReLU",
        lambda: nn.Sequential(
            frozen(nn.BatchNorm2d(4), weight=1e-30, bias=1e10), nn.ReLU(), filled(nn.Conv2d(4, 6, 3), 1.0)
        ),
        image(2),
        CROSS,
        "stays in front of the ReLU would leave the range",
    ),
    (
        "nothing but a ReLU is crossed",
        sequence(frozen(nn.BatchNorm2d(4)), nn.GELU(), nn.Conv2d(4, 6, 3)),
        image(2),
        CROSS,
        "is gelu, not relu",
    ),
]


@both
@table(DECLINES)
@pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice")
def test_declines(
    model: Callable[[], nn.Module], shape: tuple[int, ...], rule: str, reason: str, front_end: str
) -> None:
    network = model().eval()
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values())
    torch.manual_seed(1)
    compiled = compiled_by(PASSES, network, (torch.randn(shape),), front_end, verify=finite)
    assert_declined(compiled, rule, reason)


def test_float16_declines_where_one_channel_would_vanish_and_float32_does_not() -> None:
    """float16 ends at 6e-5, where trained norms have channels; dead channels of 1e-40 in float32 matter nowhere."""
    for dtype, tiny in ((torch.float16, 1e-4), (torch.float32, 1e-39)):
        model = nn.Sequential(filled(nn.Conv2d(3, 4, 1), 0.125), frozen(nn.BatchNorm2d(4), bias=0.5)).to(dtype).eval()
        with torch.no_grad():
            model[1].weight[1] = tiny
        compiled = compiled_by(PASSES, model, (torch.randn(image(2, 3)).to(dtype),), "symbolic")
        if dtype is torch.float16:
            assert_declined(compiled, AFTER, "vanish among the subnormal numbers of torch.float16")
        else:
            assert fired(compiled) == [AFTER]


# -- constants that no model runs with, asked before the first call --------------------------------------------------


def conv_and_norm(weight: torch.Tensor, bias: torch.Tensor | None = None, **statistics: Any) -> nn.Module:
    """conv2d or linear (by the weight) and batch norm, functional, with constants of any kind."""
    size = weight.shape[0]
    held = {"mean": torch.zeros(size), "variance": torch.ones(size), "gain": None, "shift": None, "eps": 1e-5}
    held |= statistics
    eps = held.pop("eps")

    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, m.weight, m.bias) if weight.dim() == 4 else F.linear(x, m.weight, m.bias)
        return F.batch_norm(y, m.mean, m.variance, m.gain, m.shift, eps=eps)

    return Network(body, weight=weight, bias=bias, **held).eval()


class _Subclass(torch.Tensor):
    """A tensor that computes in its own way, as quantised weights do."""


CONSTANTS: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("an integer weight", lambda: conv_and_norm(torch.ones(4, 3, 1, 1, dtype=torch.int8)), "weight is torch.int8, not"),
    (
        "a quantised weight",
        lambda: conv_and_norm(torch.quantize_per_tensor(torch.ones(4, 3, 1, 1), 0.1, 0, torch.qint8)),
        "weight is torch.qint8, not floating point",
    ),
    (
        "a complex weight",
        lambda: conv_and_norm(torch.ones(4, 3, 1, 1, dtype=torch.complex64)),
        "weight is torch.complex64, not floating point",
    ),
    ("a sparse weight", lambda: conv_and_norm(torch.ones(4, 3).to_sparse()), "layout torch.sparse_coo, not a plain"),
    (
        "a weight of a tensor subclass",
        lambda: conv_and_norm(torch.ones(4, 3, 1, 1).as_subclass(_Subclass)),
        "weight is a _Subclass",
    ),
    (
        "an integer bias",
        lambda: conv_and_norm(torch.ones(4, 3, 1, 1), torch.ones(4, dtype=torch.int64)),
        "bias is torch.int64, not floating point",
    ),
    (
        "a bias of another shape",
        lambda: conv_and_norm(torch.ones(4, 3), torch.ones(1)),
        r"bias has the shape \(1,\), not one number per channel",
    ),
    ("a linear weight of one dimension", lambda: conv_and_norm(torch.ones(3)), "weight has 1 dimensions, not 2"),
    ("a weight without channels", lambda: conv_and_norm(torch.ones(0, 3, 1, 1)), "the layer has no channels"),
    (
        "integer statistics",
        lambda: conv_and_norm(torch.ones(4, 3, 1, 1), mean=torch.zeros(4, dtype=torch.int64)),
        "the norm's running_mean is torch.int64",
    ),
    (
        "a statistic of another shape",
        lambda: conv_and_norm(torch.ones(4, 3, 1, 1), variance=torch.ones(1, 4, 1, 1)),
        r"the norm's running_var has the shape \(1, 4, 1, 1\)",
    ),
    (
        "a gain of another length",
        lambda: conv_and_norm(torch.ones(4, 3, 1, 1), gain=torch.ones(3)),
        r"the norm's weight has the shape \(3,\)",
    ),
    (
        "no statistics in inference mode",
        lambda: conv_and_norm(torch.ones(4, 3, 1, 1), mean=None, variance=None),
        "the norm has no running statistics",
    ),
]


@pytest.mark.parametrize(("model", "reason"), [pytest.param(*row[1:], id=row[0]) for row in CONSTANTS])
@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
def test_declines_constants_that_are_not_plain(model: Callable[[], nn.Module], reason: str) -> None:
    assert_declined(fxopt.compile(model(), passes=PASSES, strict=True), AFTER, reason)


def test_declines_a_norm_of_other_channels_than_the_layer() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(5)).eval()
    assert_declined(fxopt.compile(model, passes=PASSES, strict=True), AFTER, "the norm has 5 channels, conv2d 6")


def test_declines_a_chain_of_other_channels() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(5)).eval()
    assert_declined(fxopt.compile(model, passes=PASSES, strict=True), CHAIN, "the norms have 4 and 5 channels")


@both
def test_declines_a_chain_of_two_dtypes(front_end: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4).bfloat16()).eval()
    compiled = compiled_by(PASSES, model, (torch.randn(image(2)).bfloat16(),), front_end)
    assert_declined(compiled, CHAIN, "the norms hold torch.float32 and torch.bfloat16")


def test_declines_without_a_rank_until_the_first_call() -> None:
    compiled = fxopt.compile(randomised(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))), passes=PASSES, strict=True)
    assert [decline.rule for decline in compiled.report.pending] == [AFTER]
    compiled(torch.randn(3, 4))
    assert fired(compiled) == [AFTER]
    assert not compiled.report.pending


def test_a_two_dimensional_norm_proves_its_rank_before_the_first_call() -> None:
    compiled = fxopt.compile(randomised(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))), passes=PASSES)
    assert fired(compiled) == [AFTER]


def test_crossing_waits_for_the_dtype_of_its_input() -> None:
    model = frozen(nn.BatchNorm2d(4), bias=1.0)
    compiled = fxopt.compile(nn.Sequential(model, nn.ReLU(), nn.Conv2d(4, 6, 3)).eval(), passes=PASSES, strict=True)
    assert "the dtype of input_1" in reasons(compiled, CROSS)[0]
    compiled(torch.randn(image(2)))
    assert fired(compiled) == [CROSS]


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
