"""`torch.compile(model, backend="fxopt")`: the graphs that Dynamo finds, rewritten and lowered, graph breaks and all.

Dynamo gives a backend each graph with the parameters as inputs. Here they become constants, so that they can be folded;
where one is another tensor or was written, the graph is compiled anew. Graphs with gradients are left to TorchInductor.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from fxopt.compiler import compile
from fxopt.errors import FxoptError, FxoptNotice, UsageError
from fxopt.runtime import CompiledModule

#: What `options` may have: options of `fxopt.compile`, and a function that is given each CompiledModule.
OPTIONS = ("passes", "disable", "backend", "numerics", "verify", "strict", "inspect")
_told: set[str] = set()


def backend(
    graph: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """What runs instead of a graph of Dynamo's: `torch.compile(model, backend="fxopt", options={...})`.

    `options` are those of `fxopt.compile` (passes, disable, backend, numerics, verify, strict), and `inspect`, which is
    called with each CompiledModule when it is made. A graph that cannot be compiled runs as it is, and an FxoptNotice
    says why; with strict, the error is raised. Raises UsageError for another option, and for a mode.
    """
    unknown = [f"the option {name!r}" for name in sorted(set(options or {}) - set(OPTIONS))]
    unknown += [] if mode is None else [f"the mode {mode!r}"]
    if unknown:
        raise UsageError(f"the backend fxopt has not {unknown[0]}", hint=f"its options are {', '.join(OPTIONS)}")
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs):
        _tell("graphs with gradients are left to TorchInductor: fxopt compiles under torch.no_grad()")
        default = torch._dynamo.lookup_backend("inductor")
        return cast("Callable[..., Any]", default(graph, list(example_inputs)))
    return _Graph(graph, example_inputs, dict(options or {}))


def _tell(notice: str) -> None:
    """Says something once in a process."""
    if notice not in _told:
        _told.add(notice)
        warnings.warn(notice, FxoptNotice, stacklevel=2)


@dataclass(frozen=True)
class _State:
    """What runs for a graph, the places of the inputs that it takes, and what it has as constants: by place, tensors
    with their versions, and numbers as they are spelled (0.0 is not -0.0)."""

    run: Callable[..., Any]
    live: tuple[int, ...]
    tensors: tuple[tuple[int, torch.Tensor, int], ...] = ()
    numbers: tuple[tuple[int, str], ...] = ()

    def fits(self, inputs: Sequence[Any]) -> bool:
        """Whether nothing that it has as a constant has changed."""
        for place, tensor, version in self.tensors:
            if inputs[place] is not tensor or tensor._version != version:
                return False
        return all(repr(inputs[place].item()) == number for place, number in self.numbers)


class _Graph:
    """One graph of Dynamo's, compiled at its first call, and again where what it holds as constants has changed.

    `held` are the places of parameters, buffers and other tensors of the model among the inputs, but for those that the
    graph writes; `numbers` those of Python numbers, which come as tensors without dimensions. What was made is replaced
    as a whole, so that a thread never runs what another one is making.
    """

    def __init__(self, graph: fx.GraphModule, examples: Sequence[Any], options: dict[str, Any]) -> None:
        self.graph, self.inspect = graph, options.pop("inspect", None)
        self.options, self.strict = options, bool(options.get("strict"))
        nodes = graph.graph.find_nodes(op="placeholder")
        self.held = [i for i, example in enumerate(examples) if _is_static(example)]
        self.numbers = [i for i, node in enumerate(nodes) if i not in self.held and _is_number(node, examples[i])]
        self.sizes = {i: found for i, node in enumerate(nodes) if (found := _size_of(node, nodes)) is not None}
        self.open = any(isinstance(example, torch.SymInt) for example in examples)
        self.lock = threading.Lock()
        self.made: _State | None = None

    def __call__(self, *inputs: Any) -> Any:
        made = self.made
        if made is None or not made.fits(inputs):
            with self.lock:
                made = self.made
                if made is None or not made.fits(inputs):
                    self.made = made = self._compiled(inputs)
        return made.run(*[inputs[i] for i in made.live])

    def _compiled(self, inputs: Sequence[Any]) -> _State:
        try:
            run, live = self._made(inputs)
        except FxoptError as error:
            if self.strict:
                raise
            _tell(f"a graph of torch.compile runs as it is: {error.message}")
            return _State(self.graph, tuple(range(len(inputs))))
        tensors = tuple((place, inputs[place], inputs[place]._version) for place in self.held)
        return _State(run, live, tensors, tuple((place, repr(inputs[place].item())) for place in self.numbers))

    def _made(self, inputs: Sequence[Any]) -> tuple[CompiledModule, tuple[int, ...]]:
        """The graph compiled, and the places of the inputs that it takes."""
        while True:
            module, live = self._with_constants(inputs)
            made = compile(
                module, tuple(inputs[i] for i in live), dynamic_shapes="all" if self.open else None, **self.options
            )
            written = made._session.programs[0].captured.written_attributes()
            kept = [place for place in self.held if _name(place) not in written]
            if len(kept) == len(self.held):
                if self.inspect is not None:
                    self.inspect(made)
                return made, live
            self.held = kept  # what the graph writes is the caller's

    def _with_constants(self, inputs: Sequence[Any]) -> tuple[fx.GraphModule, tuple[int, ...]]:
        """The graph with constants for what is held, and the places of the inputs that are left."""
        module = fx.GraphModule(self.graph, copy.deepcopy(self.graph.graph))
        nodes = module.graph.find_nodes(op="placeholder")
        live = tuple(i for i in range(len(nodes)) if i not in {*self.held, *self.numbers, *self.sizes})
        with module.graph.inserting_after(nodes[-1]):
            for place in self.held:
                tensor = inputs[place]
                if isinstance(tensor, torch.nn.Parameter):
                    module.register_parameter(_name(place), tensor)
                else:
                    module.register_buffer(_name(place), tensor)
                nodes[place].replace_all_uses_with(module.graph.get_attr(_name(place)))
            for place, (source, dim) in self.sizes.items():
                nodes[place].replace_all_uses_with(module.graph.call_method("size", (nodes[source], dim)))
        for place in self.numbers:
            for user in list(nodes[place].users):
                _replace_by(user, inputs[place].item())
        for place in {*self.held, *self.numbers, *self.sizes}:
            module.graph.erase_node(nodes[place])
        module.recompile()
        return module.eval(), live


def _name(place: int) -> str:
    return f"constant_{place}"


def _replace_by(node: fx.Node, number: Any) -> None:
    """Lets everybody read a number instead of a node."""
    for user in list(node.users):
        user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), lambda n: number if n is node else n)
    node.graph.erase_node(node)


def _is_static(example: Any) -> bool:
    """Whether an input is a tensor of the model, by Dynamo's own mark; one without a version can change unseen."""
    marked = isinstance(example, torch.Tensor) and getattr(example, "_dynamo_static_input_type", None) is not None
    return marked and not example.is_inference()


def _is_number(node: fx.Node, example: Any) -> bool:
    """Whether an input is a Python float: Dynamo makes a tensor of it, of which the graph only takes the item."""
    plain = isinstance(example, torch.Tensor) and example.dim() == 0 and example.dtype is torch.float64
    return plain and bool(node.users) and all(_is_item(user) for user in node.users)


def _is_item(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "item"


def _size_of(node: fx.Node, nodes: Iterable[fx.Node]) -> tuple[int, int] | None:
    """The place of the tensor, and its dimension, whose size an input is; None for any other input."""
    size = node.meta.get("example_value")
    if not isinstance(size, torch.SymInt):
        return None
    for place, other in enumerate(nodes):
        tensor = other.meta.get("example_value")
        sizes: Sequence[int | torch.SymInt] = tensor.shape if isinstance(tensor, torch.Tensor) else ()
        for dim, found in enumerate(sizes):
            if isinstance(found, torch.SymInt) and found.node.expr == size.node.expr:
                return place, dim
    return None
