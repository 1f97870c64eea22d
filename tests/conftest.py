"""What every test runs under: repeatable random numbers, one thread per worker, importable model zoos."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

from zoo import make_torchvision_importable

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores; two thread pools would fight over them

make_torchvision_importable()


class TorchRandom:
    """torch's generator as hypothesis sees it, so that an example draws the same tensors when it is replayed."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(TORCH_RANDOM)

# ci: the same examples on every run. long: new ones every time, HYPOTHESIS_PROFILE=long.
hypothesis.settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "long",
    deadline=None,
    max_examples=2000,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`pytest --graphs 20000`: more random networks than usual."""
    parser.addoption("--graphs", type=int, default=2000, metavar="N", help="how many random networks (default: 2000)")


@pytest.fixture(scope="session")
def graphs(request: pytest.FixtureRequest) -> int:
    """How many random networks the tests of random networks go through together."""
    count: int = request.config.getoption("--graphs")
    return count


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Each test draws the same numbers whatever ran before it on its worker."""
    torch.manual_seed(0)
