"""The promise on a real network: ResNet-50 with random statistics, through both front ends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fxopt
from fxopt import ir
from fxopt.compare import relative_error
from zoo import import_torchvision


class Calls(TorchDispatchMode):
    """Counts every operator that reaches a kernel, so that no composite hides any."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    import_torchvision()
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.resnet50(weights=None).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    return network


@pytest.mark.parametrize("front_end", ["symbolic", "export"])
def test_resnet50_is_fifty_odd_fused_nodes_and_as_many_operator_calls(
    model: torch.nn.Module, front_end: str
) -> None:
    x = torch.randn(1, 3, 224, 224)
    fast = fxopt.compile(model, (x,)) if front_end == "export" else fxopt.compile(model)
    with torch.no_grad():
        expected, actual = model(x), fast(x)
        with Calls() as calls:
            fast(x)
    assert relative_error(expected, actual) < 2e-6
    assert fast.report.verdict is not None
    assert fast.report.verdict.ok
    assert fast.report.front_end == front_end

    names = Counter(ir.target_name(node) for node in fast.fused_graph.graph.nodes if ir.is_compute(node))
    assert fast.report.before == 175
    assert names["batch_norm"] == names["relu"] == names["relu_"] == names["add"] == 0
    assert names["fxopt.convolution"] == 49
    assert names["conv2d"] == 4  # the four shortcuts, which have no activation of their own
    assert names.total() < 60

    # The pointwise layers on maps of 7x7 are MKL's products, with views around them and their sums and ReLUs in place.
    fused, products = calls.counts["mkldnn::_convolution_pointwise"], calls.counts["mkl::_mkl_linear"]
    views = sum(calls.counts[name] for name in ("aten::permute", "aten::view", "aten::t"))
    assert fused + products == 53
    assert products in (0, 5)
    assert calls.counts.total() - views - products < 60


def test_the_portable_graph_is_plain_aten_and_gives_the_same(model: torch.nn.Module) -> None:
    x = torch.randn(1, 3, 64, 64)
    fast = fxopt.compile(model, (x,))
    plain = fast.graph_module
    assert all(
        node.target.namespace == "aten" for node in plain.graph.nodes if node.op == "call_function"
    )
    with torch.no_grad():
        assert relative_error(model(x), plain(x)) < 2e-6
