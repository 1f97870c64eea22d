"""The picture of docs/sync-batchnorm.md: a convolution and its norm in training, before and after `sync_batchnorm`.

The graph is as torch.fx traces it, where the synchronised norm is one node. What that node does is written down while
it runs in two processes: every operator, in the step of `fxopt/training` that called it, and the memory through which
one step reads another.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxopt
from fxopt.align import Group, by_origin_and_name
from fxopt.graphdiff import GraphDiff, assemble
from processes import found_by_all

PROCESSES = 2
#: The step that a function of `fxopt/training` is drawn as; a function between two steps belongs to the later one.
STEPS = {
    "rough_mean": "moments",
    "of": "moments",
    "Ranks.gather": "all_gather",
    "combined": "combine",
    "_affine": "normalise",
    "batch_norm": "running_statistics",
    "_Norm.forward": "running_statistics",
    "_Normalise.forward": "",
    "_moments_of_all": "",
}


class ConvNorm(nn.Module):
    """The model of the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


@dataclass
class Step:
    """The operators of a step, the steps that it reads, and its results that others read, by their memory.

    The step "" is what comes in front of the norm.
    """

    operators: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    results: dict[int, torch.Tensor] = field(default_factory=dict)


class Recorder(TorchDispatchMode):
    """Writes down what runs in the functions of STEPS: the step, the operator, its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[tuple[str, str, list[torch.Tensor], list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        step = _step(sys._getframe())
        if step is not None:
            self.ran.append((step, func._opname, _tensors((args, kwargs)), _tensors(result)))
        return result

    def steps(self) -> dict[str, Step]:
        """The steps, in the order in which they end."""
        names, later = [], ""
        for step, *_ in reversed(self.ran):
            later = step or later
            names.append(later)
        found: dict[str, Step] = {}
        writers: dict[int, str] = {}
        for name, (_, operator, read, results) in zip(reversed(names), self.ran, strict=True):
            found[name] = step = found.pop(name, Step())
            step.operators.append(operator)
            for tensor in read:
                memory = tensor.untyped_storage()._cdata
                # Other memory that no step wrote is the norm's own tensors.
                writer = writers.get(memory, "" if tensor.dim() == 4 else name)
                if writer != name and writer not in step.reads:
                    step.reads.append(writer)
                if writer not in ("", name):
                    found[writer].results[memory] = tensor
            writers |= {tensor.untyped_storage()._cdata: name for tensor in results}
        return found


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _step(frame: FrameType | None) -> str | None:
    """The step of the innermost function that has one; None in none of them."""
    while frame is not None:
        name = frame.f_code.co_qualname
        if "/fxopt/training/" in frame.f_code.co_filename and name in STEPS:
            return STEPS[name]
        frame = frame.f_back
    return None


def recorded(rank: int) -> dict[str, Step]:
    """The steps of the norm in one process."""
    model = fxopt.sync_batchnorm(ConvNorm())
    x = torch.randn(4, 3, 8, 8)
    model(x)  # traced by now
    with Recorder() as recorder:
        model(x)
    return recorder.steps()


def difference(steps: dict[str, Step]) -> GraphDiff:
    """The captured graph, and the same with the steps in the place of the norm."""
    before = fx.symbolic_trace(ConvNorm().train())
    FakeTensorProp(before, FakeTensorMode(allow_non_fake_inputs=True)).propagate(torch.randn(4, 3, 8, 8))
    after = copy.deepcopy(before)
    nodes = {node.name: node for node in after.graph.nodes}
    made = {"": nodes["conv"]}
    with after.graph.inserting_before(nodes["norm"]):
        for name, step in steps.items():
            reads = tuple(made[read] for read in step.reads)
            said = {"operators": ", ".join(step.operators)}
            made[name] = after.graph.create_node("call_method", name, reads, said, name=name)
            results = tuple(step.results.values())
            made[name].meta["val"] = results[0] if len(results) == 1 else results or None
    made["normalise"].meta["val"] = nodes["norm"].meta["val"]
    nodes["norm"].replace_all_uses_with(made["normalise"])
    after.graph.erase_node(nodes["norm"])
    alignment = by_origin_and_name(before, after)
    alignment.became["norm"] = ("normalise",)
    steps_then_result = sorted(steps, key=lambda name: name == "normalise")
    alignment.groups.append(Group(("norm",), tuple(steps_then_result), (("fxopt.sync_batchnorm", ""),)))
    return assemble(before, after, alignment, title="ConvNorm", subject=f"training in one of {PROCESSES} processes")


def drawn() -> GraphDiff:
    """What two processes run, as a diff to save."""
    with tempfile.TemporaryDirectory() as folder:
        steps, *_ = found_by_all(PROCESSES, Path(folder), recorded)
    return difference(steps)
