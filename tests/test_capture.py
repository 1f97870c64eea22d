"""Capture: what goes in and comes out in any structure, under any name, through any module; and what cannot be taken.

Both front ends are held to eager's answer, each call in turn: `captured` compiles by one of them.
"""

from __future__ import annotations

import collections
import dataclasses
import re
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


# -- structures ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Prediction:
    """What a model of transformers returns."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] | None = None
    count: int = 3


Pair = collections.namedtuple("Pair", "left right")


@front_ends
@pytest.mark.parametrize(
    ("body", "given"),
    [
        pytest.param(lambda m, x: (m.norm(m.conv(x[0])), x[1]), (image(), image(3)), id="a tuple in, a tuple out"),
        pytest.param(lambda m, x: [m.conv(x["a"]), x["b"]], {"a": image(), "b": image()}, id="a dict in, a list out"),
        pytest.param(lambda m, x: {"y": m.conv(x), "deep": {"z": (x + 1,)}}, image(), id="nested dicts out"),
        pytest.param(lambda m, x: (m.conv(x), None, 3, "name", 0.5, True), image(), id="constants out"),
        pytest.param(lambda m, x: None, image(), id="None out"),
        pytest.param(lambda m, x: Pair(m.conv(x), x * 2), image(), id="a named tuple out"),
        pytest.param(lambda m, x: collections.OrderedDict(y=m.conv(x)), image(), id="an ordered dict out"),
        pytest.param(lambda m, x: m.conv(x["x"][0][1]), {"x": [(image(), image())]}, id="nested inputs, one unused"),
        pytest.param(lambda m, x: (x, x), image(), id="the input out, twice"),
    ],
)
def test_any_structure_goes_in_and_comes_out(front_end: str, body: Callable[..., Any], given: Any) -> None:
    model = randomised(Network(body, conv=conv(), norm=norm()))
    compiled = captured(model, front_end, given)
    expected, result = model(given), compiled(given)
    assert type(result) is type(expected)
    assert repr(shape_of(result)) == repr(shape_of(expected))
    for left, right in zip(leaves(result), leaves(expected), strict=True):
        assert_close(left, right) if isinstance(left, torch.Tensor) else assert_equal(left, right)


def leaves(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value)


def shape_of(value: Any) -> Any:
    """The structure, a dot for each leaf."""
    return torch.utils._pytree.tree_map(lambda _: ".", value)


def assert_equal(left: Any, right: Any) -> None:
    assert left == right
    assert type(left) is type(right)


@front_ends
def test_a_dataclass_comes_out_as_itself(front_end: str) -> None:
    model = randomised(Network(lambda m, x: Prediction(m.norm(m.conv(x)), (x + 1,), 5), conv=conv(), norm=norm()))
    given = image()
    result, expected = captured(model, front_end, given)(given), model(given)
    assert type(result) is Prediction
    assert_close(result.logits, expected.logits)
    assert torch.equal(result.hidden[0], expected.hidden[0])
    assert result.count == 5


@front_ends
def test_sizes_come_out_as_numbers_of_each_call(front_end: str) -> None:
    model = Network(lambda _, x: (x.shape[0], x + x.shape[0])).eval()
    compiled = captured(model, front_end, image())
    for batch in (2, 3, 1):
        given = image(batch)
        count, result = compiled(given)
        assert count == batch
        assert_close(result, given + batch)


class Keywords(nn.Module):
    """Positional, keyword-only and default arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(), norm()

    def forward(
        self, x: torch.Tensor, scale: float = 2.0, *, mask: torch.Tensor | None = None, **extra: torch.Tensor
    ) -> torch.Tensor:
        y = self.norm(self.conv(x)) * scale
        if mask is not None:
            y = y * mask
        for name in sorted(extra):
            y = y + extra[name]
        return y


@front_ends
def test_keyword_arguments_and_defaults_given_later(front_end: str) -> None:
    model, x, mask = randomised(Keywords()), image(), torch.rand(2, 1, 8, 8)
    compiled = captured(model, front_end, x)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x,), {}),
        ((x, 3.0), {}),
        ((), {"x": x, "scale": 0.5}),
        ((x,), {"mask": mask}),
        ((x,), {"mask": mask, "b": mask, "a": mask}),
        ((x,), {"a": mask, "mask": mask, "b": mask}),
    ]
    for args, kwargs in calls:
        assert_close(compiled(*args, **kwargs), model(*args, **kwargs))


