"""Rules and the worklist driver that applies them.

A rule is a pattern, a guard that may decline with a reason, and a rewrite. The driver, not the rule, enforces what
holds for every rule: nothing that others read is lost, no match spans a write, the result keeps shape, dtype, device
and strides, and a rule that does not come to an end is stopped and named.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import fx

from fxopt import effects, ir
from fxopt.edit import Editor
from fxopt.errors import ConvergenceError, FxoptError, RewriteError
from fxopt.pattern import Guard, Match, NoMatch, Pattern

Numerics = Literal["bitwise", "reassociate", "approximate"]


@dataclass(frozen=True)
class Rule:
    """Where `pattern` fits and `guard` (if any) does not decline, `rewrite` gives the node to read instead.

    `rewrite(match, rewriter)` builds nodes by `rewriter.call` and `rewriter.constant`; it must not change the graph in
    any other way. It may return an existing node.
    """

    name: str
    pattern: Pattern
    rewrite: Callable[[Match, Rewriter], fx.Node]
    guard: Guard | None = None


@dataclass(frozen=True)
class Pass:
    """A named step of the pipeline: rules for the worklist driver, or a function over the same rewriter.

    `numerics` is what the pass promises: "bitwise" (the same bits), "reassociate" (the same in exact arithmetic, for
    finite values) or "approximate" (a stated bound). `layout` lets a lowering pass change strides inside the graph.
    """

    name: str
    rules: tuple[Rule, ...] = ()
    run: Callable[[Rewriter], None] | None = None
    numerics: Numerics = "reassociate"
    layout: bool = False
    doc: str = ""

    def __post_init__(self) -> None:
        if bool(self.rules) == (self.run is not None):
            raise TypeError(f"pass {self.name!r} needs either rules or a function")


@dataclass(frozen=True)
class Rewrite:
    """One rewrite that happened: which operations were removed and added, in whose place, and where they came from."""

    pass_name: str
    rule: str
    root: str
    result: str
    removed: tuple[str, ...]
    added: tuple[str, ...]
    origins: tuple[ir.Origin, ...]


@dataclass(frozen=True)
class Decline:
    """One rewrite that did not happen, and why.

    `pending` says that it waits for the first call's shapes; `fits` that the pattern was there and a guard declined, so
    that a user may want to know without asking.
    """

    pass_name: str
    rule: str
    node: str
    reason: str
    origins: tuple[ir.Origin, ...]
    pending: bool = False
    fits: bool = True


#: A guard's reason that begins with this is not final: shapes decide it at the first call.
UNKNOWN = "unknown until the first call: "


@dataclass
class Journal:
    """What a pipeline did and declined, in order; declines of one rule on one node are kept once, the latest."""

    rewrites: list[Rewrite] = field(default_factory=list)
    declines: dict[tuple[str, str, str], Decline] = field(default_factory=dict)


class Rewriter:
    """What a rule or a pass function works with: the graph to look at, and the only way to change it."""

    def __init__(self, editor: Editor, current: Pass, journal: Journal) -> None:
        self.editor = editor
        self.current = current
        self.journal = journal
        self._point: fx.Node | None = None
        self._origin: tuple[ir.Origin, ...] = ()
        self._aliases: effects.Aliases | None = None
        self._aliases_mark = -1

    @property
    def module(self) -> fx.GraphModule:
        """The IR module."""
        return self.editor.module

    @property
    def graph(self) -> fx.Graph:
        """The graph, to read."""
        return self.editor.graph

    @property
    def aliases(self) -> effects.Aliases:
        """Aliases and writes of the graph as it is now."""
        if self._aliases is None or self._aliases_mark != self.editor.mark():
            self._aliases = effects.Aliases.scan(self.graph)
            self._aliases_mark = self.editor.mark()
        return self._aliases

    def _follow(self, mark: int, readers: Iterable[fx.Node]) -> None:
        """Keeps `aliases` true to the edits behind `mark`, so that it need not be scanned again for each rewrite."""
        if self._aliases is not None and self._aliases_mark == mark:
            added = [edit.node for edit in self.editor.log[mark:] if edit.kind == "insert"]
            self._aliases.follow([n for n in added if isinstance(n, fx.Node) and not n._erased], readers)
            self._aliases_mark = self.editor.mark()

    # -- building, inside a rewrite ----------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call of an operator where the match stands, its value inferred."""
        assert self._point is not None, "nodes are built inside a rewrite"
        name = getattr(target, "_opname", None)
        return self.editor.insert(
            "call_function", target, args, kwargs, before=self._point, origin=self._origin, name=name
        )

    def call_as(self, value: torch.Tensor, target: Any, *args: Any) -> fx.Node:
        """A new call of an operator that cannot infer its result, which is known to be like `value` (a FakeTensor)."""
        assert self._point is not None, "nodes are built inside a rewrite"
        node = self.editor.insert(
            "call_function", target, args, before=self._point, origin=self._origin, name=target._opname, infer=False
        )
        node.meta["val"] = value
        return node

    def constant(self, value: torch.Tensor, name: str) -> fx.Node:
        """A new constant tensor of the module, under `name` or a name like it, as a node."""
        assert self._point is not None, "nodes are built inside a rewrite"
        kept: torch.Tensor = value.detach().contiguous()
        if kept.is_floating_point():
            kept = torch.nn.Parameter(kept, requires_grad=False)
        path = self.editor.add_tensor(name, kept)
        return self.editor.insert(
            "get_attr", path, before=self._point, origin=self._origin, name=path.replace(".", "_")
        )

    # -- one rewrite -------------------------------------------------------------------------------------------------

    def guard(self, root: fx.Node, nodes: Iterable[fx.Node], shared: Iterable[fx.Node] = ()) -> NoMatch | None:
        """What the driver asks of every rule's match, for a pass function to ask of `nodes` that `root` stands for.

        Nodes behind the root and beside the `shared` ones have no reader outside, all are pure, and nothing writes to
        their values in between.
        """
        return _driver_guard(Match(root, tuple(nodes), {}, frozenset(shared)), self)

    def substitute(
        self, root: fx.Node, build: Callable[[], fx.Node], *, rule: str, nodes: Iterable[fx.Node] = ()
    ) -> fx.Node | NoMatch:
        """Builds what is to be read instead of `root`, and removes those of `nodes` that nobody reads any more.

        All or nothing: an error undoes the edits. Raises RewriteError if `build` raises, or gives another shape,
        dtype or device; returns NoMatch if only the strides would change and the pass may not do that.
        """
        matched = tuple(dict.fromkeys((*nodes, root)))
        mark = self.editor.mark()
        self._point, self._origin = root, ir.merge_origins(matched)
        try:
            result = build()
            if not isinstance(result, fx.Node):
                raise TypeError(f"it gave {result!r}, not the node to read instead")
            difference = self._difference(root, result)
            if isinstance(difference, NoMatch):
                self.editor.undo(mark)
                return difference
        except FxoptError:
            self.editor.undo(mark)
            raise
        except Exception as error:
            self.editor.undo(mark)
            raise RewriteError(
                f"the rewrite raised {type(error).__name__}: {error}",
                pass_name=self.current.name,
                rule=rule,
                node=root,
                hint=f"the pass {self.current.name!r} is at fault; disable=({self.current.name!r},) leaves it out",
            ) from error
        finally:
            self._point = None
        if "rank" in root.meta and "rank" not in result.meta:
            self.editor.set_meta(result, "rank", root.meta["rank"])
        added = self._added(mark)
        self.editor.replace_uses(root, result)
        removed = self._sweep(matched, keep=result)
        self._follow(mark, list(result.users))
        self.journal.rewrites.append(
            Rewrite(self.current.name, rule, root.name, result.name, removed, added, self._origin)
        )
        return result

    def insert_between(self, operand: fx.Node, reader: fx.Node, build: Callable[[], fx.Node], *, rule: str) -> fx.Node:
        """Lets `reader` read what `build` makes of `operand`, right behind it; others go on reading `operand`."""
        mark = self.editor.mark()
        self._point, self._origin = operand.next, ir.origins(operand)
        try:
            result = build()
        except Exception:
            self.editor.undo(mark)
            raise
        finally:
            self._point = None
        added = self._added(mark)
        self.editor.replace_uses(operand, result, [reader])
        self._follow(mark, [reader])
        self.journal.rewrites.append(
            Rewrite(self.current.name, rule, operand.name, result.name, (), added, self._origin)
        )
        return result

    def remove(self, node: fx.Node, *, rule: str) -> None:
        """Removes a node that nobody reads, and operands that this leaves unread."""
        origin = ir.origins(node)
        name, mark = node.name, self.editor.mark()
        removed = self._sweep((node,), keep=None)
        self._follow(mark, ())
        self.journal.rewrites.append(Rewrite(self.current.name, rule, name, "", removed, (), origin))

    def decline(self, node: fx.Node, reason: str, *, rule: str = "", fits: bool = True) -> None:
        """Records why a node was left as it is; `fits` where it looked like a place for the rule."""
        key = (self.current.name, rule, node.name)
        pending = reason.startswith(UNKNOWN)
        self.journal.declines[key] = Decline(
            self.current.name, rule, node.name, reason.removeprefix(UNKNOWN), ir.origins(node), pending, fits
        )

    def _difference(self, root: fx.Node, result: fx.Node) -> NoMatch | None:
        before, after = ir.value(root), ir.value(result)
        if not isinstance(before, torch.Tensor):
            return None
        if not isinstance(after, torch.Tensor):
            raise RewriteError(
                f"the rewrite's result is {ir.describe_value(after)}, not {ir.describe_value(before)}",
                pass_name=self.current.name,
                node=root,
            )
        same = (before.dtype, before.device, before.dim()) == (after.dtype, after.device, after.dim())
        plain = all(type(size) is int for size in (*before.shape, *after.shape))
        if not same or (plain and before.shape != after.shape):
            raise RewriteError(
                f"the rewrite changes {ir.describe_value(before)} on {before.device} "
                f"to {ir.describe_value(after)} on {after.device}",
                pass_name=self.current.name,
                node=root,
            )
        if not ir.same_sizes(before.shape, after.shape):
            # Inference may settle for one batch size where the operator's own code asks for a number.
            sizes = f"from {ir.describe_value(before)} to {ir.describe_value(after)}"
            return NoMatch(f"the sizes might change {sizes}, by what is known of them", root)
        if not self.current.layout and not ir.same_sizes(_strides(before), _strides(after)):
            return NoMatch(f"the strides would change from {before.stride()} to {after.stride()}", root)
        return None

    def _added(self, mark: int) -> tuple[str, ...]:
        """The names of the operations inserted since `mark`."""
        inserted = [edit.node for edit in self.editor.log[mark:] if edit.kind == "insert"]
        return tuple(node.name for node in inserted if isinstance(node, fx.Node) and node.op != "get_attr")

    def _sweep(self, nodes: tuple[fx.Node, ...], keep: fx.Node | None) -> tuple[str, ...]:
        """Erases those of `nodes` that nobody reads, then the attributes and sizes that only they read."""
        removed: list[str] = []
        queue = deque(sorted(nodes, key=lambda node: cast(Any, node._sort_key), reverse=True))
        given = set(nodes)
        while queue:
            node = queue.popleft()
            if node is keep or node._erased or node.users or node.op in ("placeholder", "output"):
                continue
            if not effects.of(node).pure:
                continue
            operands = node.all_input_nodes
            self.editor.erase(node)
            if node.op != "get_attr":
                removed.append(node.name)
            queue.extend(
                operand for operand in operands
                if operand in given or operand.op == "get_attr" or not ir.is_compute(operand)
            )  # fmt: skip
        return tuple(removed)


