"""The compiled algebra, trainable: the rewritten graph in plain ATen, with folded weights as parameters."""

from __future__ import annotations

import copy
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fxopt import gradients, ir, ops, session
from fxopt.capture import Inputs
from fxopt.errors import FxoptNotice, InputError, UsageError, VerificationError
from fxopt.looking import Shown
from fxopt.pipeline import PassResult, flat, only
from fxopt.program import describe
from fxopt.signature import call_key
from fxopt.trained import Folds
from fxopt.trial import seeded

#: How many kinds of calls a module remembers as fitting.
MOST_KNOWN = 1000


class TrainableModule(Shown):
    """What `fxopt.compile(..., trainable=True)` returns: the model in eval mode, rewritten, with gradients.

    `graph_module` is the graph that runs, a function of the flat tensors of a call, and holds the parameters, its own:
    those that no rewrite touched under the model's names, folded ones under names that end in `_folded` or `_merged`.
    Norms stay folded and dropout off in training, too. `fxopt.compile(tuned, args)` makes it fast again once it is
    trained. The other graphs are those of the model when it was compiled.
    """

    graph_module: fx.GraphModule
    _fitting: set[Any]
    _lock: threading.RLock

    def __init__(self, work: session.Session, graph_module: fx.GraphModule) -> None:
        super().__init__()
        self.training = False
        object.__setattr__(self, "_session", work)
        object.__setattr__(self, "_fitting", set())
        object.__setattr__(self, "_lock", threading.RLock())
        self.graph_module = graph_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph. Raises InputError where these arguments need another capture than the one that is trained."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if self.checked and not torch.compiler.is_compiling():  # who captures this has guards of its own
            self._check(args, kwargs, leaves, spec)
        results = self.graph_module(*[leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        return pytree.tree_unflatten(list(results), ir.interface(self._session.before).out_spec)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], spec: pytree.TreeSpec) -> None:
        key = call_key(leaves, spec)
        if key in self._fitting:
            return
        inputs, program = Inputs.flatten(args, kwargs), self._session.programs[0]
        with self._lock, _disable_current_modes():  # who logs operators logs those of the graph alone
            refusal = program.guards.refusal(inputs)
            if refusal is None:
                difference = self._session._disagreement(program.captured, inputs)
                refusal = None if difference is None else f"the model takes another branch here: {difference}"
            if refusal is not None:
                other = program.guards.autocast not in (None, ir.autocast())
                hint = "compile it under the same autocast" if other else "compile it with such inputs"
                raise InputError(
                    f"what is trained is one graph, which does not fit this call: {refusal}",
                    hint=f"it was given {describe(inputs)}; {hint}",
                )
            if len(self._fitting) > MOST_KNOWN:
                self._fitting.clear()
            self._fitting.add(key)

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
        twin.training = self.training
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
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise UsageError("a parameter of the model is an inference tensor", hint="build it outside inference_mode")
    parameters = [work.original.get_parameter(name).requires_grad_() for name in names]
    work.trained = frozenset(map(ir.identity, parameters))
    with torch.inference_mode(False), torch.enable_grad():
        work.specialise(inputs)  # what the model refuses, and what cannot be captured, is said here
        compared: set[tuple[str, str]] = set()
        if given.verify:
            found, compared = gradients.changed_by(work.original, names, inputs, given)
            if found:
                _without(work, {result.name: result for result in found}, inputs)
        program = work.programs[0]
        Folds.forget(program.module)
        own = {str(node.target) for node in program.captured.module.graph.find_nodes(op="get_attr")}
        made = TrainableModule(work, _plain(program.module, own))
        if given.verify:
            _verify(made, inputs)
            applied = dict.fromkeys((rewrite.pass_name, rewrite.rule) for rewrite in work.report.rewrites)
            work.report.notices += [
                f"{name} ({rule}) found nothing in float64, where gradients are compared: those that it leaves are not"
                for name, rule in applied
                if (name, rule) not in compared
            ]
        return made


def _verify(made: TrainableModule, inputs: Inputs) -> None:
    """Raises VerificationError where what is trained does not give the original's answer."""
    work = made._session
    with work._kept(made.graph_module) as kept:
        actual = kept.apart(seeded(made.graph_module, inputs))
    verdict = work._compare(work._run_original(inputs), actual, inputs)
    if not verdict.ok:
        raise VerificationError(f"the graph to train gives another answer than the model: {verdict.reason}")


def _without(work: session.Session, guilty: dict[str, PassResult], inputs: Inputs) -> None:
    """Compiles again without the passes that change a gradient, which the report names."""
    given = work.options
    work.options = replace(given, passes=only(given.passes, lambda current: current.name not in guilty))
    work.programs.clear()
    work.start_empty([])
    work.specialise(inputs)
    rows = {result.name: result for result in (*work.report.passes, *guilty.values())}
    work.report.passes = [rows[current.name] for current in flat(given.passes)]


def _plain(rewritten: fx.GraphModule, own: Container[str]) -> fx.GraphModule:
    """A rewritten graph in ATen, a function of flat tensors, with tensors of its own; those that share memory share it.

    Of what is not trained only parameters of the model's `own` are parameters; what passes made is a buffer.
    """
    module, _ = ir.copy(rewritten)
    ops.decompose_all(module)
    held = ir.tensors(module)
    readers = Counter(map(ir.place, held.values()))
    storages: dict[int, Any] = {}
    for path, tensor in held.items():
        kept = isinstance(tensor, torch.nn.Parameter) and (tensor.requires_grad or path in own)
        twin = _in_copied_memory(tensor, storages) if readers[ir.place(tensor)] > 1 else tensor.detach().clone()
        ir.delete_attribute(module, path)
        ir.set_attribute(module, path, torch.nn.Parameter(twin, tensor.requires_grad) if kept else twin)
    for node in module.graph.nodes:
        node.meta = {}
    module.meta = {}
    module.recompile()
    return module


def _in_copied_memory(tensor: torch.Tensor, storages: dict[int, Any]) -> torch.Tensor:
    """A tensor in a copy of its storage, of which `storages` has one for all that share it."""
    storage = copy.deepcopy(tensor.untyped_storage(), storages)
    twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return twin.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
