"""Wrong answers and crashes that were found by reading and by adversarial models: each row is one of them."""

from __future__ import annotations

import dataclasses
from types import MethodType
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxopt
from fxopt import plugins
from graphs import FRONT_ENDS, Network, TwoInputs

pytestmark = pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice")

_LIBRARY = torch.library.Library("fxopt_tests", "DEF")
_LIBRARY.define("no_fake(Tensor x) -> Tensor")
_LIBRARY.impl("no_fake", lambda x: x * 2, "CPU")

front_ends = pytest.mark.parametrize("front_end", FRONT_ENDS)


def compiled(front_end: str, model: nn.Module, *example: Any, **options: Any) -> fxopt.CompiledModule:
    """Compiled on the example, or without one."""
    return fxopt.compile(model, example, **options) if front_end == "export" else fxopt.compile(model, **options)


@front_ends
def test_two_slices_as_arguments_are_two_programs(front_end: str) -> None:
    model = TwoInputs(lambda m, x, part: x[part] * 2)
    x, parts = torch.randn(5, 4), (slice(0, 2), slice(0, 3), slice(1, None, 2))
    fast = compiled(front_end, model, x, parts[0])
    for part in (*parts, *parts):
        assert torch.equal(fast(x, part), model(x, part))


@front_ends
@pytest.mark.parametrize(
    "views",
    [
        pytest.param(lambda whole: (whole[:2], whole[:2]), id="one tensor given twice"),
        pytest.param(lambda whole: (whole[:2], whole[1:]), id="two views that overlap"),
    ],
)
def test_a_write_to_one_input_is_a_write_to_another_that_shares_its_memory(front_end: str, views: Any) -> None:
    def write_between(m: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        result = m.conv(y)
        x.add_(1)
        return result.relu(), x

    model = TwoInputs(write_between, conv=nn.Conv2d(3, 3, 1)).eval()
    fast = compiled(front_end, model, torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))
    fast(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))  # what is proven is not asked again
    whole = torch.randn(3, 3, 4, 4)
    for result, expected in zip(fast(*views(whole.clone())), model(*views(whole.clone())), strict=True):
        torch.testing.assert_close(result, expected)


@front_ends
def test_a_norm_that_counts_while_it_runs_counts_each_call_once(front_end: str) -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        by_batch = nn.functional.batch_norm(x, m.mean, m.variance, training=True)
        return nn.functional.batch_norm(by_batch, m.mean, m.variance)

    model = Network(body, mean=torch.zeros(3), variance=torch.ones(3)).eval()
    fast = compiled(front_end, model, torch.randn(2, 3, 4, 4))
    for _ in range(3):
        x = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(fast(x), model(x))


def test_a_write_to_the_weights_of_a_module_that_stays_whole_is_noticed() -> None:
    model = Network(lambda m, x: m.head(m.memory(x)[0]), memory=nn.LSTM(3, 3), head=nn.Linear(3, 3)).eval()
    fast, x = fxopt.compile(model), torch.randn(4, 2, 3)
    fast(x)
    with torch.no_grad():
        model.memory.weight_ih_l0.mul_(3)
    with pytest.raises(fxopt.StaleWeightsError, match=r"memory\.weight_ih_l0"):
        fast(x)


@front_ends
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda m, x: m.conv(x)[m.conv(x) > 0].relu(), id="a boolean mask"),
        pytest.param(lambda m, x: torch.nonzero(m.conv(x) > 0), id="nonzero"),
        pytest.param(lambda m, x: torch.masked_select(m.conv(x), x > 0).sum(), id="masked_select, then a sum"),
        pytest.param(lambda m, x: torch.unique(m.conv(x).round()), id="unique"),
        pytest.param(lambda m, x: torch.where(m.conv(x) > 0)[0], id="where with one argument"),
    ],
)
def test_shapes_that_depend_on_values_stay_unknown(front_end: str, body: Any) -> None:
    model = Network(body, conv=nn.Conv2d(3, 3, 1)).eval()
    x = torch.randn(2, 3, 4, 4)
    fast = compiled(front_end, model, x)
    for batch in (2, 3, 1, 2):
        x = torch.randn(batch, 3, 4, 4)
        torch.testing.assert_close(fast(x), model(x))


def test_an_operator_without_a_fake_kernel_is_traced_and_its_shape_stays_unknown() -> None:
    model = Network(lambda m, x: torch.ops.fxopt_tests.no_fake(m.conv(x)).relu(), conv=nn.Conv2d(3, 3, 1)).eval()
    fast, x = fxopt.compile(model), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fast(x), model(x))


