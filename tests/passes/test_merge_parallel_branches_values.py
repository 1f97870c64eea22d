"""merge-parallel-branches: the values of merged sums, in exact arithmetic, in narrow dtypes, and of infinities."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from torch import fx, nn

import fxopt
from branches import IMAGE, MERGE, PASSES, model_of
from fxopt import ir, normalize, plugins
from fxopt.capture import capture_symbolic, private_copy
from fxopt.lowering.backend import set_concrete_values
from fxopt.pipeline import PassManager
from graphs import Network, fired, operations

# -- random sums -----------------------------------------------------------------------------------------------------

CONVOLUTIONS = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
KINDS = ("layer", "layer", "identity", "norm", "pool", "relu", "constant", "number")


@dataclass(frozen=True)
class Drawn:
    """A sum as it is drawn: its addends and how they are added up."""

    spatial: int
    addends: tuple[tuple[str, dict[str, Any]], ...]
    signs: tuple[str, ...]
    nested: bool
    behind: str
    seed: int


@st.composite
def sums(draw: Any) -> Drawn:
    """Layers whose geometries often agree, and companions; those that give another shape are left out later."""
    spatial = draw(st.integers(0, 3))
    stride, dilation = draw(st.sampled_from([1, 1, 2])), draw(st.integers(1, 2))
    groups, transposed = draw(st.sampled_from([1, 1, 2, 4])), spatial > 0 and draw(st.integers(0, 4)) == 0
    addends = []
    more = draw(st.lists(st.sampled_from(KINDS), max_size=5))
    for kind in draw(st.permutations(["layer", "layer", *more])):
        kernel = tuple(draw(st.integers(1, 3)) for _ in range(spatial))
        odd = draw(st.integers(0, 5)) == 0  # another geometry than the others, which may give the same shape
        options: dict[str, Any] = {"kernel": kernel, "bias": draw(st.booleans())}
        options["stride"] = draw(st.integers(1, 2)) if odd else stride
        options["dilation"] = tuple(draw(st.integers(1, 2)) if odd else dilation for _ in kernel)
        if odd:
            options["padding"] = tuple(draw(st.integers(0, 1)) for _ in kernel)
        else:
            options["padding"] = tuple(d * (k - 1) // 2 for k, d in zip(kernel, options["dilation"], strict=True))
        options["groups"] = draw(st.sampled_from([1, 2])) if odd else groups
        options["transposed"] = transposed
        options["operator"] = draw(st.integers(0, 3))
        addends.append((kind, options))
    signs = tuple(draw(st.sampled_from(["+", "+", "-", "alpha", "reversed"])) for _ in addends)
    behind = draw(st.sampled_from(["nothing", "nothing", "constant", "norm", "relu"]))
    return Drawn(spatial, tuple(addends), signs, draw(st.booleans()), behind, draw(st.integers(0, 2**16)))


def dyadic(*shape: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape).double() / 2


def numbered(part: nn.Module) -> nn.Module:
    """Numbers that do not round: a norm's scale is a power of two."""
    part = part.double().eval()
    with torch.no_grad():
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(dyadic(*tensor.shape))
            if name == "running_var":
                tensor.copy_(4.0 ** torch.randint(-1, 2, tensor.shape) - 2**-10)
    return part