def test_example_keyword_arguments_are_captured_with() -> None:
    model, x, mask = randomised(Keywords()), image(), torch.rand(2, 1, 8, 8)
    compiled = fxopt.compile(model, (x,), {"mask": mask})
    assert_close(compiled(x, mask=mask), model(x, mask=mask))
    assert len(compiled._session.programs) == 1


# -- modes, hooks, parametrizations, names, ties ---------------------------------------------------------------------


@front_ends
def test_a_model_in_training_mode_is_compiled_as_in_eval_and_left_as_it_was(front_end: str) -> None:
    model = nn.Sequential(conv(), norm(), nn.Dropout(0.5), nn.ReLU())
    given = image()
    with unmodified(model):
        with pytest.warns(fxopt.FxoptNotice, match="training mode"):
            compiled = captured(model, front_end, given)
        compiled(given)
    assert any("training mode" in notice for notice in compiled.report.notices)
    assert all(module.training for module in model.modules())
    assert_close(compiled(given), model.eval()(given))


@front_ends
def test_dropout_is_gone_in_inference(front_end: str) -> None:
    model = randomised(nn.Sequential(conv(), nn.Dropout2d(0.5), norm(), nn.Dropout(0.3), nn.ReLU()))
    given = image()
    compiled = captured(model, front_end, given)
    assert_close(compiled(given), model(given))
    assert not [node for node in compiled.fused_graph.graph.nodes if "dropout" in str(node.target)]


def _double(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def _shift(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0] + 1,)


@front_ends
@pytest.mark.parametrize(
    ("path", "pre"),
    [
        pytest.param("0", False, id="a hook on the convolution"),
        pytest.param("1", True, id="a pre-hook on the norm"),
        pytest.param("", False, id="a hook on the root"),
        pytest.param("", True, id="a pre-hook on the root"),
    ],
)
def test_hooks_run(front_end: str, path: str, pre: bool) -> None:
    model = randomised(nn.Sequential(conv(), norm(), nn.ReLU()))
    module = model.get_submodule(path)
    module.register_forward_pre_hook(_shift) if pre else module.register_forward_hook(_double)
    given = image()
    assert_close(captured(model, front_end, given)(given), model(given))


@front_ends
@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(nn.utils.parametrizations.weight_norm, id="weight norm"),
        pytest.param(nn.utils.parametrizations.spectral_norm, id="spectral norm"),
        pytest.param(nn.utils.weight_norm, id="weight norm by a pre-hook"),
    ],
)
def test_parametrized_weights_are_computed(front_end: str, wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = randomised(nn.Sequential(wrap(conv()), norm(), nn.ReLU()))
    given = image()
    assert_close(captured(model, front_end, given)(given), model(given))


def oddly_named() -> nn.Module:
    model = Network(lambda m, x: m.get_submodule("class")(m.get_submodule("1x1")(x)) * getattr(m, "def"))
    model.add_module("class", norm())
    model.add_module("1x1", conv())
    model.register_parameter("def", nn.Parameter(torch.rand(4, 1, 1)))
    return randomised(model)


@front_ends
def test_modules_and_parameters_may_be_named_by_keywords_and_digits(front_end: str) -> None:
    model, given = oddly_named(), image()
    compiled = captured(model, front_end, given)
    assert_close(compiled(given), model(given))
    assert_close(compiled.fused_graph(given), model(given))
    assert_close(compiled.graph_module(given), model(given))
    assert "1x1" in str(compiled.explain("1x1"))


@front_ends
@pytest.mark.parametrize("names", [("a-b", "a_b"), ("class", "class_"), ("a b", "a-b"), ("for", "1.")], ids=str)
def test_two_names_that_clean_up_alike_stay_two_tensors(front_end: str, names: tuple[str, str]) -> None:
    first, second = (name.replace(".", "") for name in names)
    model = Network(lambda m, x: x * getattr(m, first) + getattr(m, second))
    model.register_parameter(first, nn.Parameter(torch.rand(3, 1, 1)))
    model.register_buffer(second, torch.rand(3, 1, 1))
    given = image()
    assert_close(captured(model.eval(), front_end, given)(given), model(given))


@front_ends
def test_tied_weights_are_one_tensor(front_end: str) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, nn.ReLU(), second, first).eval()
    given = torch.randn(3, 4)
    compiled = captured(model, front_end, given)
    assert_close(compiled(given), model(given))
    weights = {node.target for node in compiled.captured_graph.graph.nodes if str(node.target).endswith("weight")}
    assert weights == {"0.weight"}


