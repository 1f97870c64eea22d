"""What the tests of the command line share: a folder with models, and what one command line gave."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fxopt import cli

NET = """
import torch
from torch import nn

import neighbour

class Small(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))

def build():
    print("printed by the model")
    return Small()

def wide(width):
    return Small(width)

def raises():
    raise RuntimeError(neighbour.REASON)

def number():
    return 7

class Branch(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x

class Sizes(nn.Module):
    def forward(self, x):
        return x.reshape(12)

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 4)

    def forward(self, ids, *, mask):
        return torch.relu(self.table(ids)).masked_fill(mask[..., None], 0)

MODEL = Small()
"""
IMAGE = ("--shape", "2x3x8x8")


@dataclass(frozen=True)
class Ran:
    """What one command line gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=pytest.fail)


@contextmanager
def command_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **modules: str
) -> Iterator[Callable[..., Ran]]:
    """Runs a command line in a folder that has net.py, its neighbour, modules that raise on import, and `modules`, by
    name their text."""
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    (folder / "net.py").write_text(NET)
    (folder / "neighbour.py").write_text('REASON = "no weights here"\n')
    (folder / "faulty.py").write_text("import no_such_thing_at_all\n")
    (folder / "undone.py").write_text("raise OSError('a library is missing')\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)

    def command(*arguments: str) -> Ran:
        capsys.readouterr()
        code = cli.run(arguments)
        return Ran(code, *capsys.readouterr())

    yield command
    for name in set(sys.modules) & {"net", "neighbour", "faulty", "undone", *modules} - known:
        del sys.modules[name]
