"""One spelling for each operation: a captured graph of ATen operators becomes the normal form of `docs/ir.md`.

In-place operations on fresh values become their pure twins, `view` becomes `reshape`, two names of one tensor become
one, numbers that are known become literals. What cannot be proved stays as it was captured.
"""

from __future__ import annotations

import operator
from collections import deque
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from fxopt import effects, expand, ir
from fxopt.edit import Editor
from fxopt.errors import CaptureError, InputError

aten = torch.ops.aten


def normalize(module: fx.GraphModule) -> None:
    """Brings a captured module into the normal form; idempotent."""
    editor = Editor(module)
    for node in module.graph.nodes:
        _respell(node)
    for node in list(module.graph.nodes):
        _view_in_place(node)
    _unify_tensors(editor)
    _infer_strides(module)
    propagate_sizes(module)
    for node in module.graph.nodes:
        _respell(node)
    functionalize(module)
    for node in list(module.graph.nodes):
        if isinstance(node.target, OpOverload) and node.op == "call_function":
            args, kwargs = ir.canonical_arguments(node.target, node.args, dict(node.kwargs))
            if args != node.args or kwargs != node.kwargs:
                editor.update(node, args, kwargs)
        _one_sided_clamp(editor, node)
        _string_padding(editor, node)
    _native_batch_norms(editor)
    # `_assert_tensor_metadata` repeats what a signature already fixes: dtype, device, layout.
    for node in list(module.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            editor.erase(node)


#: Second names of an operator, of the same schema, and the name that it has in the normal form.
_SECOND_NAMES = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.lift_fresh_copy.default: aten.clone.default,
    aten.lift_fresh.default: aten.clone.default,
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.true_divide.Tensor: aten.div.Tensor,
    aten.divide.Tensor: aten.div.Tensor,
    aten.multiply.Tensor: aten.mul.Tensor,
    aten.subtract.Tensor: aten.sub.Tensor,
    aten.negative.default: aten.neg.default,
    aten.absolute.default: aten.abs.default,
    aten.clip.default: aten.clamp.default,
    aten.special_erf.default: aten.erf.default,
    aten.special_expit.default: aten.sigmoid.default,
    aten.special_log1p.default: aten.log1p.default,
}


def _respell(node: fx.Node) -> None:
    if isinstance(node.target, OpOverload):
        node.target = _SECOND_NAMES.get(node.target, node.target)


def _unify_tensors(editor: Editor) -> None:
    """Lets every reader of one tensor read it under its first name."""
    first: dict[tuple[object, ...], fx.Node] = {}
    for node in list(editor.graph.nodes):
        found = ir.tensor(node)
        if found is None:
            continue
        kept = first.setdefault(ir.identity(found), node)
        if kept is not node:
            editor.replace_uses(node, kept)
            editor.erase(node)


def _infer_strides(module: fx.GraphModule) -> None:
    """Gives what torch.export captured the strides that kernels give, where `ir.infer` knows better than export did."""
    changed: set[fx.Node] = set()
    for node in module.graph.nodes:
        before = ir.fake(node)
        if before is None or (node.target is not aten.batch_norm.default and changed.isdisjoint(node.all_input_nodes)):
            continue
        after = ir.infer(node)
        if isinstance(after, torch.Tensor) and not ir.same_sizes(before.stride(), after.stride()):
            node.meta["val"] = after
            changed.add(node)


def _view_in_place(node: fx.Node) -> None:
    """`unsqueeze_` on a value of the graph that is read under its new name only is `unsqueeze`.

    Otherwise one node would have one shape for who reads it before, and another for who reads it behind.
    """
    if not effects.changes_shape(node.target):
        return
    pure = aten.transpose.int if node.target is aten.transpose_.default else twin(node.target)
    value = node.args[0]
    if pure is not None and pure._schema.arguments[0].alias_info is None:
        pure = None  # it does not give a view
    while pure is not None and isinstance(value, fx.Node) and value.op == "call_function":
        if any(node < user for user in value.users):
            break
        if not effects.of(value).writes:  # else it is what it wrote to
            node.target = pure
            return
        value = value.args[0]
    raise CaptureError(
        f"the shape of a tensor is changed in place ({node.target}) that the model was given, holds or reads elsewhere",
        node=node,
        hint="use the operation that gives a view: x = x.unsqueeze(0)",
    )


# -- in-place operations ---------------------------------------------------------------------------------------------


def twin(target: Any) -> OpOverload | None:
    """The pure operator that computes what an in-place one writes: `add_.Tensor` -> `add.Tensor`."""
    if not isinstance(target, OpOverload) or not target._opname.endswith("_") or target._opname.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), target._opname[:-1], None)
    found = getattr(packet, target._overloadname, None)
    return found if isinstance(found, OpOverload) and not found._schema.is_mutable else None


