"""Helpers over `torch.fx.Graph`, the only graph class: typed access to arguments, tensors, values and origins.

The IR is a `torch.fx.GraphModule` whose graph is in the normal form of `docs/ir.md`. Its placeholders and outputs are
flat; `Interface` (in `module.meta["interface"]`) holds the structure that the user sees.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch._prims_common import suggest_memory_format
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from fxopt import trained

aten = torch.ops.aten

#: What a FakeTensor says where the shape depends on values, or the operator has no implementation for it.
_NOT_INFERRED = (
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.DataDependentOutputException,
    fake_tensor.UnsupportedOperatorException,
    fake_tensor.UnsupportedFakeTensorException,
)

#: Functions on shapes and sizes that are part of the IR beside ATen operators.
SCALAR_FUNCTIONS = frozenset(
    {
        operator.getitem,
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.truediv,
        operator.mod,
        operator.neg,
        operator.pow,
        operator.eq,
        operator.ne,
        operator.lt,
        operator.le,
        operator.gt,
        operator.ge,
    }
)


@dataclass(frozen=True)
class Origin:
    """Where a node came from: the path of the module that made it, and the user's source line."""

    module: str
    line: str = ""


@dataclass
class Interface:
    """How a user's arguments become the flat placeholders, and the flat outputs the user's structure.

    `in_spec` is the pytree of `(args, kwargs)`, `out_spec` that of the result; `names` are the placeholders' readable
    names in order. Leaves of the inputs that are no tensors are constants of the capture: `constants` maps their
    position among the flat inputs to their value.
    """

    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    names: tuple[str, ...]
    constants: dict[int, Any] = field(default_factory=dict)


def new_module(graph: fx.Graph, interface: Interface | None = None) -> fx.GraphModule:
    """An empty IR module that owns `graph`; no Python code is generated until `recompile()` is called."""
    module = fx.GraphModule({}, fx.Graph())
    module.training = False
    adopt(module, graph)
    if interface is not None:
        module.meta["interface"] = interface
    return module


def adopt(module: fx.GraphModule, graph: fx.Graph) -> None:
    """Makes `module` the owner of `graph` without generating its code."""
    module._graph = graph
    graph.owning_module = module


def module_of(graph: fx.Graph) -> fx.GraphModule:
    """The IR module that owns `graph`."""
    owner = graph.owning_module
    assert owner is not None, "the graph is not part of an IR module"
    return owner


def interface(module: fx.GraphModule) -> Interface:
    """The user-facing structure of an IR module."""
    return cast(Interface, module.meta["interface"])


# -- attributes ------------------------------------------------------------------------------------------------------


def attribute_path(module: fx.GraphModule, name: str) -> str:
    """A dotted path for an attribute of the user's called `name`, made of parts that generated code can spell.

    A part that is a Python keyword, or has characters that no identifier has, gets underscores; two names of the user's
    never get one path. `module` remembers what it gave.
    """
    given: dict[str, str] = module.meta.setdefault("paths", {})
    path = whole = ""
    for part in name.split("."):
        whole = f"{whole}.{part}" if whole else part
        clean = re.sub(r"\W", "_", part)
        clean += "_" * keyword.iskeyword(clean)
        prefix = f"{path}." if path else ""
        while given.setdefault(prefix + clean, whole) != whole:
            clean += "_"
        path = prefix + clean
    return path


def get_attribute(module: torch.nn.Module, path: str) -> Any:
    """The tensor, module or object under a dotted path; AttributeError where there is none."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def set_attribute(module: torch.nn.Module, path: str, value: Any) -> None:
    """Puts a tensor (a Parameter as parameter, else as buffer) or a module under a dotted path."""
    *parents, last = path.split(".")
    for part in parents:
        if part not in module._modules:
            container = torch.nn.Module()
            container.training = False
            module.add_module(part, container)
        module = cast(torch.nn.Module, module._modules[part])
    if isinstance(value, torch.nn.Parameter):
        module.register_parameter(last, value)
    elif isinstance(value, torch.Tensor):
        module.register_buffer(last, value)
    elif isinstance(value, torch.nn.Module):
        module.add_module(last, value)
    else:
        setattr(module, last, value)


def delete_attribute(module: torch.nn.Module, path: str) -> None:
    """Removes what `set_attribute` put, and the containers that are empty afterwards."""
    parts = path.split(".")
    chain = [module]
    for part in parts[:-1]:
        chain.append(cast(torch.nn.Module, chain[-1]._modules[part]))
    delattr(chain[-1], parts[-1])
    for parent, child, part in zip(chain[-2::-1], chain[:0:-1], parts[-2::-1], strict=True):
        if child._modules or child._parameters or child._buffers or type(child) is not torch.nn.Module:
            break
        del parent._modules[part]


def has_attribute(module: torch.nn.Module, path: str) -> bool:
    """Whether something is under a dotted path."""
    try:
        get_attribute(module, path)
    except AttributeError:
        return False
    return True


def tensors(module: fx.GraphModule) -> dict[str, torch.Tensor]:
    """Every tensor that the graph reads, by attribute path, in graph order."""
    found: dict[str, torch.Tensor] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target not in found:
            value = get_attribute(module, node.target)
            if isinstance(value, torch.Tensor):
                found[node.target] = value
    return found


def drop_values(module: fx.GraphModule) -> None:
    """Puts tensors without memory in the place of those that the graph reads. Nothing can run it any more."""
    for path, value in tensors(module).items():
        delete_attribute(module, path)
        set_attribute(module, path, value.detach().to("meta"))


def tensor(node: Any) -> torch.Tensor | None:
    """The tensor that a `get_attr` node reads; None for anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value = get_attribute(module_of(node.graph), cast(str, node.target))
    return trained.read(value) if isinstance(value, torch.Tensor) else None


