"""What is measured of each example: float64[N] of logits and labels.

Logits are float[N, C] with labels int[N] in 0..C-1, or float[N] (or [N, 1]) with labels 0 and 1: the binary case, where
a logit above 0 says 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def is_binary(logits: torch.Tensor) -> bool:
    """Whether there is one logit for each example."""
    return logits.dim() == 1


def predicted(logits: torch.Tensor) -> torch.Tensor:
    """int64[N]: the class of the largest logit."""
    return (logits > 0).long() if is_binary(logits) else logits.argmax(1)


def top(logits: torch.Tensor, labels: torch.Tensor, k: int) -> torch.Tensor:
    """1 where the label is among the k largest logits; of equal ones the later class is the larger, as in sklearn."""
    if is_binary(logits):
        return (predicted(logits) == labels).double()
    classes = logits.shape[1]
    order = (classes - 1) - logits.flip(1).argsort(dim=1, descending=True, stable=True)
    return (order[:, :k] == labels.unsqueeze(1)).any(1).double()


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[label]; binary, -log sigmoid(+-logit)."""
    if is_binary(logits):
        return F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none")
    return F.cross_entropy(logits.double(), labels, reduction="none")


def hinge(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """max(0, 1 - margin): the label's logit less the largest other one (Crammer and Singer, 2001), or +-logit."""
    logits = logits.double()
    if is_binary(logits):
        return (1 - (2 * labels - 1) * logits).clamp_min(0)
    own = logits.gather(1, labels.unsqueeze(1))
    others = logits.scatter(1, labels.unsqueeze(1), float("-inf")).amax(1)
    return (1 - (own.squeeze(1) - others)).clamp_min(0)


def kl(original: torch.Tensor, compiled: torch.Tensor) -> torch.Tensor:
    """KL(original || compiled) of the distributions that the logits stand for."""
    left, right = _log_probabilities(original), _log_probabilities(compiled)
    terms = left.exp() * (left - right)
    return torch.where(left == float("-inf"), 0.0, terms).sum(1).clamp_min(0)


def _log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    logits = logits.double()
    if is_binary(logits):
        return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], 1)
    return F.log_softmax(logits, 1)
