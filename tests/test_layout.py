"""Layout over whole networks: the image is converted once, and nothing else is but parts of other values."""

from __future__ import annotations

import operator
from typing import Any

import benchmark_models
import pytest
import torch
from torch import fx

import fxopt
from zoo import import_timm

aten = torch.ops.aten
#: What gives a part of a value, which lies in memory with gaps. What reads it in channels-last order copies it.
PARTS = (operator.getitem, aten.slice.Tensor, aten.select.int)


def copied(model: torch.nn.Module, size: int) -> list[fx.Node]:
    """What a lowered model copies into another layout, one image of so many pixels given; parts are left out."""
    with torch.no_grad():
        fast = fxopt.compile(model, (torch.randn(1, 3, size, size),), verify=False)
    (lowered,) = fast._session.programs[0].lowered.values()
    assert lowered.backend == "onednn"
    copies = (aten.contiguous.default, aten.clone.default)
    sources = [node.args[0] for node in lowered.module.graph.nodes if node.target in copies]
    return [source for source in sources if source.target not in PARTS]


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["resnet18", "googlenet", "squeezenet1_1", "mobilenet_v3_large", "convnext_tiny"])
def test_only_the_image_is_converted(name: str) -> None:
    model, _, _ = getattr(benchmark_models, name)()
    assert [node.op for node in copied(model, 96)] == ["placeholder"]


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("mixnet_s", set()),
        ("inception_next_atto", set()),
        ("coatnet_pico_rw_224", {aten.transpose.int, aten.reshape.default}),
    ],
)
def test_nothing_that_is_converted_could_have_been_earlier(name: str, beside: set[Any]) -> None:
    torch.manual_seed(0)
    model = import_timm().create_model(name, pretrained=False).eval()
    image, *others = copied(model, model.default_cfg["input_size"][-1])
    assert image.op == "placeholder"
    assert {node.target for node in others} == beside
