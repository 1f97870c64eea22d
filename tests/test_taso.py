"""The benchmark graphs of TASO and Tensat, small: the same results, of fewer kernels."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt import cost
from taso import BENCHMARKS

#: At least so many kernels go, at any size; views are none.
GONE = {
    "ResNeXt-50 cell": 12,  # three activations and a sum in each of three blocks
    "NasNet-A cell": 20,  # the activations behind the 1x1 convolutions, the concats and what they copied
    "NasRNN cell": 121,  # the sums, and all but one of the products that read one value, in each of five steps
    "Inception-v3": 123,
    "SqueezeNet": 42,  # 26 activations, 8 concats
    "VGG-19": 18,
    "BERT": 12,  # attention is one operator, queries, keys and values are one product
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "Inception-v3" else name for name in BENCHMARKS]
)
def test_a_benchmark_graph_gives_the_same_of_fewer_kernels(name: str) -> None:
    benchmark = BENCHMARKS[name]
    model, x = benchmark.build_small().eval(), torch.randn(benchmark.small_shape)
    fast = fxopt.compile(model, (x,), strict=True)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fast(x), expected)
    report = fast.report
    assert report.verdict is not None
    assert report.verdict.ok
    assert report.work_before.work.launches - report.work_after.work.launches >= GONE[name]
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
