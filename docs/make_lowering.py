"""`make lowering`: the times behind the choices of the oneDNN backend, and their tables in docs/lowering.md.

    python docs/make_lowering.py

Each row's candidates run in turns in one process, forwards and backwards, on two threads: the median of 9 rounds of 10
calls, each with other weights than the last, as in a network. Meanwhile the machine should do nothing else.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import benchmark_models
import torch
import torch.nn.functional as F
from written import fill, table

import fxopt
from fxopt.bench.system import machine
from fxopt.lowering import in_place, onednn_products

PAGE = Path(__file__).resolve().parent / "lowering.md"
BEGIN, END = "<!-- tables: written by make lowering -->", "<!-- end of tables -->"
ROUNDS, CALLS, THREADS = 9, 10, 2

mkldnn, mkl = torch.ops.mkldnn, torch.ops.mkl

#: Rows, features in, features out.
LINEARS = (
    (1, 512, 1000), (2, 2048, 1000), (4, 2048, 1000), (16, 512, 512), (49, 512, 2048), (128, 768, 768),
    (128, 768, 3072), (197, 768, 3072), (512, 768, 768), (1024, 768, 3072), (3136, 96, 384),
)  # fmt: skip
#: Channels in, channels out, height and width, all with a ReLU.
POINTWISE = (
    (58, 58, 28), (116, 116, 14), (64, 256, 13), (144, 32, 28), (384, 96, 14), (96, 576, 14), (64, 128, 56),
    (160, 960, 7), (512, 2048, 7), (256, 1024, 14), (256, 128, 56),
)  # fmt: skip
#: Of docs/benchmark_models.py.
NETWORKS = (
    "resnet50", "googlenet", "densenet121", "squeezenet1_1", "mobilenet_v3_large", "regnet_y_400mf", "bert_base",
)  # fmt: skip
#: What is left out of the lowering, and how.
WITHOUT: dict[str, Any] = {
    "products": [(onednn_products, name, 0) for name in ("READ_ONCE", "FEW", "FEW_PIXELS", "SMALL", "SMALLEST")],
    "overwriting": [(in_place, "WRITTEN", {})],
}


def medians(candidates: list[Callable[[int], Any]]) -> list[float]:
    """Microseconds of a call of each candidate, which is given the number of the call."""
    found: list[list[float]] = [[] for _ in candidates]
    for turn in range(ROUNDS):
        for place in range(len(candidates))[:: -1 if turn % 2 else 1]:
            candidates[place](0)
            start = time.perf_counter()
            for call in range(CALLS):
                candidates[place](call)
            found[place].append((time.perf_counter() - start) / CALLS * 1e6)
    return [statistics.median(times) for times in found]


def linear(rows: int, inputs: int, outputs: int) -> list[float]:
    """ATen's, MKL's and oneDNN's linear layer."""
    x, bias = torch.randn(rows, inputs), torch.randn(outputs)
    weights = [torch.randn(outputs, inputs) for _ in range(CALLS)]
    by_mkl = [mkl._mkl_reorder_linear_weight(weight, rows) for weight in weights]
    by_onednn = [mkldnn._reorder_linear_weight(weight, rows) for weight in weights]
    return medians(
        [
            lambda call: F.linear(x, weights[call], bias),
            lambda call: mkl._mkl_linear(x, by_mkl[call], weights[call], bias, rows),
            lambda call: mkldnn._linear_pointwise(x, by_onednn[call], bias, "none", [], ""),
        ]
    )


def pointwise(inputs: int, outputs: int, size: int) -> list[float]:
    """ATen's and MKL's product with the ReLU behind it, and oneDNN's convolution."""
    x, bias = torch.randn(1, inputs, size, size).to(memory_format=torch.channels_last), torch.randn(outputs)
    rows, geometry = x.permute(0, 2, 3, 1), ([0, 0], [1, 1], [1, 1], 1)
    weights = [torch.randn(outputs, inputs, 1, 1) for _ in range(CALLS)]
    matrices = [weight.flatten(1) for weight in weights]
    by_mkl = [mkl._mkl_reorder_linear_weight(weight, size * size) for weight in matrices]
    by_onednn = [mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape)) for weight in weights]
    return medians(
        [
            lambda call: F.linear(rows, matrices[call], bias).relu_(),
            lambda call: mkl._mkl_linear(rows, by_mkl[call], matrices[call], bias, size * size).relu_(),
            lambda call: mkldnn._convolution_pointwise(x, by_onednn[call], bias, *geometry, "relu", [], ""),
        ]
    )


def network(name: str) -> list[float]:
    """A model with all of the lowering, and without a part of it."""
    model, args, kwargs = getattr(benchmark_models, name)()
    made = [fxopt.compile(model, args, kwargs)]
    for changes in WITHOUT.values():
        patches = [patch.object(*change) for change in changes]
        for current in patches:
            current.start()
        made.append(fxopt.compile(model, args, kwargs))
        for current in patches:
            current.stop()
    return medians([lambda call, fast=fast: fast(*args, **kwargs) for fast in made])  # type: ignore[misc]


def best(times: list[float]) -> list[str]:
    """Times as text, the shortest in bold."""
    return [f"**{number:.0f}**" if number == min(times) else f"{number:.0f}" for number in times]


def tables() -> str:
    """What stands between the markers of the page."""
    found = machine()
    said = f"{found['cores']} cores of {found['processor']} ({found['kernels']} kernels), torch {torch.__version__}"
    linears = [[f"{r} rows, {i} to {o} features", *best(linear(r, i, o))] for r, i, o in LINEARS]
    images = [[f"{i} to {o} channels, {s}x{s} pixels", *best(pointwise(i, o, s))] for i, o, s in POINTWISE]
    ratios = []
    for name in NETWORKS:
        whole, *others = network(name)
        ratios.append([name, *(f"{other / whole:.2f}" for other in others)])
    return "\n\n".join(
        (
            f"By `make lowering`, on {said}, {THREADS} threads. Microseconds of a linear layer:",
            table(("", "ATen", "MKL", "oneDNN"), linears),
            "Of a pointwise convolution with its ReLU:",
            table(("", "ATen", "MKL", "oneDNN's convolution"), images),
            "How many times as long a network takes without products (all by oneDNN), and without overwriting:",
            table(("", *(f"without {name}" for name in WITHOUT)), ratios),
        )
    )


def main() -> None:
    """Measures, and writes the page."""
    torch.set_num_threads(THREADS)
    with torch.no_grad():
        made = tables()
    fill(PAGE, BEGIN, END, made)


if __name__ == "__main__":
    main()
