"""The commands: compile, diff, explain, verify, passes, doctor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from fxopt import __version__, plugins, render
from fxopt.cli.making import Made, make, say_notices, say_randomized, stdout_kept
from fxopt.cli.options import JSON, LIMIT, Request, SavedType, compiling, data_option, refuse_beside_data
from fxopt.errors import InputError, UsageError
from fxopt.models import Call, draw, load
from fxopt.pipeline import Progress
from fxopt.terminal import EXIT_CODES, Exit, note, progress, show
from fxopt.verification import Verification, verify, verify_calls

#: Batch sizes that `verify` tries after the given one: 1, which captures can be wrong about, and odd ones.
BATCHES = (1, 3, 2, 5, 7, 4)
RANDOM_BATCHES = 4


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="fxopt")
def cli() -> None:
    """The same PyTorch model, faster: rewritten by small rules, verified, explained and drawn.

    MODEL is package.module:factory (torchvision.models:resnet18), timm:name (timm:resnet18), or a file's net.py:build;
    the factory is a class or function that needs no argument, or a module.
    """


@cli.command("compile", epilog=EXIT_CODES)
@compiling
@click.option(
    "--diff", "saved", type=SavedType(render.kind_of), metavar="FILE", help="Save the graph before and after, too."
)
def compile_command(request: Request, *, as_json: bool, saved: Path | None) -> None:
    """Compile MODEL and print the report."""
    with stdout_kept(as_json), progress() as told:
        made = make(request, told)
        if saved is not None:
            told(f"drawing {saved}", 0, 0)
            made.compiled.diff().save(saved)
    report = made.compiled.report
    data = {**made.to_dict(request), "report": report.to_dict(), "diff": None if saved is None else str(saved)}
    show(data, report, as_json=as_json)
    say_randomized(request, made)
    if saved is not None:
        note(f"saved {saved}")


@cli.command("diff", epilog=EXIT_CODES)
@compiling
@click.option(
    "-o", "--output", type=SavedType(render.kind_of), default="diff.html", show_default=True, metavar="FILE",
    help="Where to: .html, .dot and .json; .svg, .png and .pdf need graphviz's program dot.",
)  # fmt: skip
@click.option("--pass", "pass_name", default=None, metavar="NAME", help="What this pass did, instead of all.")
def diff_command(request: Request, *, as_json: bool, output: Path, pass_name: str | None) -> None:
    """Save the graph of MODEL before and after, side by side."""
    with stdout_kept(as_json), progress() as told:
        made = make(request, told)
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
    say_randomized(request, made)


@cli.command("explain", short_help="What happened to a layer, or why nothing did.", epilog=EXIT_CODES)
@compiling
@click.argument("layer")
def explain_command(request: Request, *, as_json: bool, layer: str) -> None:
    """What happened to LAYER (as layer1.0.conv1, or a node's name) of MODEL, or why nothing did."""
    with stdout_kept(as_json), progress() as told:
        made = make(request, told)
        explanation = made.compiled.explain(layer)
    show({**made.to_dict(request), **explanation.to_dict()}, str(explanation), as_json=as_json)
    say_randomized(request, made)
    if not as_json:
        say_notices(made)


@cli.command("verify", short_help="Compare MODEL, compiled, with the original.", epilog=EXIT_CODES)
@compiling
@click.option(
    "--batches", type=click.IntRange(min=1), help=f"How many random batches; {RANDOM_BATCHES}, if it is not given."
)
@data_option(": its batches are compared, without labels, and MODEL is compiled for the first.")
@LIMIT
def verify_command(
    request: Request, *, as_json: bool, batches: int | None, data: str | None, limit: int | None
) -> Exit:
    """Compile MODEL and compare it with the original on random inputs of several batch sizes, or on --data.

    The first random batch is of the given shapes; then the batch size changes, unless --dynamic-shapes none.
    """
    with stdout_kept(as_json), progress() as told:
        if data is None:
            if limit is not None:
                raise UsageError("--limit is of --data", hint="--batches is how many random ones")
            made, found = _on_random_batches(request, batches or RANDOM_BATCHES, told)
        else:
            refuse_beside_data(**{"--shape": request.shape, "--input": request.picture, "--batches": batches})
            loader = load(data, request.seed)
            made = make(request, told, loader)
            found = verify(made.model, made.compiled, loader, limit=limit, progress=told)
    show({**made.to_dict(request), **found.to_dict()}, str(found), as_json=as_json)
    say_randomized(request, made)
    if not as_json:
        say_notices(made)
    return Exit.FINE if found else Exit.WRONG_ANSWER


def _on_random_batches(request: Request, count: int, told: Progress) -> tuple[Made, Verification]:
    if not request.shape and request.picture is None:
        raise UsageError("verify needs inputs", hint="--shape 1x3x224x224, once per argument, --input or --data")
    made = make(request, told)
    try:
        return made, verify_calls(made.model, made.compiled, _batches(request, made, count), count, told)
    except InputError as error:
        if request.dynamic_shapes != "none":
            error.hint = f"{error.hint}; --dynamic-shapes none keeps the batch size"
        raise


def _batches(request: Request, made: Made, count: int) -> Iterator[Call]:
    given = made.shapes[0].sizes[0]
    sizes = [given] if request.dynamic_shapes == "none" else [given, *(size for size in BATCHES if size != given)]
    for index in range(count):
        size = sizes[index % len(sizes)]
        shapes = [shape.with_batch(given, size) for shape in made.shapes]
        yield draw(shapes, request.seed + index, made.picture if index == 0 else None)


@cli.command("passes", short_help="List the passes that are installed.", epilog=EXIT_CODES)
@JSON
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
@JSON
def doctor_command(as_json: bool) -> Exit:
    """Say what is installed and works; each thing is tried. Fails where something that fxopt needs does not work."""
    from rich.table import Table
    from rich.text import Text

    from fxopt.doctor import examine

    with stdout_kept(as_json), progress() as told:
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
