"""`fxopt.sync_batchnorm`: every batch norm of a training graph normalises over the batches of all processes.

    batch_norm(x, training=True)  ->  fxopt.training.normalise.batch_norm(x, ranks)

A graph has one mode for good: what forward asks of `training` was answered while it was traced. So there is a graph for
each mode that a call finds the modules in, traced by torch.fx at the first such call: `train()` and `eval()`, on the
model or on a part of it, choose as they always do. Norms that train are synchronised; a norm frozen by `eval()` uses
its running statistics. Where nothing trains there is no graph: the model's own forward runs. Modules, parameters and
buffers are the same in all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fxopt.capture import Inputs
from fxopt.capture.program import user_line_of_error
from fxopt.errors import CaptureError, UsageError
from fxopt.training.normalise import batch_norm
from fxopt.training.ranks import Ranks


class _Norm(torch.nn.Module):
    """A batch norm module, synchronised while it trains. Its tensors stay the module's own."""

    _norm: _BatchNorm

    def __init__(self, norm: _BatchNorm, ranks: Ranks, name: str) -> None:
        super().__init__()
        object.__setattr__(self, "_norm", norm)
        self.ranks, self.name = ranks, name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm: Any = self._norm
        if not norm.training:
            evaluated: torch.Tensor = norm(x)
            return evaluated
        check: Callable[[torch.Tensor], None] = getattr(norm, "_check_input_dim", lambda _: None)
        check(x)
        momentum, follows = norm.momentum, norm.track_running_stats
        if follows and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if momentum is None:  # a cumulative average
                momentum = 1.0 / float(norm.num_batches_tracked)
        mean, variance = (norm.running_mean, norm.running_var) if follows else (None, None)
        return batch_norm(
            x, mean, variance, norm.weight, norm.bias, momentum or 0.0, norm.eps, ranks=self.ranks, who=self.name
        )


class _Alone(torch.nn.Module):
    """A model that is a norm itself, which torch.fx would write out if it started from it."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, input: torch.Tensor) -> Any:
        return self.norm(input)


class SynchronisedModel(torch.nn.Module):
    """A model with synchronised batch norms: what `sync_batchnorm` returns.

    It has the model's modules and attributes under their names, so that its `state_dict` is the model's, and shares
    every parameter and buffer with it.
    """

    _original: torch.nn.Module
    _graphs: dict[Any, fx.GraphModule]
    _ranks: Ranks

    def __init__(self, model: torch.nn.Module, ranks: Ranks) -> None:
        super().__init__()
        tensors = (*model.parameters(), *model.buffers())
        twin = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
        self.__dict__.update({key: value for key, value in twin.__dict__.items() if key != "forward"})
        object.__setattr__(self, "_original", twin)
        object.__setattr__(self, "_graphs", {})
        object.__setattr__(self, "_ranks", ranks)

    @property
    def original(self) -> torch.nn.Module:
        """The model that it was made of, in the same mode: the same modules, without graphs or processes."""
        self._original.training = self.training
        return self._original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph of the mode that the modules are in. Raises CaptureError where forward cannot be traced."""
        original = self.original
        if not any(module.training for module in self.modules()):
            return original.forward(*args, **kwargs)
        inputs = Inputs.flatten(args, kwargs)
        modes = tuple(module.training for module in self.modules())
        # A graph holds the tensors that it was traced with: `model.to(...)` puts others in the place of buffers.
        held = tuple(map(id, (*self.parameters(), *self.buffers())))
        key = (modes, held, inputs.spec, tuple(inputs.constants.items()))
        if key not in self._graphs:
            self._graphs[key] = _synchronised(original, inputs, self._ranks)
        return self._graphs[key](*inputs.tensors)

    def __deepcopy__(self, memo: dict[int, Any]) -> SynchronisedModel:
        return SynchronisedModel(copy.deepcopy(self._original, memo), self._ranks)

    def __reduce__(self) -> tuple[Any, ...]:
        raise UsageError(
            "a synchronised model belongs to the processes that train it, and cannot be pickled",
            hint="save its state_dict(), which is that of the model it was made of",
        )

    @property
    def graphs(self) -> list[fx.GraphModule]:
        """The graphs traced so far, one for each mode (and set of constant arguments) that was called."""
        return list(self._graphs.values())

    def extra_repr(self) -> str:
        """Which norms are synchronised in which mode, and over how many processes."""
        lines = [f"batch norms synchronised over {self._ranks.size} processes, one collective forwards and backwards"]
        for (training, *_), graph in self._graphs.items():
            mode = "in training mode" if all(training) else "with parts in eval mode"
            names = ", ".join(graph.meta["synchronised"]) or "none, all use running statistics"
            lines.append(f"{mode}, by a graph of its own: {names}")
        return "\n".join([*lines, "in eval mode, by the model's own forward: none, all use running statistics"])


