"""fold-batchnorm: what numbers it declines: not finite, out of range, not plain, or not known yet."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxopt
from fxopt import plugins
from fxopt.pipeline import PassManager
from graphs import Network, assert_declined, compiled_by, fired, randomised, reasons
from norms import AFTER, BEFORE, CHAIN, CROSS, both, filled, frozen, holding, image, pair, table

PASSES = ("fold-batchnorm",)
NAN, INF = math.nan, math.inf

VALUES: list[tuple[str, Callable[[], nn.Module], tuple[int, ...], str, str]] = [
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
        "the weight of a conv behind a norm holds nan",
        holding(1, "weight", NAN, nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)),
        image(2),
        BEFORE,
        "the weight holds NaN",
    ),
    (
        "the weight of a conv behind a norm and a ReLU holds nan",
        holding(2, "weight", NAN, nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Conv2d(4, 6, 3)),
        image(2),
        CROSS,
        "the weight holds NaN",
    ),
    (
        "a weight that would overflow behind a norm and a ReLU",
        lambda: nn.Sequential(
            frozen(nn.BatchNorm2d(4), weight=1e20), nn.ReLU(), filled(nn.Conv2d(4, 6, 3), 1e20)
        ),
        image(2),
        CROSS,
        "the folded weight or bias would leave the range",
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
]


@both
@table(VALUES)
def test_declines_values(
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


def test_declines_an_eps_that_is_computed() -> None:
    model = Network(
        lambda m, x: F.batch_norm(m.conv(x), m.mean, m.variance, eps=x.shape[0] * 1e-3),
        conv=nn.Conv2d(4, 6, 3),
        mean=torch.zeros(6),
        variance=torch.ones(6),
    ).eval()
    assert_declined(fxopt.compile(model, passes=PASSES, strict=True), AFTER, "the norm's eps is computed at run time")


def test_declines_a_chain_without_channels() -> None:
    model = nn.Sequential(nn.BatchNorm2d(0), nn.BatchNorm2d(0)).eval()
    assert_declined(fxopt.compile(model, passes=PASSES, strict=True), CHAIN, "the norm has no channels")


def test_declines_what_is_on_the_meta_device() -> None:
    """`fxopt.compile` refuses such a model before; a graph may still hold one."""
    module = fxopt.trace(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval().to("meta"))
    run = PassManager((plugins.named("fold-batchnorm"),), strict=True).run(module)
    found = [decline.reason for decline in run.journal.declines.values() if decline.rule == AFTER]
    assert found == ["the norm's running_mean is on the meta device and has no values"]
