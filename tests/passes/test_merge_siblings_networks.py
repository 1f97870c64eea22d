"""merge-siblings on random families of convolutions, and on whole networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fxopt import ir, normalize, pipeline, plugins
from fxopt.capture import capture_symbolic, private_copy
from fxopt.compare import relative_error
from fxopt.lowering.backend import set_concrete_values
from fxopt.pipeline import PassManager, Run
from graphs import FRONT_ENDS, Network, compiled_by, operations, randomised
from siblings import FUSED, dyadic, exact, results
from zoo import import_torchvision

both = pytest.mark.parametrize("front_end", FRONT_ENDS)


# -- properties ------------------------------------------------------------------------------------------------------


def captured(model: nn.Module, x: torch.Tensor) -> torch.fx.GraphModule:
    """The model in normal form with values, without an export."""
    module, _ = ir.copy(capture_symbolic(private_copy(model)).module)
    set_concrete_values(module, [x])
    normalize.normalize(module)
    return module


def rewritten(module: torch.fx.GraphModule, passes: Any) -> Run:
    return PassManager(tuple(passes), strict=True).run(module)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": torch.relu,
    "relu6": F.relu6,
    "leaky_relu": lambda y: F.leaky_relu(y, 0.5),
    "hardshrink": lambda y: F.hardshrink(y, 0.25),
}
READERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda y: y.sum(1),
    "convolution": lambda y: F.avg_pool2d(y, 2),
    "handed out": lambda y: y,
    "a view handed out": lambda y: y.flatten(2),
    "elementwise": lambda y: y * 2,
    "half": lambda y: y.chunk(2, 1)[0] + 1,
}


@st.composite
def families(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """Convolutions that read one image, each with an activation and a reader; some have siblings, some none."""
    channels, size = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5]))
    rows = draw(
        st.lists(
            st.tuples(
                st.sampled_from([(1, 0), (3, 1), ((1, 3), (0, 1)), (3, 2)]),
                st.integers(1, 3),
                st.booleans(),
                st.sampled_from(list(ACTIVATIONS)),
                st.sampled_from([name for name in READERS if size > 1 or name != "convolution"]),
            ),
            min_size=2,
            max_size=4,
        )
    )

    def body(m: Any, x: torch.Tensor) -> Any:
        found = []
        for place, (_, _, _, activation, reader) in enumerate(rows):
            found.append(READERS[reader](ACTIVATIONS[activation](getattr(m, f"layer{place}")(x))))
        return tuple(found)

    layers = {
        f"layer{place}": nn.Conv2d(channels, 2 * half, kernel, padding=padding, bias=bias)
        for place, ((kernel, padding), half, bias, _, _) in enumerate(rows)
    }
    return exact(Network(body, **layers)), dyadic(draw(st.integers(1, 2)), channels, size, size)


def run(module: torch.fx.GraphModule, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        return results(torch.fx.Interpreter(module).run(x))


def strides(value: torch.Tensor) -> list[int]:
    return [stride for stride, size in zip(value.stride(), value.shape, strict=True) if size != 1]


@given(families())
def test_families_keep_every_bit_and_are_merged_once(family: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = family
    module = captured(model, x)
    passes = [plugins.named(name) for name in FUSED]
    merged = rewritten(module, passes).journal.rewrites
    event(f"merged: {[len(rewrite.replaced) for rewrite in merged if rewrite.pass_name == 'merge-siblings']}")
    for ours, theirs in zip(run(module, x), run(captured(model, x), x), strict=True):
        assert torch.equal(ours, theirs)
        assert strides(ours) == strides(theirs)
    before = str(module.graph)
    assert not rewritten(module, passes).journal.rewrites
    assert str(module.graph) == before


# -- whole networks --------------------------------------------------------------------------------------------------


#: model of torchvision -> convolutions before and after, for images of this size
NETWORKS = [
    pytest.param("googlenet", 96, 57, 39, id="GoogLeNet's nine modules: three 1x1 convolutions of one input are one"),
    pytest.param("inception_v3", 128, 94, 75, id="Inception-v3"),
    pytest.param("squeezenet1_1", 64, 26, 26, id="SqueezeNet: a 1x1 kernel padded to 3x3 would not pay"),
    pytest.param("resnext50_32x4d", 64, 53, 53, id="ResNeXt has no siblings"),
]


@pytest.mark.zoo
@pytest.mark.parametrize(("name", "size", "before", "after"), NETWORKS)
def test_networks(name: str, size: int, before: int, after: int) -> None:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = randomised(getattr(import_torchvision().models, name)(**options))
    x = torch.randn(2, 3, size, size)
    module = captured(model, x)
    assert operations(module)["conv2d"] == before
    # Where a concat goes by splitting the layer that reads it, there are more layers: that is another pass's count.
    rewritten(module, pipeline.only(plugins.default_pipeline(), lambda current: current.name != "eliminate-concat"))
    assert operations(module)["fxopt.convolution"] + operations(module)["conv2d"] == after
    (found,) = run(module, x)
    with torch.no_grad():
        assert relative_error(model(x), found) < 5e-6


@pytest.mark.zoo
@pytest.mark.slow
@both
def test_googlenet_compiles_to_merged_convolutions_and_is_verified(front_end: str) -> None:
    model, x = randomised(import_torchvision().models.googlenet(init_weights=False)), torch.randn(2, 3, 96, 96)
    compiled = compiled_by(("default",), model, (x,), front_end)
    merged = [rewrite for rewrite in compiled.report.rewrites if rewrite.pass_name == "merge-siblings"]
    assert [len(rewrite.replaced) for rewrite in merged] == [3] * 9
    assert operations(compiled.fused_graph)["fxopt.convolution"] == 39
    assert compiled.report.verdict is not None
    assert compiled.report.verdict.ok
