"""Synchronised batch norm: what single-process batch norm in float64 gives on the joined batch, in two collectives."""

from __future__ import annotations

import copy
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fxopt
from fxopt.training import moments
from processes import found_by_all, needs_gloo, run

pytestmark = needs_gloo


class Functional(nn.Module):
    """A batch norm as a function call, its mode asked of `training`, and a dropout that only training has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(4) + 0.5), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = x * 1.0
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, self.training, 0.3)


def affine(norm: Any) -> nn.Module:
    if norm.weight is not None:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    made: nn.Module = norm
    return made


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d of a matrix": (lambda: affine(nn.BatchNorm1d(4)), (4,)),
    "BatchNorm1d": (lambda: affine(nn.BatchNorm1d(4)), (4, 6)),
    "BatchNorm2d": (lambda: affine(nn.BatchNorm2d(4)), (4, 5, 3)),
    "BatchNorm3d": (lambda: affine(nn.BatchNorm3d(4)), (4, 2, 3, 2)),
    "without weights": (lambda: nn.BatchNorm2d(4, affine=False), (4, 5, 3)),
    "a cumulative average": (lambda: affine(nn.BatchNorm2d(4, momentum=None)), (4, 5, 3)),
    "without running statistics": (lambda: affine(nn.BatchNorm2d(4, track_running_stats=False)), (4, 5, 3)),
    "a function": (Functional, (4, 5, 3)),
}
SHARDS = {2: [(5, 3), (7, 1), (6, 0)], 3: [(4, 1, 7), (3, 0, 4), (0, 0, 5)]}


def batches(shape: tuple[int, ...], sizes: tuple[int, ...]) -> list[torch.Tensor]:
    """Two batches of each process, of mean 1000 and variance 1."""
    generator = torch.Generator().manual_seed(sum(sizes) + len(shape))
    return [torch.randn(2, size, *shape, generator=generator) + 1000 for size in sizes]


def built(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    torch.manual_seed(3)
    build, shape = NORMS[name]
    return build(), shape


def trained(model: nn.Module, steps: torch.Tensor, factors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs, gradients and buffers of two steps."""
    found: dict[str, torch.Tensor] = {}
    for number, (x, factor) in enumerate(zip(steps, factors, strict=True)):
        x = x.clone().requires_grad_()
        y = model(x)
        (y * factor).sum().backward()
        assert x.grad is not None
        found[f"output {number}"], found[f"input gradient {number}"] = y.detach(), x.grad
    found |= {f"gradient of {name}": part.grad for name, part in model.named_parameters() if part.grad is not None}
    return found | {f"buffer {name}": part.clone() for name, part in model.named_buffers()}


def shards(rank: int) -> dict[Any, dict[str, torch.Tensor]]:
    """Each norm on each way to cut a batch, in one process."""
    found = {}
    for name in NORMS:
        for sizes in SHARDS[dist.get_world_size()]:
            model, shape = built(name)
            own = fxopt.sync_batchnorm(model)
            x = batches(shape, sizes)[rank]
            found[name, sizes] = trained(own, x, x.sin())
    return found


@pytest.fixture(scope="module", params=SHARDS)
def of_shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return found_by_all(request.param, tmp_path_factory.mktemp("shards"), shards)


@pytest.mark.parametrize("name", NORMS)
def test_it_is_batch_norm_of_the_joined_batch(of_shards: list[Any], name: str) -> None:
    for sizes in SHARDS[len(of_shards)]:
        model, shape = built(name)
        x = torch.cat(batches(shape, sizes), 1)
        expected = trained(model.double(), x.double(), x.sin().double())
        parts = [result[name, sizes] for result in of_shards]
        for key, value in expected.items():
            if key.startswith("gradient"):
                made = sum(part[key].double() for part in parts)
            elif key.startswith("buffer"):
                made = parts[0][key]
                assert all(torch.equal(part[key], made) for part in parts), "all processes keep the same statistics"
            else:
                made = torch.cat([part[key] for part in parts])
            assert float((made.double() - value.double()).abs().max()) < 1e-4 * max(1.0, float(value.abs().max())), key


