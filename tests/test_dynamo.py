"""`torch.compile(model, backend="fxopt")`: a backend's manners, and what it does with weights that change."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import dynamo
from fxopt.lowering import inductor

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Model(nn.Module):
    """A convolution with its norm, a buffer, and a forward that a table gives."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.register_buffer("count", torch.zeros(()))
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        nn.init.normal_(self.norm.running_mean)
        self.run = run

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def layers(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.norm(m.conv(x)).relu()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    dynamo._told.clear()
    yield
    torch._dynamo.reset()


class Compiled:
    """A model and its twin behind torch.compile, on which `agree` calls both."""

    def __init__(self, run: Callable[..., Any], *, dynamic: bool | None = None, **options: Any) -> None:
        self.model, self.twin = Model(run).eval(), Model(run).eval()
        self.made: list[fxopt.CompiledModule] = []
        options["inspect"] = self.made.append
        self.fast = torch.compile(self.model, backend="fxopt", options=options, dynamic=dynamic)

    def agree(self, *args: Any, **kwargs: Any) -> Any:
        ours, theirs = (torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs)) for _ in range(2))
        with torch.no_grad():
            got, wanted = self.fast(*ours[0], **ours[1]), self.twin(*theirs[0], **theirs[1])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(dict(self.model.named_buffers()), dict(self.twin.named_buffers()))
        return got


def branching(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(m.conv(x))
    if y.sum() > 1e9:  # a graph break
        y = y * 2
    return m.conv(y).relu()


def counting(m: Any, x: torch.Tensor) -> torch.Tensor:
    m.count += 1
    return layers(m, x) * m.count


def writing(m: Any, x: torch.Tensor) -> torch.Tensor:
    x.mul_(2)
    return layers(m, x)


def scaled(m: Any, x: torch.Tensor, scale: float = 1.0, *, times: int = 1) -> torch.Tensor:
    return layers(m, x) * scale * times


MANNERS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "one result": (layers, (IMAGE,)),
    "nested results": (lambda m, x: {"a": [layers(m, x), (x + 1, None)], "b": x.shape[0]}, (IMAGE,)),
    "no result": (lambda m, x: None, (IMAGE,)),
    "an input twice": (lambda m, x, y: layers(m, x) + y, (IMAGE, IMAGE)),
    "views of inputs": (lambda m, x: (x[0], x.transpose(2, 3), layers(m, x)), (IMAGE,)),
    "the input itself": (lambda m, x: (x, layers(m, x)), (IMAGE,)),
    "a nested input": (lambda m, batch: layers(m, batch["x"][0]), ({"x": [IMAGE]},)),
    "an input that is written": (writing, (IMAGE,)),
    "a buffer that is written": (counting, (IMAGE,)),
    "a graph break": (branching, (IMAGE,)),
    "numbers": (scaled, (IMAGE, 0.5)),
    "a tensor without dimensions": (scaled, (IMAGE, torch.tensor(0.5, dtype=torch.float64))),
    "random numbers that are dropped": (lambda m, x: nn.functional.dropout(layers(m, x), 0.5, m.training), (IMAGE,)),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", MANNERS)
def test_it_gives_what_the_model_gives(name: str, dynamic: bool | None) -> None:
    run, args = MANNERS[name]
    both = Compiled(run, dynamic=dynamic)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxopt.FxoptNotice)  # nothing runs as it is
        for _ in range(3):
            both.agree(*args)


def test_norms_are_folded_and_a_known_shape_is_not_compiled_again() -> None:
    both = Compiled(layers)
    both.agree(IMAGE)
    (made,) = both.made
    assert {rewrite.pass_name for rewrite in made.report.rewrites} >= {"fold-batchnorm", "fuse-conv-activation"}
    both.agree(IMAGE[:, :, :4])
    count = len(both.made)
    for size in (4, 8, 5, 6):
        both.agree(IMAGE[:, :, :size])
    both.agree(IMAGE)
    assert len(both.made) == count == 2  # the second one has open sizes
    assert [len(made._session.programs) for made in both.made] == [1, 1]


def test_what_changed_is_folded_again() -> None:
    both = Compiled(layers)
    both.agree(IMAGE)
    for model in (both.model, both.twin):
        with torch.no_grad():
            model.norm.weight.mul_(2)
    both.agree(IMAGE)
    assert len(both.made) == 2
    for model in (both.model, both.twin):
        torch.manual_seed(5)
        model.conv.weight = nn.Parameter(torch.randn(3, 3, 3, 3))
    both.agree(IMAGE)
    both.agree(IMAGE)
    assert len(both.made) == 3


def test_other_numbers() -> None:
    both = Compiled(scaled, dynamic=True)
    for scale, times in ((0.5, 1), (0.25, 1), (0.25, 3), (0.5, 4), (0.5, 5)):
        both.agree(IMAGE, scale, times=times)


