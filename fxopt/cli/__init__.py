"""The command `fxopt`: compile, diff, explain, verify, evaluate, passes, doctor, bench.

Results go to standard output, notes and progress to standard error; with --json only JSON goes to standard output,
errors too. Exit codes are in `fxopt.terminal`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from fxopt.cli.bench import bench_command
from fxopt.cli.commands import cli
from fxopt.cli.evaluate import evaluate_command
from fxopt.terminal import Exit, report_error

cli.add_command(bench_command)
cli.add_command(evaluate_command)


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