def functionalize(module: fx.GraphModule) -> None:
    """Turns each in-place operation on a fresh value into its pure twin, where nobody could tell the difference.

    Legal when the value written was computed by the graph (it is no input, no parameter, no result of an opaque node),
    no alias of it that is older than the write is read afterwards, and the twin gives the same shape, dtype and
    strides. Later readers of the written value itself read the twin instead, and with them what they alias. One write
    made pure can free another, so it is asked until none is.
    """
    while _functionalize_once(module):
        pass


def _functionalize_once(module: fx.GraphModule) -> bool:
    changed = False
    aliases = effects.Aliases.scan(module.graph)
    if not any(twin(writer.target) for writer in aliases.writers):
        return False
    ahead: dict[fx.Node, deque[fx.Node]] = {}
    for node in aliases.group:
        ahead.setdefault(aliases.root(node), deque()).append(node)
    foreign = {aliases.root(node) for node in aliases.foreign}
    # Of each alias group, the values older than the current write that are read behind it: few, however long the chain.
    live: dict[fx.Node, list[fx.Node]] = {}
    editor = Editor(module)
    for writer in aliases.writers:
        pure = twin(writer.target)
        written = effects.of(writer).writes
        if pure is None or len(written) != 1 or writer.args[:1] != written:
            continue
        value = written[0]
        root = aliases.root(value)
        if root in foreign:
            continue
        older, waiting = live.get(root, []), ahead[root]
        while waiting and waiting[0] < writer:
            older.append(waiting.popleft())
        live[root] = older = [member for member in older if any(writer < user for user in member.users)]
        if any(member is not value for member in older) or not _twin_gives_the_same(writer, pure, value):
            continue
        editor.replace_uses(value, writer, [user for user in value.users if writer < user])
        writer.target = pure
        changed = True
        if ir.value(writer) is not None:
            ir.update_value(writer)
    return changed


#: In-place operators that keep their input's shape and dtype whatever these are.
_UNARY_TWINS = frozenset(
    {"relu_", "relu6_", "silu_", "sigmoid_", "tanh_", "hardtanh_", "hardswish_", "hardsigmoid_", "leaky_relu_"}
    | {"elu_", "selu_", "celu_", "mish_", "gelu_", "clamp_", "clamp_min_", "clamp_max_"}
    | {"dropout_", "feature_dropout_", "alpha_dropout_"}
)


def _twin_gives_the_same(writer: fx.Node, pure: OpOverload, value: fx.Node) -> bool:
    """An in-place operation keeps dtype, shape and strides of what it writes; the twin promotes, broadcasts, packs."""
    before = ir.fake(value)
    if before is None:
        unary = writer.target._opname in _UNARY_TWINS and pure._overloadname == "default"  # type: ignore[union-attr]
        return unary and not effects.of(value).aliases  # a view can have gaps, which the twin would close
    original = writer.target
    writer.target = pure
    try:
        after = ir.infer(writer)
    except (RuntimeError, TypeError):
        after = None
    finally:
        writer.target = original
    return (
        isinstance(after, torch.Tensor)
        and after.dtype == before.dtype
        and ir.same_sizes(after.shape, before.shape)
        and ir.same_sizes(after.stride(), before.stride())
    )


# -- sizes -----------------------------------------------------------------------------------------------------------


def propagate_sizes(module: fx.GraphModule) -> None:
    """Replaces what is known to be a plain number (a size, arithmetic on sizes, a rank, a dtype) by the literal.

    Raises InputError where an assertion of the model is known to fail.
    """
    editor = Editor(module)
    for node in list(module.graph.nodes):
        if node.op not in ("call_function", "call_method") or node._erased:
            continue
        if node.target is torch._assert:
            _settle_assertion(editor, node)
            continue
        if node.meta.get("val") is None:
            ir.update_value(node)  # an operand may have become known just now
        if isinstance(node.target, OpOverload) and node.target not in _SIZES:
            _drop_identity(editor, node)
            continue
        if expand.is_whole(node) and node.users and not _is_plain(ir.value(node)) and expand.expand(editor, node):
            continue
        found = ir.value(node)
        if node.target is operator.getitem and found is not None:
            _size_of_shape(editor, node)
            found = ir.value(node)
        if _is_plain(found):
            literal = list(found) if isinstance(found, torch.Size) else found
            _write_out(editor, node, literal)
        if not node.users and (effects.of(node).pure or getattr(node.target, "__module__", "") == "math"):
            editor.erase(node)
    for node in reversed(list(module.graph.nodes)):
        scalar = node.target in ir.SCALAR_FUNCTIONS or node.target in (getattr, aten.sym_size.int)
        if scalar and not node.users and effects.of(node).pure:
            editor.erase(node)


