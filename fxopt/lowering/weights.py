"""Weights in kernels' own layouts: packed once for all signatures, and kept instead of the plain ones where possible.

    folded weight  ->  packed weight, from which the folded one is unpacked when somebody looks at it again

A rewritten program's own tensors (folded and merged weights) are emptied as soon as nothing reads them but packed, so
that beside the caller's model there is one copy of the weights. The caller's are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxopt import ir

#: Where in a storage a tensor lies: size, stride, offset.
Extent = tuple[torch.Size, tuple[int, ...], int]


@dataclass(eq=False)
class _Packed:
    """A packed weight. `weight` is kept beside it, so that nobody else can get its place; None once it is emptied."""

    weight: torch.Tensor | None
    extent: Extent
    special: Any
    unpack: Callable[[], torch.Tensor] | None
    exact: bool


@dataclass(eq=False)
class _Emptied:
    """A storage that was let go: the tensors that lay in it, and what it is unpacked from."""

    holders: list[tuple[torch.Tensor, Extent]]
    packed: dict[Any, _Packed]
    source: _Packed
    elements: int
    dtype: torch.dtype


class Weights(dict[Any, Any]):
    """What backends make of weights, for as long as the compiled model lives. As a dictionary it is free for any use.

    `shown` is set once a caller has seen a program's tensors: none is emptied from then on. `only_packed` has places
    of weights that the last specialisation reads packed only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shown = False
        self.only_packed: set[object] = set()
        self._packed: dict[object, dict[Any, _Packed]] = {}
        self._emptied: list[_Emptied] = []
        self._owned: dict[object, list[torch.Tensor]] = {}

    def once(
        self,
        key: tuple[Any, ...],
        weight: torch.Tensor,
        pack: Callable[[], Any],
        unpack: Callable[[Any], torch.Tensor] | None = None,
        *,
        exact: bool = False,
    ) -> Any:
        """`pack()`, called once for a weight and key.

        `unpack` of what it gave is the weight, in its shape; that is seen to before a weight is emptied, if the backend
        does not know it (`exact`).
        """
        extent = _extent(weight)
        found = self._packed.setdefault(ir.place(weight), {})
        held = found.get((key, extent))
        if held is None:
            special = pack()
            again = None if unpack is None else lambda: unpack(special)
            held = found[key, extent] = _Packed(weight, extent, special, again, exact)
        return held.special

    def keys_for(self, weight: torch.Tensor) -> set[tuple[Any, ...]]:
        """The keys under which a weight, or another view of its memory, is packed."""
        return {key for key, _ in self._packed.get(ir.place(weight), ())}

    def made(self) -> Iterator[tuple[tuple[Any, ...], Any]]:
        """Each packed weight behind its key."""
        for packed in (*self._packed.values(), *(emptied.packed for emptied in self._emptied)):
            for (key, _), held in packed.items():
                yield key, held.special

    # -- emptying ----------------------------------------------------------------------------------------------------

    def own(self, modules: Iterable[fx.GraphModule], shared: Iterable[torch.Tensor]) -> None:
        """The tensors of `modules` may be emptied, but for those whose memory is that of `shared`."""
        taken = {ir.place(tensor) for tensor in shared}
        found: dict[object, dict[int, torch.Tensor]] = {}
        for module in modules:
            for tensor in ir.tensors(module).values():
                if tensor.layout is torch.strided and ir.place(tensor) not in taken:
                    found.setdefault(ir.place(tensor), {})[id(tensor)] = tensor
        self.only_packed = set()
        self._owned = {place: list(tensors.values()) for place, tensors in found.items()}

    def release(self, weight: torch.Tensor) -> None:
        """Empties the memory of a weight that is read only as packed, if it may be emptied and can be unpacked."""
        place = ir.place(weight)
        self.only_packed.add(place)
        packed = self._packed.get(place, {})
        source = next((held for held in packed.values() if held.unpack is not None), None)
        if self.shown or source is None or place not in self._owned:
            return
        assert source.unpack is not None
        assert source.weight is not None
        elements, whole = source.weight.numel(), weight.untyped_storage().nbytes()
        if elements * weight.element_size() != whole:
            return
        if not source.exact and not torch.equal(source.unpack(), source.weight):
            return
        holders = [(tensor, _extent(tensor)) for tensor in self._owned.pop(place)]
        self._emptied.append(_Emptied(holders, self._packed.pop(place), source, elements, weight.dtype))
        with torch.inference_mode(False):
            for tensor, _ in holders:
                tensor.data = torch.empty(0, dtype=tensor.dtype)
        for held in packed.values():
            held.weight = None

    def restore(self, module: fx.GraphModule | None = None) -> None:
        """Unpacks what was emptied: all of it, or what `module` holds."""
        wanted = None if module is None else {id(tensor) for tensor in ir.tensors(module).values()}
        for emptied in list(self._emptied):
            if wanted is None or any(id(tensor) in wanted for tensor, _ in emptied.holders):
                self._emptied.remove(emptied)
                self._refill(emptied)

    def _refill(self, emptied: _Emptied) -> None:
        assert emptied.source.unpack is not None
        with torch.inference_mode(False), torch.no_grad():
            memory = torch.empty(emptied.elements, dtype=emptied.dtype)
            memory.as_strided(*emptied.source.extent).copy_(emptied.source.unpack())
            for tensor, extent in emptied.holders:
                tensor.data = memory.as_strided(*extent)
            for held in emptied.packed.values():
                held.weight = memory.as_strided(*held.extent)
        self._packed[ir.place(memory)] = emptied.packed


def _extent(tensor: torch.Tensor) -> Extent:
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())