def identity(value: torch.Tensor) -> tuple[object, ...]:
    """What makes two names one tensor: (storage, offset, size, stride, dtype)."""
    if value.layout is not torch.strided:
        return (id(value),)
    return (place(value), value.device, value.storage_offset(), tuple(value.shape), value.stride(), value.dtype)


def place(value: torch.Tensor) -> object:
    """What tensors that share memory have in common: their storage."""
    if value.layout is not torch.strided:
        return id(value)
    storage = value.untyped_storage()
    # Storages without memory (empty, meta) have no address to compare, but are objects of their own.
    return storage.data_ptr() or ("storage", storage._cdata)


# -- arguments -------------------------------------------------------------------------------------------------------


def schema(target: object) -> torch.FunctionSchema | None:
    """The ATen schema of a call target; None for what has none."""
    return cast("torch.FunctionSchema | None", target._schema) if isinstance(target, OpOverload) else None


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of an operator call by its schema name, defaults filled in."""
    found = schema(node.target)
    assert found is not None, f"{node.name} has no schema"
    bound: dict[str, Any] = {}
    for position, argument in enumerate(found.arguments):
        if not argument.kwarg_only and position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def argument(node: fx.Node, name: str) -> Any:
    """One argument of an operator call by its schema name."""
    return arguments(node)[name]


def canonical_arguments(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """`(args, kwargs)` where the schema puts them: positional first, keyword-only by name, trailing defaults left out.

    Raises TypeError where they do not bind.
    """
    positional: list[Any] = []
    keyword_only: dict[str, Any] = {}
    rest = dict(kwargs)
    last_given = 0
    for position, parameter in enumerate(target._schema.arguments):
        if not parameter.kwarg_only and position < len(args):
            value, given = args[position], True
            if parameter.name in rest:
                raise TypeError(f"{target} got {parameter.name} twice")
        elif parameter.name in rest:
            value, given = rest.pop(parameter.name), True
        elif parameter.has_default_value():
            value, given = parameter.default_value, False
        else:
            raise TypeError(f"{target} lacks {parameter.name}")
        if given and parameter.has_default_value() and _same_literal(value, parameter.default_value):
            given = False
        if parameter.kwarg_only:
            if given:
                keyword_only[parameter.name] = value
        else:
            positional.append(value)
            if given:
                last_given = len(positional)
    if rest or len(args) > len(target._schema.arguments):
        raise TypeError(f"{target} does not take {sorted(rest) or 'so many arguments'}")
    return tuple(positional[:last_given]), keyword_only


def _same_literal(left: object, right: object) -> bool:
    """Equal as literals: 1, 1.0 and True differ, and so do 0.0 and -0.0."""
    if isinstance(left, fx.Node) or isinstance(right, fx.Node):
        return left is right
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same_literal, left, right))
    return type(left) is type(right) and repr(left) == repr(right)


def same_literal(left: object, right: object) -> bool:
    """Whether two literals are the same value of the same type (1, 1.0, True differ; 0.0, -0.0 differ)."""
    return _same_literal(left, right)


# -- values ----------------------------------------------------------------------------------------------------------


def value(node: Any) -> Any:
    """What is known of a node's result: a FakeTensor, a number, a tuple of them; None where shapes are not known."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def fake(node: Any) -> torch.Tensor | None:
    """The FakeTensor of a node's result, where it is one tensor and known."""
    found = value(node)
    return found if isinstance(found, torch.Tensor) else None


def rank(node: fx.Node) -> int | None:
    """The number of dimensions of a node's result, from its value or proved by the module that reads it."""
    found = fake(node)
    if found is not None:
        return found.dim()
    return cast("int | None", node.meta.get("rank"))


def shape(node: fx.Node) -> tuple[int | torch.SymInt, ...] | None:
    """The sizes of a node's result, symbolic where dynamic; None where unknown."""
    found = fake(node)
    return None if found is None else tuple(found.shape)


def static(size: object) -> int | None:
    """A size as a plain int where it is one; never asks a symbolic size for its value (that would make a guard)."""
    return size if type(size) is int else None


def same_sizes(left: Iterable[Any] | None, right: Iterable[Any] | None) -> bool:
    """Whether two shapes are known and provably equal for every input, without adding guards."""
    if left is None or right is None:
        return False
    left, right = tuple(left), tuple(right)
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))


def dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype of a node's result, where known."""
    found = fake(node)
    return None if found is None else found.dtype


def fake_mode(module: fx.GraphModule) -> FakeTensorMode | None:
    """The FakeTensorMode of the module's values; None before shapes are known."""
    return cast("FakeTensorMode | None", module.meta.get("fake_mode"))


def autocast() -> tuple[tuple[str, torch.dtype], ...]:
    """The state of autocast: the device types where it is on, each with its dtype."""
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind))


@contextmanager
def _inference(mode: FakeTensorMode) -> Iterator[None]:
    quiet: AbstractContextManager[Any] = nullcontext()
    if mode.shape_env is not None:
        quiet = mode.shape_env.suppress_guards()
    with mode, quiet, torch.no_grad():
        yield


def infer(node: fx.Node) -> Any:
    """Infers what a node gives from its inputs' values; None where one of them is unknown or the node is opaque, or
    where only the values decide its shape (`nonzero`, a boolean mask).

    Raises whatever the operator raises on inputs that do not fit.
    """
    module = module_of(node.graph)
    if node.op == "get_attr":
        attribute = get_attribute(module, cast(str, node.target))
        mode = fake_mode(module)
        if not isinstance(attribute, torch.Tensor) or mode is None:
            return None
        return mode.from_tensor(attribute.detach(), static_shapes=True)
    if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
        return None
    mode = fake_mode(module)
    if mode is None:
        return None
    missing = False

    def known(operand: fx.Node) -> Any:
        nonlocal missing
        found = operand.meta.get("val")
        missing |= found is None
        return found

    args, kwargs = fx.map_arg((node.args, node.kwargs), known)
    if missing:
        return None
    try:
        with _inference(mode):
            return _as_the_kernel(node.target, args, cast(Any, node.target)(*args, **kwargs))
    except _NOT_INFERRED:
        return None


def _as_the_kernel(target: Any, args: tuple[Any, ...], found: Any) -> Any:
    """What was inferred, with the strides that the real kernel gives: the CPU's batch norm packs its result in the
    memory format that its input suggests, where the fake one keeps the input's strides."""
    if target is not torch.ops.aten.batch_norm.default or found.device.type != "cpu":
        return found
    return torch.empty_like(found, memory_format=suggest_memory_format(args[0]))


def update_value(node: fx.Node) -> None:
    """Sets `meta["val"]` by inference, or drops it where it cannot be known."""
    found = infer(node)
    if found is None:
        node.meta.pop("val", None)
    else:
        node.meta["val"] = found


def describe_value(found: Any) -> str:
    """A value in a few characters: `f32[2, 3, 8, 8]`."""
    if isinstance(found, torch.Tensor):
        name = str(found.dtype).removeprefix("torch.")
        short = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16", "int64": "i64"}
        return f"{short.get(name, name)}[{', '.join(str(size) for size in found.shape)}]"
    if isinstance(found, (tuple, list)):
        return "(" + ", ".join(map(describe_value, found)) + ")"
    return "?" if found is None else str(found)


def is_fake(found: object) -> bool:
    """Whether an object is a FakeTensor."""
    return isinstance(found, FakeTensor)


# -- nodes -----------------------------------------------------------------------------------------------------------


def origins(node: fx.Node) -> tuple[Origin, ...]:
    """Where a node came from; a rewritten node has the origins of all nodes that it stands for."""
    return cast("tuple[Origin, ...]", node.meta.get("origin", ()))


def merge_origins(nodes: Iterable[fx.Node]) -> tuple[Origin, ...]:
    """The origins of several nodes, each once, in order."""
    return tuple(dict.fromkeys(origin for node in nodes for origin in origins(node)))


def target_name(node: fx.Node) -> str:
    """An operator's name as a person reads it: `conv2d`, `fxopt.convolution`, `LSTM`."""
    target = node.target
    if isinstance(target, OpOverload):
        name = target._opname
        return name if target.namespace in ("aten", "prims") else f"{target.namespace}.{name}"
    if node.op == "call_module":
        return type(get_attribute(module_of(node.graph), cast(str, target))).__name__
    if isinstance(target, str):
        return target
    return getattr(target, "__name__", str(target))


def is_compute(node: fx.Node) -> bool:
    """Whether a node is work at run time: not an input, an attribute, an output, or arithmetic on sizes."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    return node.target not in SCALAR_FUNCTIONS and node.target is not aten.sym_size.int


def copy(module: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A copy of an IR module that shares its tensors, and the map from its nodes to the copy's (same names)."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        twin = graph.create_node(
            node.op,
            node.target,
            fx.map_arg(node.args, nodes.__getitem__),
            fx.map_arg(node.kwargs, nodes.__getitem__),
            node.name,
            node.type,
        )
        twin.meta = dict(node.meta)
        nodes[node] = twin
    twin_module = new_module(graph)
    twin_module.meta = dict(module.meta)
    for node in module.graph.nodes:
        if node.op in ("get_attr", "call_module") and not has_attribute(twin_module, node.target):
            set_attribute(twin_module, node.target, get_attribute(module, node.target))
    return twin_module, nodes