def test_zero_has_a_sign() -> None:
    both = Compiled(lambda m, x, scale: 1 / (x * scale), dynamic=True)
    for scale in (0.5, 0.0, -0.0, 0.0):
        both.agree(IMAGE.abs() + 1, scale)


def test_a_call_runs_what_fits_it_though_another_thread_compiles_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[dynamo._Graph, tuple[Any, ...]]] = []

    class Noted(dynamo._Graph):
        def __call__(self, *inputs: Any) -> Any:
            calls.append((self, inputs))
            return super().__call__(*inputs)

    monkeypatch.setattr(dynamo, "_Graph", Noted)
    both = Compiled(scaled, dynamic=True)
    both.agree(IMAGE, 0.25)
    both.agree(IMAGE, 0.5)
    (graph, other), (same, inputs) = calls[-2:]
    assert graph is same
    wanted, fits, busy = graph(*inputs)[0].clone(), dynamo._State.fits, []

    def overtaken(state: dynamo._State, given: Sequence[Any]) -> bool:
        found = fits(state, given)
        if found and not busy:
            busy.append(True)
            graph(*other)  # as another thread might, between the question and the call
        return found

    monkeypatch.setattr(dynamo._State, "fits", overtaken)
    torch.testing.assert_close(graph(*inputs)[0], wanted)
    assert busy


@pytest.mark.skipif(inductor.unavailable("cpu") is not None, reason="TorchInductor needs a C++ compiler")
def test_graphs_with_gradients_are_left_to_the_default() -> None:
    both = Compiled(layers)
    with pytest.warns(fxopt.FxoptNotice, match="left to TorchInductor"):
        got = both.fast(IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fxopt.FxoptNotice)  # once is enough
        both.fast(IMAGE[:1]).sum().backward()
    torch.testing.assert_close(got, both.twin(IMAGE), rtol=1e-4, atol=1e-5)
    assert both.model.conv.weight.grad is not None
    assert not both.made
    both.agree(IMAGE)
    assert len(both.made) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes(mode: Callable[[], Any]) -> None:
    both = Compiled(layers)
    with mode():
        torch.testing.assert_close(both.fast(IMAGE), both.twin(IMAGE), rtol=1e-4, atol=1e-5)
    assert len(both.made) == 1


def test_a_model_of_inference_tensors() -> None:
    with torch.inference_mode():
        both = Compiled(layers)
        for _ in range(2):  # a write to them leaves no version: they are no constants
            torch.testing.assert_close(both.fast(IMAGE), both.twin(IMAGE), rtol=1e-4, atol=1e-5)
            both.model.norm.weight.mul_(2)
            both.twin.norm.weight.mul_(2)


def test_autocast() -> None:
    both = Compiled(layers)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted = both.fast(IMAGE), both.twin(IMAGE)
    assert got.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted, rtol=5e-2, atol=5e-2)
    both.agree(IMAGE)


def test_two_models_and_two_threads() -> None:
    first, second = Compiled(layers), Compiled(scaled)
    failed: list[BaseException] = []

    def work(both: Compiled) -> None:
        try:
            for _ in range(5):
                both.agree(IMAGE)
        except BaseException as error:
            failed.append(error)

    first.agree(IMAGE)
    second.agree(IMAGE)
    threads = [threading.Thread(target=work, args=(both,)) for both in (first, second, first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_an_exception_of_the_models_own() -> None:
    def fails(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = layers(m, x)
        if x.shape[0] == 2:
            raise ValueError("two is too many")
        return y

    both = Compiled(fails)
    with torch.no_grad(), pytest.raises(ValueError, match="two is too many"):
        both.fast(IMAGE)
    both.agree(IMAGE[:1])


def test_a_graph_that_cannot_be_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise fxopt.CaptureError("no")

    monkeypatch.setattr(dynamo, "compile", refuse)
    with pytest.warns(fxopt.FxoptNotice, match="runs as it is: no"):
        Compiled(layers).agree(IMAGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(fxopt.CaptureError):
            Compiled(layers, strict=True).agree(IMAGE)


def test_a_norm_in_training_mode_counts_on() -> None:
    both = Compiled(layers)
    both.model.train()
    both.twin.train()
    for _ in range(3):
        both.agree(IMAGE)
    assert not torch.equal(both.twin.norm.running_mean, Compiled(layers).twin.norm.running_mean)


def test_options() -> None:
    both = Compiled(layers, disable=("fold-batchnorm",), numerics="bitwise")
    both.agree(IMAGE)
    assert both.made[0].report.backend == "aten"
    for options, said in (({"colour": 1}, "colour"), ({}, "mode")):
        compiled = torch.compile(Model(layers).eval(), backend=lambda g, e, o=options: dynamo.backend(
            g, e, options=o, mode=None if o else "max-autotune"
        ))  # fmt: skip
        with torch.no_grad(), pytest.raises(Exception, match=said):
            compiled(IMAGE)


def test_it_is_listed() -> None:
    assert "fxopt" in torch._dynamo.list_backends()
