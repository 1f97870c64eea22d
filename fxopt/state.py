"""What a model keeps between calls: told apart from its weights, put back after a run that only compares, made private.

A compiled model counts as the original does, in tensors of its own; running either to compare leaves no trace.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, cast

import torch

from fxopt import ir
from fxopt.agreement import copied
from fxopt.capture import Captured

#: What every nn.Module has; the rest of its `__dict__` is the user's.
_OWN = frozenset(torch.nn.Module().__dict__) - {"training"}


class KeptState:
    """A context for runs that compare: what they write to buffers, tensors and plain attributes is put back at its end.

    Meanwhile torch's fused attention is off: it takes other operators, and gives other strides, than the forward that
    it stands for, and no capture ever sees it.
    """

    def __init__(self, *modules: torch.nn.Module) -> None:
        self.modules = modules

    def __enter__(self) -> KeptState:
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        inner = dict.fromkeys(module for root in self.modules for module in root.modules() if not _scripted(module))
        self._attributes = [(module, _plain(module)) for module in inner]
        self._slots = [(slots, dict(slots)) for module in inner for slots in _slots(module)]
        tensors: dict[int, torch.Tensor] = {}
        for module in inner:
            for held in (*module._buffers.values(), *module.__dict__.values()):
                if isinstance(held, torch.Tensor) and not held.is_inference():
                    tensors[id(held)] = held
        self._tensors = [(held, held._version, held.detach().clone()) for held in tensors.values()]
        return self

    def __exit__(self, *exception: object) -> None:
        self.put_back()
        for module, before in self._attributes:
            for name in _names(module).difference(before):
                del module.__dict__[name]
            for name, (held, contents) in before.items():
                if name not in module.__dict__ or module.__dict__[name] is not held:
                    module.__dict__[name] = held
                if isinstance(held, list):
                    held[:] = contents
                elif isinstance(held, dict):
                    held.clear()
                    held.update(contents)
        for slots, filled in self._slots:
            if not _same(slots, filled):
                slots.clear()
                slots.update(filled)
        torch.backends.mha.set_fastpath_enabled(self._fastpath)

    def put_back(self) -> None:
        """Gives the tensors the values that they had at the beginning."""
        for held, version, before in self._tensors:
            # A norm in training mode writes its running statistics without a new version.
            if held._version != version or not _same_numbers(held, before):
                with torch.no_grad():
                    held.copy_(before)

    def apart(self, results: Iterable[Any]) -> list[Any]:
        """Results of a run, those that share memory with what will be put back as copies."""
        places = {held.untyped_storage().data_ptr() for held, _, _ in self._tensors if held.layout is torch.strided}
        return [copied(leaf) if _place(leaf) in places else leaf for leaf in results]

    def changed(self) -> list[str]:
        """The attributes that hold something else than at the beginning (another tensor, too), as `Type.attribute`."""
        found = []
        for slots, filled in self._slots:
            found += [str(name) for name in dict.fromkeys((*filled, *slots)) if slots.get(name) is not filled.get(name)]
        for module, before in self._attributes:
            for name in sorted(_names(module) | set(before)):
                held, contents = before.get(name, (None, None))
                now = module.__dict__.get(name)
                if not _same(now, held) or (isinstance(now, (list, dict)) and not _same(_contents(now), contents)):
                    found.append(f"{type(module).__name__}.{name}")
        return found


def _scripted(module: torch.nn.Module) -> bool:
    """Whether a module is TorchScript's: its tensors are no Python dictionary's, and nobody can put others there."""
    return isinstance(module, torch.jit.ScriptModule)


def _slots(module: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return cast("dict[str, Any]", module._parameters), cast("dict[str, Any]", module._buffers)


def _names(module: torch.nn.Module) -> set[str]:
    return set(module.__dict__) - _OWN


def _plain(module: torch.nn.Module) -> dict[str, tuple[Any, Any]]:
    return {name: (module.__dict__[name], _contents(module.__dict__[name])) for name in _names(module)}


def _contents(held: Any) -> Any:
    return held.copy() if isinstance(held, (list, dict)) else None


def _same(left: Any, right: Any) -> bool:
    """The same object, or the same plain value; of lists and dicts, of the same objects."""
    if left is right:
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(_same(left[key], right[key]) for key in left)
    return isinstance(left, (bool, int, float, str, torch.dtype, torch.device)) and repr(left) == repr(right)


def _same_numbers(left: torch.Tensor, right: torch.Tensor) -> bool:
    """The same numbers in the same places, NaN counted as one."""
    if left.layout is not torch.strided or left.is_quantized or left.is_meta:
        return True
    left = left.detach()
    return torch.equal(left, right) or bool(((left == right) | (left != left) & (right != right)).all())


def _place(leaf: Any) -> int | None:
    if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
        return None
    return leaf.untyped_storage().data_ptr()


def privatise(captured: Captured, original: torch.nn.Module, earlier: Sequence[Captured]) -> None:
    """Gives tensors that a program writes (counters, caches) memory of its own, so that the caller's stay as they are.

    The private original and the captures made of it share that memory: they go on from one state. What `earlier`
    captures write is private already.
    """
    places: Collection[int | None] = {_place(held) for other in earlier for held in _written(other).values()}
    copies: dict[int | None, torch.Tensor] = {}
    for path, held in _written(captured).items():
        place = _place(held)
        if place not in places:
            copies.setdefault(place, _flat_copy(held))
            ir.delete_attribute(captured.module, path)
            ir.set_attribute(captured.module, path, _moved(held.detach(), copies[place]))
    for module in original.modules() if copies else ():
        if _scripted(module):
            continue
        for holder in (*_slots(module), module.__dict__):
            for name, own in holder.items():
                if isinstance(own, torch.Tensor) and _place(own) in copies:
                    holder[name] = _moved(own, copies[_place(own)])


def _written(captured: Captured) -> dict[str, torch.Tensor]:
    return {path: ir.get_attribute(captured.module, path) for path in captured.written_attributes()}


def _flat_copy(held: torch.Tensor) -> torch.Tensor:
    """The whole memory behind a tensor, copied, as one row of its dtype."""
    storage = held.untyped_storage().clone()
    with torch.no_grad():
        return torch.empty(0, dtype=held.dtype, device=held.device).set_(storage)


def _moved(held: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """The same view of another memory; all views of it have one version, so that a write through any is noticed."""
    with torch.no_grad():
        row = memory if memory.dtype == held.dtype else memory.view(held.dtype)
        twin = row.as_strided(held.shape, held.stride(), held.storage_offset()).detach()
    if isinstance(held, torch.nn.Parameter):
        return torch.nn.Parameter(twin, requires_grad=held.requires_grad)
    return twin