def _strides(value: torch.Tensor) -> list[Any]:
    """The strides that tell layouts apart: those of dimensions longer than one."""
    return [stride for stride, size in zip(value.stride(), value.shape, strict=True) if ir.static(size) != 1]


# -- the driver ------------------------------------------------------------------------------------------------------


def apply(current: Pass, editor: Editor, journal: Journal, *, budget: int | None = None) -> None:
    """Runs one pass over a module: its function, or its rules until none of them applies.

    Raises ConvergenceError when a rule goes on beyond the budget (default: ten rewrites per node, and a hundred), and
    RewriteError when a rewrite fails.
    """
    rewriter = Rewriter(editor, current, journal)
    if current.run is not None:
        try:
            current.run(rewriter)
        except FxoptError:
            raise
        except Exception as error:
            raise RewriteError(
                f"the pass raised {type(error).__name__}: {error}",
                pass_name=current.name,
                hint=f"the pass {current.name!r} is at fault; disable=({current.name!r},) leaves it out",
            ) from error
        return
    limit = 10 * len(editor.graph.nodes) + 100 if budget is None else budget
    by_root: dict[Any, list[Rule]] = {}
    for rule in current.rules:
        for target in rule.pattern.roots():
            by_root.setdefault(target, []).append(rule)
    queue = deque(node for node in editor.graph.nodes if node.target in by_root)
    waiting = set(queue)
    count = 0
    while queue:
        node = queue.popleft()
        waiting.discard(node)
        if node._erased:
            continue
        for rule in by_root.get(node.target, ()):
            result = _try(rule, node, rewriter)
            if isinstance(result, NoMatch):
                rewriter.decline(node, result.reason, rule=rule.name, fits=result.fits)
                continue
            count += 1
            if count > limit:
                raise ConvergenceError(
                    f"the rule did not come to an end within {limit} rewrites",
                    pass_name=current.name,
                    rule=rule.name,
                    node=result,
                    hint="its rewrite gives something that it, or another rule of the pass, matches again",
                )
            near = [result, *result.users, *result.all_input_nodes]
            near += [reader for user in result.users for reader in user.users]
            for neighbour in near:
                if neighbour.target in by_root and neighbour not in waiting:
                    queue.append(neighbour)
                    waiting.add(neighbour)
            break


