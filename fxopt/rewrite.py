"""Rules, passes, and the rewriter through which they change a graph.

A rule is a pattern, a guard that may decline with a reason, and a rewrite. The rewriter, not the rule, enforces what
holds for every rule: nothing that others read is lost, no match spans a write, the result keeps shape, dtype, device,
memory of its own, and strides where they show.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import fx

from fxopt import effects, ir, legality, observe, trained
from fxopt.edit import Editor
from fxopt.errors import FxoptError, RewriteError
from fxopt.journal import UNKNOWN, Decline, Journal, Rewrite
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

    def constant(self, value: torch.Tensor, name: str, *, keep_strides: bool = False) -> fx.Node:
        """A new constant tensor of the module, under `name` or a name like it, as a node; contiguous unless
        `keep_strides`, which keeps its memory, too. Of what depends on trained parameters it is one itself."""
        assert self._point is not None, "nodes are built inside a rewrite"
        with torch.inference_mode(False):  # autograd could not use an inference tensor later
            kept: torch.Tensor = value.detach()
            kept = kept.clone() if kept.is_inference() else kept
            kept = kept if keep_strides else kept.contiguous()
        if kept.is_floating_point() or value.requires_grad:
            kept = torch.nn.Parameter(kept, requires_grad=value.requires_grad)
            if value.requires_grad:
                trained.Folds.of(self.module).add(kept, value)
        path = self.editor.add_tensor(name, kept)
        return self.editor.insert(
            "get_attr", path, before=self._point, origin=self._origin, name=path.replace(".", "_")
        )

    # -- one rewrite -------------------------------------------------------------------------------------------------

    def refusal(self, nodes: Iterable[fx.Node], *roots: fx.Node, shared: Iterable[fx.Node] = ()) -> NoMatch | None:
        """What holds for every rewrite: why `nodes` may not become others that are read instead of `roots`; else None.

        A node that is no root has no reader outside (but for `shared` ones, which stay); all are pure; nothing writes
        to a value of theirs, or an alias of one, between the first of them and the last root. The driver asks this for
        each match of a rule; a function pass asks it itself.
        """
        matched = tuple(dict.fromkeys((*nodes, *roots)))
        found = legality.of_readers(matched, {*roots, *shared})
        return found or legality.of_writes(matched, max(roots), self.aliases)

    def substitute(
        self, root: fx.Node, build: Callable[[], fx.Node], *, rule: str, nodes: Iterable[fx.Node] = ()
    ) -> fx.Node | NoMatch:
        """`substitute_all` of one root."""
        results = self.substitute_all((root,), lambda: (build(),), rule=rule, nodes=nodes)
        return results if isinstance(results, NoMatch) else results[0]

    def substitute_all(
        self,
        roots: Sequence[fx.Node],
        build: Callable[[], Sequence[fx.Node]],
        *,
        rule: str,
        nodes: Iterable[fx.Node] = (),
    ) -> tuple[fx.Node, ...] | NoMatch:
        """Builds what is to be read instead of each of `roots`; removes those of `nodes` that nobody reads any more.

        `build` gives one node per root, in their order. It builds in front of the first root or, where the roots (or
        `nodes`) read what is computed behind that, right behind the last such operand.

        All or nothing: an error or a NoMatch undoes every edit. Raises RewriteError if `build` raises, or gives another
        shape, dtype or device; returns NoMatch where somebody could tell a result from what it replaces (see
        `fxopt.observe`), or where a reader stands in front of it.
        """
        roots = tuple(roots)
        matched = tuple(dict.fromkeys((*nodes, *roots)))
        mark = self.editor.mark()
        self._point, self._origin = self._place(roots, matched), ir.merge_origins(matched)
        names = tuple(root.name for root in roots)
        aliases = None if self.current.layout else self.aliases
        read, made = self._constants(matched), len(trained.Folds.of(self.module))
        try:
            results = self._built(roots, build)
            added = self._added(mark)
            removed = self._replace(tuple(zip(roots, results, strict=True)), matched, mark, aliases)
            if not isinstance(removed, NoMatch):
                removed = self._refused_by_training(read, made, mark) or removed
        except FxoptError:
            self.editor.undo(mark)
            raise
        except Exception as error:
            self.editor.undo(mark)
            raise RewriteError(
                f"the rewrite raised {type(error).__name__}: {error}",
                pass_name=self.current.name,
                rule=rule,
                node=roots[0],
                hint=f"the pass {self.current.name!r} is at fault; disable=({self.current.name!r},) leaves it out",
            ) from error
        finally:
            self._point = None
        if isinstance(removed, NoMatch):
            self.editor.undo(mark)
            return removed
        self._follow(mark, [user for result in results for user in result.users])
        replaced = tuple(zip(names, (result.name for result in results), strict=True))
        self.journal.rewrites.append(Rewrite(self.current.name, rule, replaced, removed, added, self._origin))
        return results

    def _constants(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, torch.Tensor]:
        """The attributes that nodes read, as they are."""
        read = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n.op == "get_attr")
        return {node: ir.get_attribute(self.module, str(node.target)) for node in read}

    def _refused_by_training(self, read: dict[fx.Node, torch.Tensor], made: int, mark: int) -> NoMatch | None:
        added = [edit.node for edit in self.editor.log[mark:] if edit.kind == "insert"]
        paths = [str(node.target) for node in added if isinstance(node, fx.Node) and node.op == "get_attr"]
        reason = trained.Folds.of(self.module).refusal(read, made, paths)
        return None if reason is None else NoMatch(reason)

    def attempt(self, rule: Rule, root: fx.Node) -> fx.Node | NoMatch:
        """Applies one rule at one node under all that the driver sees to; why it does not apply is recorded."""
        result = _try(rule, root, self)
        if isinstance(result, NoMatch):
            self.decline(root, result.reason, rule=rule.name, fits=result.fits)
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
            Rewrite(self.current.name, rule, ((operand.name, result.name),), (), added, self._origin)
        )
        return result

    def substitute_memory(self, base: fx.Node, build: Callable[[fx.Node], fx.Node], *, rule: str) -> NoMatch | None:
        """Replaces memory that the graph makes and writes: `base`, what may share it, and all writes to it are gone.

        Who reads one of these behind the last write reads what `build` gives for it instead. Refused where somebody
        could tell: memory that is handed out, is not the graph's own, or is read in front of a write.
        """
        aliases = self.aliases
        root = aliases.root(base)
        members = [node for node in self.graph.nodes if node.op != "output" and aliases.root(node) is root]
        inside, writers = set(members), [node for node in members if node in aliases.writers]
        reads = {node: [user for user in node.users if user not in inside] for node in members}
        last = max(writers, default=base)
        refusal = legality.of_memory(root, members, reads, last, aliases)
        if refusal is not None:
            return refusal
        mark = self.editor.mark()
        self._point, self._origin = last.next, ir.origins(base)
        try:
            built = {node: build(node) for node, users in reads.items() if users}
            checks = (
                observe.difference(node, result, pass_name=self.current.name) or observe.strides_kept(((node, result),))
                for node, result in built.items()
            )
            refusal = next((reason for reason in checks if reason is not None), None)
        except Exception:
            self.editor.undo(mark)
            raise
        finally:
            self._point = None
        if refusal is not None:
            self.editor.undo(mark)
            return refusal
        for node, result in built.items():
            self.editor.replace_uses(node, result, reads[node])
        added, names = self._added(mark), tuple(node.name for node in reversed(members))
        for node in reversed(members):
            self.editor.erase(node)
        pairs = tuple((node.name, result.name) for node, result in built.items()) or ((base.name, ""),)
        self.journal.rewrites.append(Rewrite(self.current.name, rule, pairs, names, added, self._origin))
        return None

    def remove(self, node: fx.Node, *, rule: str) -> None:
        """Removes a node that nobody reads, and operands that this leaves unread."""
        origin = ir.origins(node)
        name, mark = node.name, self.editor.mark()
        removed = self._sweep((node,), keep=())
        self._follow(mark, ())
        self.journal.rewrites.append(Rewrite(self.current.name, rule, ((name, ""),), removed, (), origin))

    def decline(self, node: fx.Node, reason: str, *, rule: str = "", fits: bool = True) -> None:
        """Records why a node was left as it is; `fits` where it looked like a place for the rule."""
        key = (self.current.name, rule, node.name)
        pending = reason.startswith(UNKNOWN)
        self.journal.declines[key] = Decline(
            self.current.name, rule, node.name, reason.removeprefix(UNKNOWN), ir.origins(node), pending, fits
        )

    def _place(self, roots: tuple[fx.Node, ...], matched: tuple[fx.Node, ...]) -> fx.Node:
        """Where to build: as early as possible behind what the match reads."""
        first = min(roots)
        if len(roots) == 1:
            return first
        read = [operand for node in matched for operand in node.all_input_nodes if operand.op != "get_attr"]
        last = max((operand for operand in read if operand not in matched), default=first)
        return first if last < first or last is first else last.next

    def _built(self, roots: tuple[fx.Node, ...], build: Callable[[], Sequence[fx.Node]]) -> tuple[fx.Node, ...]:
        results = tuple(build())
        for result in results:
            if not isinstance(result, fx.Node):
                raise TypeError(f"it gave {result!r}, not the node to read instead")
        if len(results) != len(roots):
            raise TypeError(f"it gave {len(results)} nodes to read instead of {len(roots)}")
        for root, result in zip(roots, results, strict=True):
            if result is not root and result in roots:
                raise TypeError(f"it gave {result.name}, which is itself replaced")
        return results

    def _replace(
        self,
        pairs: tuple[observe.Pair, ...],
        matched: tuple[fx.Node, ...],
        mark: int,
        aliases: effects.Aliases | None,
    ) -> tuple[str, ...] | NoMatch:
        """Lets readers read the results, and gives the names of what is gone; NoMatch where somebody could tell."""
        new = {edit.node for edit in self.editor.log[mark:] if edit.kind == "insert" and isinstance(edit.node, fx.Node)}
        for root, result in pairs:
            refusal = observe.difference(root, result, pass_name=self.current.name)
            if refusal is not None:
                return refusal
        refusal = None if aliases is None else observe.memory_shared(pairs, new, aliases)
        if refusal is None and self.current.numerics == "bitwise" and aliases is not None:
            # A kernel may round otherwise where it runs over memory in another order.
            refusal = observe.strides_kept(pairs)
        if refusal is not None:
            return refusal
        readers = {root: [user for user in root.users if user not in new] for root, _ in pairs}
        for root, result in pairs:
            if "rank" in root.meta and "rank" not in result.meta:
                self.editor.set_meta(result, "rank", root.meta["rank"])
            if root is not result:
                self.editor.replace_uses(root, result)
        removed = self._sweep(matched, keep=[result for _, result in pairs])
        refusal = legality.of_order(new, [result for _, result in pairs])
        if refusal is None and aliases is not None:
            refusal = observe.settle(self.editor, pairs, readers, aliases)
        return removed if refusal is None else refusal

    def _added(self, mark: int) -> tuple[str, ...]:
        """The names of the operations inserted since `mark`."""
        inserted = [edit.node for edit in self.editor.log[mark:] if edit.kind == "insert"]
        return tuple(node.name for node in inserted if isinstance(node, fx.Node) and node.op != "get_attr")

    def _sweep(self, nodes: tuple[fx.Node, ...], keep: Sequence[fx.Node]) -> tuple[str, ...]:
        """Erases those of `nodes` that nobody reads, then the attributes and sizes that only they read."""
        removed: list[str] = []
        queue = deque(sorted(nodes, key=lambda node: cast(Any, node._sort_key), reverse=True))
        given = set(nodes)
        while queue:
            node = queue.popleft()
            if node in keep or node._erased or node.users or node.op in ("placeholder", "output"):
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


# -- one rule at one node --------------------------------------------------------------------------------------------


def _try(rule: Rule, node: fx.Node, rewriter: Rewriter) -> fx.Node | NoMatch:
    match = _match(rule, node, rewriter)
    if isinstance(match, NoMatch):
        return NoMatch(match.reason, match.node, fits=False)
    refusal = rewriter.refusal(match.nodes, match.root, shared=match.shared)
    if refusal is None and rule.guard is not None:
        refusal = _guard(rule, match, rewriter)
    if refusal is not None:
        return refusal
    return rewriter.substitute(node, lambda: rule.rewrite(match, rewriter), rule=rule.name, nodes=match.nodes)


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
