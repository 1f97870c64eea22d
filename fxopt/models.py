"""Models and inputs as a command line names them.

A model is `package.module:factory` (`torchvision.models:resnet50`), `timm:name`, or a file's `net.py:build`; the
factory is a class or function that needs no argument, or a module. A function may give the model's inputs with it. An
input is `1x3x224x224`, `1x16:int64:1000` or `mask=1x16:bool`, or a picture.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.capture.program import user_line_of_error
from fxopt.errors import FxoptError, InputError, UsageError

FORMS = "package.module:factory, timm:name or net.py:factory"


class ModelError(FxoptError):
    """The model that was named could not be imported or built."""


# -- models ----------------------------------------------------------------------------------------------------------


def load_model(name: str, seed: int = 0) -> torch.nn.Module:
    """The model of a name, built under `seed`.

    Raises UsageError where nothing has that name or it needs arguments, ModelError where its code raises.
    """
    model = load(name, seed)
    if isinstance(model, tuple) and model:
        model = model[0]
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"{name} gives {type(model).__name__}, not an nn.Module")
    return model


def load(name: str, seed: int = 0) -> Any:
    """What the factory of a name gives, called under `seed`. Raises as `load_model` does."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise UsageError(f"{name!r} names no model", hint=f"it is written {FORMS}")
    torch.manual_seed(seed)
    if place == "timm":
        return _from_timm(attribute)
    is_file = place.endswith(".py")
    # As Python does for a script and for -m. It stays there: a model may import its neighbours as late as in forward.
    folder = str(Path(place).parent.resolve()) if is_file else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = _from_file(place) if is_file else _import(place)
    factory = _attribute(module, attribute, name)
    return factory if isinstance(factory, torch.nn.Module) else _call(factory, name)


def _from_timm(name: str) -> torch.nn.Module:
    timm = _import("timm")
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.5)
        raise UsageError(f"timm has no model named {name!r}", hint="there are: " + ", ".join([*close, "..."]))
    model = _call(lambda: timm.create_model(name, pretrained=False), f"timm:{name}")
    assert isinstance(model, torch.nn.Module)
    return model


