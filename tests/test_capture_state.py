"""Capture of what a model writes, keeps between calls, and draws at random: each call in turn as in eager.

Both front ends are held to it: `captured` compiles by one of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from graphs import FRONT_ENDS, Network, randomised, unmodified

pytestmark = pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice", "ignore::FutureWarning")

front_ends = pytest.mark.parametrize("front_end", FRONT_ENDS)


def image(batch: int = 2, size: int = 8) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def conv() -> nn.Conv2d:
    return nn.Conv2d(3, 4, 3, padding=1)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4)


def captured(model: nn.Module, front_end: str, *args: Any, **options: Any) -> fxopt.CompiledModule:
    return fxopt.compile(model, args, **options) if front_end == "export" else fxopt.compile(model, **options)


def assert_close(result: Any, expected: Any) -> None:
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=1e-5)


# -- writes ----------------------------------------------------------------------------------------------------------


def _alias(_: Any, x: torch.Tensor) -> Any:
    y = x * 2
    z = y
    y += 1
    return y, z


def _input_added(_: Any, x: torch.Tensor) -> torch.Tensor:
    x += 1
    return x * 2


def _input_multiplied(_: Any, x: torch.Tensor) -> torch.Tensor:
    x.mul_(2)
    return x.sum()


def _item(_: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, 0] = 0
    y[:, 1] += 1
    return y


def _view(_: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.view(y.shape[0], -1).add_(1)
    return y


def _slice(_: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[:, :1].relu_()
    return y.relu_()


def _slice_of_input(_: Any, x: torch.Tensor) -> torch.Tensor:
    x[:, :1].zero_()
    return x + 1


def _between(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    y.add_(1)
    return m.norm(y)


def _behind(m: Any, x: torch.Tensor) -> Any:
    y = m.conv(x)
    z = y.view(y.shape)
    normed = m.norm(y)
    z.add_(1)
    return normed, y


def _read_after(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    z = y
    y = y.relu_()
    return m.norm(y) + z


def _copied(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    out = torch.zeros_like(y)
    out.copy_(y)
    out[..., ::2] *= 2
    return m.norm(out)


def _out(_: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    torch.add(x, 1, out=y)
    return y


def _unread(_: Any, x: torch.Tensor) -> torch.Tensor:
    y = x * 1.0
    z = y[:, 1:]
    z.mul_(2)
    return y


@front_ends
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(_alias, id="y += 1 is seen through z = y"),
        pytest.param(_input_added, id="x += 1 writes the caller's tensor"),
        pytest.param(_input_multiplied, id="x.mul_(2) writes the caller's tensor"),
        pytest.param(_slice_of_input, id="x[:, :1].zero_() writes the caller's tensor"),
        pytest.param(_item, id="y[:, 0] = 0"),
        pytest.param(_view, id="a write to a view"),
        pytest.param(_slice, id="relu_ of a slice"),
        pytest.param(_between, id="a write between a convolution and its norm"),
        pytest.param(_behind, id="a write through a view behind the norm"),
        pytest.param(_read_after, id="relu_ of what is read later"),
        pytest.param(_copied, id="copy_ into fresh zeros"),
        pytest.param(_out, id="out="),
        pytest.param(_unread, id="a write that nobody reads by its result"),
    ],
)
def test_writes_are_as_in_eager(front_end: str, body: Callable[..., Any]) -> None:
    model = randomised(Network(body, conv=conv(), norm=norm()))
    with unmodified(model):
        example = image()
        before = example.clone()
        compiled = captured(model, front_end, example)
        assert torch.equal(example, before), "compiling wrote to the example"
        for batch in (2, 1, 3):
            ours, theirs = (given := image(batch)), given.clone()
            assert_close(compiled(ours), model(theirs))
            assert torch.equal(ours, theirs)


@front_ends
def test_one_tensor_given_as_two_arguments_is_written_once_for_both(front_end: str) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            x.add_(1)
            return x + y

    model = Two().eval()
    compiled = captured(model, front_end, image(), image())
    ours = image()
    theirs = ours.clone()
    assert_close(compiled(ours, ours), model(theirs, theirs))
    assert torch.equal(ours, theirs)


# -- state -----------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A counter of calls: a buffer, a parameter, or a plain tensor."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.norm = conv(), norm()
        count = torch.zeros(1)
        if kind == "buffer":
            self.register_buffer("count", count)
        else:
            self.count = nn.Parameter(count) if kind == "parameter" else count

    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            self.count += 1
        return self.norm(self.conv(x)) + self.count, self.count * 2


@front_ends
@pytest.mark.parametrize("kind", ["buffer", "parameter", "plain tensor"])
def test_a_counter_counts_as_in_eager_over_all_signatures_and_the_callers_stays(front_end: str, kind: str) -> None:
    model = randomised(Counting(kind))
    eager = copy.deepcopy(model)
    with unmodified(model):
        compiled = captured(model, front_end, image())
        for batch, size in ((2, 8), (2, 8), (3, 8), (1, 8), (2, 9), (2, 8), (0, 8), (2, 9)):
            given = image(batch, size)
            assert_close(compiled(given), eager(given))
    assert model.count.item() == 0


def _counts_in_python(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.calls += 1
    return x + m.calls


def _reassigns(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.total = m.total + 1
    return x + m.total


def _collects(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.seen.append(x)
    return x + len(m.seen)


@front_ends
@pytest.mark.parametrize(
    ("body", "parts", "name"),
    [
        pytest.param(_counts_in_python, {"calls": 0}, "calls", id="a Python number"),
        pytest.param(_reassigns, {"total": torch.zeros(1)}, "total", id="a buffer that is reassigned"),
        pytest.param(_collects, {"seen": []}, "seen", id="a list that grows"),
    ],
)
def test_an_answer_that_depends_on_hidden_state_is_refused(
    front_end: str, body: Callable[..., Any], parts: dict[str, Any], name: str
) -> None:
    model = Network(body, **parts).eval()
    with pytest.raises(fxopt.CaptureError, match=rf"forward (changes|assigns) \S*{name}") as caught:
        captured(model, front_end, image())(image())
    assert "buffer" in str(caught.value)


@front_ends
def test_state_that_no_answer_depends_on_is_no_obstacle(front_end: str) -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        m.calls += 1
        m.last = x * 2
        m.log.append(tuple(x.shape))
        return m.conv(x)

    model = Network(body, conv=conv(), calls=0, last=None, log=[]).eval()
    compiled = captured(model, front_end, image())
    for batch in (2, 3, 1):
        given = image(batch)
        assert_close(compiled(given), model.conv(given))
    assert (model.calls, model.last, model.log) == (0, None, [])


# -- random numbers --------------------------------------------------------------------------------------------------


@front_ends
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda m, x: x + torch.randn_like(x), id="randn_like"),
        pytest.param(lambda m, x: x * torch.rand(3, 1, 1), id="rand of a constant size"),
        pytest.param(lambda m, x: F.dropout(x, 0.5, True), id="dropout that is always on"),
        pytest.param(lambda m, x: torch.rand_like(x) - torch.rand_like(x), id="two draws, which are not one"),
        pytest.param(lambda m, x: (torch.rand_like(x), torch.randn_like(x))[1], id="a draw that nobody reads"),
        pytest.param(lambda m, x: m.norm(m.conv(x)).sigmoid().bernoulli(), id="bernoulli behind a fold"),
        pytest.param(lambda m, x: x[:, torch.randperm(3)], id="randperm"),
    ],
)
def test_one_seed_gives_eagers_numbers(front_end: str, body: Callable[..., Any]) -> None:
    model = randomised(Network(body, conv=conv(), norm=norm()))
    compiled = captured(model, front_end, image())
    for batch in (2, 4, 1):
        given = image(batch)
        torch.manual_seed(5)
        expected = [model(given), model(given)]
        torch.manual_seed(5)
        assert_close([compiled(given), compiled(given)], expected)


def test_compiling_draws_no_random_number_of_the_callers() -> None:
    model = randomised(Network(lambda m, x: m.norm(m.conv(x)) + torch.rand(1), conv=conv(), norm=norm()))
    given, state = image(), torch.get_rng_state()
    fxopt.compile(model, (given,))
    assert torch.equal(torch.get_rng_state(), state)
