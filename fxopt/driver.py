"""The driver: runs one pass over a module, its function or, by a worklist, its rules until none of them applies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch

from fxopt import buffers
from fxopt.edit import Editor
from fxopt.errors import ConvergenceError, FxoptError, RewriteError
from fxopt.journal import Journal
from fxopt.pattern import NoMatch
from fxopt.rewrite import Pass, Rewriter, Rule


def apply(current: Pass, editor: Editor, journal: Journal, *, budget: int | None = None) -> None:
    """Runs one pass over a module: its function, or its rules until none of them applies.

    Raises ConvergenceError when a rule goes on beyond the budget (default: ten rewrites per node, and a hundred), and
    RewriteError when a rewrite fails.
    """
    rewriter = Rewriter(editor, current, journal)
    with torch.enable_grad():  # what is computed from trained parameters is known by requiring grad
        if current.run is not None:
            _run_function(current.run, rewriter)
        else:
            _run_rules(current.rules, rewriter, 10 * len(editor.graph.nodes) + 100 if budget is None else budget)
    for buffer, number, why in buffers.settle(editor):
        rewriter.decline(buffer, buffers.report(buffers.parts(buffer)[number], why), rule=f"part {number}")


def _run_function(run: Callable[[Rewriter], None], rewriter: Rewriter) -> None:
    current = rewriter.current
    try:
        run(rewriter)
    except FxoptError:
        raise
    except Exception as error:
        raise RewriteError(
            f"the pass raised {type(error).__name__}: {error}",
            pass_name=current.name,
            hint=f"the pass {current.name!r} is at fault; disable=({current.name!r},) leaves it out",
        ) from error


def _run_rules(rules: Iterable[Rule], rewriter: Rewriter, limit: int) -> None:
    by_root: dict[Any, list[Rule]] = {}
    for rule in rules:
        for target in rule.pattern.roots():
            by_root.setdefault(target, []).append(rule)
    queue = deque(node for node in rewriter.graph.nodes if node.target in by_root)
    waiting = set(queue)
    count = 0
    while queue:
        node = queue.popleft()
        waiting.discard(node)
        if node._erased:
            continue
        for rule in by_root.get(node.target, ()):
            result = rewriter.attempt(rule, node)
            if isinstance(result, NoMatch):
                continue
            count += 1
            if count > limit:
                raise ConvergenceError(
                    f"the rule did not come to an end within {limit} rewrites",
                    pass_name=rewriter.current.name,
                    rule=rule.name,
                    node=result,
                    hint="its rewrite gives something that it, or another rule of the pass, matches again",
                )
            near = [result, *result.users, *result.all_input_nodes]
            near += [reader for user in result.users for reader in user.users]
            for neighbour in near:
                if neighbour.target in by_root and neighbour not in waiting:
                    queue.append(neighbour)
                    waiting.add(neighbour)
            break
