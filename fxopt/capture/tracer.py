"""torch.fx's tracer as it records a model: each call as the ATen operator that it is, each write as a write.

Modules whose forward looks at shapes are written out, torch's recurrent and transformer modules stay whole.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt import effects, ir, spelling
from fxopt.capture.program import FlatModel, strip_root, user_line

aten = torch.ops.aten

#: In-place spellings that a proxy of torch.fx would read as out of place.
_INPLACE = {"__iadd__": "add_", "__isub__": "sub_", "__imul__": "mul_", "__itruediv__": "div_"}


class _Proxy(fx.Proxy):
    """A proxy on which `x += y` is the write that it is, also where x is an attribute of another (`x.mT -= 1`)."""

    def __setitem__(self, index: Any, value: Any) -> None:
        raise fx.proxy.TraceError("an item of a tensor is assigned")

    def __getattr__(self, name: str) -> Any:
        return _Attribute(self, name)


class _Attribute(_Proxy, fx.proxy.Attribute):
    """An attribute of a traced value."""


def _in_place(method: str) -> Callable[[_Proxy, Any], Any]:
    def spell(self: _Proxy, other: Any) -> Any:
        # On a size (an int in Python) or a shape `n += 1` makes a new one; on a tensor it writes.
        if _gives_number(self.node) or _gives_sizes(self.node):
            return getattr(operator, method.removesuffix("_"))(self, other)
        return self.tracer.create_proxy("call_method", method, (self, other), {})

    return spell


for _name, _method in _INPLACE.items():
    setattr(_Proxy, _name, _in_place(_method))


class NoHiddenEffects(TorchDispatchMode):
    """Real tensors may be read while tracing, but not written, and nothing is drawn: that would happen only once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            raise fx.proxy.TraceError(f"a tensor that is no input is written ({func})")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise fx.proxy.TraceError(f"random numbers are drawn outside the traced values ({func})")
        return func(*args, **(kwargs or {}))


def _gives_number(node: fx.Node) -> bool:
    if effects._is_number(node):
        return True
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return _gives_sizes(node.args[0]) and not isinstance(node.args[1], slice)
    return node.target is getattr and node.args[1:] in (("ndim",), ("is_cuda",))


