"""The program of docs/tutorial.md: a network that reads handwritten digits, from its data to a fine-tuned graph.

    python docs/tutorial.py                        all steps; less than a minute
    torchrun --nproc-per-node 2 docs/tutorial.py   one step: training in two processes, which the program starts itself

What it leaves is in build/tutorial. `make tutorial` runs it, and writes the page.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn import metrics
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset, random_split

import fxopt
from fxopt.evaluation import losses

FOLDER = Path("build/tutorial")
WEIGHTS = FOLDER / "digits.pt"
BATCH, EPOCHS = 48, 8

# -- data ------------------------------------------------------------------------------------------------------------


def digits(dtype: torch.dtype = torch.float32) -> TensorDataset:
    """All 1,797: float[1, 8, 8] in [0, 1], and which digit it is."""
    found = load_digits()
    pixels = torch.tensor(found.images, dtype=dtype)
    return TensorDataset(pixels[:, None] / 16, torch.tensor(found.target))


def split(dataset: Dataset[Any]) -> list[Dataset[Any]]:
    """1,440 to train on, 357 that are held out: the same at every call."""
    return list(random_split(dataset, [1440, 357], torch.Generator().manual_seed(0)))


def shuffled(dataset: Dataset[Any], rank: int = 0, processes: int = 1) -> DataLoader[Any]:
    """Batches to train on, in an order that a seed gives; of several processes, each has its share of every batch."""
    sampler = DistributedSampler(dataset, processes, rank, seed=0)
    return DataLoader(dataset, BATCH // processes, sampler=sampler)


def data() -> DataLoader[Any]:
    """All digits, in batches to evaluate."""
    return DataLoader(digits(), batch_size=256)


# -- network ---------------------------------------------------------------------------------------------------------


class Layer(nn.Sequential):
    """Convolution, norm, and an activation if it has one."""

    def __init__(self, width: int, filters: int, size: int, activation: bool = True) -> None:
        super().__init__(nn.Conv2d(width, filters, size, padding=size // 2, bias=False), nn.BatchNorm2d(filters))
        if activation:
            self.append(nn.ReLU())


class Attention(nn.Module):
    """Squeeze and excite: each channel is weighted by what all channels are on average."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(mean))))


class Network(nn.Module):
    """A residual block, four branches that are concatenated, attention, and a linear layer: logits, float[N, 10]."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = Layer(1, width, 3)
        self.block = nn.Sequential(Layer(width, width, 3), Layer(width, width, 3, activation=False))
        self.branches = nn.ModuleList(Layer(width, width, size) for size in (1, 1, 3, 5))
        self.attention = Attention(4 * width)
        self.last = nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        x = F.relu(x + self.block(x))
        x = torch.cat([branch(x) for branch in self.branches], 1)
        return self.last(self.attention(x).mean((2, 3)))


def fresh() -> Network:
    """The network untrained: the same at every call."""
    torch.manual_seed(0)
    return Network()


# -- training --------------------------------------------------------------------------------------------------------

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def fit(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    loader: DataLoader[Any],
    loss: Loss = F.cross_entropy,
    epochs: int = EPOCHS,
) -> list[float]:
    """Trains a model, in the mode that it is in. The mean loss of each epoch."""
    curve = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)  # another order in each
        total = 0.0
        for x, labels in loader:
            optimiser.zero_grad()
            found = loss(model(x), labels)
            found.backward()
            optimiser.step()
            total += found.item() * len(labels)
        curve.append(total / len(loader.sampler))
    return curve


def accuracy(model: nn.Module, dataset: Dataset[Any]) -> float:
    """The part of the examples that a model in eval mode is right about."""
    found = fxopt.evaluate(model, model, DataLoader(dataset, batch_size=256), losses=())
    return found["top-1"].compiled


def tell(name: str, model: nn.Module, curve: list[float]) -> None:
    """Prints what training came to."""
    _, held_out = split(digits())
    right = accuracy(model, held_out)
    print(f"{name:8} loss {curve[0]:.3f} -> {curve[-1]:.4f}, {right:.1%} of the held-out digits right")


# -- optimisers ------------------------------------------------------------------------------------------------------

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, 0.02),
    "Adam": lambda parameters: torch.optim.Adam(parameters, 0.002),
}


def compare_optimisers() -> tuple[Network, dict[str, list[float]]]:
    """Trains the same network by each. The last one's, and the curves."""
    train, _ = split(digits())
    curves = {}
    for name, optimiser in OPTIMISERS.items():
        model = fresh()
        curves[name] = fit(model, optimiser(model.parameters()), shuffled(train))
        tell(name, model.eval(), curves[name])
    torch.save(model.state_dict(), WEIGHTS)
    return model, curves


def build() -> Network:
    """The network that Adam has trained, as a command line asks for it."""
    model = Network()
    model.load_state_dict(torch.load(WEIGHTS))
    return model.eval()


# -- hinge -----------------------------------------------------------------------------------------------------------


