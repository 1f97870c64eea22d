"""TorchInductor behind fxopt's rewrites: the rewritten graph in ATen, handed over and compiled for each signature.

TorchInductor gets all that is computed, as one function. What a result is beside that stays an ATen operator behind it:
a view of another value, an input or a constant handed out, a number. So results have the strides that they always had,
and those that share memory go on sharing it.

The weights of convolutions and linear layers are constants to it ("freezing"), which it packs once for each signature.
Every other tensor is an argument: it folds a constant into the convolution in front of it, and takes the wrong axis
where a transposed convolution has as many inputs as outputs, or the image is as wide as there are channels.

Compiling takes seconds to minutes per signature, and every new batch size is one. TorchInductor's own settings
(`torch._inductor.config`) hold.

Numerics: reassociates. Fused half-precision operators round once, where ATen rounds after each; exponentials and the
like may differ from ATen's in the last digits. NaN: a relu, clamp, relu6, hardtanh or hardsigmoid fused into a layer
may turn it into a number, as in the onednn backend; elsewhere it stays.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from fxopt import effects, ir, ops
from fxopt.lowering import executor
from fxopt.lowering.backend import Backend, Runner, Setting
from fxopt.lowering.weights import Weights

aten = torch.ops.aten

_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8}
    | {torch.uint8, torch.bool}
)
#: Layers whose weight and bias are constants; those of transposed convolutions are not.
_LAYERS = frozenset({aten.linear.default, *ops.STRING_PADDED_TARGETS, *ops.CONVOLUTION_TARGETS}) - {
    *ops.TRANSPOSED_TARGETS
}
_PACKED = (torch.float32, torch.bfloat16, torch.float16)  # oneDNN refuses to pack float64
#: TorchInductor keeps what it compiles in globals: one graph at a time.
_COMPILING = threading.RLock()


# -- what it takes ---------------------------------------------------------------------------------------------------


def unavailable(device: str) -> str | None:
    """Why TorchInductor cannot compile for a type of device here; None where it can."""
    if device == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "TorchInductor needs Triton for CUDA: pip install triton"
    if device != "cpu":
        return f"TorchInductor was probed on the CPU and CUDA, not on {device}"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    except Exception as error:
        return f"TorchInductor finds no C++ compiler ({type(error).__name__}): install g++ or clang, or set CXX"
    return None


def _declines(module: fx.GraphModule, setting: Setting) -> str | None:
    if setting.needs_grad:
        return "an input requires grad, and only the forward would be compiled"
    if setting.autocast:
        return "autocast is on, and TorchInductor was probed without it"
    devices: dict[str, None] = {}
    computed = False
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        refusal = _refusal(node)
        if refusal is not None:
            return f"{node.name} {refusal}"
        computed = computed or (node.op == "call_function" and not effects.of(node).aliases)
        devices.update(dict.fromkeys(value.device.type for value in _tensors(node)))
    if not computed:
        return "nothing is computed: every result is an input, a constant, or a view of one"
    return next((refusal for device in devices if (refusal := unavailable(device)) is not None), None)


def _refusal(node: fx.Node) -> str | None:
    """Why a node cannot be part of what TorchInductor compiles."""
    if node.op in ("call_module", "call_method"):
        return f"is a {ir.target_name(node)} that was left whole"
    if node.op == "call_function":
        if not isinstance(node.target, OpOverload) and node.target is not getitem:
            return "is a call of no operator"
        found = effects.of(node)
        if found.writes:
            return "writes in place"
        if found.random:
            return "draws random numbers, which TorchInductor would draw otherwise"
        if not found.pure:
            return "is there for the error that it may raise"
    leaves = pytree.tree_leaves(ir.value(node))
    if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return "gives what is no tensor, or of a shape that depends on values"
    for leaf in leaves:
        if leaf.layout is not torch.strided or leaf.dtype not in _DTYPES:
            return f"is {leaf.dtype} ({leaf.layout}), and TorchInductor was probed on plain tensors of other dtypes"
    return None


def _tensors(node: fx.Node) -> Iterator[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(ir.value(node)) if isinstance(leaf, torch.Tensor))


# -- building --------------------------------------------------------------------------------------------------------


def _build(module: fx.GraphModule, packed: Weights) -> Runner:
    ops.decompose_all(module)
    for node in module.graph.nodes:
        if node.op == "call_function":
            ir.update_value(node)  # a view's value lies in the memory of what it now views
    run = executor.build(_hand_over(module, packed))

    def call(*tensors: torch.Tensor) -> tuple[Any, ...]:
        with torch.no_grad():
            return run(*tensors)

    return call


def _hand_over(module: fx.GraphModule, packed: Weights) -> fx.GraphModule:
    """The graph as it is called: what TorchInductor compiled, then the views that are handed out."""
    behind = _views_behind(module.graph)
    output = module.graph.output_node()
    read = dict.fromkeys(node for reader in (*behind, output) for node in reader.all_input_nodes)
    results = [node for node in read if node.op == "call_function" and node not in behind]
    inner, arguments = _inner(module, results)
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    outer = ir.new_module(graph)
    for node in module.graph.nodes:
        if node.op == "placeholder" or (node.op == "get_attr" and (node in read or node in arguments)):
            made[node] = graph.node_copy(node)
        if node.op == "get_attr" and node in made:
            ir.set_attribute(outer, str(node.target), ir.get_attribute(module, str(node.target)))
    if results:
        compiled = _compiled(inner, arguments, results, packed)
        call = graph.create_node("call_function", compiled, tuple(made[node] for node in arguments), name="inductor")
        made |= {node: graph.call_function(getitem, (call, number)) for number, node in enumerate(results)}
    for node in (*behind, output):
        made[node] = graph.node_copy(node, made.__getitem__)
    return outer


def _views_behind(graph: fx.Graph) -> dict[fx.Node, None]:
    """The views through which results are handed out, in order: what they view is computed, or given."""
    found: set[fx.Node] = set()
    waiting = list(graph.output_node().all_input_nodes)
    while waiting:
        node = waiting.pop()
        viewed = [operand for operand in effects.of(node).aliases if _same_memory(operand, node)]
        if viewed and node.target is not getitem and node not in found:
            found.add(node)
            waiting += viewed
    return {node: None for node in graph.nodes if node in found}


def _same_memory(left: fx.Node, right: fx.Node) -> bool:
    values = ir.fake(left), ir.fake(right)
    storages = {value.untyped_storage()._cdata for value in values if value is not None}
    return None not in values and len(storages) == 1


def _inner(module: fx.GraphModule, results: Sequence[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The graph of what is computed, with layers' weights as constants; and the nodes that are its arguments."""
    needed, waiting = set(results), list(results)
    while waiting:
        new = [operand for operand in waiting.pop().all_input_nodes if operand not in needed]
        needed.update(new)
        waiting += new
    graph, made = fx.Graph(), dict[fx.Node, fx.Node]()
    inner = ir.new_module(graph)
    nodes = [node for node in module.graph.nodes if node in needed]
    constants = {node for node in nodes if node.op == "get_attr" and all(map(_is_layer(node), node.users))}
    arguments = [node for node in nodes if node.op in ("placeholder", "get_attr") and node not in constants]
    for node in arguments:
        made[node] = graph.placeholder(node.name)
    for node in nodes:
        if node in constants:
            ir.set_attribute(inner, str(node.target), ir.get_attribute(module, str(node.target)))
        if node not in made:
            made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in results))
    inner.recompile()
    return inner, arguments


