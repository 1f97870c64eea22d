"""`make demo`: GoogLeNet and ResNet-50 on a photograph: compiled, verified, reported, timed against eager, drawn."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import demo_models
import torch

import fxopt


def main() -> None:
    folder = Path("build/demo")
    folder.mkdir(parents=True, exist_ok=True)
    threads = min(2, torch.get_num_threads())
    for name, build in demo_models.MODELS.items():
        model, args = build()
        fast = fxopt.compile(model, args)
        print(fast.report)
        first = next(module for module, layer in model.named_modules() if isinstance(layer, torch.nn.BatchNorm2d))
        print(f"\nWhat became of the layer {first!r}?\n{fast.explain(first)}")
        pictures = [folder / f"{name}.html", folder / f"{name}.dot"]
        for picture in pictures:
            fast.diff().save(picture)
        print(f"\neach in its own process, in turns:\n{fxopt.benchmark(build, name=name, threads=threads)}")
        print(f"before and after: open {pictures[0]}\n")


if __name__ == "__main__":
    main()
