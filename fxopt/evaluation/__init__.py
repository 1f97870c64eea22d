"""How well a compiled model does what the original does, over labelled data."""

from fxopt.evaluation.evaluate import Evaluation, Score, evaluate

__all__ = ["Evaluation", "Score", "evaluate"]
