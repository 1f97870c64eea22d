"""Draws the pictures of the README and the documentation: `python docs/make_images.py`. Needs graphviz's `dot`."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fxopt

sys.path.insert(0, str(Path(__file__).resolve().parent))
import demo_models

IMAGES = Path(__file__).resolve().parent / "images"


def main() -> None:
    """ResNet-18 as a whole, and its first residual block, before and after."""
    demo_models.import_torchvision()
    import torchvision

    torch.manual_seed(0)
    network = demo_models.randomize_norms(torchvision.models.resnet18().eval())
    IMAGES.mkdir(exist_ok=True)
    for name, model, shape in (
        ("resnet18", network, (2, 3, 224, 224)),
        ("block", network.layer1[0], (2, 64, 56, 56)),
    ):
        fast = fxopt.compile(model, (torch.randn(shape),))
        print(fast.diff().save(IMAGES / f"{name}.svg"))


if __name__ == "__main__":
    main()
