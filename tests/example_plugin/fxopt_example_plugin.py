"""fold-double-negation

    neg(neg(x))  ->  clone(x)

Legal when: the inner negation has no other reader (the driver sees to that).
Numerics: bitwise. Negation flips the sign bit, or wraps the one integer that has no opposite; twice is nothing.
"""

import torch

from fxopt import Match, Pass, Rewriter, Rule, call, var

aten = torch.ops.aten

X = var("x")
INNER = call(aten.neg.default, X, name="inner")
PATTERN = call(aten.neg.default, INNER, name="outer")


def rewrite(match: Match, rewriter: Rewriter) -> torch.fx.Node:
    # A copy, not x itself: neg gives a fresh tensor, which its reader may write to.
    return rewriter.call(aten.clone.default, match["x"])


PASS = Pass(
    "fold-double-negation",
    rules=(Rule("double-negation", PATTERN, rewrite, guard=None),),
    numerics="bitwise",
)
