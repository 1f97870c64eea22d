"""The oneDNN backend: one call for a layer with its epilogue, ATen's answer, the model's strides, and what NaN does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxopt
from graphs import FRONT_ENDS, Network, operations, randomised

pytestmark = pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice")

front_ends = pytest.mark.parametrize("front_end", FRONT_ENDS)


class Counted(TorchDispatchMode):
    """Counts every operator that reaches a kernel, so that no composite hides any."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def counted(compiled: fxopt.CompiledModule, *inputs: torch.Tensor) -> Counter[str]:
    """The operators of one call, of a signature that is known already."""
    with torch.no_grad():
        compiled(*inputs)
        with Counted() as mode:
            compiled(*inputs)
    return mode.calls


def lowered(model: nn.Module, front_end: str, *inputs: torch.Tensor) -> fxopt.CompiledModule:
    compiled = fxopt.compile(model, inputs) if front_end == "export" else fxopt.compile(model)
    compiled(*inputs)
    assert compiled.report.backend == "onednn", compiled.report.notices
    return compiled


def assert_eager(model: nn.Module, compiled: fxopt.CompiledModule, *inputs: torch.Tensor) -> None:
    expected, result = model(*inputs), compiled(*inputs)
    torch.testing.assert_close(result, expected, rtol=2e-5, atol=2e-5)
    assert result.stride() == expected.stride()
    assert result.dtype == expected.dtype


def image(batch: int = 2, channels: int = 4) -> torch.Tensor:
    return torch.randn(batch, channels, 10, 10)


# -- calls -----------------------------------------------------------------------------------------------------------


@front_ends
def test_convolution_norm_and_relu_are_one_call(front_end: str) -> None:
    model = randomised(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    given = image().to(memory_format=torch.channels_last)
    compiled = lowered(model, front_end, given)
    assert counted(compiled, given) == {"mkldnn._convolution_pointwise.default": 1}
    assert_eager(model, compiled, given)


@front_ends
def test_a_residual_block_is_one_call_a_convolution(front_end: str) -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.relu(m.n2(m.c2(F.relu(m.n1(m.c1(x))))) + x)

    model = randomised(
        Network(body, c1=nn.Conv2d(4, 4, 3, padding=1), n1=nn.BatchNorm2d(4),
                c2=nn.Conv2d(4, 4, 3, padding=1), n2=nn.BatchNorm2d(4))
    )  # fmt: skip
    given = image().to(memory_format=torch.channels_last)
    compiled = lowered(model, front_end, given)
    assert counted(compiled, given) == {
        "mkldnn._convolution_pointwise.default": 1,
        "mkldnn._convolution_pointwise.binary": 1,
    }
    assert_eager(model, compiled, given)


def test_weights_are_packed_once_for_all_signatures() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    compiled = lowered(model, "export", image())
    for batch in (1, 3, 5):
        assert_eager(model, compiled, image(batch))
    assert len(list(compiled._session.packed.made())) == 1


# -- every activation against ATen -----------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(-0.25, 0.75),
    "clamp from below": lambda x: x.clamp(min=-0.1),
    "clamp from above": lambda x: x.clamp(max=0.2),
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.4),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "elu": lambda x: F.elu(x, 0.7),
    "mish": F.mish,
}