def traced(model: nn.Module, *inputs: torch.Tensor) -> Any:
    """What the graph of `fxopt.trace`, taken without inputs, gives on them."""
    module = fxopt.trace(model)
    results = fx.Interpreter(module).run(*inputs)
    return fxopt.ir.interface(module).out_spec.unflatten(list(results))


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(nn.BatchNorm2d(3), id="a batch norm"),
        pytest.param(nn.InstanceNorm2d(3), id="an instance norm"),
        pytest.param(nn.ConvTranspose2d(3, 3, 2), id="a transposed convolution"),
    ],
)
def test_a_forward_given_to_one_object_is_the_one_that_is_traced(layer: nn.Module) -> None:
    layer.forward = lambda x: x * 3  # type: ignore[method-assign, assignment]
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), layer).eval(), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(traced(model, x), model(x))


def test_a_forward_given_to_the_model_itself_is_the_one_that_is_traced() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    model.forward = MethodType(lambda self, x, y: self[0](x) + y, model)  # type: ignore[method-assign]
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    torch.testing.assert_close(fxopt.compile(model)(x, y), model(x, y))


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        pytest.param(nn.LSTM(4, 4), 1, id="an LSTM"),
        pytest.param(nn.MultiheadAttention(4, 2), 3, id="an attention"),
        pytest.param(nn.TransformerEncoderLayer(4, 2, 8), 1, id="a transformer layer"),
    ],
)
def test_a_model_that_is_itself_a_module_that_stays_whole(model: nn.Module, inputs: int) -> None:
    x = torch.randn(5, 2, 4)
    fast = fxopt.compile(model.eval())
    torch.testing.assert_close(fast(*[x] * inputs), model(*[x] * inputs))


def _sums_up(m: Any, x: torch.Tensor) -> torch.Tensor:
    total = torch.zeros(4)
    total += x.sum((0, 1, 2))
    return total


def _narrow_part(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.conv(x)
    return y.float()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(_sums_up, "writes to a tensor that it makes", id="a sum in a tensor that forward makes"),
        pytest.param(lambda m, x: (x + 1, torch.zeros(3)), "hands out a tensor that it makes", id="a new tensor"),
        pytest.param(lambda m, x: (x + 1, torch.zeros(3)[1:]), "hands out a tensor that it makes", id="a view of one"),
        pytest.param(_narrow_part, "switches autocast", id="autocast for a part of the model"),
    ],
)
def test_what_happens_anew_in_each_call_is_not_traced_but_exported(body: Any, message: str) -> None:
    model = Network(body, conv=nn.Conv2d(3, 3, 1)).eval()
    with pytest.raises(fxopt.CaptureError, match=message):
        fxopt.trace(model)
    fast = fxopt.compile(model)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 4, 4)
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda m, x, y: x.to(y.device), id="to a device"),
        pytest.param(lambda m, x, y: x.to(y.dtype), id="to a dtype"),
        pytest.param(lambda m, x, y: x.to(y.device, y.dtype), id="to both"),
        pytest.param(lambda m, x, y: x.view(y.shape) + x.reshape(y.shape), id="viewed in the shape of another"),
    ],
)
def test_a_trace_tells_devices_dtypes_and_shapes_of_other_tensors_apart(body: Any) -> None:
    model, x, y = TwoInputs(body), torch.randn(2, 6), torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(traced(model, x, y), model(x, y))


@front_ends
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        pytest.param(nn.BatchNorm1d(6), (2, 5, 6), id="of tokens"),
        pytest.param(nn.BatchNorm2d(6), (2, 6, 4, 6), id="of an image"),
    ],
)
def test_a_norm_of_a_transposed_value_is_packed_as_the_kernel_packs_it(
    front_end: str, norm: nn.Module, shape: tuple[int, ...]
) -> None:
    """The fake kernel keeps the strides of its input, by which `contiguous()` would do nothing."""
    model = Network(lambda m, x: m.norm(x.transpose(1, -1)).transpose(1, -1).contiguous(), norm=norm).eval()
    fast = compiled(front_end, model, torch.randn(shape))
    for batch in (2, 3):
        x = torch.randn(batch, *shape[1:])
        torch.testing.assert_close(fast(x), model(x), check_stride=True)


@front_ends
@pytest.mark.parametrize("sizes", [(5,), (5, 4), (5, 4, 3)], ids=["1d", "2d", "3d"])
def test_a_map_of_any_rank_is_enlarged(front_end: str, sizes: tuple[int, ...]) -> None:
    model, x = Network(lambda m, x: F.interpolate(x, scale_factor=2) + 1), torch.randn(2, 3, *sizes)
    torch.testing.assert_close(compiled(front_end, model, x)(x), model(x))


@front_ends
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda m, x: x * x.stride(0), id="one stride"),
        pytest.param(lambda m, x: x * x.stride()[0], id="strides"),
        pytest.param(lambda m, x: x * x.element_size(), id="the size of an element"),
        pytest.param(lambda m, x: x * x.shape.numel(), id="a method of a shape"),
        pytest.param(lambda m, x: x * x.sum().item(), id="an item"),
        pytest.param(lambda m, x: torch.tensor([x.shape[0], 2]) + x[:, :2], id="a tensor made of a size"),
    ],
)
def test_numbers_that_a_tensor_is_asked_for(front_end: str, body: Any) -> None:
    model = Network(body)
    fast = compiled(front_end, model, torch.randn(2, 4))
    for batch in (2, 3, 2):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(fast(x), model(x))


