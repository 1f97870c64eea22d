"""The command `fxopt evaluate`: a model and its compiled twin over labelled data, and whether it lost too much."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import click
import torch.distributed as dist

from fxopt.cli.making import make, say_notices, say_randomized, stdout_kept
from fxopt.cli.options import LIMIT, Request, compiling, data_option
from fxopt.evaluation.evaluate import LOSSES, evaluate
from fxopt.models import load
from fxopt.terminal import EXIT_CODES, Exit, note, progress, show


@click.command("evaluate", short_help="Score MODEL and its compiled twin on labelled data.", epilog=EXIT_CODES)
@compiling
@data_option(" with labels.", required=True)
@click.option(
    "--loss", "losses", multiple=True, type=click.Choice([*LOSSES, "kl"]), help="Once per loss; all, if none is named."
)
@LIMIT
@click.option("--max-drop", type=float, help="Fail where top-1 drops by more: 0.01 is one example of a hundred.")
def evaluate_command(
    request: Request, *, as_json: bool, data: str, losses: tuple[str, ...], limit: int | None, max_drop: float | None
) -> Exit:
    """Compile MODEL and score it beside the original on labelled data: top-1, top-5, agreement, losses.

    Under torchrun the processes share the data, and the first one says what all of them found.
    """
    with _group() as group:
        return _evaluate(request, data, losses, limit, max_drop, group, as_json=as_json)


@contextlib.contextmanager
def _group() -> Iterator[dist.ProcessGroup | None]:
    """The group of the processes that torchrun started; None where it did not."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield None
        return
    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _evaluate(
    request: Request,
    data: str,
    losses: tuple[str, ...],
    limit: int | None,
    max_drop: float | None,
    group: dist.ProcessGroup | None,
    *,
    as_json: bool,
) -> Exit:
    with stdout_kept(as_json), progress() as told:
        made = make(request, told)
        loader = load(data, request.seed)
        chosen = losses or (*LOSSES, "kl")
        found = evaluate(
            made.model, made.compiled, loader, losses=chosen, limit=limit, progress=told, process_group=group
        )
    failed = max_drop is not None and found.drop > max_drop
    if group is not None and dist.get_rank(group) > 0:
        return Exit.WRONG_ANSWER if failed else Exit.FINE
    show({**made.to_dict(request), **found.to_dict(), "ok": not failed}, found, as_json=as_json)
    say_randomized(request, made)
    if not as_json:
        say_notices(made)
    if failed:
        note(f"top-1 dropped by {found.drop:.4g}, and --max-drop is {max_drop:g}")
    return Exit.WRONG_ANSWER if failed else Exit.FINE
