"""Writes out what symbolic tracing left whole, once shapes are known, as the ATen operators that it runs.

Without shapes `F.interpolate(x)`, `x[..., 0]`, `x.T` and `1 / x` stay the Python calls that they are. With them,
PyTorch's own dispatch says what they are: the call is run on the values of its operands, and each operator before
autograd is recorded, which is how torch.export records them too.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from fxopt import ir
from fxopt.edit import Editor


def is_whole(node: fx.Node) -> bool:
    """Whether a node is a Python call on tensors, not an operator: a function, a method, indexing, an attribute."""
    if node.op == "call_method":
        return True
    if node.op != "call_function" or isinstance(node.target, OpOverload) or node.target is torch._assert:
        return False
    if node.target is operator.getitem and not isinstance(ir.value(node.args[0]), torch.Tensor):
        return False  # an item of a list of results
    return getattr(node.target, "__module__", "").partition(".")[0] in ("torch", "_operator", "builtins")


def expand(editor: Editor, node: fx.Node) -> bool:
    """Replaces a whole call by the operators that it runs; False where that cannot be known.

    It cannot where an operand's value is unknown or symbolic, and where the call looks at the data of a tensor.
    """
    _take_apart(editor, node)
    operands = [operand for operand in node.all_input_nodes if isinstance(ir.value(operand), torch.Tensor)]
    others = [operand for operand in node.all_input_nodes if operand not in operands]
    if not operands or not all(_is_plain(ir.value(operand)) for operand in others):
        return False
    traced = _trace(node, operands)
    if traced is None:
        return False
    nodes: dict[fx.Node, Any] = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
    result: Any = None
    origin = ir.origins(node)
    for step in traced.graph.nodes:
        if step.op == "output":
            result = fx.map_arg(step.args[0], nodes.__getitem__)
        elif step.op == "get_attr":
            path = editor.add_tensor("_tensor_constant0", ir.get_attribute(traced, str(step.target)))
            nodes[step] = editor.insert("get_attr", path, before=node, origin=origin)
        elif step.op == "call_function":
            args, kwargs = fx.map_arg((step.args, step.kwargs), nodes.__getitem__)
            name = step.target._opname if isinstance(step.target, OpOverload) else None
            nodes[step] = editor.insert(
                "call_function", step.target, args, kwargs, before=node, origin=origin, name=name
            )
    _replace(editor, node, result)
    return True


def _take_apart(editor: Editor, node: fx.Node) -> None:
    """Lets a call read the items of a list of tensors in place of the list: `torch.cat(x.chunk(2))`."""
    for operand in node.all_input_nodes:
        value = ir.value(operand)
        if isinstance(value, (list, tuple)) and all(isinstance(part, torch.Tensor) for part in value):
            items = [
                editor.insert("call_function", operator.getitem, (operand, index), before=node, origin=ir.origins(node))
                for index in range(len(value))
            ]
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: items if n is operand else n)  # noqa: B023
            editor.update(node, args, kwargs)


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def _trace(node: fx.Node, operands: list[fx.Node]) -> fx.GraphModule | None:
    """The operators that a call runs on its operands' values; None where PyTorch cannot trace it."""

    def call(*tensors: Any) -> Any:
        known = dict(zip(operands, tensors, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: known.get(n, ir.value(n)))
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tracer = make_fx(call, pre_dispatch=True, _allow_non_fake_inputs=True)
            traced: fx.GraphModule = tracer(*map(ir.value, operands))
    except Exception:
        # Control flow on values, an operator without shapes: the call stays whole, which is always legal.
        return None
    known = all(step.op in ("placeholder", "get_attr", "call_function", "output") for step in traced.graph.nodes)
    return traced if known else None


def _replace(editor: Editor, node: fx.Node, result: Any) -> None:
    """Lets every reader have the result, taken apart where it is several."""
    if isinstance(result, fx.Node):
        editor.replace_uses(node, result)
    else:
        for user in list(node.users):
            if user.target is operator.getitem and user.args[0] is node and isinstance(user.args[1], int):
                _replace(editor, user, result[user.args[1]])
            else:
                args, kwargs = fx.map_arg((user.args, user.kwargs), lambda n: result if n is node else n)
                editor.update(user, args, kwargs)
    if not node.users:
        editor.erase(node)
