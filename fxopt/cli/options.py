"""The options of the command line: shapes, names of passes, where to save, and those that compiling takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from fxopt.errors import UsageError
from fxopt.models import Shape


class ShapeType(click.ParamType[Shape]):
    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Shape:
        if isinstance(value, Shape):
            return value
        try:
            return Shape.parse(value)
        except UsageError as error:
            self.fail(f"{error.message}: {error.hint}", param, ctx)


class NamesType(click.ParamType[tuple[str | tuple[str, ...], ...]]):
    """Names of passes: `a,b+c,d` is a, then b and c in turns until neither rewrites, then d."""

    name = "a,b+c"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        steps = [tuple(filter(None, map(str.strip, part.split("+")))) for part in value.split(",")]
        return tuple(step[0] if len(step) == 1 else step for step in steps if step)


class SavedType(click.ParamType[Path]):
    """A path to save something under, refused before the work rather than after; `check` raises for one that is not
    saved under."""

    name = "file"

    def __init__(self, check: Callable[[Path], object]) -> None:
        self.check = check

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        self.check(path)
        if not path.parent.is_dir():
            self.fail(f"{value}: there is no folder {path.parent}", param, ctx)
        return path


@dataclass(frozen=True)
class Request:
    """What the options that compiling takes came to."""

    model: str
    shape: tuple[Shape, ...]
    picture: str | None
    seed: int
    randomize_norms: bool | None
    passes: tuple[str | tuple[str, ...], ...] | None
    disable: tuple[tuple[str | tuple[str, ...], ...], ...]
    backend: str
    numerics: str
    verify: bool
    verify_each: bool
    dynamic_shapes: str
    strict: bool


_COMPILING = (
    click.argument("model"),
    click.option(
        "--shape", multiple=True, type=ShapeType(), metavar="SHAPE",
        help="Random input, as 1x3x224x224; 1x16:int64:1000 are whole numbers below 1000 (10 if not said); "
        "mask=1x16:bool is an argument by name. Once per argument. Without: traced without inputs, not verified.",
    ),
    click.option(
        "--input", "picture", type=click.Path(exists=True, dir_okay=False), metavar="PICTURE",
        help="A picture for the first input: resized to its shape (1x3x224x224 if not said), scaled to [0, 1].",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of random weights and inputs."),
    click.option(
        "--randomize-norms/--no-randomize-norms", default=None,
        help="Give batch norms that never saw data random statistics, so that folding has something to do. "
        "Done by itself for models of installed packages, not for files.",
    ),
    click.option(
        "--passes", type=NamesType(), default=None,
        help="These passes in this order, not the default ones; a+b are repeated until neither rewrites.",
    ),
    click.option("--disable", type=NamesType(), multiple=True, help="Leave these passes out. May be repeated."),
    click.option("--backend", default="auto", show_default=True, help="auto, or the name of one (see doctor)."),
    click.option(
        "--numerics", type=click.Choice(["bitwise", "reassociate", "approximate"]), default="reassociate",
        show_default=True, help="What the passes may do to the last digits.",
    ),
    click.option("--verify/--no-verify", default=True, show_default=True, help="Compare with the model on the inputs."),
    click.option("--verify-each", is_flag=True, help="Compare after every pass."),
    click.option(
        "--dynamic-shapes", type=click.Choice(["batch", "all", "none"]), default="batch", show_default=True,
        help="Which sizes stay open: first dimensions, all, or none.",
    ),
    click.option("--strict", is_flag=True, help="Fail where a pass fails or changes the answer."),
)  # fmt: skip
#: How many batches of --data.
LIMIT = click.option(
    "--limit", type=click.IntRange(min=1), help="How many batches of --data; all, if it is not given."
)
#: For every command.
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, and only JSON, to standard output.")


def data_option(help: str, *, required: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--data, of which `help` says what the command does with the DataLoader."""
    return click.option(
        "--data", required=required, metavar="net.py:data", help=f"A function that gives a DataLoader{help}"
    )


def refuse_beside_data(**given: object) -> None:
    """Raises UsageError for an option that says what --data says already; each is given under its name in the help."""
    for name, value in given.items():
        if value:
            raise UsageError(f"--data does not go with {name}", hint="the loader's batches are the inputs, as they are")


def compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of compiling; the command gets them as one Request."""

    @functools.wraps(function)
    def command(as_json: bool, **options: Any) -> Any:
        own = {name: options.pop(name) for name in list(options) if name not in Request.__annotations__}
        return function(Request(**options), as_json=as_json, **own)

    for option in reversed((*_COMPILING, JSON)):
        command = option(command)
    return command