class _Tracer(fx.Tracer):
    """Traces a model with the tensors of a call open, and all else of it as it is."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__()
        self.inputs = inputs

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """The model as a function of itself and the tensors, and these as proxies."""

        def call(root: torch.nn.Module, *tensors: Any) -> Any:
            args, kwargs = self.inputs.replaced(tensors)
            return root_fn(root, *args, **kwargs)

        names = [f"tensors_{number}" for number in range(len(self.inputs.tensors))]
        return call, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in names)]


def _synchronised(model: torch.nn.Module, inputs: Inputs, ranks: Ranks) -> fx.GraphModule:
    """The model traced in its mode, with the batch norms that train synchronised."""
    root = _Alone(model) if isinstance(model, _BatchNorm) else model
    try:
        graph = _Tracer(inputs).trace(root)
    except Exception as error:
        raise CaptureError(
            f"torch.fx cannot trace the model: {type(error).__name__}: {str(error).splitlines()[0]}",
            line=user_line_of_error(error),
            hint="make branches depend on configuration instead of on values, or mark a function with torch.fx.wrap",
        ) from error
    module = fx.GraphModule(root, graph, type(model).__name__)
    found = [norm for node in list(graph.nodes) if (norm := _rewrite(module, node, ranks)) is not None]
    module.meta["synchronised"] = found
    graph.lint()
    module.recompile()
    return module


#: Functions that are a batch norm, with the order of their arguments.
_FUNCTIONS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: (
        "input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled",
    ),
}  # fmt: skip
_TAKEN = ("input", "running_mean", "running_var", "weight", "bias", "momentum", "eps")
_DEFAULTS = {"running_mean": None, "running_var": None, "weight": None, "bias": None, "training": False,
             "momentum": 0.1, "eps": 1e-5}  # fmt: skip


def _rewrite(module: fx.GraphModule, node: fx.Node, ranks: Ranks) -> str | None:
    """Synchronises a node that is a batch norm in training mode, and gives its name; None for any other."""
    if node.op == "call_module":
        norm = module.get_submodule(str(node.target))
        if not isinstance(norm, _BatchNorm) or not norm.training:
            return None
        name = str(node.target)
        path = f"{name.replace('.', '_')}_synchronised"
        module.add_submodule(path, _Norm(norm, ranks, name))
        node.target = path
        return name
    if node.op != "call_function" or node.target not in _FUNCTIONS:
        return None
    given = {**_DEFAULTS, **dict(zip(_FUNCTIONS[node.target], node.args, strict=False)), **node.kwargs}
    if given["training"] is False:
        return None
    if given["training"] is not True:
        raise CaptureError("a batch norm's mode is computed in forward", node=node, hint="use self.training")
    node.args = tuple(given[name] for name in _TAKEN)
    node.kwargs = {}
    who = node.name

    def normalise(*args: Any) -> torch.Tensor:
        return batch_norm(*args, ranks=ranks, who=who)

    node.target = normalise
    return who


def deployed(model: torch.nn.Module) -> torch.nn.Module:
    """What a trained model is without the processes that trained it."""
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return inner.original if isinstance(inner, SynchronisedModel) else inner


def sync_batchnorm(model: torch.nn.Module, process_group: dist.ProcessGroup | None = None) -> SynchronisedModel:
    """The model with every batch norm synchronised over a process group while it trains.

    All processes of the group call it, with the same model; None is the group of all. It works on every device whose
    backend has float64 collectives: CPU tensors over gloo, CUDA over NCCL. Batches may differ in size, and be empty.
    The model itself is not changed; what is returned shares its parameters and buffers, and is what to train:

        model = fxopt.sync_batchnorm(Net())
        model = DistributedDataParallel(model)

    `fxopt.compile` takes it as it takes the model. Raises UsageError where torch.distributed is not initialised, and
    CollectiveError, in every process, where processes hold different models.
    """
    if not isinstance(model, torch.nn.Module):
        raise UsageError(f"expected an nn.Module, got {type(model).__name__}")
    if any(torch.nn.parameter.is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers())):
        raise UsageError("the model is lazy: parts of it have no sizes yet", hint="call it once on an example first")
    ranks = Ranks(process_group)
    norms = {name: str(norm) for name, norm in model.named_modules() if isinstance(norm, _BatchNorm)}
    sizes = {name: f"{tensor.dtype}{list(tensor.shape)}" for name, tensor in model.state_dict().items()}
    ranks.agree({"the class": type(model).__qualname__, **norms, **sizes}, "the model")
    return SynchronisedModel(model, ranks)


