"""What a node reads, writes, aliases, and draws at random: from ATen's schemas; unknown means "may do anything"."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from fxopt import ir, ops

aten = torch.ops.aten

#: Composite operators that always compute a new tensor, though their schema has no kernel to prove it.
_FRESH_COMPOSITES = frozenset(
    {
        *ops.CONVOLUTION_TARGETS,
        *ops.STRING_PADDED_TARGETS,
        ops.convolution,
        ops.linear,
        ops.buffer,
        aten.linear.default,
        aten.batch_norm.default,
        aten.layer_norm.default,
        aten.rms_norm.default,
        aten.group_norm.default,
        aten.instance_norm.default,
        aten.matmul.default,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten.adaptive_avg_pool1d.default,
        aten.adaptive_avg_pool2d.default,
        aten.adaptive_avg_pool3d.default,
        aten.relu6.default,
        aten.softmax.int,
        aten.log_softmax.int,
        aten.scaled_dot_product_attention.default,
        aten.upsample_nearest2d.vec,
        aten.upsample_bilinear2d.vec,
        aten.embedding.default,
    }
)

#: Operators whose schema says fresh but which may hand back their input, or which write where the schema is silent.
_MAY_RETURN_INPUT = frozenset(
    {
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.feature_alpha_dropout.default,
    }
)
#: Operators that give views of their input, though their schema says fresh.
_UNTOLD_VIEWS = frozenset({aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default})

#: torch's own modules that stay opaque and whose forward, in eval mode, writes nothing and draws nothing.
PURE_MODULES: tuple[type[torch.nn.Module], ...] = (
    torch.nn.RNNBase,
    torch.nn.RNNCellBase,
    torch.nn.MultiheadAttention,
    torch.nn.TransformerEncoder,
    torch.nn.TransformerEncoderLayer,
    torch.nn.TransformerDecoder,
    torch.nn.TransformerDecoderLayer,
    torch.nn.Transformer,
)


@dataclass(frozen=True)
class Effects:
    """What one node does beside giving a value.

    `writes` are the operands it changes in place; `aliases` the operands that its result may share memory with;
    `random` that it draws random numbers; `raises` that it is there for the error it may raise;
    `opaque` that it may do anything at all.
    """

    writes: tuple[fx.Node, ...] = ()
    aliases: tuple[fx.Node, ...] = ()
    random: bool = False
    raises: bool = False
    opaque: bool = False

    @property
    def pure(self) -> bool:
        """Whether the node may be dropped when nobody reads it."""
        return not (self.writes or self.random or self.raises or self.opaque)


def _operands(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def of(node: fx.Node) -> Effects:
    """The effects of a node."""
    if node.op in ("placeholder", "get_attr", "output"):
        return Effects(aliases=tuple(node.all_input_nodes) if node.op == "output" else ())
    target = node.target
    if isinstance(target, OpOverload):
        return _of_operator(node, target)
    if node.op == "call_function":
        if target in ir.SCALAR_FUNCTIONS:
            tensors = [operand for operand in node.all_input_nodes if not _is_number(operand)]
            if target is operator.getitem:
                return Effects(aliases=tuple(tensors))
            return Effects() if not tensors else Effects(opaque=True, aliases=tuple(tensors))
        if target is getattr:
            return Effects(aliases=tuple(node.all_input_nodes))
        if target is torch._assert:
            return Effects(raises=True)
        if isinstance(target, HigherOrderOperator) and target.name() == "wrap_with_set_grad_enabled":
            # Its body is a graph of operators; it may return what it was given, and write if they do.
            body = cast(fx.Node, node.args[1])
            inner = ir.get_attribute(ir.module_of(node.graph), cast(str, body.target))
            if all(of(step).pure for step in inner.graph.nodes):
                return Effects(aliases=tuple(node.all_input_nodes))
    if node.op == "call_module":
        module = ir.get_attribute(ir.module_of(node.graph), cast(str, target))
        if not module.training and type(module).__module__.startswith("torch.nn.") and isinstance(module, PURE_MODULES):
            return Effects(aliases=tuple(node.all_input_nodes))
    operands = tuple(node.all_input_nodes)
    return Effects(writes=operands, aliases=operands, random=True, raises=True, opaque=True)


def _is_number(node: fx.Node) -> bool:
    found = node.meta.get("val")
    if found is not None:
        return isinstance(found, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool))
    return node.target is aten.sym_size.int or (
        node.target in ir.SCALAR_FUNCTIONS
        and node.target is not operator.getitem
        and all(_is_number(operand) for operand in node.all_input_nodes)
    )


def _of_operator(node: fx.Node, target: OpOverload) -> Effects:
    given = ir.arguments(node)
    writes: list[fx.Node] = []
    viewed: list[fx.Node] = []
    for parameter in target._schema.arguments:
        if parameter.alias_info is None:
            continue
        operands = _operands(given.get(parameter.name))
        if parameter.alias_info.is_write:
            writes += operands
        viewed += operands
    if given.get("training") or given.get("use_input_stats"):
        # Norms update their running statistics; the schemas of the high-level ones do not say so.
        writes += _operands([given.get("running_mean"), given.get("running_var")])
    random = torch.Tag.nondeterministic_seeded in target.tags
    if target in _MAY_RETURN_INPUT:
        random = bool(given["train"]) and given["p"] != 0  # at p = 0 the input comes back as it is
        viewed += _operands(given["input"])
    elif target in _UNTOLD_VIEWS:
        viewed += _operands(given["self"])
    elif target is aten.scaled_dot_product_attention.default:
        random = given["dropout_p"] != 0.0
    elif not viewed and target not in _FRESH_COMPOSITES and _is_composite(target):
        # A composite may return its input as it is; its schema does not say so.
        viewed += node.all_input_nodes
    raises = "assert" in target._opname or target._opname.startswith("sym_constrain")
    # What gives nothing is there for something else: an error (`_linalg_check_errors`), a message.
    raises = raises or not target._schema.returns
    return Effects(tuple(dict.fromkeys(writes)), tuple(dict.fromkeys(viewed)), random, raises)


def changes_shape(target: Any) -> bool:
    """Whether an operator changes the sizes or strides of a tensor in place (`unsqueeze_`), for all who hold it."""
    return (
        isinstance(target, OpOverload)
        and torch.Tag.inplace_view in target.tags
        and target is not aten.detach_.default  # which only cuts it off from autograd
    )


def _is_composite(target: OpOverload) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(target.name(), "CompositeImplicitAutograd")


#: Operators whose meaning depends on the strides of what they read, or on where in memory it lies.
STRIDED: frozenset[Any] = frozenset(
    {aten.as_strided.default, aten.view_as_complex.default, aten.view_as_real.default, aten.view.dtype}
)
#: What may be asked of a tensor and does not depend on its strides; other operators that give no tensor may.
_NUMBERS = frozenset(
    {
        aten.sym_size.int,
        aten.sym_numel.default,
        aten.item.default,
        aten._local_scalar_dense.default,
        aten.equal.default,
        aten.is_nonzero.default,
    }
)


def strides_matter(node: fx.Node) -> str | None:
    """Why the meaning of a node depends on the strides of the values it reads; None where it does not.

    The strides of its own result may: that is for inference to say.
    """
    target = node.target
    if target is operator.getitem:
        return None
    if not isinstance(target, OpOverload):
        return "is opaque and may look at them"
    if target.namespace not in ("aten", "fxopt", "mkldnn", "mkl"):
        return f"is an operator of {target.namespace}, which may look at them"
    if not of(node).pure:
        return "writes, draws at random, or may raise"  # random numbers are drawn in the order of memory
    if target in STRIDED:
        return "reads memory by them"
    if target not in _NUMBERS and not any("Tensor" in str(found.type) for found in target._schema.returns):
        return "may ask for them"
    return None


def may_view(node: fx.Node) -> bool:
    """Whether a node's result is a view of an operand or a copy, as the strides have it (`reshape`, `contiguous`)."""
    target = node.target
    return isinstance(target, OpOverload) and bool(of(node).aliases) and _is_composite(target)