class Sum(nn.Module):
    """Addends of one value of four channels."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        torch.manual_seed(drawn.seed)
        self.drawn, spatial = drawn, drawn.spatial
        self.x = dyadic(2, 4, *[5] * spatial)
        self.parts = nn.ModuleList(self._built(kind, options) for kind, options in drawn.addends)
        self.register_buffer("constant", dyadic(4, *[1] * spatial))
        self.norm = numbered(NORMS[spatial](4, eps=2**-10))
        shapes = [self._shape(index) for index in range(len(drawn.addends))]
        whole = [index for index, shape in enumerate(shapes) if shape is not None and len(shape) == spatial + 2]
        same = [index for index in whole if shapes[index] == shapes[whole[0]]]
        #: A whole addend comes first, so that a constant or a number has something to be added to.
        self.kept = same[:1] + [
            index
            for index, (kind, _) in enumerate(drawn.addends)
            if index in same[1:] or kind in ("constant", "number")
        ]

    def _shape(self, index: int) -> torch.Size | None:
        try:
            found = self._addend(index, self.x)
        except RuntimeError:  # a window wider than the image
            return None
        return found.shape if isinstance(found, torch.Tensor) else None

    def _built(self, kind: str, options: dict[str, Any]) -> nn.Module:
        spatial = self.drawn.spatial
        if kind == "norm":
            return numbered(NORMS[spatial](4, eps=2**-10))
        if kind == "pool" and spatial:
            kernel = tuple(2 ** (size // 2) for size in options["kernel"])  # no thirds
            padding = tuple(min(pad, size // 2) for pad, size in zip(options["padding"], kernel, strict=True))
            return POOLS[spatial](kernel, options["stride"], padding, count_include_pad=options["bias"])
        if kind == "layer" and spatial == 0:
            return numbered(nn.Linear(4, 4, bias=options["bias"]))
        if kind == "layer":
            table = TRANSPOSED if options["transposed"] else CONVOLUTIONS
            given = {key: options[key] for key in ("stride", "padding", "dilation", "groups", "bias")}
            return numbered(table[spatial](4, 4, options["kernel"], **given))
        return nn.Identity()

    def _addend(self, index: int, x: torch.Tensor) -> Any:
        kind, options = self.drawn.addends[index]
        match kind:
            case "relu":
                return x.relu()
            case "constant":
                return self.constant
            case "number":
                return options["operator"] - 1.5
            case _:
                return self.parts[index](x)

    def _is_whole(self, index: int) -> bool:
        return self.drawn.addends[index][0] not in ("constant", "number")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The addends in turn; nested, the first half by itself."""
        total: Any = None
        held: Any = None
        for place, index in enumerate(self.kept if self.kept[:1] and self._is_whole(self.kept[0]) else []):
            addend = self._addend(index, x)
            total = addend if total is None else _added(total, addend, self.drawn.signs[index])
            if self.drawn.nested and place == len(self.kept) // 2 - 1:
                held, total = total, None
        total = total if held is None else _added(held, total, "-")
        total = x.relu() if total is None else total
        match self.drawn.behind:
            case "constant":
                return total * self.constant - 1
            case "norm":
                return self.norm(total)
            case "relu":
                return total.relu()
            case _:
                return total


def _added(total: Any, addend: Any, sign: str) -> Any:
    tensors = isinstance(total, torch.Tensor) and isinstance(addend, torch.Tensor)
    match sign:
        case "-":
            return total - addend
        case "reversed":
            return addend + total
        case "alpha" if tensors:
            return torch.sub(total, addend, alpha=0.5)
        case _:
            return total + addend


