"""The command `fxopt`: compile, diff, explain, passes, verify, doctor.

Results go to standard output, notes and progress to standard error; with --json only JSON goes to standard output,
errors too. Exit codes are in `fxopt.terminal`.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
import torch

from fxopt import __version__, plugins
from fxopt.compiler import FxoptNotice, trace
from fxopt.compiler import compile as compile_model
from fxopt.errors import CaptureError, InputError, UsageError
from fxopt.models import Call, Shape, draw, load_model, randomize_fresh_norms, read_picture
from fxopt.pipeline import Progress
from fxopt.render import SUFFIXES
from fxopt.runtime import CompiledModule
from fxopt.terminal import EXIT_CODES, Exit, note, progress, report_error, show

PICTURE_SHAPE = Shape((1, 3, 224, 224))
#: Batch sizes that `verify` tries after the given one: 1, which captures can be wrong about, and odd ones.
BATCHES = (1, 3, 2, 5, 7, 4)


# -- options ---------------------------------------------------------------------------------------------------------


class _ShapeType(click.ParamType[Shape]):
    name = "shape"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Shape:
        if isinstance(value, Shape):
            return value
        try:
            return Shape.parse(value)
        except UsageError as error:
            self.fail(f"{error.message}: {error.hint}", param, ctx)


class _NamesType(click.ParamType[tuple[str | tuple[str, ...], ...]]):
    """Names of passes: `a,b+c,d` is a, then b and c in turns until neither rewrites, then d."""

    name = "a,b+c"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        steps = [tuple(filter(None, map(str.strip, part.split("+")))) for part in value.split(",")]
        return tuple(step[0] if len(step) == 1 else step for step in steps if step)


class _SavedType(click.ParamType[Path]):
    """A path to save a diff under: refused before the model is compiled, rather than after."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        path = Path(value)
        if path.suffix.removeprefix(".").lower() not in SUFFIXES:
            self.fail(f"{value}: the suffix says how to save it: " + " ".join(f".{s}" for s in SUFFIXES), param, ctx)
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
        "--shape", multiple=True, type=_ShapeType(), metavar="SHAPE",
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
        "--passes", type=_NamesType(), default=None,
        help="These passes in this order, not the default ones; a+b are repeated until neither rewrites.",
    ),
    click.option("--disable", type=_NamesType(), multiple=True, help="Leave these passes out. May be repeated."),
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
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, and only JSON, to standard output.")

def _compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of compiling; the command gets them as one Request."""

    @functools.wraps(function)
    def command(as_json: bool, **options: Any) -> Any:
        own = {name: options.pop(name) for name in list(options) if name not in Request.__annotations__}
        return function(Request(**options), as_json=as_json, **own)

    for option in reversed((*_COMPILING, _JSON)):
        command = option(command)
    return command


# -- compiling -------------------------------------------------------------------------------------------------------


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


def _make(request: Request, told: Progress) -> Made:
    shapes = request.shape or ((PICTURE_SHAPE,) if request.picture else ())
    picture = read_picture(request.picture, shapes[0]) if request.picture else None
    args, kwargs = draw(shapes, request.seed, picture)
    told(f"building {request.model}", 0, 0)
    model = load_model(request.model, request.seed).eval()
    randomize = request.randomize_norms
    if randomize is None:
        randomize = not request.model.rpartition(":")[0].endswith(".py")
    randomized = randomize_fresh_norms(model, request.seed) if randomize else 0
    told(f"capturing {request.model}", 0, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxoptNotice)  # the report has them
        compiled = compile_model(
            model,
            args if shapes else None,
            kwargs or None,
            passes="default" if request.passes is None else request.passes,
            disable=[name for names in request.disable for entry in names for name in _written_out(entry)],
            backend=request.backend,
            numerics=request.numerics,  # type: ignore[arg-type]
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


def _say_randomized(request: Request, made: Made) -> None:
    if made.randomized:
        note(
            f"the {made.randomized} batch norms of {request.model} never saw data; they got random statistics "
            "(--no-randomize-norms keeps them)"
        )


def _say_notices(made: Made) -> None:
    for text in made.compiled.report.notices:
        note(text)


@contextlib.contextmanager
def _stdout_kept(as_json: bool) -> Iterator[None]:
    """With --json, what a model prints while it is built and run goes to standard error."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


# -- commands --------------------------------------------------------------------------------------------------------


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="fxopt")
def cli() -> None:
    """The same PyTorch model, faster: rewritten by small rules, verified, explained and drawn.

    MODEL is package.module:factory (torchvision.models:resnet18), timm:name (timm:resnet18), or a file's net.py:build;
    the factory is a class or function that needs no argument, or a module.
    """


@cli.command("compile", epilog=EXIT_CODES)
@_compiling
@click.option("--diff", "saved", type=_SavedType(), metavar="FILE", help="Save the graph before and after, too.")
def compile_command(request: Request, *, as_json: bool, saved: Path | None) -> None:
    """Compile MODEL and print the report."""
    with _stdout_kept(as_json), progress() as told:
        made = _make(request, told)
        if saved is not None:
            told(f"drawing {saved}", 0, 0)
            made.compiled.diff().save(saved)
    report = made.compiled.report
    data = {**made.to_dict(request), "report": report.to_dict(), "diff": None if saved is None else str(saved)}
    show(data, report, as_json=as_json)
    _say_randomized(request, made)
    if saved is not None:
        note(f"saved {saved}")


