"""How the command line speaks: results to standard output, everything else to standard error, exit codes."""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import click
from rich.console import Console, RenderableType

from fxopt.errors import CaptureError, FxoptError, UsageError, VerificationError
from fxopt.pipeline import Progress


class Exit(IntEnum):
    """What the process returns."""

    FINE = 0
    WRONG_ANSWER = 1
    USAGE = 2
    NOT_CAPTURED = 3
    FAILED = 4
    INTERRUPTED = 130


EXIT_CODES = """\b
Exit codes:
  0  fine
  1  wrong answer: the compiled model does not give the model's
  2  usage: an option, or a name that no model, pass, backend or layer has
  3  the model could not be captured
  4  anything else: its code raises, inputs do not fit, a plugin, drawing
"""


def show(data: Any, text: RenderableType, *, as_json: bool) -> None:
    """The result of a command, on standard output: as JSON, or for a person (120 columns where it is no terminal)."""
    try:
        if as_json:
            click.echo(json.dumps(data, indent=2, allow_nan=False))
        else:
            width = None if sys.stdout.isatty() else 120
            Console(width=width).print(text, markup=False, highlight=False, soft_wrap=isinstance(text, str))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has seen enough (`fxopt passes | head -1`). Nothing is left to say on this stream.
        sys.stdout = open("/dev/null" if sys.platform != "win32" else "nul", "w")  # noqa: SIM115 (for the process)


def note(text: str) -> None:
    """Something beside the result, on standard error."""
    click.echo(f"note: {text}", err=True)


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A bar on standard error while long work goes on, where that is a terminal; gone when the work is done."""
    if not sys.stderr.isatty():
        yield lambda stage, done, total: None
        return
    from rich import progress as bars

    columns = (
        bars.SpinnerColumn(),
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeElapsedColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("starting", total=None)

        def advance(stage: str, done: int, total: int) -> None:
            # "done" ends one round of several; the bar waits for the next.
            if stage != "done":
                shown.update(task, description=stage, completed=done, total=total or None)

        yield advance


_PLACES = ("pass", "rule", "node", "line", "hint")


def describe(error: BaseException) -> tuple[Exit, dict[str, Any]]:
    """The exit code for an error, and the error as data."""
    told: dict[str, Any] = {"type": type(error).__name__, "message": "", **dict.fromkeys(_PLACES)}
    if isinstance(error, FxoptError):
        code = Exit.FAILED
        for kind, own in (
            (VerificationError, Exit.WRONG_ANSWER),
            (UsageError, Exit.USAGE),
            (CaptureError, Exit.NOT_CAPTURED),
        ):
            if isinstance(error, kind):
                code = own
        places = (error.pass_name, error.rule, error.node_name, error.line, error.hint)
        told |= {"message": error.message, **dict(zip(_PLACES, places, strict=True))}
    elif isinstance(error, click.ClickException):
        code = Exit.USAGE if isinstance(error, click.UsageError) else Exit.FAILED
        told["message"] = error.format_message()
    elif isinstance(error, (click.Abort, KeyboardInterrupt)):
        code, told["message"] = Exit.INTERRUPTED, "interrupted"
    else:
        code, told["message"] = Exit.FAILED, str(error)
    return code, {**told, "exit_code": int(code)}


def report_error(error: BaseException, *, as_json: bool) -> Exit:
    """Says what went wrong, on standard error or as JSON on standard output; returns the exit code.

    What fxopt did not raise on purpose is shown with its traceback.
    """
    code, told = describe(error)
    expected = isinstance(error, (FxoptError, click.ClickException, click.Abort, KeyboardInterrupt, OSError))
    if not expected:
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    if as_json:
        show({"error": told}, "", as_json=True)
    elif isinstance(error, click.ClickException):
        error.show()
    elif expected:
        click.echo(f"Error: {error if str(error) else told['message']}", err=True)
    else:
        click.echo("Error: this is a bug in fxopt, in a plugin or in the model; a report is welcome", err=True)
    return code