@front_ends
def test_a_convolution_called_twice_with_a_norm_each_is_folded_twice_over_or_not_at_all(front_end: str) -> None:
    model = randomised(
        Network(lambda m, x: m.n2(m.c(m.n1(m.c(x)))), c=nn.Conv2d(4, 4, 1), n1=norm(), n2=norm())
    )
    given = torch.randn(2, 4, 5, 5)
    assert_close(captured(model, front_end, given)(given), model(given))


# -- opaque modules --------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """A module of torch's behind a fold."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        x = self.linear(x).relu()
        return self.inner(x, x, x) if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param(nn.LSTM(4, 5, batch_first=True), id="LSTM"),
        pytest.param(nn.GRU(4, 5, 2, batch_first=True, bidirectional=True), id="GRU"),
        pytest.param(nn.MultiheadAttention(4, 2, batch_first=True), id="MultiheadAttention"),
        pytest.param(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), id="TransformerEncoderLayer"),
    ],
)
@front_ends
@pytest.mark.parametrize("grad", [True, False], ids=["with grad", "without grad"])
def test_torchs_recurrent_and_attention_modules(front_end: str, inner: nn.Module, grad: bool) -> None:
    model = Wrapped(inner).eval()
    with torch.set_grad_enabled(grad):
        compiled = captured(model, front_end, torch.randn(2, 3, 4))
        for batch in (2, 4, 1):
            given = torch.randn(batch, 3, 4)
            torch.testing.assert_close(compiled(given), model(given), rtol=1e-4, atol=1e-5)
    assert compiled.report.front_end == front_end
    if front_end == "symbolic":
        kinds = {type(compiled.captured_graph.get_submodule(node.target)).__name__
                 for node in compiled.captured_graph.graph.nodes if node.op == "call_module"}  # fmt: skip
        assert kinds == {type(inner).__name__}


# -- what cannot be captured -----------------------------------------------------------------------------------------


class Branching(nn.Module):
    """Control flow that depends on data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        if y.sum() > 0:  # THE LINE
            return y
        return -y


def line_of(marker: str) -> str:
    with open(__file__, encoding="utf-8") as source:
        return next(f"{__file__}:{number}" for number, line in enumerate(source, 1) if line.rstrip().endswith(marker))


@front_ends
def test_a_branch_on_data_is_an_error_at_the_users_line_that_says_what_to_do(front_end: str) -> None:
    with pytest.raises(fxopt.CaptureError) as caught:
        captured(Branching().eval(), front_end, image())(image())
    error = caught.value
    assert error.line is not None
    assert error.line.startswith(line_of("# THE LINE"))
    assert "forward" in error.line
    assert "torch.where" in str(error)


def test_without_inputs_a_model_that_cannot_be_traced_says_so_and_waits_for_its_first_call() -> None:
    def body(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.conv(x) if x.shape[0] > 4 else m.conv(x) * 2

    model = Network(body, conv=conv()).eval()
    with pytest.warns(fxopt.FxoptNotice, match="captured at the first call"):
        compiled = fxopt.compile(model)
    assert compiled.report.front_end == "nothing yet"
    for batch in (2, 5, 1):
        given = image(batch)
        assert_close(compiled(given), model(given))
    assert compiled.report.front_end == "export"
    assert any("captured at the first call" in notice for notice in compiled.report.notices)


def test_without_inputs_shapes_are_pending_until_the_first_call() -> None:
    model = randomised(Network(lambda m, x: (m.conv(x) + m.other(x.neg())).relu(), conv=conv(), other=conv()))
    compiled = fxopt.compile(model)
    assert compiled.report.pending
    assert "wait for the first call" in str(compiled.report)
    waiting = compiled.report.pending[0].node
    assert "pending" in str(compiled.explain(waiting))
    given = image()
    assert_close(compiled(given), model(given))
    assert not compiled.report.pending
    assert "pending" not in str(compiled.explain(waiting))
    assert re.search(r"verified: ", str(compiled.report))


def test_both_front_ends_give_one_graph() -> None:
    model = randomised(
        Network(
            lambda m, x: m.head(m.pool(F.relu(m.norm(m.conv(x)), inplace=True) + m.skip(x)).flatten(1)),
            conv=conv(), skip=conv(), norm=norm(), pool=nn.AdaptiveAvgPool2d(1), head=nn.Linear(4, 5),
        )
    )  # fmt: skip
    graphs = [fxopt.trace(model), fxopt.trace(model, (image(),))]
    said = [[str(node.target) for node in graph.graph.nodes if node.op == "call_function"] for graph in graphs]
    assert said[0] == said[1]