def _try(rule: Rule, node: fx.Node, rewriter: Rewriter) -> fx.Node | NoMatch:
    match = _match(rule, node, rewriter)
    if isinstance(match, NoMatch):
        return NoMatch(match.reason, match.node, fits=False)
    refusal = _driver_guard(match, rewriter)
    if refusal is None and rule.guard is not None:
        refusal = _guard(rule, match, rewriter)
    if refusal is not None:
        return refusal
    return rewriter.substitute(
        node, lambda: rule.rewrite(match, rewriter), rule=rule.name, nodes=match.nodes
    )


def _match(rule: Rule, node: fx.Node, rewriter: Rewriter) -> Match | NoMatch:
    try:
        return rule.pattern.match(node)
    except Exception as error:
        raise RewriteError(
            f"the pattern raised {type(error).__name__}: {error}",
            pass_name=rewriter.current.name,
            rule=rule.name,
            node=node,
            hint=f"a call's arguments are those of {ir.target_name(node)}'s schema, in its order or by its names",
        ) from error


def _guard(rule: Rule, match: Match, rewriter: Rewriter) -> NoMatch | None:
    assert rule.guard is not None
    try:
        found = rule.guard(match)
        if found is None or isinstance(found, NoMatch):
            return found
        raise TypeError(f"it gave {found!r}, neither None nor NoMatch")
    except Exception as error:
        raise RewriteError(
            f"the guard raised {type(error).__name__}: {error}",
            pass_name=rewriter.current.name,
            rule=rule.name,
            node=match.root,
            hint="a guard declines by returning NoMatch",
        ) from error


def _driver_guard(match: Match, rewriter: Rewriter) -> NoMatch | None:
    """What holds for every rule, whatever its own guard says."""
    inside = set(match.nodes)
    for node in match.nodes:
        if node is match.root or node in match.shared:
            continue
        for user in node.users:
            if user not in inside:
                where = "is a result of the model" if user.op == "output" else f"is also read by {user.name}"
                return NoMatch(f"{node.name} {where}", node)
    for node in match.nodes:
        if not effects.of(node).pure:
            return NoMatch(f"{node.name} writes, draws at random, or is not known", node)
    aliases = rewriter.aliases
    if aliases.writers:
        first = min(match.nodes)
        values = {operand for node in match.nodes for operand in (node, *node.all_input_nodes)}
        writer = aliases.writer_between(first, match.root, values)
        if writer is not None:
            return NoMatch(f"{writer.name} may write to a value of the match in between", writer)
        # A constant is read once and for all: it must not be written at any time.
        for value in values:
            if value.op == "get_attr":
                written = aliases.writer_of(value)
                if written is not None:
                    return NoMatch(f"{written.name} may write to {value.target}", written)
    return None
