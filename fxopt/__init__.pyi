"""What fxopt offers, by name."""

from . import bench as bench
from . import cost, effects, ir, ops
from . import errors as errors
from . import lowering as lowering
from .bench import benchmark
from .compiler import compile, trace
from .errors import (
    CaptureError,
    CheckError,
    CollectiveError,
    ConvergenceError,
    ExportError,
    FxoptError,
    FxoptNotice,
    InputError,
    PluginError,
    RenderError,
    RewriteError,
    StaleWeightsError,
    UsageError,
    VerificationError,
)
from .evaluation import Evaluation, evaluate
from .graphdiff import GraphDiff, diff
from .journal import UNKNOWN
from .lowering import Backend, Setting
from .pattern import Match, NoMatch, any_of, call, const, lit, var
from .plugins import backends, passes, register
from .rewrite import Pass, Rewriter, Rule
from .runtime import CompiledModule
from .trainable import TrainableModule
from .training import sync_batchnorm
from .verification import Verification, verify

__version__: str

__all__ = [
    "UNKNOWN",
    "Backend",
    "CaptureError",
    "CheckError",
    "CollectiveError",
    "CompiledModule",
    "ConvergenceError",
    "Evaluation",
    "ExportError",
    "FxoptError",
    "FxoptNotice",
    "GraphDiff",
    "InputError",
    "Match",
    "NoMatch",
    "Pass",
    "PluginError",
    "RenderError",
    "RewriteError",
    "Rewriter",
    "Rule",
    "Setting",
    "StaleWeightsError",
    "TrainableModule",
    "UsageError",
    "Verification",
    "VerificationError",
    "any_of",
    "backends",
    "benchmark",
    "call",
    "compile",
    "const",
    "cost",
    "diff",
    "effects",
    "evaluate",
    "ir",
    "lit",
    "ops",
    "passes",
    "register",
    "sync_batchnorm",
    "trace",
    "var",
    "verify",
]
