"""The benchmark graphs of TASO and Tensat, small: the same results, of fewer operations."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt import cost
from taso import BENCHMARKS

#: At least so many operations go, at any size: each convolution's ReLU, each sum that a layer takes as its residual.
GONE = {
    "ResNeXt-50 cell": 12,  # three activations and a sum in each of three blocks
    "NasNet-A cell": 4,  # the activations behind the 1x1 convolutions
    "NasRNN cell": 40,  # each of eight sums, in each of five steps
    "Inception-v3": 94,
    "SqueezeNet": 26,
    "VGG-19": 18,
    "BERT": 0,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "Inception-v3" else name for name in BENCHMARKS]
)
def test_a_benchmark_graph_gives_the_same_of_fewer_operations(name: str) -> None:
    benchmark = BENCHMARKS[name]
    model, x = benchmark.build_small().eval(), torch.randn(benchmark.small_shape)
    fast = fxopt.compile(model, (x,), strict=True)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fast(x), expected)
    report = fast.report
    assert report.verdict is not None
    assert report.verdict.ok
    assert report.before - report.after >= GONE[name]
    assert report.work_after.seconds <= report.work_before.seconds


@pytest.mark.parametrize(
    ("name", "gflops"), [("Inception-v3", 11.4), ("SqueezeNet", 0.70), ("VGG-19", 39.3)], ids=lambda value: str(value)
)
def test_a_benchmark_graph_has_the_size_of_the_network(name: str, gflops: float) -> None:
    """Twice the multiply-adds that torchvision publishes for the networks of these names."""
    benchmark = BENCHMARKS[name]
    with torch.device("meta"):
        model, x = benchmark.build().eval(), torch.empty(benchmark.shape)
    work = cost.of_module(fxopt.trace(model, (x,))).work
    assert work.flops == pytest.approx(1e9 * gflops, rel=0.02)