def _import(place: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is not None and (place == error.name or place.startswith(error.name + ".")):
            hint = f"pip install {error.name}" if "." not in error.name else f"a model is written {FORMS}"
            raise UsageError(f"there is no module {error.name!r}", hint=hint) from error
        raise _raised(f"importing {place}", error) from error
    except Exception as error:
        raise _raised(f"importing {place}", error) from error


def _from_file(place: str) -> ModuleType:
    path = Path(place).resolve()
    if not path.is_file():
        raise UsageError(f"there is no file {place}")
    # Under its own name if that is free, so that its classes can be pickled and imported again.
    held = sys.modules.get(path.stem)
    free = held is None or getattr(held, "__file__", None) == str(path)
    name = path.stem if free else f"_fxopt_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _raised(f"running {place}", error) from error
    return module


def _attribute(module: ModuleType, attribute: str, name: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [other for other in dir(found) if not other.startswith("_")]
            close = difflib.get_close_matches(part, public, n=5, cutoff=0.5)
            hint = "there are: " + ", ".join(close) if close else "look for the name of the class or function there"
            raise UsageError(f"{name.rpartition(':')[0]} has no {attribute!r}", hint=hint)
        found = getattr(found, part)
    return found


def _call(factory: Any, name: str) -> Any:
    if not callable(factory):
        raise UsageError(f"{name} is {type(factory).__name__}, neither an nn.Module nor something that makes one")
    needed = _needed(factory)
    if needed:
        raise UsageError(
            f"{name} needs arguments: {', '.join(needed)}",
            hint="write a function without arguments that calls it, in a file: net.py:build",
        )
    try:
        return factory()
    except Exception as error:
        raise _raised(f"building {name}", error) from error


def _needed(factory: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:
        return []  # a builtin without a signature: calling it says more
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in variadic]


def _raised(doing: str, error: Exception) -> ModelError:
    said = str(error).strip() or "no message"
    hint = "fxopt doctor says what is installed and works" if doing.startswith("importing") else None
    return ModelError(f"{doing} raised {type(error).__name__}: {said}", line=user_line_of_error(error), hint=hint)


def randomize_fresh_norms(model: torch.nn.Module, seed: int = 0) -> int:
    """Gives batch norms that never saw data (mean 0, variance 1) statistics as if they had; returns how many.

    Folding a fresh norm would leave the weights nearly as they are, and prove nothing. Does nothing where any norm has
    seen data: such a model has weights that mean something.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and isinstance(module.running_mean, torch.Tensor)
    ]
    if not all(_fresh(norm) for norm in norms):
        return 0
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in norms:
            for tensor in (norm.running_mean, norm.bias):
                if tensor is not None:
                    tensor.copy_(0.1 * torch.randn(tensor.shape, generator=draw))
            for tensor in (norm.running_var, norm.weight):
                if tensor is not None:
                    tensor.copy_(0.5 + torch.rand(tensor.shape, generator=draw))
    return len(norms)


def _fresh(norm: torch.nn.modules.batchnorm._BatchNorm) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    return mean is not None and variance is not None and not bool(mean.any()) and bool((variance == 1).all())


# -- inputs ----------------------------------------------------------------------------------------------------------

#: Random whole numbers are below this, so that they index small tables; `1x16:int64:1000` asks for others.
IDS = 10
_DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64",
)  # fmt: skip
_SHAPE = re.compile(r"((?P<name>[A-Za-z_]\w*)=)?(?P<sizes>\d+(x\d+)*)(:(?P<dtype>[a-z]+\d*))?(:(?P<below>\d+))?")


@dataclass(frozen=True)
class Shape:
    """One input to draw: its sizes, dtype, the bound of whole numbers, and the argument's name, if by keyword."""

    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    below: int = IDS
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads `[name=]1x3x224x224[:dtype[:below]]`. Raises UsageError."""
        found = _SHAPE.fullmatch(text.strip())
        if found is None:
            raise UsageError(
                f"{text!r} is no shape", hint="write 1x3x224x224, 1x16:int64, 1x16:int64:1000 or mask=1x16:bool"
            )
        kind = found["dtype"] or "float32"
        if kind not in _DTYPES:
            raise UsageError(f"{text!r}: no dtype is named {kind!r}", hint="there are: " + ", ".join(_DTYPES))
        dtype = getattr(torch, kind)
        if found["below"] is not None and (dtype is torch.bool or dtype.is_floating_point or dtype.is_complex):
            raise UsageError(f"{text!r}: a bound is for whole numbers", hint="write 1x16:int64:1000")
        below = int(found["below"] or (256 if dtype is torch.uint8 else IDS))
        if below < 1:
            raise UsageError(f"{text!r}: nothing is below {below}")
        return cls(tuple(map(int, found["sizes"].split("x"))), dtype, below, found["name"])

    def __str__(self) -> str:
        kind = "" if self.dtype is torch.float32 else ":" + str(self.dtype).removeprefix("torch.")
        return (f"{self.name}=" if self.name else "") + "x".join(map(str, self.sizes)) + kind

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str | None = None) -> Shape:
        """The shape of a tensor that is there."""
        return cls(tuple(tensor.shape), tensor.dtype, name=name)

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        """Random values: standard normal, or whole numbers in [0, below), or truth values."""
        if self.dtype is torch.bool:
            return torch.randint(2, self.sizes, generator=generator).bool()
        if self.dtype.is_floating_point:
            return torch.randn(self.sizes, generator=generator).to(self.dtype)
        if self.dtype.is_complex:
            return torch.randn(self.sizes, generator=generator, dtype=self.dtype)
        return torch.randint(self.below, self.sizes, generator=generator).to(self.dtype)

    def with_batch(self, old: int, new: int) -> Shape:
        """The same with another first size, where that was `old`."""
        return replace(self, sizes=(new, *self.sizes[1:])) if self.sizes[0] == old else self


def draw(shapes: Sequence[Shape], seed: int, picture: torch.Tensor | None = None) -> Call:
    """The arguments for shapes, `picture` in place of the first: the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    values = [shape.draw(generator) for shape in shapes]
    if picture is not None:
        values[0] = picture
    pairs = list(zip(shapes, values, strict=True))
    positional = tuple(value for shape, value in pairs if shape.name is None)
    return positional, {shape.name: value for shape, value in pairs if shape.name is not None}


Call = tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]


def shapes_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Shape, ...]:
    """The shapes of the tensors of a call; those inside an argument have its name."""
    named = [*((None, value) for value in args), *kwargs.items()]
    leaves = [(name, leaf) for name, value in named for leaf in pytree.tree_leaves(value)]
    return tuple(Shape.of(leaf, name) for name, leaf in leaves if isinstance(leaf, torch.Tensor))