def test_moments_at_a_mean_of_1000_are_float64s() -> None:
    x = torch.randn(64, 4, 9) + 1000
    rough, exact = moments.rough_mean(x), x.double()
    own = moments.of(x - moments.along(rough, x), rough)
    torch.testing.assert_close(own.mean, exact.mean((0, 2)), rtol=1e-10, atol=0)
    torch.testing.assert_close(own.variance, exact.var((0, 2), correction=0), rtol=1e-6, atol=0)
    plain = (x.square().mean((0, 2)) - x.mean((0, 2)).square()).double()
    assert float((plain / own.variance - 1).abs().max()) > 1e-3, "which sums of squares are not"


# -- in one group ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions, norms and a dropout; the second norm can be frozen."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        pooled = F.dropout(self.body(x).mean((2, 3)), 0.5, self.training and scale > 1)
        return self.head(pooled) * scale


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def distributed(rank: int, steps: int) -> list[torch.Tensor]:
    """A few steps of SGD under DistributedDataParallel."""
    model = fxopt.sync_batchnorm(net())
    parallel = DistributedDataParallel(model)
    compiled = fxopt.compile(parallel)
    assert compiled.report.model == "Net"
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(steps):
        x, target = data(step)
        own = slice(3 * rank, 3 * rank + 3)
        optimiser.zero_grad()
        F.cross_entropy(parallel(x[own]), target[own]).backward()
        optimiser.step()
    with pytest.raises(fxopt.StaleWeightsError):
        compiled(x)
    torch.testing.assert_close(fxopt.compile(parallel)(x), model.eval()(x).detach(), rtol=1e-4, atol=1e-5)
    return [tensor.detach() for tensor in model.state_dict().values()]


def another(rank: int) -> Any:
    return fxopt.sync_batchnorm(Net(8 + rank))


def no_gradient(rank: int) -> Any:
    return fxopt.sync_batchnorm(nn.BatchNorm1d(3))(torch.randn(4, 3, requires_grad=rank == 0))


def one_value(rank: int) -> Any:
    return fxopt.sync_batchnorm(nn.BatchNorm1d(3))(torch.randn(1 - rank, 3))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) if x.sum() > 0 else x


def branches(rank: int) -> Any:
    return fxopt.sync_batchnorm(Branches())(torch.randn(2, 3))


def group_of_two(rank: int) -> dict[str, Any]:
    """What two processes find, each for itself."""
    found: dict[str, Any] = {"distributed": distributed(rank, 3)}
    for function in (another, no_gradient, one_value, branches):
        with pytest.raises(fxopt.FxoptError) as raised:
            function(rank)
        found[function.__name__] = repr(raised.value)
    made = fxopt.sync_batchnorm(model := net())
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
    counts: Counter[str] = Counter()
    for name in ("all_gather", "all_reduce", "broadcast", "all_gather_object", "all_gather_into_tensor"):
        real = getattr(dist, name)
        setattr(dist, name, lambda *a, _n=name, _f=real, **k: (counts.update([_n]), _f(*a, **k))[1])
    y = made(x.requires_grad_())
    found["forward"] = dict(counts)
    y.sum().backward()
    found["backward"] = dict(counts - Counter(found["forward"]))
    found["text"] = str(made)
    found["same tensors"] = all(
        left is right for left, right in zip(model.state_dict(keep_vars=True).values(),
                                             made.state_dict(keep_vars=True).values(), strict=True)
    )  # fmt: skip
    found["same names"] = list(model.state_dict()) == list(made.state_dict())

    counts.clear()
    made.eval()
    evaluated = made(x)
    found["eval"] = torch.equal(evaluated, copy.deepcopy(model).eval()(x)) and not counts
    made.train()
    made.body[4].eval()  # type: ignore[index]
    before = made.body[4].running_mean.clone()  # type: ignore[index]
    made(x)
    found["frozen"] = counts["all_gather"] == 1 and torch.equal(before, made.body[4].running_mean)  # type: ignore[index]
    found["graphs"] = len(made.graphs)
    made.train()
    made(x, scale=2.0)
    found["graphs of constants"] = len(made.graphs)
    moved = fxopt.sync_batchnorm(Functional())
    moved(x[:, :1].expand(-1, 4, -1, -1))
    moved.double()(x[:, :1].expand(-1, 4, -1, -1).double())
    found["moved"] = moved.mean.dtype == torch.float64 and bool(moved.mean.abs().max() > 0)
    twin = copy.deepcopy(made)
    found["copy"] = not {id(p) for p in twin.parameters()} & {id(p) for p in made.parameters()}

    with pytest.raises(ValueError, match="GPU") as refused:
        nn.SyncBatchNorm(3)(x)
    found["torch's own"] = str(refused.value)

    fast = fxopt.compile(made, (x.detach(),))
    found["compiled"] = [str(node.target) for node in fast.fused_graph.graph.nodes if node.op == "call_function"]
    found["its error"] = float((fast(x.detach()) - copy.deepcopy(model).eval()(x)).detach().abs().max())
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return found_by_all(2, tmp_path_factory.mktemp("two"), group_of_two)


