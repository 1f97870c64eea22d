"""`fxopt.compile` and `fxopt.trace`: the front door."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxopt import exporting, plugins
from fxopt.capture import Inputs, capture_export, capture_symbolic, private_copy
from fxopt.errors import CaptureError, FxoptNotice, UsageError
from fxopt.pipeline import Progress, Step, flat, only
from fxopt.program import Options
from fxopt.rewrite import Numerics, Pass
from fxopt.runtime import CompiledModule
from fxopt.session import Session
from fxopt.signature import call_key
from fxopt.state import privatise
from fxopt.trainable import TrainableModule
from fxopt.trainable import make as make_trainable
from fxopt.training import deployed

#: How passes are named: "default", or names ("default" among them) and Pass objects in the order in which they run. An
#: inner tuple of them is a group that is repeated until none of its passes rewrites.
Passes = str | Iterable[str | Pass | tuple[str | Pass, ...]]


def choose_passes(passes: Passes = "default", disable: Iterable[str] = ()) -> tuple[Step, ...]:
    """The pipeline of `passes` without those in `disable`.

    Raises UsageError for a name that no pass has.
    """
    entries = (passes,) if isinstance(passes, str) else passes
    chosen = tuple(step for entry in entries for step in _stretch(entry))
    unwanted = {disable} if isinstance(disable, str) else set(disable)
    for name in unwanted:
        if name not in {current.name for current in flat(chosen)}:
            plugins.named(name)  # a name that no pass has is a mistake; one that is not chosen is not
    return only(chosen, lambda current: current.name not in unwanted)


def _stretch(entry: object) -> tuple[Step, ...]:
    """What one entry stands for: a pass, the pass of a name, the default pipeline, or a group of these."""
    if isinstance(entry, Pass):
        return (entry,)
    if isinstance(entry, (tuple, list)):
        return (flat(step for part in entry for step in _stretch(part)),)
    if not isinstance(entry, str):
        raise UsageError(f"{entry!r} is no pass", hint="give a name that fxopt.passes() lists, or a fxopt.Pass")
    return plugins.default_pipeline() if entry == "default" else (plugins.named(entry),)


@overload
def compile(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    passes: Passes = "default",
    disable: Sequence[str] = (),
    backend: str = "auto",
    numerics: Numerics = "reassociate",
    verify: bool | str = True,
    dynamic_shapes: str | None = "batch",
    trainable: Literal[False] = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> CompiledModule: ...


@overload
def compile(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    passes: Passes = "default",
    disable: Sequence[str] = (),
    backend: str = "auto",
    numerics: Numerics = "reassociate",
    verify: bool | str = True,
    dynamic_shapes: str | None = "batch",
    trainable: Literal[True],
    strict: bool = False,
    progress: Progress | None = None,
) -> TrainableModule: ...


def compile(
    model: torch.nn.Module | ExportedProgram,
    args: tuple[Any, ...] | torch.Tensor | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    passes: Passes = "default",
    disable: Sequence[str] = (),
    backend: str = "auto",
    numerics: Numerics = "reassociate",
    verify: bool | str = True,
    dynamic_shapes: str | None = "batch",
    trainable: bool = False,
    strict: bool = False,
    progress: Progress | None = None,
) -> CompiledModule | TrainableModule:
    """The same function as `model` in eval mode, faster.

    An ExportedProgram stands for the module that it was exported from; its own example inputs are the default.
    `args` and `kwargs` are example inputs, of any structure. With them everything is done now: captured by torch.export
    with the first dimension open (`dynamic_shapes`: "batch", "all" or None), rewritten, lowered for these inputs, and
    verified on them. Without, the model is traced symbolically and finished at its first call.

    `passes` is "default" or a sequence of names ("default" among them) and Pass objects, where an inner tuple is a
    group that is repeated until none of its passes rewrites; `disable` leaves out some.
    `backend` is "auto" or the name of one. `numerics` is what is allowed: "bitwise", "reassociate" or "approximate".
    `verify` compares the result with the original on first use; "each" compares after every pass. With `strict` a pass
    that fails or changes the answer raises, instead of being rolled back and named in the report.
    `trainable` stops before lowering: what is returned runs the rewritten graph in ATen, on parameters of its own that
    require grad where the model's do, or where they are folded from such. It needs example inputs. With `verify`,
    gradients are compared with the model's, through what was folded, in float64.
    `progress(stage, done, total)` is called as work goes on.

    Raises UsageError for what is not a module or an option, CaptureError where the model cannot be captured,
    InputError where it does not take the inputs, VerificationError rather than a wrong answer.
    """
    if numerics not in ("bitwise", "reassociate", "approximate"):
        raise UsageError(f"numerics is {numerics!r}", hint='it is "bitwise", "reassociate" or "approximate"')
    if verify not in (True, False, "each"):
        raise UsageError(f"verify is {verify!r}", hint='it is True, False or "each"')
    if dynamic_shapes not in ("batch", "all", None):
        raise UsageError(f"dynamic_shapes is {dynamic_shapes!r}", hint='it is "batch", "all" or None')
    name = ""
    if isinstance(model, ExportedProgram):
        name = type(model).__name__
        if args is None and kwargs is None and model.example_inputs is not None:
            args, kwargs = model.example_inputs
        model = exporting.taken(model)
    model = deployed(model)
    name = name or type(model).__name__
    original = private_copy(model)
    if backend != "auto":
        plugins.backend(backend)
    for broken in plugins.broken().values() if strict else ():
        raise broken
    options = Options(choose_passes(passes, disable), backend, numerics, verify, dynamic_shapes, strict, progress)
    notices = []
    if any(module.training for module in model.modules()):
        notices.append("the model was in training mode; it is compiled as in eval mode, and itself left as it was")
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise UsageError(
            "the model is on the meta device: it has shapes but no values",
            hint="load its weights onto a device first (to_empty, then load_state_dict)",
        )
    if trainable and args is None and kwargs is None:
        raise UsageError("trainable=True needs example inputs", hint="fxopt.compile(model, (x,), trainable=True)")
    if trainable and backend not in ("auto", "aten"):
        raise UsageError(f"trainable=True stops before lowering: it takes no backend {backend!r}")
    session = Session(original, name, replace(options, backend="aten") if trainable else options)
    given, named = _examples(args), dict(kwargs or {})
    made: CompiledModule | TrainableModule
    if trainable:
        made = make_trainable(model, session, given, named)
    elif args is None and kwargs is None:
        try:
            session.start_symbolic()
        except CaptureError as error:
            notices.append(f"captured at the first call instead of now: {error.message}")
            session.start_empty([])
        made = CompiledModule(session)
    else:
        made = CompiledModule(session)
        with torch.no_grad():
            made._specialise(given, named, call_key(*pytree.tree_flatten((given, named))))
    session.report.notices[:0] = notices
    for notice in notices:
        warnings.warn(notice, FxoptNotice, stacklevel=2)
    return made


def _examples(args: Any) -> tuple[Any, ...]:
    if args is None or isinstance(args, (tuple, list)):
        return tuple(args or ())
    if isinstance(args, torch.Tensor):
        return (args,)
    raise UsageError(
        f"the example inputs are {type(args).__name__}, not the tuple of the call's arguments",
        hint="fxopt.compile(model, (x,)), or fxopt.compile(model, (x,), {'mask': mask})",
    )


def trace(
    model: torch.nn.Module, example_inputs: tuple[Any, ...] | torch.Tensor | None = None, **kwargs: Any
) -> fx.GraphModule:
    """The IR alone: the model captured in normal form (see docs/ir.md), symbolically or, with inputs, by torch.export.

    Raises UsageError and CaptureError as `compile` does.
    """
    original = private_copy(model)
    if example_inputs is None and not kwargs:
        captured = capture_symbolic(original)
    else:
        given = _examples(example_inputs)
        captured = capture_export(original, Inputs.flatten(given, kwargs))
    privatise(captured, original, [])
    captured.module.recompile()
    return captured.module


__all__ = ["FxoptNotice", "choose_passes", "compile", "trace"]
