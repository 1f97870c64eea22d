"""Compares gradients: those of a rewritten graph with the original's, through what was folded, in float64.

Rounding moves a ReLU's input across zero here and there, and its gradient with it, so in float32 gradients of two right
graphs differ visibly. In float64 they agree to seven digits and more where the rewrites are right (PyTorch's hardswish
has its constants in float32).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxopt import ir, normalize, plugins, trained
from fxopt.capture import Inputs
from fxopt.compare import Verdict, relative_error
from fxopt.errors import VerificationError
from fxopt.looking import Shown
from fxopt.lowering.weights import Weights
from fxopt.pipeline import PassManager, PassResult
from fxopt.program import KEPT, Options
from fxopt.session import Session
from fxopt.trained import Folds
from fxopt.trial import in_float64, seeded

#: How far a gradient may be from the original's, by its own largest number, or a millionth of the largest of all.
TOLERANCE = 1e-7
NEGLIGIBLE = 1e-6


def changed_by(
    original: torch.nn.Module, names: Sequence[str], inputs: Inputs, options: Options
) -> tuple[list[PassResult], set[tuple[str, str]]]:
    """The passes that fail on a model in float64 or change a gradient there; and the rules, by pass, that are right.

    `original` is a model's private copy, `names` those of its parameters that are trained. Raises VerificationError
    where the model does not run in float64 or has no gradients, and where the captured graph has others than the model.
    """
    wide = in_float64(original)
    for part in wide.modules():
        if isinstance(part, Shown):
            part.checked = False
    parameters = [wide.get_parameter(name).requires_grad_() for name in names]
    call = inputs.with_tensors(tuple(t.double() if t.is_floating_point() else t for t in inputs.tensors))
    session = Session(wide, type(wide).__name__, replace(options, backend="aten"))
    session.trained = frozenset(map(ir.identity, parameters))
    floats = [n for n, t in zip(call.tensor_names, call.tensors, strict=True) if trained.takes_gradient(t)]
    labels = [*floats, *names]

    def gradients(run: Callable[..., Sequence[Any]], leaves: Sequence[torch.Tensor], folds: Folds | None) -> list[Any]:
        return seeded(trained.gradients_of(run, leaves, folds), call)[: len(labels)]

    try:
        with session._kept():
            expected = gradients(session._flat_original(call), parameters, None)
        captured = session._capture(call, options.dynamic_shapes)
    except Exception as error:
        said = str(error).splitlines()[0]
        raise VerificationError(
            f"gradients are compared in float64, where the model does not run, or has none: {said}",
            hint="verify=False trains without the comparison",
        ) from error
    held = {ir.identity(tensor): tensor for tensor in ir.tensors(captured.module).values()}
    leaves = [held.get(ir.identity(parameter), parameter) for parameter in parameters]

    def judge(module: fx.GraphModule) -> Verdict:
        twin, _ = ir.copy(module)
        try:
            with session._kept(twin):
                run = plugins.backend("aten").build(twin, Weights())
                actual = gradients(run, leaves, Folds.of(module))
        except RuntimeError as error:
            return Verdict(False, math.inf, (), f"its gradients cannot be computed: {str(error).splitlines()[0]}")
        return _compare(expected, actual, labels)

    module, _ = ir.copy(captured.module)
    normalize.normalize(module)
    verdict = judge(module)
    if not verdict.ok:
        raise VerificationError(
            f"the captured graph has other gradients than the model: {verdict.reason}",
            hint="a backward pass of the model's own (autograd.Function, a hook) is not captured; train the model",
        )
    each = options.verify == "each"
    manager = PassManager(options.passes, numerics=options.numerics, strict=options.strict, judge=judge, each=each)
    run = manager.run(module)
    compared = {(rewrite.pass_name, rewrite.rule) for rewrite in run.journal.rewrites}
    return [result for result in run.results if result.status not in KEPT], compared


def _compare(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor], names: Sequence[str]) -> Verdict:
    """Whether gradients agree."""
    largest = max((float(gradient.abs().max()) for gradient in expected if gradient.numel()), default=0.0)
    worst = 0.0
    for name, left, right in zip(names, expected, actual, strict=True):
        if left.numel() == 0:
            continue
        error = relative_error(left, right)
        own = float(left.abs().max())
        if own < NEGLIGIBLE * largest:
            distance = float((left - right).abs().max())
            error = distance / (NEGLIGIBLE * largest)
        worst = max(worst, error)
        if not error <= TOLERANCE:
            return Verdict(False, error, (), f"the gradient of {name} is off by {error:.1e}")
    return Verdict(True, worst, ())
