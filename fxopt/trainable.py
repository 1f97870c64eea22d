"""The compiled algebra, trainable: the rewritten graph in plain ATen, with folded weights as parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxopt import gradients, ir, ops, session
from fxopt.capture import Inputs
from fxopt.errors import FxoptNotice, InputError, UsageError
from fxopt.looking import Shown, presentable
from fxopt.lowering.backend import Setting
from fxopt.pipeline import flat, only
from fxopt.program import Options, Program, describe
from fxopt.signature import proof_state
from fxopt.trained import Folds


class TrainableModule(Shown):
    """What `fxopt.compile(..., trainable=True)` returns: the model in eval mode, rewritten, with gradients.

    `graph_module` is the graph that runs, and holds the parameters, its own: those that no rewrite touched under the
    model's names, folded ones under names that end in `_folded` or `_merged`. Norms stay folded and dropout off in
    training, too. `fxopt.compile(tuned, args)` makes it fast again once it is trained.
    """

    graph_module: fx.GraphModule
    _fitting: set[Any]

    def __init__(self, work: session.Session, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.training = False
        object.__setattr__(self, "_session", work)
        object.__setattr__(self, "_fitting", set())
        self.graph_module = graph_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph. Raises InputError where these arguments need another capture than the one that is trained."""
        self._check(Inputs.flatten(args, kwargs))
        return self.graph_module(*args, **kwargs)

    def _check(self, inputs: Inputs) -> None:
        program: Program = self._session.programs[0]
        refusal = program.guards.refusal(inputs)
        state = None if refusal else proof_state(program, inputs, Setting.now(inputs.tensors))
        if refusal is None and state not in self._fitting:
            difference = self._session._disagreement(program.captured, inputs)
            refusal = None if difference is None else f"the model takes another branch here: {difference}"
        if refusal is not None:
            raise InputError(
                f"what is trained is one graph, which does not fit this call: {refusal}",
                hint=f"it was given {describe(inputs)}; compile with such inputs, or dynamic_shapes='all'",
            )
        self._fitting.add(state)

    def train(self, mode: bool = True) -> TrainableModule:
        """Sets the flag, which changes nothing: says so (FxoptNotice) where somebody may count on it."""
        if mode:
            notice = "a compiled module trains as in eval mode: its norms stay folded, and dropout is off"
            warnings.warn(notice, FxoptNotice, stacklevel=2)
        self.training = mode
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TrainableModule:
        """Refuses (UsageError) what would give the tensors another dtype or device: the graph was made for theirs."""
        for name, tensor in (*self.graph_module.named_parameters(), *self.graph_module.named_buffers()):
            with torch.no_grad():
                after = fn(tensor)
            if (after.dtype, after.device) != (tensor.dtype, tensor.device):
                raise UsageError(
                    f"{name} cannot become {after.dtype} on {after.device}: the graph was made for {tensor.dtype} on "
                    f"{tensor.device}",
                    hint="convert the original model, then compile it",
                )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainableModule:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own, of copying what it keeps of a signature
            memo[id(self)] = twin = TrainableModule(self._session, copy.deepcopy(self.graph_module, memo))
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, (self._session.state(), self.graph_module))

    def __repr__(self) -> str:
        count = sum(parameter.requires_grad for parameter in self.parameters())
        report = self.report
        return f"TrainableModule({report.model}: {report.before} -> {report.after} nodes, {count} trained parameters)"


def _restore(state: dict[str, Any], graph_module: fx.GraphModule) -> TrainableModule:
    return TrainableModule(session.Session.from_state(state), graph_module)


def make(
    model: torch.nn.Module, work: session.Session, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> TrainableModule:
    """Captures, rewrites and verifies a model, gradients included, and makes its graph trainable.

    `model` is the caller's, which says what is trained; `work` a session on its private copy. Raises UsageError where
    nothing is trained, CaptureError where the model cannot be captured, VerificationError for other gradients.
    """
    inputs, given = Inputs.flatten(args, dict(kwargs)), work.options
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise UsageError("no parameter of the model requires grad", hint="call model.requires_grad_() first")
    parameters = [work.original.get_parameter(name) for name in names]
    work.trained = frozenset(map(ir.identity, parameters))
    guilty = {}
    with torch.inference_mode(False), torch.enable_grad():
        if given.verify:
            found = gradients.changed_by(work.original, names, inputs, given)
            guilty = {result.name: result for result in found}
            work.options = _without(given, set(guilty))
        work.specialise(inputs)
        program = work.programs[0]
        rows = {result.name: result for result in (*work.report.passes, *guilty.values())}
        work.report.passes = [rows[current.name] for current in flat(given.passes)]
        Folds.forget(program.module)
    return TrainableModule(work, _plain(program.module))


def _plain(rewritten: fx.GraphModule) -> fx.GraphModule:
    """A rewritten graph in ATen, with tensors of its own, and without what only a compiler asks of a graph."""
    module, _ = ir.copy(rewritten)
    ops.decompose_all(module)
    for path, tensor in ir.tensors(module).items():
        ir.delete_attribute(module, path)
        ir.set_attribute(module, path, copy.deepcopy(tensor))
    module = presentable(module)
    for node in module.graph.nodes:
        node.meta = {}
    module.meta = {}
    return module


def _without(options: Options, guilty: set[str]) -> Options:
    return replace(options, passes=only(options.passes, lambda current: current.name not in guilty))
