"""The compiled module: an nn.Module for inference with one specialisation per input signature.

A signature is the arguments' structure and constants, each tensor's sizes, strides, dtype, device and whether it
requires grad, and torch's state (gradients, inference mode, autocast, threads). Specialisations are kept in a bounded
cache; making one is serialised by a lock, running them is not.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from fxopt import exporting, ir, memory, onnx_model, ops, session
from fxopt.capture import Inputs
from fxopt.errors import StaleWeightsError, UsageError
from fxopt.looking import Shown, presentable
from fxopt.program import Specialisation
from fxopt.signature import call_key

#: How many signatures a module remembers.
MOST_SPECIALISATIONS = 32


class CompiledModule(Shown):
    """What `fxopt.compile` returns: the same function as the original in eval mode, faster.

    Its parameters are frozen: a result requires grad only where an input does. It shares with the caller's model the
    tensors that it did not change; after a write to one of those a call raises StaleWeightsError.
    """

    _lock: threading.RLock
    _ready: OrderedDict[Any, Specialisation]
    _versions: tuple[tuple[torch.Tensor, int], ...]

    def __init__(self, work: session.Session) -> None:
        super().__init__()
        self.training = False
        object.__setattr__(self, "_session", work)
        object.__setattr__(self, "_lock", threading.RLock())
        object.__setattr__(self, "_ready", OrderedDict())
        object.__setattr__(self, "_versions", ())
        self._remember()

    # -- calling -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the specialisation for these arguments, making it first where there is none.

        Raises InputError where the model does not take them, StaleWeightsError where a shared weight was written.
        """
        leaves: Sequence[Any] = args
        spec: Any = None
        if kwargs or not all(type(argument) is torch.Tensor for argument in args):  # else there is nothing to flatten
            leaves, spec = pytree.tree_flatten((args, kwargs))
        try:
            key = call_key(leaves, spec)
            ready = self._ready.get(key)
        except (TypeError, RuntimeError):  # an argument that cannot be a key is refused by name in `_specialise`
            key = ready = None
        if ready is None:
            ready = self._specialise(args, kwargs, key)
        for tensor, version in self._versions:
            if tensor._version != version:
                self._raise_stale()
        results = ready.run(*[leaf for leaf in leaves if isinstance(leaf, torch.Tensor)])
        return pytree.tree_unflatten(results, ir.interface(ready.program.captured.module).out_spec)

    def _specialise(self, args: tuple[Any, ...], kwargs: dict[str, Any], key: Any) -> Specialisation:
        with self._lock:
            if key is not None and key in self._ready:
                return self._ready[key]
            self._check_versions()
            made = self._session.specialise(Inputs.flatten(args, kwargs))
            if key is not None:  # what cannot be a key, and is taken all the same, is prepared for each call
                self._ready[key] = made
            while len(self._ready) > MOST_SPECIALISATIONS:
                self._ready.popitem(last=False)
            self._remember()
            memory.give_back()
            return made

    def _remember(self) -> None:
        object.__setattr__(self, "_versions", self._session.shared_versions())

    def _check_versions(self) -> None:
        if any(tensor._version != version for tensor, version in self._versions):
            self._raise_stale()

    def _raise_stale(self) -> None:
        names = [
            name
            for name, tensor in self._session.shared_tensors().items()
            if any(tensor is held and tensor._version != version for held, version in self._versions)
        ]
        raise StaleWeightsError(
            f"the original model's {', '.join(names[:3]) or 'weights'} changed after it was compiled",
            hint="a compiled module is a snapshot that shares what it did not change: call fxopt.compile again",
        )

    def discard_original(self) -> None:
        """Lets go of the original and of all that only a new signature would need, for a caller who lets go of it, too.

        The calls made so far go on working, and hold no more than the weights as their kernels read them. A call of
        another signature, a look at the graphs or tensors, a copy or conversion raises UsageError from then on.
        """
        with self._lock:
            if not self._session.discarded:
                object.__setattr__(self, "_versions", self._session.discard())
                memory.give_back()

    # -- looking -----------------------------------------------------------------------------------------------------

    @property
    def graph_module(self) -> fx.GraphModule:
        """The rewritten graph in plain ATen, exportable anywhere."""
        module, _ = ir.copy(self._shown().after)
        ops.decompose_all(module)
        return presentable(module)

    def exported(self) -> ExportedProgram:
        """The rewritten graph as a program of torch.export, in plain ATen, with the model's signature and structures.

        It has tensors of its own, and leaves open the sizes that the capture did; constants of the call (numbers, None)
        are constants of the program. It is compared with the original on stand-ins for the inputs, unless `verify` is
        False. Raises UsageError where shapes are not known yet, ExportError, VerificationError.
        """
        with self._lock:
            self._check_versions()
            made = exporting.exported(self._shown())
            self._remember()
        return made

    def to_onnx(self, path: str | Path, *, opset: int | None = None) -> None:
        """Writes the rewritten graph as an ONNX model, through `exported` and torch.onnx.

        `opset` is the version of ONNX's operators, by default torch's. Inputs and outputs are named as the model names
        them, an open batch is the axis "batch". Weights above 1.8 GB are in a file of their own beside `path`. Raises
        what `exported` raises, UsageError where the packages of the extra `onnx` are missing, and ExportError where
        ONNX lacks an operator.
        """
        with self._lock:
            self._check_versions()
            onnx_model.write(self._shown(), path, opset)
            self._remember()

    def __repr__(self) -> str:
        report = self._session.report
        return (
            f"CompiledModule({report.model}: {report.before} -> {report.after} nodes, "
            f"{len(report.rewrites)} rewrites, backend {report.backend})"
        )

    def _shown(self) -> session.Session:
        """The session, its tensors as they are for a caller to see."""
        with self._lock:
            self._session.refuse_discarded("a look at the graphs or tensors needs")
            self._session.show()
        return self._session

    # -- being an nn.Module ------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> CompiledModule:
        """Refuses training mode (UsageError): batch norms are folded away."""
        if mode:
            raise UsageError(
                "a compiled module is for inference: its norms are folded and its parameters frozen",
                hint="train the original model, then compile it again",
            )
        return self

    def named_modules(
        self, memo: set[torch.nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Module]]:
        """This module, then the containers that hold the compiled graph's tensors under the model's names."""
        memo = set() if memo is None else memo
        yield prefix, self
        for name, module in self._shown().after.named_modules(memo, "", remove_duplicate):
            if name:
                yield f"{prefix}.{name}" if prefix else name, module

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The frozen parameters of the compiled graph, folded ones among them, under the model's names."""
        yield from self._shown().after.named_parameters(prefix, recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The buffers of the compiled graph under the model's names."""
        yield from self._shown().after.named_buffers(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The tensors of the compiled graph under the model's names; folded ones end in `_folded`."""
        return cast("dict[str, Any]", self._shown().after.state_dict(*args, **kwargs))

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused (UsageError): a compiled module is a snapshot."""
        raise UsageError(
            "a compiled module does not load weights: its own are folded",
            hint="load them into the original model, then compile it again",
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> CompiledModule:
        """`.to()`, `.half()`, `.cuda()`: the original is converted, and compiled again at the next call."""
        with self._lock:
            self._session.refuse_discarded("a conversion needs")
            if self._session.converts(fn):
                self._session.convert(fn)
                self._ready.clear()
                self._remember()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledModule:
        with self._lock:
            twin = CompiledModule(self._session.clone(memo))
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        with self._lock:
            return (_restore, (self._session.state(),))


def _restore(state: dict[str, Any]) -> CompiledModule:
    return CompiledModule(session.Session.from_state(state))
