"""Draws the pictures of the documentation: `python docs/make_images.py [PAGE...]`. Needs graphviz's `dot`.

The picture of a pass is its diff of the example on its page, `docs/passes/PASS.md`, whose code leaves it in `fast`;
`docs/sync_picture.py` makes that of `docs/sync-batchnorm.md`. A test says which of these is not as it would be drawn.
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
import sync_picture

from fxopt.graphdiff import GraphDiff

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "images"
SYNC = "sync-batchnorm"
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


def pictures() -> dict[str, Path]:
    """Where the picture of each page is, by the page's name."""
    passes = sorted(page.stem for page in (DOCS / "passes").glob("*.md"))
    return {SYNC: IMAGES / f"{SYNC}.svg"} | {name: IMAGES / "passes" / f"{name}.svg" for name in passes}


def difference(name: str) -> GraphDiff:
    """What the picture of a page shows: of a pass, the example in front of it and behind it."""
    if name == SYNC:
        return sync_picture.drawn()
    scope: dict[str, Any] = {}
    for block in BLOCK.finditer((DOCS / "passes" / f"{name}.md").read_text(encoding="utf-8")):
        exec(block["text"], scope)
    found: GraphDiff = scope["fast"].diff(name)
    return found


def main(names: list[str]) -> None:
    """The pages that are named, or everything."""
    (IMAGES / "passes").mkdir(parents=True, exist_ok=True)
    if not names:
        draw_models()
    found = pictures()
    for name in names or found:
        print(difference(name).save(found[name]))


if __name__ == "__main__":
    main(sys.argv[1:])