def hinge(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """max(0, 1 - margin) on average: what `fxopt.evaluate` and scikit-learn call hinge."""
    return losses.hinge(logits, labels).mean()


def train_by_hinge() -> list[float]:
    """Adam once more, by another loss."""
    train, _ = split(digits())
    model = fresh()
    curve = fit(model, OPTIMISERS["Adam"](model.parameters()), shuffled(train), hinge)
    tell("hinge", model.eval(), curve)
    return curve


# -- two processes ---------------------------------------------------------------------------------------------------


def train_shard() -> None:
    """What each process does: train on its share of every batch, with norms over all of it. In float64, for proof."""
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = fxopt.sync_batchnorm(fresh().double())
    parallel = DistributedDataParallel(model)
    train, _ = split(digits(torch.float64))
    fit(parallel, OPTIMISERS["SGD"](parallel.parameters()), shuffled(train, rank, processes), epochs=1)
    torch.save(model.state_dict(), FOLDER / f"rank{rank}.pt")
    dist.destroy_process_group()


def train_in_two_processes() -> tuple[float, float]:
    """By how much the two processes' weights differ at most: from each other, and from those of one process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, __file__], check=True)
    first, second = (torch.load(FOLDER / f"rank{rank}.pt") for rank in (0, 1))
    alone = fresh().double()
    train, _ = split(digits(torch.float64))
    fit(alone, OPTIMISERS["SGD"](alone.parameters()), shuffled(train), epochs=1)

    def difference(other: dict[str, torch.Tensor]) -> float:
        return max(float((first[name] - tensor).abs().max()) for name, tensor in other.items())

    found = difference(second), difference(alone.state_dict())
    print(f"largest difference of the two: {found[0]:.1e}; from what one process trains: {found[1]:.1e}")
    return found


# -- compile ---------------------------------------------------------------------------------------------------------


def compile_network(model: Network) -> fxopt.CompiledModule:
    """The same function, faster."""
    x, _ = next(iter(data()))
    fast = fxopt.compile(model, (x,))
    for found in fast.report.passes:
        if found.rewrites:
            print(f"{found.name:24} {found.rewrites}")
    print(f"operations: {fast.report.before} -> {fast.report.after}\n")
    print(fast.explain("block.1.1"))
    return fast


# -- evaluate --------------------------------------------------------------------------------------------------------


def evaluate_both(model: Network, fast: fxopt.CompiledModule) -> fxopt.Evaluation:
    """Both on all digits, and scikit-learn's word for it."""
    found = fxopt.evaluate(model, fast, data())
    print(found)
    theirs = by_scikit_learn(model)
    ours = {name: found[name].original for name in theirs}
    print("scikit-learn:", ", ".join(f"{name} {value:.6g}" for name, value in theirs.items()))
    print(f"largest difference: {max(abs(ours[name] - theirs[name]) for name in theirs):.1e}")
    return found


def by_scikit_learn(model: nn.Module) -> dict[str, float]:
    """The scores of a model on all digits, as scikit-learn's functions have them."""
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in data()]).double()
    labels, every = load_digits().target, list(range(10))
    return {
        "top-1": float(metrics.accuracy_score(labels, logits.argmax(1))),
        "top-5": float(metrics.top_k_accuracy_score(labels, logits.numpy(), k=5, labels=every)),
        "cross_entropy": float(metrics.log_loss(labels, logits.softmax(1).numpy(), labels=every)),
        "hinge": float(metrics.hinge_loss(labels, logits.numpy(), labels=every)),
    }


# -- draw ------------------------------------------------------------------------------------------------------------


def draw(fast: fxopt.CompiledModule) -> None:
    """The graph before and after, as a page to click through."""
    print(fast.diff().save(FOLDER / "graph.html"))


# -- fine-tune -------------------------------------------------------------------------------------------------------


def moved() -> TensorDataset:
    """All digits a pixel further to the right and down, as another scanner might have them."""
    pixels, labels = digits().tensors
    return TensorDataset(pixels.roll((1, 1), (2, 3)), labels)


def fine_tune(model: Network) -> tuple[fxopt.CompiledModule, float, float]:
    """The compiled graph, trained on other data and compiled again: held-out accuracy there, before and after."""
    train, held_out = split(moved())
    loader = shuffled(train)
    tuned = fxopt.compile(model, next(iter(loader))[:1], trainable=True)
    print(tuned)
    before = accuracy(model, held_out)
    fit(tuned, OPTIMISERS["Adam"](tuned.parameters()), loader)
    fast = fxopt.compile(tuned, next(iter(loader))[:1])
    after = accuracy(fast, held_out)
    print(f"of the held-out digits, moved, {before:.1%} right before, {after:.1%} after")
    return fast, before, after


# -- all of it -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """What the steps left."""

    model: Network
    curves: dict[str, list[float]]
    apart: tuple[float, float]
    fast: fxopt.CompiledModule
    evaluation: fxopt.Evaluation
    tuned: fxopt.CompiledModule
    accuracies: tuple[float, float]


def main() -> Results:
    """Every step, in its order."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the network is too small to be shared
    print("== optimisers ==")
    model, curves = compare_optimisers()
    print("== hinge ==")
    curves["hinge"] = train_by_hinge()
    print("== two processes ==")
    apart = train_in_two_processes()
    print("== compile ==")
    fast = compile_network(model)
    print("== evaluate ==")
    evaluation = evaluate_both(model, fast)
    print("== draw ==")
    draw(fast)
    print("== fine-tune ==")
    tuned, before, after = fine_tune(model)
    return Results(model, curves, apart, fast, evaluation, tuned, (before, after))


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        train_shard()
    else:
        main()