def _is_layer(constant: fx.Node) -> Callable[[fx.Node], bool]:
    """Whether a reader is a layer that has the constant as its weight or bias."""

    def layer(reader: fx.Node) -> bool:
        return reader.target in _LAYERS and constant in reader.args[1:3] and ir.dtype(constant) in _PACKED

    return layer


@dataclass(eq=False)
class _Compiled:
    """What TorchInductor made of `inner`, with results in fresh memory and in `strides`, as ATen gives them.

    Those that are not are copied: TorchInductor leaves out copies that seem to do nothing (a clone), and chooses
    layouts. Which results are concerned is the same in each call, and found in the first.
    """

    run: Callable[..., Any]
    inner: fx.GraphModule
    strides: tuple[tuple[int, ...], ...]
    copied: list[int] | None = None

    def __call__(self, *arguments: torch.Tensor) -> list[torch.Tensor]:
        """The results, from the values of the graph's placeholders."""
        results = list(self.run(*arguments))
        if self.copied is None:
            self.copied = self._concerned(arguments, results)
        for number in self.copied:
            result = results[number]
            fresh = torch.empty_strided(result.shape, self.strides[number], dtype=result.dtype, device=result.device)
            results[number] = fresh.copy_(result)
        return results

    def _concerned(self, arguments: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> list[int]:
        """The results that share memory with an argument or with a result before them, or have other strides."""
        places = {argument.untyped_storage().data_ptr() for argument in arguments}
        found = []
        for number, (result, wanted) in enumerate(zip(results, self.strides, strict=True)):
            place = result.untyped_storage().data_ptr()
            strides = zip(result.stride(), wanted, result.shape, strict=True)
            if place in places or any(have != want and size != 1 for have, want, size in strides):
                found.append(number)
            places.add(place)
        return found


def _compiled(
    inner: fx.GraphModule, arguments: Sequence[fx.Node], results: Sequence[fx.Node], packed: Weights
) -> _Compiled:
    """`inner` compiled, or what a living specialisation has of it: signatures may differ in what does not matter here.

    Whether gradients are on is part of a signature, for one.
    """
    examples = [value for node in arguments if (value := ir.fake(node)) is not None]
    given = tuple((tuple(value.shape), value.stride(), value.dtype, value.device) for value in examples)
    constants = tuple(ir.identity(value) for value in ir.tensors(inner).values())
    key = ("inductor", inner.code, given, constants, torch.get_num_threads())
    reference: weakref.ref[_Compiled] | None = packed.get(key)
    held = None if reference is None else reference()
    if held is None:
        strides = tuple(tuple(value.stride()) for node in results for value in _tensors(node))
        held = _Compiled(_compile(inner, examples), inner, strides)
        packed[key] = weakref.ref(held)
    return held


def _compile(inner: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
    import torch._inductor

    # A copy: TorchInductor may change the graph that it is given.
    with _COMPILING, torch.inference_mode(False), torch.no_grad():
        compiled: Callable[..., Any] = torch._inductor.compile(
            fx.GraphModule(inner, copy.deepcopy(inner.graph)), examples, options={"freezing": True}
        )
    return compiled


BACKEND = Backend("inductor", numerics="reassociate", declines=_declines, build=_build)
