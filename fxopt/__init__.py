"""fxopt: a graph-rewriting compiler on torch.fx that shows, proves and explains what it does."""

from fxopt import cost, effects, ir, ops
from fxopt.bench import benchmark
from fxopt.compiler import compile, trace
from fxopt.errors import (
    CaptureError,
    CheckError,
    CollectiveError,
    ConvergenceError,
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
from fxopt.evaluation import Evaluation, evaluate
from fxopt.graphdiff import GraphDiff, diff
from fxopt.journal import UNKNOWN
from fxopt.lowering import Backend, Setting
from fxopt.pattern import Match, NoMatch, any_of, call, const, lit, var
from fxopt.plugins import backends, passes, register
from fxopt.rewrite import Pass, Rewriter, Rule
from fxopt.runtime import CompiledModule
from fxopt.trainable import TrainableModule
from fxopt.training import sync_batchnorm
from fxopt.verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "UNKNOWN",
    "Backend",
    "CaptureError",
    "CheckError",
    "CollectiveError",
    "CompiledModule",
    "ConvergenceError",
    "Evaluation",
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
