"""`fxopt.verify`: a model and what was compiled of it, run on the same data and compared batch by batch.

Both run in the state of torch that the caller is in (gradients, autocast), on copies of each batch, with one seed. The
verdicts are those of `fxopt.compare`, float64 reference included.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt.agreement import copied
from fxopt.capture import Inputs, private_copy
from fxopt.capture.program import register_dataclasses
from fxopt.compare import Verdict, _json, compare
from fxopt.errors import FxoptError, InputError, UsageError
from fxopt.pipeline import Progress
from fxopt.program import describe

#: One call: positional and keyword arguments.
Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class WorstOutput:
    """One output (`output`, `output['logits']`, ...), its largest relative error, and the batch that showed it."""

    name: str
    error: float
    batch: int


@dataclass(frozen=True)
class WrongBatch:
    """A batch on which the answers differ: its number, counted from 0, what it was, and what is wrong."""

    batch: int
    inputs: str
    reason: str


@dataclass(frozen=True)
class Verification:
    """What comparing two models on `count` batches found. It is true (`assert fxopt.verify(...)`) where all agree.

    `error` is the largest max|difference| / max|expected| of any output on any batch. Where the float64 reference was
    asked, `original_error` and `compiled_error` are the largest distances from it. `notes` say what was left out.
    """

    ok: bool
    count: int
    error: float
    outputs: tuple[WorstOutput, ...]
    wrong: tuple[WrongBatch, ...] = ()
    original_error: float | None = None
    compiled_error: float | None = None
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return self.ok

    def to_dict(self) -> dict[str, Any]:
        """The result for programs: only JSON's types; an infinite error is the text "inf"."""
        return {
            "ok": self.ok,
            "count": self.count,
            "error": _json(self.error),
            "outputs": [{"name": o.name, "error": _json(o.error), "batch": o.batch} for o in self.outputs],
            "wrong": [{"batch": w.batch, "inputs": w.inputs, "reason": w.reason} for w in self.wrong],
            "original_error": _json(self.original_error),
            "compiled_error": _json(self.compiled_error),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        batches = "1 batch" if self.count == 1 else f"{self.count} batches"
        if self.ok:
            lines = [f"verified on {batches}: " + _size(self.error)]
        else:
            lines = [f"WRONG on {len(self.wrong)} of {batches}"]
            lines += [f"  batch {w.batch} ({w.inputs}): {w.reason}" for w in self.wrong[:5]]
            if len(self.wrong) > 5:
                lines.append(f"  and {len(self.wrong) - 5} more")
        if self.original_error is not None and self.compiled_error is not None:
            lines.append(f"  from float64: original {self.original_error:.1e}, compiled {self.compiled_error:.1e}")
        lines += [f"  {o.name}: {_size(o.error)}, worst in batch {o.batch}" for o in self.outputs if o.error > 0]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def verify(
    model: torch.nn.Module,
    compiled: Callable[..., Any],
    data: Any,
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compares `compiled` with `model` (as in eval mode, on a private copy) on `data`, batch by batch.

    `data` is one batch (a tensor; a tuple of positional arguments; a dict of keyword arguments) or an iterable of
    batches: a DataLoader, a list, a generator. At most `limit` batches are drawn from it. Each batch is again a tensor,
    a tuple or list of positional arguments, or a dict of keyword arguments. A single batch is passed whole. Of the
    batches of an iterable, what `forward` cannot take is left out, and `notes` say so:

    - of a dict, keys that are no parameter of `forward`;
    - of a tuple or list, entries behind the last positional parameter. A DataLoader's batches end in labels, which an
      optional parameter must not get by mistake: only the parameters without a default are filled. To give more, yield
      dicts.

    A result or an argument written in place is compared too. Raises UsageError where there is nothing to compare,
    InputError where the model itself does not take a batch, and what fxopt itself raises in `compiled`.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}", hint="it is how many batches to compare: 1 or more, or None for all")
    notes: list[str] = []
    calls, total = _batches(model, data, limit, notes)
    return replace(verify_calls(model, compiled, calls, total, progress), notes=tuple(notes))


def verify_calls(
    model: torch.nn.Module,
    compiled: Callable[..., Any],
    calls: Iterable[Call],
    total: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """`verify` on calls as `(args, kwargs)`; `total` (0: not known) is for `progress` only."""
    original = _frozen(private_copy(model))
    tally = _Tally()
    for args, kwargs in calls:
        if progress is not None:
            progress("verify", tally.count, total)
        tally.add(*_one(original, compiled, Inputs.flatten(args, kwargs), tally.count))
    if progress is not None:
        progress("done", tally.count, tally.count)
    if tally.count == 0:
        raise UsageError("the data has no batches, so nothing was verified", hint="an iterator is spent once read")
    if tally.values == 0 and not tally.wrong:
        raise UsageError(
            "every result on this data is empty, so nothing was verified", hint="give batches of at least one element"
        )
    return tally.result()


# -- data ------------------------------------------------------------------------------------------------------------

def _batches(model: torch.nn.Module, data: Any, limit: int | None, notes: list[str]) -> tuple[Iterable[Call], int]:
    """The calls that `data` stands for, and how many (0: not known). `notes` grow while the calls are drawn."""
    if isinstance(data, torch.Tensor):
        return [((data,), {})], 1
    if isinstance(data, tuple):
        return [(data, {})], 1
    if isinstance(data, Mapping):
        return [((), dict(data))], 1
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise UsageError(
            f"the data is to be tensors or batches of them, not {type(data).__name__}",
            hint="a tensor, a tuple of arguments, a dict of keyword arguments, or an iterable of those (a DataLoader)",
        )
    from torch.utils.data import DataLoader

    taken = _Taken.of(model, loader=isinstance(data, DataLoader))
    drawn = data if limit is None else itertools.islice(data, limit)
    return (taken.call(batch, notes) for batch in drawn), _length(data, limit)


def first_call(model: torch.nn.Module, data: Iterable[Any]) -> Call:
    """The call that the first batch of a loader is, without labels.

    Raises UsageError where there is none, where `forward` takes nothing of it, and for an iterator, which would have
    lost the batch for whoever reads it next.
    """
    if isinstance(data, Iterator):
        raise UsageError("the data can be read only once", hint="give a DataLoader, or a list of batches")
    notes: list[str] = []
    calls, _ = _batches(model, data, 1, notes)
    for args, kwargs in calls:
        if not args and not kwargs:
            raise UsageError(f"the model takes nothing of the first batch: {'; '.join(notes) or 'it is empty'}")
        return args, kwargs
    raise UsageError("the data has no batches", hint="an iterator is spent once read")


def _length(data: object, limit: int | None) -> int:
    try:
        known = len(data) if isinstance(data, Sized) else 0
    except TypeError:
        known = 0  # a DataLoader over an iterable dataset has a __len__ that refuses
    return min(known, limit) if limit is not None and known else known


@dataclass(frozen=True)
class _Taken:
    """What `forward` takes of a batch: how many positional arguments, and which keywords (None: any)."""

    positional: int | None
    keywords: frozenset[str] | None

    @classmethod
    def of(cls, model: torch.nn.Module, *, loader: bool) -> _Taken:
        parameters = inspect.signature(getattr(model, "forward", model)).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        names = frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        needed = sum(place.default is place.empty for place in places) if loader else len(places)
        return cls(
            None if inspect.Parameter.VAR_POSITIONAL in kinds else max(needed, min(len(places), 1)),
            None if inspect.Parameter.VAR_KEYWORD in kinds else names,
        )

    def call(self, batch: Any, notes: list[str]) -> Call:
        if isinstance(batch, Mapping):
            unknown = [] if self.keywords is None else [key for key in batch if key not in self.keywords]
            if unknown:
                _note(notes, f"not passed, because forward has no such parameter: {', '.join(map(str, unknown))}")
            return (), {key: value for key, value in batch.items() if key not in unknown}
        if isinstance(batch, (tuple, list)):
            if self.positional is not None and len(batch) > self.positional:
                left = len(batch) - self.positional
                which = "the last entry" if left == 1 else f"the last {left} entries"
                _note(notes, f"{which} of a batch of {len(batch)} not passed: taken for labels")
                batch = batch[: self.positional]
            return tuple(batch), {}
        return (batch,), {}


def _note(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)


# -- running ---------------------------------------------------------------------------------------------------------


def _frozen(original: torch.nn.Module) -> torch.nn.Module:
    """The private copy with parameters that need no gradient, as the compiled module's, and buffers of its own."""
    memo: dict[int, Any] = {}
    for module in original.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                module._parameters[name] = memo.setdefault(
                    id(parameter), torch.nn.Parameter(parameter.detach(), requires_grad=False)
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                if id(buffer) not in memo:
                    memo[id(buffer)] = buffer.detach().clone(memory_format=torch.preserve_format)
                module._buffers[name] = memo[id(buffer)]
    return original


@dataclass(frozen=True)
class _Ran:
    """One call's flat results, their names and structure, and its arguments as the call left them."""

    leaves: list[Any]
    names: tuple[str, ...]
    spec: pytree.TreeSpec
    arguments: tuple[torch.Tensor, ...]


def _run(call: Callable[..., Any], inputs: Inputs) -> _Ran:
    copies = tuple(copied(tensor) for tensor in inputs.tensors)
    args, kwargs = inputs.with_tensors(copies).call()
    devices = {tensor.device.index or 0 for tensor in copies if tensor.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(0)
        result = call(*args, **kwargs)
    register_dataclasses(result)
    found, spec = pytree.tree_flatten_with_path(result)
    names = tuple("output" + pytree.keystr(path) for path, _ in found)
    return _Ran([_detached(leaf) for _, leaf in found], names, spec, tuple(map(_detached, copies)))


@contextmanager
def _state_kept(model: object) -> Iterator[None]:
    """Buffers that a call writes are put back, so that every batch starts from the same state and leaves no trace.

    They are compared by value: a compiled module writes them through other tensors on the same memory.
    """
    buffers = list(model.buffers()) if isinstance(model, torch.nn.Module) else []
    held = [(buffer, buffer.detach().clone()) for buffer in buffers if not buffer.is_inference()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in held:
                if not _same(buffer, before):
                    buffer.copy_(before)


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.layout is not torch.strided or left.shape != right.shape:
        return left.shape == right.shape
    return bool(((left == right) | ((left != left) & (right != right))).all())


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _one(
    original: torch.nn.Module, compiled: Callable[..., Any], inputs: Inputs, batch: int
) -> tuple[str, tuple[str, ...], Verdict, int]:
    """One batch: its inputs in words, the outputs' names, the verdict, and how many values were compared."""
    said = describe(inputs)
    try:
        with _state_kept(original):
            expected = _run(original, inputs)
    except Exception as error:
        raise InputError(
            f"the model itself does not take batch {batch}: {type(error).__name__}: {_first_line(error)}",
            hint=f"it was given {said or 'nothing'}",
        ) from error
    try:
        with _state_kept(compiled):
            actual = _run(compiled, inputs)
    except FxoptError:
        raise
    except Exception as error:
        reason = f"the compiled model raises {type(error).__name__}: {_first_line(error)}"
        return said, (), Verdict(False, math.inf, (), reason), 0
    if expected.spec != actual.spec:
        return said, (), Verdict(False, math.inf, (), "the results have another structure"), 0
    written = [
        index
        for index, (left, right) in enumerate(zip(expected.arguments, actual.arguments, strict=True))
        if not _same(left, right)
    ]
    names = list(expected.names)
    labels = [name for name, leaf in zip(inputs.names, inputs.leaves, strict=True) if isinstance(leaf, torch.Tensor)]
    names += [f"{labels[index]} after the call" for index in written]

    def exact() -> list[Any]:
        wide = _run_in_float64(original, inputs)
        return [*wide.leaves, *(wide.arguments[index] for index in written)]

    verdict = compare(
        [*expected.leaves, *(expected.arguments[index] for index in written)],
        [*actual.leaves, *(actual.arguments[index] for index in written)],
        reference=exact,
        bitwise=_promises_same_bits(compiled),
    )
    values = sum(leaf.numel() if isinstance(leaf, torch.Tensor) else 1 for leaf in expected.leaves)
    return said, tuple(names), verdict, values


def _run_in_float64(original: torch.nn.Module, inputs: Inputs) -> _Ran:
    model = copy.deepcopy(original).double()
    wide = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs.tensors)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        return _run(model, inputs.with_tensors(wide))


def _promises_same_bits(compiled: object) -> bool:
    from fxopt.runtime import CompiledModule

    return isinstance(compiled, CompiledModule) and compiled._session.options.numerics == "bitwise"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "")


# -- counting --------------------------------------------------------------------------------------------------------


class _Tally:
    """The worst of each output over the batches seen so far."""

    def __init__(self) -> None:
        self.count = 0
        self.values = 0
        self.worst: dict[str, WorstOutput] = {}
        self.wrong: list[WrongBatch] = []
        self.error = 0.0
        self.distances: tuple[float, float] | None = None

    def add(self, inputs: str, names: tuple[str, ...], verdict: Verdict, values: int) -> None:
        for output in verdict.outputs:
            name = names[output.index]
            held = self.worst.get(name)
            if held is None or output.relative > held.error:
                self.worst[name] = WorstOutput(name, output.relative, self.count)
        self.error = max(self.error, verdict.error)
        if not verdict.ok:
            reason = re.sub(r"^output (\d+)", lambda found: names[int(found[1])], verdict.reason)
            self.wrong.append(WrongBatch(self.count, inputs, reason))
        if verdict.original_error is not None and verdict.compiled_error is not None:
            original, compiled = self.distances or (0.0, 0.0)
            self.distances = (max(original, verdict.original_error), max(compiled, verdict.compiled_error))
        self.values += values
        self.count += 1

    def result(self) -> Verification:
        original, compiled = self.distances or (None, None)
        outputs, wrong = tuple(self.worst.values()), tuple(self.wrong)
        return Verification(not wrong, self.count, self.error, outputs, wrong, original, compiled)


def _size(error: float) -> str:
    return "no difference" if error == 0 else f"max|difference| / max|expected| = {error:.1e}"


__all__ = ["Verification", "WorstOutput", "WrongBatch", "verify", "verify_calls"]
