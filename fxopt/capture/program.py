"""What capture takes and gives: flat inputs, the model as a function of flat tensors, the captured program."""

from __future__ import annotations

import copy
import dataclasses
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxopt import effects, ir
from fxopt.errors import CaptureError, InputError, UsageError

_TORCH = str(Path(torch.__file__).parent) + os.sep
_FXOPT = str(Path(__file__).parent.parent) + os.sep

#: Under this name the model hangs in the module that is captured; attribute names lose it again.
ROOT = "model"


#: Arguments beside tensors: immutable, so that a program captured for one value is right whenever that value is given.
CONSTANT_TYPES = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    Enum,
    range,
    slice,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


def register_dataclasses(value: Any) -> None:
    """Makes dataclass-like results (outputs of models, say) known to pytree, so that they can be taken apart."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value) not in pytree.SUPPORTED_NODES:
            kind = type(value)  # under a name, so that exported programs can be saved
            torch.export.register_dataclass(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
        for item in dataclasses.fields(value):
            register_dataclasses(getattr(value, item.name))
    elif isinstance(value, dict):
        for part in value.values():
            register_dataclasses(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            register_dataclasses(part)


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, flat: `leaves` in pytree order under `spec`, readable `names`."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    names: tuple[str, ...]

    @classmethod
    def flatten(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """Takes a call's arguments apart. Raises InputError for what can be neither a tensor nor a constant."""
        register_dataclasses((args, kwargs))
        found, spec = pytree.tree_flatten_with_path((tuple(args), dict(kwargs)))
        for path, leaf in found:
            if not isinstance(leaf, (torch.Tensor, *CONSTANT_TYPES)):
                raise InputError(
                    f"{_name(path)} is a {type(leaf).__module__}.{type(leaf).__qualname__}, which cannot be an input",
                    hint="pass tensors, numbers, strings, None, and tuples, lists, dicts or dataclasses of them; other "
                    "containers after torch.utils._pytree.register_pytree_node",
                )
        return cls(tuple(leaf for _, leaf in found), spec, tuple(_name(path) for path, _ in found))

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The leaves that are tensors: the placeholders, in order."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor))

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Their names."""
        found = zip(self.names, self.leaves, strict=True)
        return tuple(name for name, leaf in found if isinstance(leaf, torch.Tensor))

    @property
    def constants(self) -> dict[int, Any]:
        """The leaves that are not, by position: constants of the capture."""
        return {index: leaf for index, leaf in enumerate(self.leaves) if not isinstance(leaf, torch.Tensor)}

    def with_tensors(self, tensors: tuple[torch.Tensor, ...]) -> Inputs:
        """The same call with other tensors."""
        rest = iter(tensors)
        leaves = tuple(next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves)
        return Inputs(leaves, self.spec, self.names)

    def replaced(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` with something else, a proxy say, in the place of each tensor."""
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def call(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` again."""
        args, kwargs = pytree.tree_unflatten(list(self.leaves), self.spec)
        return args, kwargs


def _name(path: tuple[Any, ...]) -> str:
    """A leaf's place as a person writes it: `args[0]`, `mask`, `batch['ids']`."""
    first, rest = path[0], path[1:]
    if getattr(first, "idx", None) == 1 and rest:
        return str(rest[0].key) + pytree.keystr(rest[1:])
    return "args" + pytree.keystr(rest)


class _Structure:
    spec: pytree.TreeSpec | None = None


class FlatModel(torch.nn.Module):
    """The model as a function of flat tensors: what both front ends capture. Calling it runs the model's own hooks.

    After a call, `structure.spec` is the pytree of the result, whose leaves are returned as a list. (It is held aside
    because torch.export takes back what a forward assigns to its module.)
    """

    def __init__(self, model: torch.nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.add_module(ROOT, model)
        self.training = False
        object.__setattr__(self, "inputs", inputs)
        self.structure = _Structure()

    def forward(self, *tensors: Any) -> list[Any]:
        """Calls the model on its own structure of arguments and takes its result apart."""
        inputs: Inputs = self.__dict__["inputs"]
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in inputs.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, inputs.spec)
        result = self._modules[ROOT](*args, **kwargs)  # type: ignore[misc]
        register_dataclasses(result)
        found, self.structure.spec = pytree.tree_flatten(result)
        return found


def strip_root(path: str) -> str:
    """An attribute path as the user's model has it."""
    return path.removeprefix(ROOT + ".") if path != ROOT else ""


@dataclass
class Captured:
    """One captured program: its module in normal form, which front end took it, under which guards.

    `guards` are Python expressions over `L['tensors'][i]`; `bounds` the smallest and largest sizes that symbols may
    take; `grad` says whether gradients were on. A program that was captured symbolically fits every size.
    """

    module: fx.GraphModule
    front_end: str
    guards: tuple[str, ...] = ()
    bounds: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    grad: bool = True

    def written_attributes(self) -> set[str]:
        """Attribute paths of the tensors that the program itself may write (counters and caches)."""
        aliases = effects.Aliases.scan(self.module.graph)
        roots = {aliases.root(value) for writer in aliases.writers for value in effects.of(writer).writes}
        return {
            str(node.target)
            for node in self.module.graph.nodes
            if node.op == "get_attr" and ir.tensor(node) is not None and aliases.root(node) in roots
        }


def private_copy(model: torch.nn.Module) -> torch.nn.Module:
    """The model's modules copied, in eval mode, sharing the memory of every tensor with the caller's.

    The tensors themselves are the copy's own, so that what `model.half()` or `model.to(device)` puts into the caller's
    is not seen here; a write to the memory shows in the version, which both have in common. They are frozen, as those
    of the compiled module are: torch computes some operators another way where a weight requires grad.

    Raises UsageError for what is not a module, and CaptureError where it cannot be copied.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(
            f"fxopt compiles an nn.Module, not {type(model).__name__}",
            hint="wrap a function in a module whose forward calls it",
        )
    memo: dict[int, Any] = {}
    for module in model.modules():
        for held in (*module._parameters.values(), *module._buffers.values(), *module.__dict__.values()):
            if isinstance(held, torch.Tensor) and torch.nn.parameter.is_lazy(held):
                raise UsageError(
                    f"the model is lazy: {type(module).__name__} has no sizes yet",
                    hint="call it once on an example first",
                )
            if isinstance(held, torch.Tensor):
                memo[id(held)] = _same_memory(held)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of copying a GraphModule's signature
            twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise CaptureError(
            f"the model cannot be copied, and fxopt never works on the caller's own: {error}",
            hint="remove what copy.deepcopy refuses (open files, locks, generators) from the module's attributes",
        ) from error
    return twin.eval()


def _same_memory(held: torch.Tensor) -> torch.Tensor:
    """Another tensor of the same memory and version; subclasses, which may hold more, stay themselves."""
    if held.is_inference():
        return held
    if type(held) is torch.nn.Parameter:
        twin: torch.Tensor = torch.nn.Parameter(held.detach(), requires_grad=False)
    elif type(held) is torch.Tensor:
        twin = held.detach()
    else:
        return held
    twin.__dict__.update(held.__dict__)
    return twin


def user_line(skip: int = 1) -> str:
    """The innermost line of the running program that is neither torch's nor fxopt's, as `file:line in function`."""
    frame = sys._getframe(skip)
    while frame is not None:
        code: CodeType = frame.f_code
        name = code.co_filename
        if code is FlatModel.forward.__code__:
            break  # further out is whoever called fxopt, not the model
        if not name.startswith((_TORCH, _FXOPT, "<")):
            return f"{name}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def line_of_trace(trace: str) -> str:
    """The innermost line of a recorded stack trace that is not torch's, as `file:line in function`."""
    for line in reversed(trace.splitlines()):
        words = line.strip()
        if words.startswith("File ") and words.count('"') == 2:
            _, name, rest = words.split('"')
            if name.startswith(("torch/", _TORCH, _FXOPT, "<")) or "/torch/" in name:
                continue
            number, _, where = rest.removeprefix(", line ").partition(", ")
            return f"{name}:{number} {where}"
    return ""


def user_line_of_error(error: BaseException) -> str:
    """The innermost line of the user's own code in an error's traceback."""
    found = ""
    step = error.__traceback__
    while step is not None:
        name = step.tb_frame.f_code.co_filename
        if not name.startswith((_TORCH, _FXOPT, "<")):
            found = f"{name}:{step.tb_lineno} in {step.tb_frame.f_code.co_name}"
        step = step.tb_next
    return found