@cli.command("diff", epilog=EXIT_CODES)
@_compiling
@click.option(
    "-o", "--output", type=_SavedType(), default="diff.html", show_default=True, metavar="FILE",
    help="Where to: .html, .dot and .json; .svg, .png and .pdf need graphviz's program dot.",
)  # fmt: skip
@click.option("--pass", "pass_name", default=None, metavar="NAME", help="What this pass did, instead of all.")
def diff_command(request: Request, *, as_json: bool, output: Path, pass_name: str | None) -> None:
    """Save the graph of MODEL before and after, side by side."""
    with _stdout_kept(as_json), progress() as told:
        made = _make(request, told)
        told(f"drawing {output}", 0, 0)
        found = made.compiled.diff(pass_name)
        found.save(output)
    before, after = found.compute_nodes()
    data = {
        **made.to_dict(request),
        "pass": pass_name,
        "saved": str(output),
        "compute_nodes": {"before": before, "after": after},
        "counts": found.counts(),
        "notes": list(found.notes),
    }
    show(data, f"{found}\nsaved {output}", as_json=as_json)
    _say_randomized(request, made)


@cli.command("explain", short_help="What happened to a layer, or why nothing did.", epilog=EXIT_CODES)
@_compiling
@click.argument("layer")
def explain_command(request: Request, *, as_json: bool, layer: str) -> None:
    """What happened to LAYER (as layer1.0.conv1, or a node's name) of MODEL, or why nothing did."""
    with _stdout_kept(as_json), progress() as told:
        made = _make(request, told)
        explanation = made.compiled.explain(layer)
    show({**made.to_dict(request), **explanation.to_dict()}, str(explanation), as_json=as_json)
    _say_randomized(request, made)
    if not as_json:
        _say_notices(made)


@cli.command("verify", short_help="Compare MODEL, compiled, with the original.", epilog=EXIT_CODES)
@_compiling
@click.option("--batches", type=click.IntRange(min=1), default=4, show_default=True, help="How many random batches.")
def verify_command(request: Request, *, as_json: bool, batches: int) -> Exit:
    """Compile MODEL and compare it with the original on random inputs of several batch sizes.

    The first batch is of the given shapes; then the batch size changes, unless --dynamic-shapes none.
    """
    from fxopt.verification import verify_calls

    if not request.shape and request.picture is None:
        raise click.UsageError("verify needs inputs: --shape 1x3x224x224, once per argument, or --input picture.jpg")
    with _stdout_kept(as_json), progress() as told:
        made = _make(request, told)
        try:
            found = verify_calls(made.model, made.compiled, _batches(request, made, batches), batches, told)
        except InputError as error:
            if request.dynamic_shapes != "none":
                error.hint = f"{error.hint}; --dynamic-shapes none keeps the batch size"
            raise
    show({**made.to_dict(request), **found.to_dict()}, str(found), as_json=as_json)
    _say_randomized(request, made)
    if not as_json:
        _say_notices(made)
    return Exit.FINE if found else Exit.WRONG_ANSWER


def _batches(request: Request, made: Made, count: int) -> Iterator[Call]:
    given = made.shapes[0].sizes[0]
    sizes = [given] if request.dynamic_shapes == "none" else [given, *(size for size in BATCHES if size != given)]
    for index in range(count):
        size = sizes[index % len(sizes)]
        shapes = [shape.with_batch(given, size) for shape in made.shapes]
        yield draw(shapes, request.seed + index, made.picture if index == 0 else None)


@cli.command("passes", short_help="List the passes that are installed.", epilog=EXIT_CODES)
@_JSON
def passes_command(as_json: bool) -> None:
    """List every pass that is installed, who provides it, and plugins that could not be loaded."""
    from rich.table import Table
    from rich.text import Text

    entries = [
        {
            "name": entry.name,
            "origin": entry.origin,
            "default": entry.default,
            "numerics": entry.current.numerics,
            "doc": _first_line(entry.name, entry.current.doc),
        }
        for entry in plugins.available().values()
    ]
    broken = {name: error.message for name, error in plugins.broken().items()}
    table = Table("pass", "origin", "default", "numerics", "what it does")
    for entry in entries:
        texts = ("yes" if entry[key] is True else "" if entry[key] is False else str(entry[key]) for key in entry)
        table.add_row(*(Text(text) for text in texts))
    show({"passes": entries, "broken": broken}, table, as_json=as_json)
    for text in broken.values() if not as_json else ():
        note(text)


def _first_line(name: str, doc: str) -> str:
    lines = (" ".join(line.split()) for line in (doc or "").splitlines())
    return next((line for line in lines if line and line != name), "")


@cli.command("doctor", short_help="Say what is installed and works.", epilog=EXIT_CODES)
@_JSON
def doctor_command(as_json: bool) -> Exit:
    """Say what is installed and works; each thing is tried. Fails where something that fxopt needs does not work."""
    from rich.table import Table
    from rich.text import Text

    from fxopt.doctor import examine

    with _stdout_kept(as_json), progress() as told:
        findings = examine(told)
    wrong = any(finding.status == "wrong" for finding in findings)
    broken = any(finding.status == "broken" and finding.needed for finding in findings)
    table = Table(box=None, show_header=False)
    colours = {"ok": "green", "absent": "dim", "broken": "red", "wrong": "bold red"}
    for finding in findings:
        detail = finding.detail + (f" ({finding.hint})" if finding.hint else "")
        table.add_row(Text(finding.status, colours[finding.status]), Text(finding.name), Text(detail))
    fine = not wrong and not broken
    show({"ok": fine, "findings": [finding.to_dict() for finding in findings]}, table, as_json=as_json)
    return Exit.FINE if fine else Exit.WRONG_ANSWER if wrong else Exit.FAILED


# -- the process -----------------------------------------------------------------------------------------------------


def run(arguments: Sequence[str]) -> int:
    """Runs one command line; returns the exit code."""
    as_json = "--json" in arguments
    try:
        code = cli.main(list(arguments), prog_name="fxopt", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        return int(report_error(error, as_json=as_json))
    return int(code or Exit.FINE)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))
