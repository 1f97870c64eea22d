"""The exception family: every error names the pass, the rule, the node, the user's source line, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import Node


class FxoptError(Exception):
    """Base of every error that fxopt raises on purpose.

    The message is followed by what is known of the place: pass, rule, node, the user's line, and a hint.
    """

    def __init__(
        self,
        message: str,
        *,
        pass_name: str | None = None,
        rule: str | None = None,
        node: Node | None = None,
        line: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.pass_name = pass_name
        self.rule = rule
        self.node_name = None if node is None else node.name
        if line is None and node is not None:
            origins = node.meta.get("origin") or ()
            line = next((origin.line for origin in origins if origin.line), None)
        self.line = line
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.message]
        for label, text in (
            ("pass", self.pass_name),
            ("rule", self.rule),
            ("node", self.node_name),
            ("your code", self.line),
            ("what to do", self.hint),
        ):
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.__dict__))


def _rebuild(cls: type[FxoptError], state: dict[str, object]) -> FxoptError:
    error = cls.__new__(cls)
    error.__dict__.update(state)
    Exception.__init__(error, str(error))
    return error


class CaptureError(FxoptError):
    """The model could not be captured as a graph."""


class InputError(FxoptError, TypeError):
    """The inputs of a call are not what the compiled model takes."""


class CheckError(FxoptError):
    """The graph breaks the contract of the normal form (`fxopt.check`)."""


class RewriteError(FxoptError):
    """A rewrite raised, or gave a value of another shape, dtype or device."""


class ConvergenceError(RewriteError):
    """A rule went on rewriting beyond its budget."""


class PluginError(FxoptError):
    """A plugin failed to import, is not a pass or backend, or takes a name that is taken."""


class VerificationError(FxoptError):
    """The compiled model does not give the original's answer."""


class StaleWeightsError(FxoptError):
    """A tensor that the compiled model shares with the caller's model was written after compiling."""


class ExportError(FxoptError):
    """The compiled model cannot be written as an exported program, or in ONNX."""


class UsageError(FxoptError, ValueError):
    """fxopt was called with something that it does not take."""


class CollectiveError(FxoptError):
    """Processes that work together do not: one is gone, or they hold different things."""


class RenderError(FxoptError):
    """A picture could not be drawn."""


class FxoptNotice(UserWarning):
    """Something that the caller may want to know; what concerns compiling is also in the report."""
