"""Compiles the model that a command line names, and says what was done to it on the way."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch

from fxopt.cli.options import Request
from fxopt.compiler import compile as compile_model
from fxopt.compiler import trace
from fxopt.errors import CaptureError, FxoptNotice
from fxopt.models import Shape, draw, load_model, randomize_fresh_norms, read_picture, shapes_of
from fxopt.pipeline import Progress
from fxopt.rewrite import Numerics
from fxopt.runtime import CompiledModule
from fxopt.terminal import note
from fxopt.verification import first_call

PICTURE_SHAPE = Shape((1, 3, 224, 224))


@dataclass(frozen=True)
class Made:
    """A compiled model, what it was compiled of, and what was said about it."""

    model: torch.nn.Module
    compiled: CompiledModule
    shapes: tuple[Shape, ...]
    picture: torch.Tensor | None
    randomized: int

    def to_dict(self, request: Request) -> dict[str, Any]:
        return {
            "model": request.model,
            "inputs": [str(shape) for shape in self.shapes],
            "seed": request.seed,
            "norms_randomized": self.randomized,
            "notices": list(self.compiled.report.notices),
        }


def make(request: Request, told: Progress, data: Any = None) -> Made:
    """Compiles the model for the inputs of the request, or for the first batch of `data` where that is given."""
    shapes = request.shape or ((PICTURE_SHAPE,) if request.picture else ())
    picture = read_picture(request.picture, shapes[0]) if request.picture else None
    args, kwargs = draw(shapes, request.seed, picture)
    told(f"building {request.model}", 0, 0)
    model = load_model(request.model, request.seed).eval()
    randomize = request.randomize_norms
    if randomize is None:
        randomize = not request.model.rpartition(":")[0].endswith(".py")
    randomized = randomize_fresh_norms(model, request.seed) if randomize else 0
    if data is not None:
        told("reading the first batch", 0, 0)
        args, kwargs = first_call(model, data)
        shapes = shapes_of(args, kwargs)
    told(f"capturing {request.model}", 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxoptNotice)  # the report has them
        compiled = compile_model(
            model,
            args if args or kwargs else None,
            kwargs or None,
            passes="default" if request.passes is None else request.passes,
            disable=[name for names in request.disable for entry in names for name in _written_out(entry)],
            backend=request.backend,
            numerics=cast("Numerics", request.numerics),
            verify="each" if request.verify_each else request.verify,
            dynamic_shapes=None if request.dynamic_shapes == "none" else request.dynamic_shapes,
            strict=request.strict,
            progress=told,
        )
    if not compiled._session.programs:
        _raise_untraceable(model)
    return Made(model, compiled, shapes, picture, randomized)


def _written_out(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    """The names of an entry: of a group, as `a+b` is, all."""
    return (entry,) if isinstance(entry, str) else entry


def _raise_untraceable(model: torch.nn.Module) -> NoReturn:
    """No first call will come that capture could wait for, so that the reason is an error here."""
    try:
        trace(model)
    except CaptureError as error:
        hint = "give an example input: --shape 1x3x224x224, or --input picture.jpg"
        raise CaptureError(error.message, line=error.line, hint=hint) from error
    raise CaptureError("the model was not captured")


def say_randomized(request: Request, made: Made) -> None:
    if made.randomized:
        note(
            f"the {made.randomized} batch norms of {request.model} never saw data; they got random statistics "
            "(--no-randomize-norms keeps them)"
        )


def say_notices(made: Made) -> None:
    for text in made.compiled.report.notices:
        note(text)


@contextlib.contextmanager
def stdout_kept(as_json: bool) -> Iterator[None]:
    """With --json, what a model prints while it is built and run goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield
