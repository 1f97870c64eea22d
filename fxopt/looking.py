"""What a compiled model shows of itself, whether it is run or trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxopt import ir, session
from fxopt.report import Explanation, Report, explain


class Shown(torch.nn.Module):
    """A module that came out of `fxopt.compile`: its report, its graphs, and what happened to each layer."""

    _session: session.Session
    #: Whether a call is checked against what was captured: not on a copy that runs in another dtype, to compare.
    checked: bool = True

    @property
    def report(self) -> Report:
        """What the compilation did; print it, or `to_dict()`."""
        return self._session.report

    def explain(self, subject: str) -> Explanation:
        """What happened to a layer (a module path) or node, or why nothing did.

        Raises UsageError where nothing has that name.
        """
        return explain(subject, self._session.before, self._session.after, self._session.report)

    def diff(self, pass_name: str | None = None) -> Any:
        """The graph before and after, to save as a picture: of all passes, or of one."""
        from fxopt import graphdiff

        self._shown()
        return graphdiff.of_compiled(self, pass_name)

    @property
    def captured_graph(self) -> fx.GraphModule:
        """The graph as it was captured, in the normal form, before any rewrite."""
        return _frozen(presentable(self._shown().before))

    @property
    def fused_graph(self) -> fx.GraphModule:
        """The rewritten graph, fused operations as single nodes."""
        return _frozen(presentable(self._shown().after))

    def _shown(self) -> session.Session:
        """The session, its tensors as they are for a caller to see."""
        return self._session


def presentable(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with the user's own signature, and code to run."""
    twin, _ = ir.copy(module)
    interface = ir.interface(module)
    graph = twin.graph
    placeholders = graph.find_nodes(op="placeholder")
    args_spec, kwargs_spec = interface.in_spec.children()
    if not interface.constants and all(child.is_leaf() for child in (*args_spec.children(), *kwargs_spec.children())):
        # Plain arguments: the module takes and gives them as the model does.
        names = [node.name for node in placeholders]
        graph.set_codegen(fx.graph._PyTreeCodeGen(fx.graph._PyTreeInfo(names, interface.in_spec, interface.out_spec)))
    twin.recompile()
    return twin


def _frozen(module: fx.GraphModule) -> fx.GraphModule:
    """A copy for looking at, whose parameters are the caller's own memory: nobody trains them by mistake."""
    for path, tensor in ir.tensors(module).items():
        if tensor.requires_grad:
            ir.delete_attribute(module, path)
            ir.set_attribute(module, path, torch.nn.Parameter(tensor.detach(), requires_grad=False))
    return module
