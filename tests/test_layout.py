"""Layout over whole networks: the image is converted once, and nothing else is but parts of other values."""

from __future__ import annotations

import operator

import benchmark_models
import pytest
import torch

import fxopt
from fxopt import ir

aten = torch.ops.aten
#: What gives a part of a value, which lies in memory with gaps. What reads it in channels-last order copies it.
PARTS = (operator.getitem, aten.slice.Tensor, aten.select.int)


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["resnet18", "googlenet", "squeezenet1_1", "mobilenet_v3_large", "convnext_tiny"])
def test_only_the_image_is_converted(name: str) -> None:
    model, _, _ = getattr(benchmark_models, name)()
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        fast = fxopt.compile(model, (x,), verify=False)
    (lowered,) = fast._session.programs[0].lowered.values()
    copied = [
        node for node in lowered.module.graph.nodes if node.target in (aten.contiguous.default, aten.clone.default)
    ]
    whole = [node.args[0] for node in copied if node.args[0].target not in PARTS]
    assert lowered.backend == "onednn"
    assert [node.op for node in whole] == ["placeholder"], [ir.describe_value(node.meta["val"]) for node in whole]
