"""fold-batchnorm: where it declines, and why. Brackets name peers' bug reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from graphs import assert_declined, compiled_by
from norms import (
    AFTER,
    BEFORE,
    CHAIN,
    CROSS,
    between,
    both,
    f_batch_norm,
    filled,
    frozen,
    functional,
    holding,
    image,
    sequence,
    table,
)

PASSES = ("fold-batchnorm",)


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
def test_declines(
    model: Callable[[], nn.Module], shape: tuple[int, ...], rule: str, reason: str, front_end: str
) -> None:
    network = model().eval()
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in network.state_dict().values())
    torch.manual_seed(1)
    compiled = compiled_by(PASSES, network, (torch.randn(shape),), front_end, verify=finite)
    assert_declined(compiled, rule, reason)
