"""The models of docs/benchmarks.md, with their inputs; `fxopt bench docs/benchmark_models.py:resnet18` runs one.

Fifteen networks of torchvision on an image, and BERT on 128 tokens with their mask. All have random weights; batch
norms have random statistics, because fresh ones (mean 0, variance 1) would leave a fold nothing to do.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from fxopt.models import randomize_fresh_norms
from zoo import import_torchvision, import_transformers

Example = tuple[torch.nn.Module, tuple[torch.Tensor, ...], dict[str, torch.Tensor]]


def _torchvision(name: str, size: int = 224, **options: Any) -> Example:
    """A model of torchvision in eval mode, and float32[1, 3, size, size]."""
    torch.manual_seed(0)
    model = import_torchvision().models.get_model(name, weights=None, **options).eval()
    randomize_fresh_norms(model)
    if name == "vit_b_16":  # a fresh head is zero, and so would every answer be
        torch.nn.init.normal_(model.heads.head.weight, std=0.02)
    return model, (torch.randn(1, 3, size, size),), {}


resnet18 = partial(_torchvision, "resnet18")
resnet50 = partial(_torchvision, "resnet50")
vgg16 = partial(_torchvision, "vgg16")
googlenet = partial(_torchvision, "googlenet", init_weights=False, aux_logits=False)
inception_v3 = partial(_torchvision, "inception_v3", 299, init_weights=False, aux_logits=False)
densenet121 = partial(_torchvision, "densenet121")
squeezenet1_1 = partial(_torchvision, "squeezenet1_1")
mobilenet_v2 = partial(_torchvision, "mobilenet_v2")
mobilenet_v3_large = partial(_torchvision, "mobilenet_v3_large")
efficientnet_b0 = partial(_torchvision, "efficientnet_b0")
shufflenet_v2_x1_0 = partial(_torchvision, "shufflenet_v2_x1_0")
regnet_y_400mf = partial(_torchvision, "regnet_y_400mf")
convnext_tiny = partial(_torchvision, "convnext_tiny")
vit_b_16 = partial(_torchvision, "vit_b_16")
swin_t = partial(_torchvision, "swin_t")


def bert_base() -> Example:
    """BERT-base as transformers has it, int64[1, 128] of token numbers, and a mask of ones."""
    torch.manual_seed(0)
    transformers = import_transformers()
    config = transformers.BertConfig()
    tokens = torch.randint(0, config.vocab_size, (1, 128))
    model = transformers.BertModel(config).eval()
    return model, (tokens,), {"attention_mask": torch.ones_like(tokens)}


NAMES = (
    "resnet18", "resnet50", "vgg16", "googlenet", "inception_v3", "densenet121", "squeezenet1_1", "mobilenet_v2",
    "mobilenet_v3_large", "efficientnet_b0", "shufflenet_v2_x1_0", "regnet_y_400mf", "convnext_tiny", "vit_b_16",
    "swin_t", "bert_base",
)  # fmt: skip