@dataclass
class Aliases:
    """Which values of a graph may share memory, and where the graph writes: one linear scan, kept up by `follow`.

    Two nodes with one `root` may alias. What an edit parts may stay together here: that errs on the safe side.
    """

    group: dict[fx.Node, fx.Node] = field(default_factory=dict)
    writers: dict[fx.Node, Effects] = field(default_factory=dict)
    foreign: set[fx.Node] = field(default_factory=set)
    storages: dict[object, fx.Node] = field(default_factory=dict)
    _written: dict[fx.Node, fx.Node] | None = None

    @classmethod
    def scan(cls, graph: fx.Graph) -> Aliases:
        """Reads a whole graph."""
        found = cls()
        for node in graph.nodes:
            found._enter(node)
        return found

    def follow(self, added: Iterable[fx.Node], readers: Iterable[fx.Node]) -> None:
        """Takes in an edit: the nodes that were added, and those that now read another value."""
        for node in added:
            self._enter(node)
        for reader in readers:
            if reader.op != "output":
                self._join_effects(reader)

    def _enter(self, node: fx.Node) -> None:
        self.group[node] = node
        if node.op == "output":
            return
        effects = self._join_effects(node)
        if node.op in ("placeholder", "get_attr") or effects.opaque:
            self.foreign.add(node)
        if node.op == "placeholder":  # a caller may give one tensor twice, or two views of one
            self._join(node, self.storages.setdefault("inputs", node))
        if node.op == "get_attr":
            found = ir.tensor(node)
            if found is not None and found.layout is torch.strided:
                place = found.untyped_storage().data_ptr() or ("attribute", node.target)
                self._join(node, self.storages.setdefault(place, node))

    def _join_effects(self, node: fx.Node) -> Effects:
        effects = of(node)
        for operand in effects.aliases:
            self._join(node, operand)
        if effects.writes or effects.opaque:
            self.writers[node] = effects
            if self._written is not None:
                for written in effects.writes:
                    self._written.setdefault(self.root(written), node)
        return effects

    def _join(self, left: fx.Node, right: fx.Node) -> None:
        left, right = self.root(left), self.root(right)
        if left is not right:
            first, second = (left, right) if left < right else (right, left)
            self.group[second] = first
            if self._written is not None and second in self._written:
                self._written.setdefault(first, self._written.pop(second))

    def root(self, node: fx.Node) -> fx.Node:
        """The representative of all values that `node` may share memory with."""
        while self.group[node] is not node:
            self.group[node] = self.group[self.group[node]]
            node = self.group[node]
        return node

    def writer_of(self, value: fx.Node) -> fx.Node | None:
        """The first node, wherever it stands, that is known to write to `value`; None if there is none."""
        root = self.root(value)
        if self._written is None or (root in self._written and self._written[root]._erased):
            self.writers = {writer: effects for writer, effects in self.writers.items() if not writer._erased}
            self._written = {}
            for writer, effects in self.writers.items():
                for written in effects.writes:
                    self._written.setdefault(self.root(written), writer)
        return self._written.get(root)

    def writer_between(self, first: fx.Node, last: fx.Node, values: Iterable[fx.Node]) -> fx.Node | None:
        """A node strictly between `first` and `last` that may write to one of `values`; None if there is none."""
        if not self.writers:
            return None
        roots = {self.root(node) for node in values if node in self.group}
        for writer, effects in self.writers.items():
            if writer._erased or not first < writer < last:
                continue
            if effects.opaque or any(self.root(written) in roots for written in effects.writes):
                return writer
        return None

    def written_after(self, node: fx.Node, values: Iterable[fx.Node]) -> fx.Node | None:
        """A node behind `node` that may write to one of `values`; None if there is none."""
        roots = {self.root(value) for value in values if value in self.group}
        for writer, effects in self.writers.items():
            if writer._erased or not node < writer:
                continue
            if effects.opaque or any(self.root(written) in roots for written in effects.writes):
                return writer
        return None