def captured(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    """The sum in normal form, with values."""
    module, _ = ir.copy(capture_symbolic(private_copy(model)).module)
    set_concrete_values(module, [x])
    normalize.normalize(module)
    return module


def result_of(module: fx.GraphModule, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        (found,) = fx.Interpreter(module).run(x)
    return found


@given(sums())
def test_every_bit_is_kept_in_exact_arithmetic_and_once_is_enough(drawn: Drawn) -> None:
    model = Sum(drawn).eval()
    module = captured(model, model.x)
    expected = result_of(module, model.x)
    names = ("fold-affine", "fold-batchnorm", *PASSES)
    run = PassManager([plugins.named(name) for name in names], strict=True).run(module)
    rewrites = [rewrite.rule for rewrite in run.journal.rewrites]
    event(f"merges: {rewrites.count(MERGE)}, layers left: {operations(module).total()}")
    actual = result_of(module, model.x)
    assert actual.stride() == expected.stride()
    assert torch.equal(actual, expected)
    before = str(module.graph)
    again = PassManager([plugins.named(name) for name in PASSES], strict=True).run(module)
    assert not again.journal.rewrites
    assert str(module.graph) == before


# -- rounding and dtypes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_no_worse_than_twice_eagers(dtype: torch.dtype) -> None:
    model = model_of(lambda m, x: m.one(x) + m.three(x) - m.bare(x) + x + m.norm(x)).to(dtype)
    x = torch.randn(16, 4, 9, 9).to(dtype)
    fast = fxopt.compile(model, (x,), passes=PASSES, backend="aten", verify=False, strict=True)
    assert operations(fast.fused_graph) == {"conv2d": 1}
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        eager, ours = (float((found.double() - exact).abs().max()) for found in (model(x), fast(x)))
    assert fast(x).dtype == dtype
    assert ours <= 2 * eager + 4 * torch.finfo(dtype).eps


def test_the_weights_are_added_up_once() -> None:
    """Eight times 1/2 of the last place: one by one each would be rounded away."""
    layers = {f"conv{index}": nn.Conv2d(2, 2, 1, bias=False) for index in range(9)}
    with torch.no_grad():
        for index in range(9):
            layers[f"conv{index}"].weight.fill_(1.0 if index == 0 else 2.0**-24)
    model = Network(lambda m, x: sum(getattr(m, name)(x) for name in layers), **layers).eval()
    fast = fxopt.compile(model, passes=PASSES)
    (weight,) = fast.state_dict().values()
    assert torch.equal(weight, torch.full((2, 2, 1, 1), 1 + 2.0**-21))


@pytest.mark.parametrize("example", [True, False])
def test_under_autocast_layers_are_narrower_than_what_stands_beside_them(example: bool) -> None:
    x = torch.randn(IMAGE)
    for body in (
        lambda m, x: m.one(x) + m.three(x),
        lambda m, x: m.three(x) + x,
        lambda m, x: m.three(x) + m.norm(x),
        lambda m, x: m.one(x) + m.three(x) + x.relu(),
    ):
        model = model_of(body)
        fast = fxopt.compile(model, (x,) if example else None, passes=PASSES, backend="aten")
        fast(x)
        assert fired(fast) == [MERGE]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            expected, actual = model(x), fast(x)
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, atol=0.1, rtol=0.1)


# -- infinities ------------------------------------------------------------------------------------------------------


def reach(model: nn.Module, value: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pixels of channel 0 are finite, in the model and merged, where one pixel of the input is not."""
    x = torch.zeros(1, 4, 5, 5)
    x[0, 0, 2, 2] = value
    fast = fxopt.compile(model, (torch.zeros(1, 4, 5, 5),), passes=PASSES, backend="aten", strict=True)
    assert fired(fast) == [MERGE]
    with torch.no_grad():
        return model(x)[0, 0].isfinite(), fast(x)[0, 0].isfinite()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_infinity_spreads_over_the_zeros_around_a_kernel(value: float) -> None:
    """Not promised, and not kept: zero times infinity is NaN. What is promised is for finite values."""
    eager, merged = reach(model_of(lambda m, x: m.row(x) + m.column(x)), value)
    cross, square = torch.ones(5, 5, dtype=torch.bool), torch.ones(5, 5, dtype=torch.bool)
    cross[2, 1:4] = cross[1:4, 2] = square[1:4, 1:4] = False
    assert torch.equal(eager, cross)
    assert torch.equal(merged, square)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_infinity_spreads_no_further_than_the_largest_kernel_that_was_there(value: float) -> None:
    eager, merged = reach(model_of(lambda m, x: m.three(x) + m.one(x) + x), value)
    assert torch.equal(eager, merged)


def test_an_infinity_of_a_value_beside_a_layer_is_nan_behind_the_zeros_of_its_unit_kernel() -> None:
    x = torch.zeros(1, 4, 1, 1)
    x[0, 0] = float("inf")
    layer = nn.Conv2d(4, 4, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[1, 0] = -1.0
    model = Network(lambda m, x: m.layer(x) + m.pool(x), layer=layer, pool=nn.AvgPool2d(1)).eval()
    fast = fxopt.compile(model, (torch.zeros(1, 4, 1, 1),), passes=PASSES, backend="aten", strict=True)
    assert fired(fast) == [MERGE]
    with torch.no_grad():
        assert model(x).flatten().tolist() == fast(x).flatten().tolist()  # both read channel 0 anyway