@front_ends
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda m, x: m.conv(x).sort(1)[0], id="the first of a sort's results"),
        pytest.param(lambda m, x: tuple(m.conv(x).topk(2, 1)), id="all of topk's results"),
        pytest.param(lambda m, x: m.conv(x).chunk(2, 1), id="chunks, which are views"),
        pytest.param(lambda m, x: (lambda y: (y.max(1)[0], y))(m.conv(x)), id="a maximum and what it is of"),
    ],
)
def test_results_have_their_own_strides_whatever_the_backend_computes_in(front_end: str, body: Any) -> None:
    model = Network(body, conv=nn.Conv2d(3, 4, 1)).eval()
    x = torch.randn(2, 3, 5, 6)
    fast = compiled(front_end, model, x, backend="onednn", verify=False)
    for result, expected in zip(pytree.tree_leaves(fast(x)), pytree.tree_leaves(model(x)), strict=True):
        torch.testing.assert_close(result, expected, check_stride=True)
    assert fast.report.backend == "onednn"


@front_ends
def test_a_weight_is_packed_once_for_all_batch_sizes(front_end: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(2), nn.Linear(16, 1024)).eval()
    fast = compiled(front_end, model, torch.randn(72, 3, 6, 6), backend="onednn")
    fast(torch.randn(72, 3, 6, 6))
    packed = [id(special) for _, special in fast._session.packed.made()]
    fast(torch.randn(81, 3, 6, 6))
    assert len(packed) == 2  # by oneDNN; MKL's weights are for one number of rows
    assert [id(special) for _, special in fast._session.packed.made()] == packed


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_module_stays_whole() -> None:
    part = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).eval())
    model = Network(lambda m, x: m.part(x) + 1, part=part).eval()
    fast = fxopt.compile(model)
    for batch in (2, 3):
        x = torch.randn(batch, 3, 4, 4)
        torch.testing.assert_close(fast(x), model(x))


RELU = torch.ops.aten.relu.default


@front_ends
@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        pytest.param(
            fxopt.Rule("r", fxopt.call(RELU, nosuch=fxopt.var("x")), lambda match, rewriter: match.root),
            "the pattern raised KeyError",
            id="a pattern names an argument that the operator has not",
        ),
        pytest.param(
            fxopt.Rule("r", fxopt.call(RELU, fxopt.var("x"), fxopt.var("y")), lambda match, rewriter: match.root),
            "the pattern raised IndexError",
            id="a pattern has more arguments than the operator",
        ),
        pytest.param(
            fxopt.Rule("r", fxopt.call(RELU, fxopt.var("x")), lambda match, rewriter: None),
            "it gave None, not the node to read instead",
            id="a rewrite gives nothing",
        ),
        pytest.param(
            fxopt.Rule("r", fxopt.call(RELU, fxopt.var("x")), lambda m, r: m.root, lambda m: True),
            "it gave True, neither None nor NoMatch",
            id="a guard gives a truth value",
        ),
    ],
)
def test_a_malformed_rule_is_named_and_the_rest_goes_on(front_end: str, rule: fxopt.Rule, reason: str) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval(), torch.randn(2, 3, 4, 4)
    passes = [fxopt.Pass("malformed", rules=(rule,)), "default"]
    fast = compiled(front_end, model, x, passes=passes)
    torch.testing.assert_close(fast(x), model(x))
    failed = fast.report.passes[0]
    assert failed.status == "failed"
    assert reason in failed.reason
    assert sum(result.rewrites for result in fast.report.passes) == 1


def _build_raises(module: fx.GraphModule, packed: Any) -> Any:
    raise ValueError("no compiler here")


def _run_raises(module: fx.GraphModule, packed: Any) -> Any:
    def run(*tensors: torch.Tensor) -> Any:
        raise RuntimeError("the kernel refuses")

    return run


@front_ends
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        pytest.param(_build_raises, "ValueError: no compiler here", id="while it builds"),
        pytest.param(_run_raises, "RuntimeError: the kernel refuses", id="at the first run"),
    ],
)
def test_a_backend_that_raises_gives_way(
    monkeypatch: pytest.MonkeyPatch, front_end: str, build: Any, reason: str
) -> None:
    broken = dataclasses.replace(plugins.backend("aten"), name="broken", build=build)
    installed = plugins.backend
    monkeypatch.setattr(plugins, "backend", lambda name: broken if name == "broken" else installed(name))
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval(), torch.randn(2, 3, 4, 4)
    fast = compiled(front_end, model, x, backend="broken")
    torch.testing.assert_close(fast(x), model(x))
    assert fast.report.backend == "aten"
    assert any("broken" in notice and reason in notice for notice in fast.report.notices)
