"""`fxopt.evaluate`: scikit-learn's own numbers, for both models, and what is no data said as such."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxopt
from fxopt.evaluation import losses
from fxopt.evaluation.tally import Tally

CLASSES, EXAMPLES = 7, 83


class Net(nn.Module):
    """Logits of a few features; the second one is a little off the first."""

    def __init__(self, outputs: int = CLASSES, off: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, outputs)
        with torch.no_grad():
            self.linear.weight.mul_(3).add_(off * torch.randn(outputs, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def examples(classes: int = CLASSES) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(EXAMPLES, 5, generator=generator), torch.randint(0, classes, (EXAMPLES,), generator=generator)


def loader(classes: int = CLASSES, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*examples(classes)), batch_size=16, **options)


@pytest.fixture(scope="module")
def found() -> fxopt.Evaluation:
    return fxopt.evaluate(Net(), Net(off=0.3).eval(), loader(), losses=("cross_entropy", "hinge", "kl"))


def test_scores_are_scikit_learns(found: fxopt.Evaluation) -> None:
    x, labels = examples()
    assert found.examples == EXAMPLES
    for side, model in (("original", Net()), ("compiled", Net(off=0.3))):
        logits = model(x).detach().double()
        every = list(range(CLASSES))
        expected = {
            "top-1": metrics.accuracy_score(labels, logits.argmax(1)),
            "top-5": metrics.top_k_accuracy_score(labels, logits.numpy(), k=5, labels=every),
            "cross_entropy": metrics.log_loss(labels, logits.softmax(1).numpy(), labels=every),
            "hinge": metrics.hinge_loss(labels, logits.numpy(), labels=every),
        }
        for name, value in expected.items():
            assert getattr(found[name], side) == pytest.approx(value, abs=1e-6), (name, side)


def test_what_is_measured_between_them(found: fxopt.Evaluation) -> None:
    x, _ = examples()
    one, other = Net()(x).detach().double(), Net(off=0.3)(x).detach().double()
    assert found["agreement"].compiled == pytest.approx(float((one.argmax(1) == other.argmax(1)).double().mean()))
    expected = (one.softmax(1) * (one.log_softmax(1) - other.log_softmax(1))).sum(1).mean()
    assert found["kl"].compiled == pytest.approx(float(expected), abs=1e-9)
    assert found["kl"].original is None
    assert found.drop == pytest.approx(found["top-1"].original - found["top-1"].compiled)  # type: ignore[operator]


def test_two_classes_by_one_logit() -> None:
    x, labels = examples(2)
    model = Net(1)
    found = fxopt.evaluate(model, fxopt.compile(model), loader(2), losses=("cross_entropy", "hinge", "kl"))
    logits = model(x).detach().double().squeeze(1)
    signs = np.where(labels.numpy() == 1, 1, -1)
    assert found["top-1"].compiled == pytest.approx(metrics.accuracy_score(labels, (logits > 0).long()))
    entropy = metrics.log_loss(labels, logits.sigmoid().numpy())
    assert found["cross_entropy"].compiled == pytest.approx(entropy, abs=1e-6)
    assert found["hinge"].compiled == pytest.approx(metrics.hinge_loss(signs, logits.numpy()), abs=1e-6)
    assert found["kl"].compiled < 1e-9
    assert "top-5" not in [score.name for score in found.scores]


def test_equal_logits_are_ordered_as_scikit_learn_orders_them() -> None:
    logits = torch.tensor([[0.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 1.0, 0.0]])
    for labels in ([0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 0, 1]):
        for k in (1, 2, 3):
            expected = metrics.top_k_accuracy_score(labels, logits.numpy(), k=k, labels=[0, 1, 2, 3])
            assert float(losses.top(logits, torch.tensor(labels), k).mean()) == pytest.approx(expected), (labels, k)


def test_a_function_of_the_users() -> None:
    def squared(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits.argmax(1) - labels).square().float()

    x, labels = examples()
    found = fxopt.evaluate(Net(), Net().eval(), loader(), losses=[squared])
    assert found["squared"].original == pytest.approx(float(squared(Net()(x), labels).mean()))
    assert found["squared"].difference == 0


# -- intervals -------------------------------------------------------------------------------------------------------


def test_the_interval_of_hits_is_agresti_and_mins() -> None:
    tally = Tally(hits=True)
    original = torch.tensor([1.0] * 70 + [0.0] * 10 + [1.0] * 15 + [0.0] * 5).double()
    compiled = torch.tensor([1.0] * 70 + [0.0] * 10 + [0.0] * 15 + [1.0] * 5).double()
    tally.add(original, compiled)
    b, c, n = 15.5, 5.5, 102.0
    error = 1.959964 * math.sqrt((b + c) - (c - b) ** 2 / n) / n
    assert tally.interval() == pytest.approx(((5 - 15) / n - error, (5 - 15) / n + error), abs=1e-6)


def test_where_no_example_differs_the_interval_says_how_many_still_might() -> None:
    tally = Tally(hits=True)
    tally.add(torch.ones(100).double(), torch.ones(100).double())
    low, high = tally.interval()
    assert -0.03 < low < 0 < high < 0.03


@pytest.mark.parametrize("sizes", [[100], [1, 99], [33, 33, 34]])
def test_a_tally_is_of_examples_and_not_of_batches(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(5)
    one, other = (torch.randn(100, generator=generator).double() for _ in range(2))
    tally = Tally()
    for left, right in zip(one.split(sizes), other.split(sizes), strict=True):
        tally.add(left, right)
    error = 1.959964 * float((other - one).std(correction=0)) / 10
    mean = float((other - one).mean())
    assert tally.interval() == pytest.approx((mean - error, mean + error), abs=1e-6)


# -- data ------------------------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(*examples(), strict=True))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, features: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        return {"logits": self.net(features) * scale}


def named() -> list[dict[str, torch.Tensor]]:
    return [{"features": x, "labels": y} for x, y in loader()]


LOADERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "a DataLoader": (Net, loader),
    "with workers": (Net, lambda: loader(num_workers=2)),
    "without a length": (Net, lambda: DataLoader(Stream(), batch_size=16)),
    "a generator": (Net, lambda: iter(list(loader()))),
    "lists": (Net, lambda: [[x, y.tolist()] for x, y in loader()]),
    "dicts, and a result of logits": (Named, named),
}


@pytest.mark.parametrize(("model", "data"), LOADERS.values(), ids=LOADERS.keys())
def test_every_loader_gives_the_same(model: Callable[[], nn.Module], data: Callable[[], Any]) -> None:
    told: list[tuple[str, int, int]] = []
    found = fxopt.evaluate(model(), model().eval(), data(), progress=lambda *said: told.append(said))
    assert found["top-1"].original == fxopt.evaluate(Net(), Net().eval(), loader())["top-1"].original
    assert found.examples == EXAMPLES
    assert told[0][:2] == ("evaluate", 0)
    assert told[-1][0] == "done"


def test_a_limit_draws_no_more_batches() -> None:
    assert fxopt.evaluate(Net(), Net().eval(), loader(), limit=2).examples == 32
    with pytest.raises(fxopt.UsageError, match="limit is 0"):
        fxopt.evaluate(Net(), Net().eval(), loader(), limit=0)


class Poisoned(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x[:, :1] > 2, math.nan, super().forward(x))


X, Y = examples()
WRONG: dict[str, tuple[Any, Any, str]] = {
    "nothing": (Net(), [], "the data has no examples"),
    "no loader": (Net(), X, "not a Tensor"),
    "no labels": (Net(), [X], "batch 0 is a Tensor, and has no labels"),
    "a dict without labels": (Net(), [{"x": X}], "batch 0 is a dict of x, and has no labels"),
    "labels out of range": (Net(), [(X, Y), (X, Y + 1)], "batch 1: example"),
    "negative labels": (Net(), [(X, Y - 1)], "has the label -1, of 7 classes"),
    "labels that are probabilities": (Net(), [(X, torch.rand(EXAMPLES, 7))], "the labels of batch 0 are torch.float32"),
    "another structure": (Net(), [(X, Y), (X, X, Y)], "batch 1 is a tuple of 3, and those in front of it were a tuple"),
    "fewer labels": (Net(), [(X, Y[:5])], "batch 0 has 5 labels, and the model gives 83 logits"),
    "NaN": (Poisoned(), [(X, Y)], "batch 0: the model gives NaN for examples ["),
    "no logits": (nn.Flatten(0), [(X, Y)], "batch 0 has 83 labels, and the model gives 415 logits"),
    "images": (nn.Unflatten(1, (5, 1, 1)), [(X, Y)], "the model gives [83, 5, 1, 1], not logits"),
}


@pytest.mark.parametrize(("model", "data", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said(model: nn.Module, data: Any, said: str) -> None:
    with pytest.raises((fxopt.InputError, fxopt.UsageError)) as raised:
        fxopt.evaluate(model, model, data)
    assert said in str(raised.value)


def test_losses_that_are_none() -> None:
    with pytest.raises(fxopt.UsageError, match="no loss is named 'mse'"):
        fxopt.evaluate(Net(), Net().eval(), loader(), losses=["mse"])
    with pytest.raises(fxopt.UsageError, match="it gives a number for each example"):
        fxopt.evaluate(Net(), Net().eval(), loader(), losses=[lambda logits, labels: logits.mean()])


def test_the_result_is_a_table_and_json(found: fxopt.Evaluation) -> None:
    text = str(found)
    assert "83 examples" in text
    assert all(name in text for name in ("top-1", "top-5", "agreement", "cross_entropy", "hinge", "kl"))
    data = json.loads(json.dumps(found.to_dict()))
    assert data["scores"]["top-1"]["difference"] == pytest.approx(-data["drop"])


def test_a_compiled_model_scores_as_its_original() -> None:
    model = Net()
    found = fxopt.evaluate(model, fxopt.compile(model), loader())
    assert found["agreement"].compiled == 1.0
    assert found.drop == 0
    assert found["kl"].compiled < 1e-9
