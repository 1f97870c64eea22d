"""Model zoos for tests, demo and sweep: torchvision and timm beside a CPU build of torch.

torchvision's compiled operators are linked against the torch build they were made for. Beside another one they do not
load, and `import torchvision` dies while it registers fake kernels and gradients for operators that are not there
("operator torchvision::nms does not exist"). Its models need none of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

REGISTRATIONS = ("torchvision._meta_registrations", "torchvision._autograd_registrations")


def torchvision_operators_load() -> bool:
    """Whether torchvision is installed and its compiled operators fit this torch; does not import torchvision."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        return False
    for folder in spec.submodule_search_locations or ():
        for suffix in EXTENSION_SUFFIXES:
            library = Path(folder) / f"_C{suffix}"
            if library.exists():
                try:
                    torch.ops.load_library(library)
                except OSError:
                    return False
                return True
    return False


def make_torchvision_importable() -> None:
    """Replace torchvision's operator registrations by empty modules where its operators cannot load.

    Call it before the first `import torchvision` or `import timm`. Cheap, and nothing happens the second time.
    """
    if "torchvision" in sys.modules or torchvision_operators_load():
        return
    for name in REGISTRATIONS:
        sys.modules.setdefault(name, ModuleType(name))


def import_torchvision() -> ModuleType:
    """torchvision, with `torchvision.models` loaded. ModuleNotFoundError where it is not installed."""
    make_torchvision_importable()
    return importlib.import_module("torchvision")


def import_timm() -> ModuleType:
    """timm, which imports torchvision. ModuleNotFoundError where it is not installed."""
    make_torchvision_importable()
    return importlib.import_module("timm")


def import_transformers() -> ModuleType:
    """transformers, which looks for torchvision. ModuleNotFoundError where it is not installed."""
    make_torchvision_importable()
    return importlib.import_module("transformers")