class EachActivation(nn.Module):
    """A layer of its own, and its residual if one is given, in front of every activation."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in ACTIVATIONS)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        results = []
        for layer, activation in zip(self.layers, ACTIVATIONS.values(), strict=True):
            y = layer(x)
            results.append(activation(y if residual is None else y + residual))
        return tuple(results)


def assert_each(results: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for name, left, right in zip(ACTIVATIONS, results, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=2e-5, atol=2e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
        assert strides(left) == strides(right), name


def strides(value: torch.Tensor) -> list[int]:
    """Those of the dimensions that have more than one element."""
    return [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size > 1]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "a convolution": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 9, 9)),
    "a grouped, strided, dilated convolution": (lambda: nn.Conv2d(4, 6, 3, 2, 2, 2, groups=2), (2, 4, 11, 11)),
    "a depthwise convolution": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), (2, 4, 9, 9)),
    "a strided 1x1 convolution": (lambda: nn.Conv2d(4, 6, 1, 2), (2, 4, 9, 9)),
    "a 3d convolution": (lambda: nn.Conv3d(3, 4, 3, padding=1), (2, 3, 5, 6, 7)),
    "a transposed convolution": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (2, 4, 7, 7)),
    "a grouped transposed convolution": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    "a 3d transposed convolution": (lambda: nn.ConvTranspose3d(3, 4, 2, 2), (2, 3, 4, 5, 6)),
    "a linear layer": (lambda: nn.Linear(96, 64), (1024, 96)),
    "a linear layer on three dimensions": (lambda: nn.Linear(96, 64, bias=False), (4, 256, 96)),
}
layers = pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS.keys())


@layers
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "with a residual"])
def test_a_layer_and_every_activation_give_atens_answer_in_one_call_each(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], with_residual: bool
) -> None:
    model = EachActivation(layer).eval()
    inputs = [torch.randn(shape)]
    if with_residual:
        inputs.append(torch.randn(model.layers[0](inputs[0]).shape))
    compiled = fxopt.compile(model, disable=("merge-siblings",))  # they all read one input
    compiled(*inputs)
    assert compiled.report.backend == "onednn", compiled.report.notices
    assert_each(compiled(*inputs), model(*inputs))
    calls = counted(compiled, *inputs)
    assert sum(count for name, count in calls.items() if name.startswith("mkldnn.")) == len(ACTIVATIONS)


# -- strides ---------------------------------------------------------------------------------------------------------


def _passed_on(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.conv(x)


def _transposed(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.conv(x).permute(0, 2, 3, 1)


def _flattened(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.conv(x).relu().flatten(1)


def _sliced(m: Any, x: torch.Tensor) -> torch.Tensor:
    return m.conv(x)[:, 1:3]


def _reshaped(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x).relu()
    return y.reshape(y.shape[0], 2, -1).transpose(1, 2)


def _concatenated(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([m.conv(x), m.conv(x).sigmoid()], 1)


def _pooled(m: Any, x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(F.max_pool2d(m.conv(x).relu(), 2), 2)


def _strided_read(m: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.as_strided(m.conv(x), (2, 3), (1, 2))


@front_ends
@pytest.mark.parametrize(
    "body",
    [_passed_on, _transposed, _flattened, _sliced, _reshaped, _concatenated, _pooled, _strided_read],
    ids=lambda body: body.__name__.strip("_").replace("_", " "),
)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_results_have_the_strides_that_eager_gives(
    front_end: str, body: Callable[..., Any], order: torch.memory_format
) -> None:
    model = Network(body, conv=nn.Conv2d(4, 6, 3)).eval()
    given = image().to(memory_format=order)
    compiled = lowered(model, front_end, given)
    assert_eager(model, compiled, given)
    assert_eager(model, compiled, image(3).to(memory_format=order))


@front_ends
def test_an_opaque_module_reads_what_it_always_read(front_end: str) -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.lstm(m.conv(x).flatten(2).transpose(1, 2))[0]

    model = Network(body, conv=nn.Conv2d(4, 6, 3), lstm=nn.LSTM(6, 3, batch_first=True)).eval()
    given = image()
    compiled = lowered(model, front_end, given)
    torch.testing.assert_close(compiled(given), model(given), rtol=2e-5, atol=2e-5)


# -- what it does not take -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "given"),
    [
        pytest.param(nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9), id="a 1d convolution"),
        pytest.param(nn.Conv2d(4, 6, 3), torch.randn(4, 9, 9), id="an unbatched convolution"),
        pytest.param(nn.Conv2d(4, 6, 3).double(), torch.randn(2, 4, 9, 9).double(), id="float64"),
        pytest.param(nn.Conv2d(4, 6, 3).bfloat16(), torch.randn(2, 4, 9, 9).bfloat16(), id="bfloat16"),
        pytest.param(nn.Linear(4, 6), torch.randn(4), id="a vector"),
        pytest.param(nn.Linear(4, 6), torch.randn(2, 4), id="a small linear layer"),
        pytest.param(nn.Conv2d(4, 6, 3), torch.randn(0, 4, 9, 9), id="an empty batch"),
    ],
)
def test_what_onednn_does_not_take_stays_aten(layer: nn.Module, given: torch.Tensor) -> None:
    model = Network(lambda m, x: m.layer(x).relu(), layer=layer).eval()
    compiled = fxopt.compile(model, (given,))
    torch.testing.assert_close(compiled(given), model(given))
    assert not [name for name in counted(compiled, given) if name.startswith("mkldnn.")]


def test_a_weight_that_is_computed_stays_aten() -> None:
    model = Network(lambda m, x: F.conv2d(x, m.w * 2).relu(), w=nn.Parameter(torch.randn(6, 4, 3, 3))).eval()
    given = image()
    compiled = fxopt.compile(model, (given,))
    assert_eager(model, compiled, given)


@pytest.mark.parametrize(
    ("enter", "reason"),
    [
        pytest.param(lambda: torch.autocast("cpu", torch.bfloat16), "autocast", id="autocast"),
        pytest.param(lambda: torch.backends.mkldnn.flags(enabled=False), "without oneDNN", id="oneDNN is off"),
    ],
)
def test_where_it_may_not_run_the_portable_backend_does_and_the_report_says_so(
    enter: Callable[[], Any], reason: str
) -> None:
    model, given = Network(lambda m, x: m.conv(x).relu(), conv=nn.Conv2d(4, 6, 3)).eval(), image()
    with enter():
        compiled = fxopt.compile(model, (given,))
        assert compiled.report.backend == "aten"
        assert any(reason in notice for notice in compiled.report.notices)
        assert not [name for name in counted(compiled, given) if name.startswith("mkldnn.")]


def test_with_an_input_that_requires_grad_the_portable_backend_runs() -> None:
    model, given = Network(lambda m, x: m.conv(x).relu(), conv=nn.Conv2d(4, 6, 3)).eval(), image().requires_grad_()
    compiled = fxopt.compile(model, (image(),))
    compiled(given)
    with Counted() as mode:
        compiled(given).sum().backward()
    assert not [name for name in mode.calls if name.startswith("mkldnn.")]
    assert given.grad is not None


# -- NaN and infinity: what the docstring of fxopt/lowering/onednn.py says -------------------------------------------

#: Fused, these turn NaN into a number.
LOSES_NAN = {"relu", "relu6", "clamp", "clamp from below", "clamp from above", "hardtanh", "hardsigmoid"}


def passing() -> nn.Module:
    """A 1x1 convolution that passes its input on."""
    layer = nn.Conv2d(1, 1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    return layer


def poisoned(value: float) -> torch.Tensor:
    """An image of one bad value, at (1, 2), and of more pixels than a product takes."""
    given = torch.randn(1, 1, 9, 9)
    given[0, 0, 1, 2] = value
    return given


def test_nan_is_kept_by_aten_and_lost_by_onednns_bounded_activations_only() -> None:
    model, given = EachActivation(passing).eval(), poisoned(math.nan)
    example = torch.randn(1, 1, 9, 9)
    fused, portable = (fxopt.compile(model, (example,), backend=backend) for backend in ("onednn", "aten"))
    expected = model(given)
    assert all(result[0, 0, 1, 2].isnan() for result in expected)
    assert_each(portable(given), expected)
    for name, result, right in zip(ACTIVATIONS, fused(given), expected, strict=True):
        lost = not bool(result[0, 0, 1, 2].isnan())
        assert not lost or name in LOSES_NAN, f"the docstring does not say that {name} loses NaN"
        result[0, 0, 1, 2] = right[0, 0, 1, 2]
        torch.testing.assert_close(result, right, rtol=2e-5, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("value", [math.inf, -math.inf], ids=["inf", "-inf"])
def test_infinity_is_as_in_aten(value: float) -> None:
    model, given = EachActivation(passing).eval(), poisoned(value)
    compiled = fxopt.compile(model, (torch.randn(1, 1, 9, 9),), backend="onednn")
    assert_each(compiled(given), model(given))


@pytest.mark.parametrize("name", ["clamp", "hardtanh"])
def test_bounds_the_wrong_way_round_stay_atens(name: str) -> None:
    """oneDNN refuses them, and not before it runs."""
    model = Network(lambda m, x: m.conv(x).clamp(2, -1), conv=nn.Conv2d(4, 4, 3)).eval()
    if name == "hardtanh":
        model = Network(lambda m, x: torch.ops.aten.hardtanh(m.conv(x), 2, -1), conv=nn.Conv2d(4, 4, 3)).eval()
    x = torch.randn(2, 4, 6, 6)
    fast = fxopt.compile(model, (x,), backend="onednn", verify=False, passes=["fuse-conv-activation"])
    assert torch.equal(fast(x), model(x))


def test_bounds_the_wrong_way_round_stay_atens_behind_a_linear_layer() -> None:
    model = Network(lambda m, x: m.linear(x).clamp(2, -1), linear=nn.Linear(512, 512)).eval()
    x = torch.randn(1024, 512)
    fast = fxopt.compile(model, (x,), backend="onednn", verify=False, passes=["fuse-linear-activation"])
    assert torch.equal(fast(x), model(x))
    assert "mkldnn._linear_pointwise" in operations(next(iter(fast._ready.values())).module)
