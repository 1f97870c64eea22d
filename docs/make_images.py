"""Draws the pictures of the documentation: `python docs/make_images.py [PASS...]`. Needs graphviz's `dot`.

The picture of a pass is its diff of the example on its page, `docs/passes/PASS.md`, whose code leaves it in `fast`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch

import fxopt

sys.path.insert(0, str(Path(__file__).resolve().parent))
import demo_models

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images"
BLOCK = re.compile(r"^```python\n(?!>>>)(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def draw_models() -> None:
    """ResNet-18 as a whole, and its first residual block, before and after."""
    demo_models.import_torchvision()
    import torchvision

    torch.manual_seed(0)
    network = demo_models.randomize_norms(torchvision.models.resnet18().eval())
    for name, model, shape in (
        ("resnet18", network, (2, 3, 224, 224)),
        ("block", network.layer1[0], (2, 64, 56, 56)),
    ):
        fast = fxopt.compile(model, (torch.randn(shape),))
        print(fast.diff().save(IMAGES / f"{name}.svg"))


def draw_pass(name: str) -> None:
    """The example on a pass's page, in front of the pass and behind it."""
    scope: dict[str, Any] = {}
    for block in BLOCK.finditer((DOCS / "passes" / f"{name}.md").read_text(encoding="utf-8")):
        exec(block["text"], scope)
    print(scope["fast"].diff(name).save(IMAGES / "passes" / f"{name}.svg"))


def main(names: list[str]) -> None:
    """The passes that are named, or everything."""
    (IMAGES / "passes").mkdir(parents=True, exist_ok=True)
    if not names:
        draw_models()
    for name in names or sorted(page.stem for page in (DOCS / "passes").glob("*.md")):
        draw_pass(name)


if __name__ == "__main__":
    main(sys.argv[1:])