def _gives_sizes(node: fx.Node) -> bool:
    """Whether a node is a shape or a part of one."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return isinstance(node.args[1], slice) and _gives_sizes(node.args[0])
    return node.target is getattr and node.args[1:] == ("shape",)


class Tracer(fx.Tracer):
    """Records ATen operators; expands the modules whose forward looks at shapes; knows tensors by identity."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=False)
        self._attribute_names: dict[int, str] = {}
        self._attribute_proxies: dict[str, fx.Proxy] = {}
        self._modules: list[str] = [""]
        self._autocast = ir.autocast()
        self._thread = threading.get_ident()

    def trace_model(self, root: FlatModel, names: tuple[str, ...]) -> fx.Graph:
        """The graph of `root` as a function of one proxy per name."""
        self.flat_names = names
        for path, module in root.named_modules(remove_duplicate=False):
            for name, held in (*module._parameters.items(), *module._buffers.items()):
                if held is not None:
                    self._attribute_names.setdefault(id(held), f"{path}.{name}" if path else name)
        return self.trace(root)

    def name_of(self, held: Any) -> str | None:
        """The attribute path of a tensor of the root's."""
        return self._attribute_names.get(id(held))

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """One placeholder per flat tensor. `type(root).forward` is FlatModel's, so the model's own hooks run."""
        placeholders = [self.create_proxy("placeholder", name, (), {}) for name in self.flat_names]
        return root_fn, [self.root, *placeholders]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The proxy of a node."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        """torch's recurrent and transformer modules stay whole, and what is scripted: they are no list of operators."""
        if isinstance(m, torch.jit.ScriptModule):
            return True
        return isinstance(m, effects.PURE_MODULES) and type(m).__module__.startswith("torch.nn.")

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter or buffer as one `get_attr` node; found by identity, not by listing every name."""
        if isinstance(attr_val, torch.Tensor) and threading.get_ident() == self._thread:
            name = self._attribute_names.get(id(attr_val))
            if name is not None:
                if name not in self._attribute_proxies:
                    self._attribute_proxies[name] = self.create_proxy(
                        "get_attr", name, (), {}, name=strip_root(name).replace(".", "_")
                    )
                return self._attribute_proxies[name]
        return attr_val

    def call_module(self, m: torch.nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """Traces through, keeping the path; expands what looks at shapes; keeps leaves whole."""
        if threading.get_ident() != self._thread:  # torch.fx patches nn.Module for the whole process while it traces
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        self._modules.append(path)
        try:
            hooked = m._forward_hooks or m._forward_pre_hooks
            expansion = None if hooked or torch.nn.utils.parametrize.is_parametrized(m) else _expansion(m)
            if expansion is not None:
                return expansion(self, m, *args, **kwargs)
            if self.is_leaf_module(m, path):
                return _apart(m, self.create_proxy("call_module", path, args, kwargs))
            return forward(*args, **kwargs)
        finally:
            self._modules.pop()

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        """Looks into functions that were marked by `torch.fx.wrap`; what cannot be traced stays one opaque call."""
        if kind == "call_function" and isinstance(target, FunctionType) and not target.__module__.startswith("torch."):
            last = next(iter(reversed(self.graph.nodes)))
            try:
                return target(*args, **kwargs)
            except Exception:
                for node in reversed(list(self.graph.nodes)):
                    if node is last:
                        break
                    self.graph.erase_node(node)
                kept = set(self.graph.nodes)
                self._attribute_proxies = {n: p for n, p in self._attribute_proxies.items() if p.node in kept}
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        """Records a call under its one spelling."""
        if not torch.is_grad_enabled():
            raise fx.proxy.TraceError("the model switches gradients off for a part of itself")
        if ir.autocast() != self._autocast:
            raise fx.proxy.TraceError("the model switches autocast for a part of itself")
        if kind in ("call_function", "call_method"):
            if target is operator.getitem or target == "__getitem__":
                indexed = self._index(args)
                if indexed is not None:
                    return indexed
            if kind == "call_method" and target in ("size", "dim", "ndimension") and len(args) == 1 and not kwargs:
                kind, target, args = "call_function", getattr, (args[0], "shape" if target == "size" else "ndim")
            spelled = None
            if not isinstance(target, OpOverload):
                spelled = spelling.operator_for(kind, target, args, kwargs, _gives_number)
            if spelled is not None:
                kind = "call_function"
                target, args, kwargs = spelled
            if isinstance(target, OpOverload):
                args, kwargs = ir.canonical_arguments(target, tuple(args), dict(kwargs))
                if effects.changes_shape(target):
                    # What came before shares the tensor or not (`contiguous`), which only a run can tell.
                    raise fx.proxy.TraceError(f"the shape of a tensor is changed in place ({target})")
        if name is None and isinstance(target, OpOverload):
            name = target._opname
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if kind not in ("placeholder", "output"):
            node.meta["origin"] = (ir.Origin(strip_root(self._modules[-1]), user_line(2)),)
        return node

    def _index(self, args: tuple[Any, ...]) -> fx.Node | None:
        """`x[1, :, None]` as select, slice and unsqueeze, as PyTorch's own indexing does it; None where it is no
        tensor that is indexed, or not by these."""
        source, index = args
        if not isinstance(source, fx.Node):
            return None
        if source.target is getattr and source.args[1:] == ("shape",) and isinstance(index, int):
            return self.create_node("call_function", aten.sym_size.int, (source.args[0], index), {})
        schema = ir.schema(source.target)
        one_tensor = schema is not None and [str(r.type) for r in schema.returns] == ["Tensor"]
        if not one_tensor and source.op not in ("placeholder", "get_attr"):
            return None
        parts = index if isinstance(index, tuple) else (index,)
        if not all(part is None or type(part) is int or isinstance(part, slice) for part in parts):
            return None
        node, dim = source, 0
        for part in parts:
            if part is None:
                node = self.create_node("call_function", aten.unsqueeze.default, (node, dim), {})
                dim += 1
            elif isinstance(part, slice):
                if (part.start, part.stop, part.step) != (None, None, None):
                    start = 0 if part.start is None else part.start
                    stop = 2**63 - 1 if part.stop is None else part.stop
                    step = 1 if part.step is None else part.step
                    node = self.create_node("call_function", aten.slice.Tensor, (node, dim, start, stop, step), {})
                dim += 1
            else:
                node = self.create_node("call_function", aten.select.int, (node, dim, part), {})
        return node


def _apart(m: torch.nn.Module, result: Any) -> Any:
    """What a leaf gives, in the structure that it always has."""
    if isinstance(m, torch.nn.LSTM):
        return result[0], (result[1][0], result[1][1])
    if isinstance(m, (torch.nn.RNNBase, torch.nn.LSTMCell, torch.nn.MultiheadAttention)):
        return result[0], result[1]
    return result


# -- modules whose forward looks at shapes ---------------------------------------------------------------------------


def _batch_norm(tracer: Tracer, m: Any, input: Any) -> Any:
    ranks = {
        torch.nn.BatchNorm2d: 4,
        torch.nn.BatchNorm3d: 5,
    }
    for kind, rank in ranks.items():
        if isinstance(m, kind) and isinstance(input, fx.Proxy):
            _prove_rank(input.node, rank)
    statistics = m.running_mean is None and m.running_var is None
    result = tracer.create_proxy(
        "call_function",
        aten.batch_norm.default,
        (input, m.weight, m.bias, m.running_mean, m.running_var, statistics, *_norm_options(m)),
        {},
    )
    if "rank" in input.node.meta:
        result.node.meta["rank"] = input.node.meta["rank"]
    return result


def _norm_options(m: Any) -> tuple[float, float, bool]:
    """Momentum, eps, and whether cuDNN may be used, as the module's forward passes them."""
    return 0.0 if m.momentum is None else m.momentum, m.eps, torch.backends.cudnn.enabled