def test_each_norm_takes_one_collective_forwards_and_one_backwards(two: list[Any]) -> None:
    for found in two:
        assert (found["forward"], found["backward"]) == ({"all_gather": 2}, {"all_reduce": 2})


def test_torchs_own_refuses_the_same_input(two: list[Any]) -> None:
    assert all("expected input tensor to be on GPU" in found["torch's own"] for found in two)


def test_names_and_tensors_are_the_models(two: list[Any]) -> None:
    assert all(found["same tensors"] and found["same names"] and found["copy"] for found in two)
    assert all(found["moved"] for found in two), "a graph follows the tensors that .double() puts there"


def test_it_switches_between_training_and_eval_as_the_model_does_and_says_how(two: list[Any]) -> None:
    for found in two:
        assert found["eval"], "in eval mode it is the model, without collectives"
        assert found["frozen"], "a norm in eval mode keeps its statistics"
        assert (found["graphs"], found["graphs of constants"]) == (2, 3)
        assert "synchronised over 2 processes, one collective forwards and backwards" in found["text"]
        assert "in training mode, by a graph of its own: body.1, body.4" in found["text"]
        assert "in eval mode, by the model's own forward: none" in found["text"]


def test_what_was_trained_compiles_and_its_norms_are_folded(two: list[Any]) -> None:
    for found in two:
        assert found["its error"] < 1e-5
        assert not [target for target in found["compiled"] if "batch_norm" in target]


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.randint(0, 2, (6,), generator=generator)


def test_with_distributed_data_parallel_it_trains_as_one_process_does_on_the_joined_batch(two: list[Any]) -> None:
    model = net()
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(3):
        x, target = data(step)
        optimiser.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimiser.step()
    for found in two:
        for tensor, expected in zip(found["distributed"], model.state_dict().values(), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)


# -- processes that die ----------------------------------------------------------------------------------------------


def dies(rank: int) -> float:
    """Rank 1 is gone before the second step."""
    model = fxopt.sync_batchnorm(net())
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    if rank == 1:
        os._exit(1)
    start = time.perf_counter()
    with pytest.raises(fxopt.CollectiveError, match=r"body.1: rank .* heard nothing(.|\n)*a process has ended"):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
    return time.perf_counter() - start


def test_a_process_that_dies_is_an_error_in_the_others_and_no_hang(tmp_path: Path) -> None:
    results = run(3, tmp_path, dies)
    for rank, result in enumerate(results):
        assert result is None if rank == 1 else result < 50, result


WRONG = {
    "another": "the model differs between processes: body.1 is BatchNorm2d(8, ",
    "no_gradient": "its input requires a gradient in ranks [0] only",
    "one_value": "all processes together have 1 values per channel, and training needs two",
    "branches": "torch.fx cannot trace the model: TraceError",
}


@pytest.mark.parametrize(("name", "said"), WRONG.items(), ids=WRONG)
def test_what_goes_wrong_is_said_in_every_process(two: list[Any], name: str, said: str) -> None:
    assert all(said in found[name] for found in two), two[0][name]


def test_a_lazy_model_is_refused() -> None:
    with pytest.raises(fxopt.UsageError, match="call it once on an example first"):
        fxopt.sync_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()))


def test_without_a_process_group_it_says_what_to_do() -> None:
    with pytest.raises(fxopt.UsageError, match="init_process_group"):
        fxopt.sync_batchnorm(net())
