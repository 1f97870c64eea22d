"""Whether a captured graph is what the original does on given inputs: both are run, and each operator call is logged.

A branch that the capture did not see (on a batch of 1, a stride order, autocast, a grad state) shows as another list
of operators or of their numbers, even where the outputs happen to agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.compare import compare

#: Calls that only rename a tensor, or that one side makes for constants.
_SILENT = frozenset({"detach", "alias", "lift_fresh", "lift_fresh_copy", "sym_size", "_assert_tensor_metadata"})
#: In the normal form `view` is `reshape`, whose parts have other names, and which inference mode leaves whole.
_RENAMED = {"_unsafe_view": "view", "_reshape_alias": "view", "reshape": "view"}


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if name.endswith("_") and not name.endswith("__"):
            name = name[:-1]
        if name not in _SILENT:
            self.calls.append((_RENAMED.get(name, name), _numbers(_bound(func, args, kwargs or {}))))
        return func(*args, **(kwargs or {}))


def _bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Every argument in the schema's order: defaults that one side spells out are no difference, nor is what torch
    itself adds from its settings."""
    given = dict(zip((parameter.name for parameter in func._schema.arguments), args, strict=False)) | kwargs
    return [
        given.get(parameter.name, parameter.default_value if parameter.has_default_value() else None)
        for parameter in func._schema.arguments
        if parameter.name not in ("cudnn_enabled", "cudnn_enable")
    ]


def _numbers(value: Any) -> tuple[Any, ...]:
    """The arguments that are no tensors; of tensors, the shape."""
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), str(value.dtype))
    if isinstance(value, (list, tuple)):
        return tuple(_numbers(part) for part in value)
    if isinstance(value, dict):
        return tuple((key, _numbers(part)) for key, part in sorted(value.items()))
    return (type(value).__name__, repr(value))


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, because a model may write to its inputs, and only the real call may show that.

    Where strides leave gaps or overlap (`expand`), the memory that they span is copied.
    """
    plain = tensor.detach()
    twin = plain.clone(memory_format=torch.preserve_format)
    if twin.layout is torch.strided and twin.numel() and twin.stride() != plain.stride():
        span = 1 + sum((size - 1) * stride for size, stride in zip(plain.shape, plain.stride(), strict=True))
        twin = plain.as_strided((span,), (1,)).clone().as_strided(plain.shape, plain.stride())
    return twin.requires_grad_(tensor.requires_grad)


def disagreement(
    original: Any, graph: fx.GraphModule, tensors: Sequence[torch.Tensor], put_back: Callable[[], None]
) -> str | None:
    """None where the captured graph makes the calls that `original` (a function of flat tensors) makes, and gives what
    it gives; else the first difference. `put_back` lets both start from one state."""
    with torch.random.fork_rng(devices=[]):
        state = torch.random.get_rng_state()
        copies = [copied(tensor) for tensor in tensors]
        with _Log() as said:
            results = original(*copies)
        # Copied before the state is put back, which a result may share; outside the log, which would count the copies.
        expected = [copied(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in results]
        put_back()
        torch.random.set_rng_state(state)
        copies = [copied(tensor) for tensor in tensors]
        with _Log() as captured:
            actual = fx.Interpreter(graph, garbage_collect_values=True).run(*copies)
    for index, (left, right) in enumerate(zip(said.calls, captured.calls, strict=False)):
        if left != right:
            return f"operator {index} is {left[0]} in the model and {right[0]} in the capture, or has other arguments"
    if len(said.calls) != len(captured.calls):
        return f"the model makes {len(said.calls)} operator calls, the capture {len(captured.calls)}"
    verdict = compare(list(expected), list(actual))
    return None if verdict.ok else verdict.reason