def _prove_rank(node: fx.Node, rank: int) -> None:
    """A module takes only this rank: kept as a fact, and checked on the first call."""
    node.meta["rank"] = rank


def _instance_norm(tracer: Tracer, m: Any, input: Any) -> Any:
    return tracer.create_proxy(
        "call_function",
        aten.instance_norm.default,
        (input, m.weight, m.bias, m.running_mean, m.running_var, not m.track_running_stats, *_norm_options(m)),
        {},
    )


def _conv_transpose(tracer: Tracer, m: Any, input: Any, output_size: Any = None) -> Any:
    if output_size is not None:
        raise fx.proxy.TraceError("a transposed convolution is given its output size")
    target = {1: aten.conv_transpose1d.default, 2: aten.conv_transpose2d.input, 3: aten.conv_transpose3d.input}[
        len(m.kernel_size)
    ]
    return tracer.create_proxy(
        "call_function",
        target,
        (input, m.weight, m.bias, list(m.stride), list(m.padding), list(m.output_padding), m.groups, list(m.dilation)),
        {},
    )


def _expansion(m: torch.nn.Module) -> Callable[..., Any] | None:
    """How a module is written out without running its forward: only for exactly torch's own forward."""
    nn = torch.nn
    if "forward" in m.__dict__:  # somebody gave this one object a forward of its own
        return None
    forward = type(m).forward
    if isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.training:
        plain = forward in (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
        known = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        checked = any(type(m)._check_input_dim is kind._check_input_dim for kind in known)
        return _batch_norm if plain and checked else None
    if type(m) in (nn.InstanceNorm2d, nn.InstanceNorm3d):
        return _instance_norm
    if forward in (nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward):
        return _conv_transpose
    return None
