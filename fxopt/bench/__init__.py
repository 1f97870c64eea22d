"""Benchmarks: a model in fxopt, in eager PyTorch and in other runtimes, measured so that the figures compare."""

from fxopt.bench.measure import benchmark
from fxopt.bench.result import Benchmark, Mean, Ratio, Timing, means
from fxopt.bench.runtimes import RUNTIMES, Built, Fxopt, OnnxRuntime, Prepare
from fxopt.bench.system import Memory

__all__ = [
    "RUNTIMES",
    "Benchmark",
    "Built",
    "Fxopt",
    "Mean",
    "Memory",
    "OnnxRuntime",
    "Prepare",
    "Ratio",
    "Timing",
    "benchmark",
    "means",
]