#: Operators that give sizes.
_SIZES = (aten.sym_size.int, aten.sym_numel.default)


def _is_plain(found: Any) -> bool:
    if type(found) is torch.Size:
        return all(type(size) is int for size in found)
    return type(found) in (int, float, bool) or isinstance(found, (torch.dtype, torch.device))


def _drop_identity(editor: Editor, node: fx.Node) -> None:
    """`x[:]` and `contiguous()` of what is so are `x` itself: PyTorch makes no call, torch.export records some."""
    if node.target not in (aten.slice.Tensor, aten.contiguous.default):
        return
    given = ir.arguments(node)
    source = given["self"]
    before, after = ir.fake(source), ir.fake(node)
    if before is None or after is None:
        return
    if node.target is aten.contiguous.default:
        order = given["memory_format"]
        same = before.is_contiguous(memory_format=torch.contiguous_format if type(order) is int else order)
    else:
        same = given["step"] == 1 and ir.same_sizes(before.shape, after.shape)
    if same and ir.same_sizes(before.stride(), after.stride()):
        editor.replace_uses(node, source)
        editor.erase(node)


def _write_out(editor: Editor, node: fx.Node, literal: Any) -> None:
    """Lets every reader of a node have the literal in its place, but for who calls a method of it."""
    for user in list(node.users):
        if user.op == "call_method" and user.args[0] is node:
            continue
        args, kwargs = fx.map_arg((user.args, user.kwargs), lambda n: literal if n is node else n)
        editor.update(user, args, kwargs)


def _size_of_shape(editor: Editor, node: fx.Node) -> None:
    """`x.shape[i]` is `sym_size(x, i)`."""
    source, index = node.args
    if isinstance(source, fx.Node) and source.target is getattr and source.args[1:] == ("shape",):
        size = editor.insert(
            "call_function", aten.sym_size.int, (source.args[0], index), before=node, origin=ir.origins(node)
        )
        editor.replace_uses(node, size)


def _settle_assertion(editor: Editor, node: fx.Node) -> None:
    condition = ir.value(node.args[0])
    if condition is True:
        editor.erase(node)
    elif condition is False:
        message = node.args[1] if len(node.args) > 1 else node.kwargs.get("message", "")
        raise InputError(f"the model's own check fails on these inputs: {message}", node=node)


# -- other forms -----------------------------------------------------------------------------------------------------


def _one_sided_clamp(editor: Editor, node: fx.Node) -> None:
    """A clamp of one bound is a clamp."""
    if node.target is aten.clamp_min.default:
        node.target = aten.clamp.default
    elif node.target is aten.clamp_max.default:
        node.target = aten.clamp.default
        editor.update(node, (node.args[0], None, *node.args[1:]), {})


def _string_padding(editor: Editor, node: fx.Node) -> None:
    """`padding="same"` and `"valid"` as numbers, where both sides get the same."""
    numeric = {
        aten.conv1d.padding: aten.conv1d.default,
        aten.conv2d.padding: aten.conv2d.default,
        aten.conv3d.padding: aten.conv3d.default,
    }.get(node.target)  # type: ignore[call-overload]
    if numeric is None:
        return
    given = ir.arguments(node)
    weight = ir.tensor(given["weight"])
    if weight is None:
        return
    kernel = weight.shape[2:]
    dilation = list(given["dilation"])
    dilation = dilation * len(kernel) if len(dilation) == 1 else dilation
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if given["padding"] == "same" and any(total % 2 for total in reach):
        return
    padding = [total // 2 if given["padding"] == "same" else 0 for total in reach]
    given["padding"] = padding
    node.target = numeric
    args, kwargs = ir.canonical_arguments(numeric, (), given)
    editor.update(node, args, kwargs)


def _native_batch_norms(editor: Editor) -> None:
    """Export's lower forms of an inference batch norm, of whose results only the first is read."""
    forms = (aten._native_batch_norm_legit_no_training.default, aten.native_batch_norm.default)
    for node in list(editor.graph.nodes):
        if node.target not in forms:
            continue
        given = ir.arguments(node)
        readers = list(node.users)
        if given.get("training") or any(r.target is not operator.getitem or r.args[1] != 0 for r in readers):
            continue
        if given["running_mean"] is None or given["running_var"] is None:
            continue
        args = (given["input"], given["weight"], given["bias"], given["running_mean"], given["running_var"], False)
        norm = editor.insert(
            "call_function",
            aten.batch_norm.default,
            (*args, given["momentum"], given["eps"], torch.backends.cudnn.enabled),
            before=node,
            origin=ir.origins(node),
        )
        for reader in readers:
            editor.replace_uses(reader, norm)
            editor.erase(reader)
        editor.erase(node)