def read_picture(path: str, shape: Shape) -> torch.Tensor:
    """A picture as float[batch, 3 or 1, height, width] in [0, 1], resized to `shape`, the same in each of the batch.

    Raises UsageError where the shape is no picture's, InputError where the file cannot be read or Pillow is missing.
    """
    if len(shape.sizes) != 4 or shape.sizes[1] not in (1, 3) or not shape.dtype.is_floating_point:
        raise UsageError(f"a picture does not fit the shape {shape}", hint="write 1x3x224x224, or 1x1x224x224 for grey")
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(f"reading {path} needs Pillow: {error}", hint="pip install pillow") from error
    batch, channels, height, width = shape.sizes
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB" if channels == 3 else "L").resize((width, height))
    except OSError as error:
        raise InputError(f"the picture {path} cannot be read: {error}") from error
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(height, width, channels)
    plane = (pixels.permute(2, 0, 1).to(torch.float32) / 255).to(shape.dtype)
    return plane.expand(batch, -1, -1, -1).contiguous()


# -- both ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A model and its inputs by name, to be built in any process: calling it gives `(model, args, kwargs)`.

    The inputs are `inputs` as they are, or drawn for `shapes`; without these, a factory that gives `(model, args)` or
    `(model, args, kwargs)` has its own, and any other gets `default`. `batch` replaces the first size of the first
    input, and of each input that has the same one; inputs of a factory are repeated for it. `randomize_norms` None
    randomises fresh batch norms of models of installed packages, not of files.
    """

    name: str
    shapes: tuple[Shape, ...] = ()
    default: tuple[Shape, ...] = ()
    batch: int | None = None
    seed: int = 0
    randomize_norms: bool | None = None
    inputs: Call | None = None

    def __call__(self) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
        """Builds it. Raises UsageError and ModelError as `load_model` does."""
        made = load(self.name, self.seed)
        own = isinstance(made, tuple)
        model, args, kwargs = _parts(made, self.name) if own else (made, (), {})
        if not isinstance(model, torch.nn.Module):
            raise UsageError(f"{self.name} gives {type(model).__name__}, not an nn.Module")
        randomize = self.randomize_norms
        if randomize is None:
            randomize = not self.name.rpartition(":")[0].endswith(".py")
        if randomize:
            randomize_fresh_norms(model, self.seed)
        if self.inputs is not None:
            return model, *self.inputs
        if own and not self.shapes:
            return model, *self._repeated(args, kwargs)
        shapes = self.shapes or self.default
        if self.batch is not None and shapes:
            given = shapes[0].sizes[0]
            shapes = tuple(shape.with_batch(given, self.batch) for shape in shapes)
        return model, *draw(shapes, self.seed)

    def _repeated(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The inputs with another first size: their rows, again from the first where there are too few."""
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.dim()]
        if self.batch is None or not tensors:
            return args, kwargs
        given = tensors[0].shape[0]
        rows = torch.arange(self.batch) % max(1, given)

        def repeat(leaf: Any) -> Any:
            fits = isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == given
            return leaf[rows] if fits else leaf

        found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(repeat, (args, kwargs))
        return found


def _parts(made: tuple[Any, ...], name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    kinds = [(object, (tuple, list)), (object, (tuple, list), dict)]
    if not any(len(made) == len(kind) and all(map(isinstance, made, kind)) for kind in kinds):
        raise UsageError(
            f"{name} gives a tuple that is no model with its inputs",
            hint="a function gives the model, (model, args) or (model, args, kwargs)",
        )
    return made[0], tuple(made[1]), dict(made[2]) if len(made) == 3 else {}
