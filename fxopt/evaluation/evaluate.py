"""`fxopt.evaluate`: a model and what was compiled of it, side by side over labelled data."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from fxopt.capture import private_copy
from fxopt.errors import InputError, UsageError
from fxopt.evaluation import losses as known
from fxopt.evaluation.batches import Batch, batches, iterable
from fxopt.evaluation.shards import Share, agree, joined, share
from fxopt.evaluation.tally import Tally
from fxopt.pipeline import Progress
from fxopt.training.ranks import Ranks
from fxopt.verification import _length

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

#: A loss of the user's: float[N] of logits and labels.
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

LOSSES: dict[str, Loss] = {"cross_entropy": known.cross_entropy, "hinge": known.hinge}
TOPS = (1, 5)
#: What is measured between both models: the original's column is empty.
BETWEEN = ("agreement", "kl")


@dataclass(frozen=True)
class Score:
    """The mean of one score: the original's, the compiled one's, and the difference with its 95 % interval."""

    name: str
    original: float | None
    compiled: float
    difference: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found on `examples`. `drop` is by how much the compiled model's top-1 is lower."""

    examples: int
    scores: tuple[Score, ...]

    def __getitem__(self, name: str) -> Score:
        for score in self.scores:
            if score.name == name:
                return score
        raise KeyError(name)

    @property
    def drop(self) -> float:
        """The original's top-1 less the compiled one's: 0.01 is one example of a hundred."""
        return 0.0 - (self["top-1"].difference or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """The result for programs: only JSON's types."""
        return {
            "examples": self.examples,
            "drop": self.drop,
            "scores": {
                score.name: {
                    "original": score.original,
                    "compiled": score.compiled,
                    "difference": score.difference,
                    "interval": None if score.interval is None else list(score.interval),
                }
                for score in self.scores
            },
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        table = Table(title=f"{self.examples} examples", title_justify="left")
        table.add_column("score")
        for title in ("original", "compiled", "difference", "95 % of it"):
            table.add_column(title, justify="right")
        for score in self.scores:
            low, high = score.interval or (None, None)
            between = "" if low is None or high is None else f"{low:+.2g} to {high:+.2g}"
            numbers = (_text(score.original), _text(score.compiled), _text(score.difference, "+"))
            table.add_row(score.name, *numbers, between)
        yield table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120).print(self)
        return text.getvalue().rstrip()


def _text(number: float | None, sign: str = "") -> str:
    return "" if number is None else f"{number:{sign}.6g}"


def evaluate(
    model: torch.nn.Module,
    compiled: Callable[..., Any],
    data: Any,
    *,
    losses: Sequence[str | Loss] = ("cross_entropy", "kl", "hinge"),
    limit: int | None = None,
    progress: Progress | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Evaluation:
    """Scores `model` (as in eval mode, on a private copy) and `compiled` on the same labelled batches.

    `data` is a DataLoader or another iterable of tuples that end in int[N] labels, or of dicts with `labels`; at most
    `limit` batches are drawn. The models give logits: float[N, C], or float[N] for two classes, alone, first of a
    tuple, or as `logits`. Always measured are top-1, top-5 where there are more than five classes, and agreement, the
    part of the examples for which both say the same. `losses` names more: "cross_entropy", "hinge", "kl"
    (KL(original || compiled)), or functions of logits and labels that give float[N].

    With a `process_group` every process calls it, with the same model and data, takes its share of the batches (`limit`
    is of these) and gets what all of them found: each example counts once, whatever a sampler pads with.

    Raises UsageError where there is nothing to evaluate or a loss is unknown, InputError for batches without labels, of
    changing structure, with labels out of range, and where a model gives NaN; CollectiveError in the other processes.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}", hint="it is how many batches to evaluate: 1 or more, or None for all")
    chosen = [_named(loss) for loss in losses]
    original, drawn = private_copy(model), iterable(data)
    if process_group is None:
        tallies, examples = _tallied(original, compiled, Share(drawn), chosen, limit, progress)
    else:
        ranks = Ranks(process_group)
        agree(original, ranks)
        tallies, examples, error = {}, 0, None
        try:
            tallies, examples = _tallied(original, compiled, share(drawn, ranks), chosen, limit, progress)
        except Exception as raised:  # raised again by `joined`, once the others know
            error = raised
        tallies, examples = joined(tallies, examples, error, ranks)
    if progress is not None:
        progress("done", examples, examples)
    if not examples:
        raise UsageError("the data has no examples, so nothing was evaluated", hint="an iterator is spent once read")
    return Evaluation(examples, tuple(_score(name, tally) for name, tally in tallies.items()))


def _tallied(
    original: torch.nn.Module,
    compiled: Callable[..., Any],
    own: Share,
    losses: list[tuple[str, Loss | None]],
    limit: int | None,
    progress: Progress | None,
) -> tuple[dict[str, Tally], int]:
    """The sums over a share of the batches, and how many examples it has."""
    tallies: dict[str, Tally] = {}
    examples, total = 0, _length(own.data, limit)
    with torch.no_grad():
        for batch in batches(own.data, limit):
            if progress is not None:
                progress("evaluate", batch.number, total)
            left, right = _logits(original, batch, "model"), _logits(compiled, batch, "compiled model")
            if left.shape != right.shape:
                shapes = f"{list(left.shape)}, and the compiled one {list(right.shape)}"
                raise InputError(f"batch {batch.number}: the model gives {shapes}")
            left_over = None if own.examples is None else own.examples - examples
            labels = batch.labels[:left_over]
            if len(labels):
                _add(tallies, losses, left[:left_over], right[:left_over], labels)
                examples += len(labels)
    return tallies, examples


def _named(loss: str | Loss) -> tuple[str, Loss | None]:
    if callable(loss):
        return getattr(loss, "__name__", type(loss).__name__), loss
    if loss != "kl" and loss not in LOSSES:
        there = ", ".join((*LOSSES, "kl"))
        raise UsageError(f"no loss is named {loss!r}", hint=f"there are {there}, or give a function")
    return loss, LOSSES.get(loss)


def _logits(call: Callable[..., Any], batch: Batch, who: str) -> torch.Tensor:
    result = call(*batch.args, **batch.kwargs)
    if isinstance(result, Mapping):
        result = result.get("logits")
    elif isinstance(result, (tuple, list)) and result:
        result = result[0]
    result = getattr(result, "logits", result)
    if not isinstance(result, torch.Tensor) or not result.is_floating_point() or result.dim() not in (1, 2):
        said = f"{list(result.shape)}" if isinstance(result, torch.Tensor) else f"a {type(result).__name__}"
        raise InputError(
            f"batch {batch.number}: the {who} gives {said}, not logits", hint="logits are float[N, C] or float[N]"
        )
    if result.dim() == 2 and result.shape[1] == 1:
        result = result.squeeze(1)
    if len(result) != len(batch.labels):
        labels = len(batch.labels)
        raise InputError(f"batch {batch.number} has {labels} labels, and the {who} gives {len(result)} logits")
    if bool(result.isnan().any()):
        rows = result.view(len(result), -1).isnan().any(1).nonzero().flatten().tolist()
        raise InputError(f"batch {batch.number}: the {who} gives NaN for examples {rows[:5]}")
    classes = 2 if known.is_binary(result) else result.shape[1]
    wrong = ((batch.labels < 0) | (batch.labels >= classes)).nonzero().flatten().tolist()
    if wrong:
        raise InputError(
            f"batch {batch.number}: example {wrong[0]} has the label {batch.labels[wrong[0]]}, of {classes} classes",
            hint=f"labels are 0 to {classes - 1}",
        )
    return result


def _add(
    tallies: dict[str, Tally],
    losses: list[tuple[str, Loss | None]],
    left: torch.Tensor,
    right: torch.Tensor,
    labels: torch.Tensor,
) -> None:
    labels, right = labels.to(left.device), right.to(left.device)
    classes = 2 if known.is_binary(left) else left.shape[1]

    def add(name: str, one: torch.Tensor, other: torch.Tensor, *, hits: bool = False) -> None:
        tallies.setdefault(name, Tally(hits)).add(one, other)

    for k in TOPS:
        if k == 1 or classes > k:
            add(f"top-{k}", known.top(left, labels, k), known.top(right, labels, k), hits=True)
    agree = (known.predicted(left) == known.predicted(right)).double()
    add("agreement", torch.ones_like(agree), agree, hits=True)
    for name, loss in losses:
        if loss is None:
            found = known.kl(left, right)
            add(name, torch.zeros_like(found), found)
            continue
        scores: list[Any] = [loss(logits, labels) for logits in (left, right)]
        for score in scores:
            if not isinstance(score, torch.Tensor) or score.shape != labels.shape:
                said = list(score.shape) if isinstance(score, torch.Tensor) else type(score).__name__
                raise UsageError(f"the loss {name} gives {said}", hint="it gives a number for each example: float[N]")
        add(name, scores[0].double(), scores[1].double())


def _score(name: str, tally: Tally) -> Score:
    original, compiled = tally.original / tally.count, tally.compiled / tally.count
    if name in BETWEEN:
        return Score(name, None, compiled, None, None)
    return Score(name, original, compiled, tally.difference / tally.count, tally.interval())
