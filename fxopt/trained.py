"""Constants that training changes, and what a folded one has to do with the model's own.

In a graph that shall be trained, the captured parameters require grad, and so does, in a pass, whatever is computed
from them. `Folds` makes a leaf of such a value and keeps how autograd came to it: by the chain rule, the gradient of a
folded weight gives those of the parameters that were folded into it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

_FOLDS, _FROZEN = "folds", "frozen"


class Folds:
    """The leaves that passes made of values that depend on parameters, in their order.

    `frozen` names the parameters that are not trained, and what was folded from them alone.
    """

    def __init__(self, frozen: Iterable[str] = ()) -> None:
        self.frozen = set(frozen)
        self._made: list[tuple[torch.nn.Parameter, torch.Tensor]] = []

    @classmethod
    def of(cls, module: fx.GraphModule) -> Folds:
        """Those of an IR module and its copies."""
        if _FOLDS not in module.meta:
            module.meta[_FOLDS] = cls(module.meta.get(_FROZEN, ()))
        found: Folds = module.meta[_FOLDS]
        return found

    def __len__(self) -> int:
        return len(self._made)

    @staticmethod
    def forget(module: fx.GraphModule) -> None:
        """Lets go of what autograd kept of the passes' own computations."""
        module.meta.pop(_FOLDS, None)

    def add(self, leaf: torch.nn.Parameter, value: torch.Tensor) -> None:
        """Records that a leaf stands for a value."""
        self._made.append((leaf, value))

    def pull_back(self) -> None:
        """Adds to the gradients of parameters what those of the leaves folded from them come to."""
        for leaf, value in reversed(self._made):
            if leaf.grad is not None:
                torch.autograd.backward(value, leaf.grad, retain_graph=True)
                leaf.grad = None

    def refusal(self, read: Mapping[fx.Node, torch.Tensor], made: int, added: Iterable[str]) -> str | None:
        """Why what a rewrite made may not be trained; None where it may.

        `read` are the constants that the rewritten nodes read, `made` how many leaves there were before, `added` the
        paths of the new constants. A trained parameter that is still read would become two; a frozen one would be
        trained within a leaf. What was made of frozen ones alone is noted as frozen.
        """
        sources = {id(source) for _, value in self._made[made:] for source in _sources(value)}
        gone = [node for node in read if node._erased or not node.users]
        for node, value in read.items():
            if id(value) in sources and node not in gone:
                return f"{node.target} is trained, and {next(iter(node.users)).name} reads it, too"
        taken = [str(node.target) for node in gone if node.target in self.frozen]
        if taken and sources:
            return f"{taken[0]} is frozen, and would be part of what is trained"
        self.frozen.update(added if taken else ())
        return None


def freeze(module: fx.GraphModule, trained: Container[Any], identity: Callable[[torch.Tensor], Any]) -> None:
    """Lets the parameters of a capture require grad that are among `trained`, by identity, and names the others."""
    frozen = set()
    for path, tensor in module.named_parameters():
        if identity(tensor) in trained:
            tensor.requires_grad_()
        else:
            frozen.add(path)
    module.meta[_FROZEN] = frozenset(frozen)


def _sources(value: torch.Tensor) -> list[torch.Tensor]:
    """The leaves that autograd computed a value from."""
    found, waiting, seen = [], [value.grad_fn], set()
    while waiting:
        step = waiting.pop()
        if step is not None and step not in seen:
            seen.add(step)
            found += [step.variable] if hasattr(step, "variable") else []
            waiting += [before for before, _ in step.next_functions]
    return found


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def read(value: torch.Tensor) -> torch.Tensor:
    """The tensor of an attribute as a plain tensor of the same memory; one that is trained stays part of its graph."""
    trained = value.requires_grad and torch.is_grad_enabled()
    return torch.ops.aten.alias.default(value) if trained else value.detach()


def takes_gradient(tensor: torch.Tensor) -> bool:
    """Whether a tensor can have a gradient."""
    return tensor.is_floating_point() or tensor.is_complex()


def gradients_of(
    run: Callable[..., Sequence[Any]], parameters: Sequence[torch.Tensor], folds: Folds | None = None
) -> Callable[..., list[torch.Tensor]]:
    """A function of the same tensors that gives their gradients, and then those of `parameters`.

    They are those of sum(result * c), where c has numbers that are the same for all who ask; of what nothing depends
    on, zero.
    """

    def call(*tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves = [*(tensor.requires_grad_() for tensor in tensors if takes_gradient(tensor)), *parameters]
        try:
            with torch.enable_grad():
                # A leaf that requires grad may not be written in place; a copy of it may.
                results = run(*(tensor.clone() if tensor.requires_grad else tensor for tensor in tensors))
            asked = [(i, r) for i, r in enumerate(results) if isinstance(r, torch.Tensor) and r.requires_grad]
            if asked:
                torch.autograd.backward([result for _, result in asked], [_cotangent(*entry) for entry in asked])
            if folds is not None:
                folds.pull_back()
            return [torch.zeros_like(leaf) if leaf.grad is None else _dense(leaf.grad).clone() for leaf in leaves]
        finally:
            for leaf in leaves:
                leaf.grad = None

    return call


def _cotangent(index: int, result: torch.Tensor) -> torch.Tensor:
    """Numbers like a result's, exact in every dtype: eighths from -1 to 1."""
    drawn = torch.randint(-8, 9, result.shape, generator=torch.Generator().manual_seed(index))
    return (drawn / 8).to(result)
