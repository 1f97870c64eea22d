"""What fxopt says where it cannot go on: each message names what was wrong, what was expected, and what to do."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from graphs import FRONT_ENDS, Network, randomised

pytestmark = pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice")

front_ends = pytest.mark.parametrize("front_end", FRONT_ENDS)


def convnet() -> nn.Module:
    return randomised(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))


def image(batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, 8, 8)


def compiled_by(front_end: str, model: nn.Module, *example: Any) -> fxopt.CompiledModule:
    return fxopt.compile(model, example or (image(),)) if front_end == "export" else fxopt.compile(model)


# -- what is compiled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("thing", "kind"),
    [
        pytest.param(lambda x: x, "function", id="a function"),
        pytest.param(nn.ReLU, "type", id="a class"),
        pytest.param("resnet50", "str", id="a name"),
        pytest.param(None, "NoneType", id="None"),
        pytest.param(collections.OrderedDict(), "OrderedDict", id="a state dict"),
    ],
)
def test_what_is_no_module_is_refused_by_its_kind(thing: Any, kind: str) -> None:
    for attempt in (lambda: fxopt.compile(thing), lambda: fxopt.trace(thing)):
        with pytest.raises(fxopt.UsageError, match=f"compiles an nn.Module, not {kind}") as caught:
            attempt()
        assert "wrap a function in a module" in str(caught.value)


@front_ends
def test_a_model_on_the_meta_device_is_refused(front_end: str) -> None:
    with torch.device("meta"):
        model = convnet_without_values()
    with pytest.raises(fxopt.UsageError, match="meta device") as caught:
        compiled_by(front_end, model)
    assert "load its weights" in str(caught.value)


def convnet_without_values() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()


@front_ends
def test_a_lazy_model_is_refused_until_it_knows_its_sizes(front_end: str) -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU()).eval()
    with pytest.raises(fxopt.FxoptError, match="lazy") as caught:
        compiled_by(front_end, model)(image())
    assert "call it once" in str(caught.value)


def test_a_model_that_cannot_be_copied_is_refused_with_the_reason() -> None:
    model = convnet()
    model.source = (number for number in range(3))
    with pytest.raises(fxopt.CaptureError, match="cannot be copied") as caught:
        fxopt.compile(model)
    assert "generator" in str(caught.value)


@front_ends
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_weights_that_are_not_finite_are_declined_and_give_eagers_answer(front_end: str, bad: float) -> None:
    model = convnet()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = bad
    compiled, given = compiled_by(front_end, model), image()
    torch.testing.assert_close(compiled(given), model(given), rtol=2e-5, atol=1e-5, equal_nan=True)
    reasons = [decline.reason for decline in compiled.report.declines if decline.pass_name == "fold-batchnorm"]
    assert any("NaN or infinity" in reason for reason in reasons), reasons


# -- what it is compiled with ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"numerics": "fast"}, 'it is "bitwise", "reassociate" or "approximate"', id="numerics"),
        pytest.param({"verify": "always"}, 'it is True, False or "each"', id="verify"),
        pytest.param({"dynamic_shapes": "some"}, '"batch"', id="dynamic_shapes"),
        pytest.param({"backend": "tensorrt"}, "no backend is named 'tensorrt'", id="backend"),
        pytest.param({"backend": "tensorrt"}, "onednn", id="backend, and those there are"),
        pytest.param({"passes": ["fold-batchnrom"]}, "no pass is named 'fold-batchnrom'", id="passes"),
        pytest.param({"passes": "fold-batchnrom"}, "fold-batchnorm", id="passes, and those there are"),
        pytest.param({"disable": ("fold",)}, "no pass is named 'fold'", id="disable"),
        pytest.param({"passes": [3]}, "3 is no pass", id="a pass that is none"),
    ],
)
@front_ends
def test_an_option_that_does_not_exist_is_refused_with_those_that_do(
    front_end: str, options: dict[str, Any], message: str
) -> None:
    args = ((image(),),) if front_end == "export" else ()
    with pytest.raises(fxopt.UsageError) as caught:
        fxopt.compile(convnet(), *args, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("args", [3, "x", {"x": 1}], ids=["a number", "a string", "a dict"])
def test_example_arguments_that_are_no_tuple_are_refused(args: Any) -> None:
    with pytest.raises(fxopt.UsageError, match="example inputs") as caught:
        fxopt.compile(convnet(), args)
    assert "fxopt.compile(model, (x,))" in str(caught.value)


# -- calls -----------------------------------------------------------------------------------------------------------


def wrong_call(*args: Any, **kwargs: Any) -> Callable[[nn.Module], Any]:
    return lambda compiled: compiled(*args, **kwargs)


WRONG_CALLS = [
    pytest.param(wrong_call(torch.randn(3, 8, 8, 8, 8)), ["f32[3, 8, 8, 8, 8]"], id="a rank too many"),
    pytest.param(wrong_call(torch.randn(2, 4)), ["f32[2, 4]"], id="ranks too few"),
    pytest.param(wrong_call(image(channels=5)), ["f32[2, 5, 8, 8]"], id="other channels"),
    pytest.param(wrong_call(image().double()), ["f64[2, 3, 8, 8]"], id="another dtype"),
    pytest.param(wrong_call(image().to("meta")), ["meta"], id="another device"),
    pytest.param(wrong_call(), ["missing"], id="no argument"),
    pytest.param(wrong_call(image(), image()), ["positional argument"], id="an argument too many"),
    pytest.param(wrong_call(image(), mask=image()), ["mask"], id="a keyword that it does not know"),
    pytest.param(wrong_call("image.png"), ["image.png"], id="a string"),
    pytest.param(wrong_call(None), ["None"], id="None"),
    pytest.param(wrong_call([[1.0, 2.0]]), ["1.0"], id="a list of numbers"),
]


@front_ends
@pytest.mark.parametrize(("call", "words"), WRONG_CALLS)
def test_a_wrong_call_is_an_input_error_that_says_what_was_given_and_what_was_expected(
    front_end: str, call: Callable[[nn.Module], Any], words: list[str]
) -> None:
    model = convnet()
    compiled = compiled_by(front_end, model)
    if front_end == "symbolic":
        compiled(image())
    with pytest.raises(fxopt.InputError) as caught:
        call(compiled)
    said = str(caught.value)
    for word in words:
        assert word in said
    if front_end == "export":
        assert "it was compiled for args[0]: float32[any, 3, 8, 8] on cpu" in said
    assert isinstance(caught.value, TypeError)
    given = image()
    torch.testing.assert_close(compiled(given), model(given), rtol=2e-5, atol=1e-5)


@front_ends
@pytest.mark.parametrize(("call", "words"), WRONG_CALLS)
def test_a_wrong_first_call_is_an_input_error_too(
    front_end: str, call: Callable[[nn.Module], Any], words: list[str]
) -> None:
    model = convnet()
    if front_end == "export":
        with pytest.raises(fxopt.InputError):
            call(lambda *args, **kwargs: fxopt.compile(model, args, kwargs))
        return
    compiled = fxopt.compile(model)
    with pytest.raises(fxopt.InputError):
        call(compiled)
    given = image()
    torch.testing.assert_close(compiled(given), model(given), rtol=2e-5, atol=1e-5)


@front_ends
@pytest.mark.parametrize("thing", [object(), {"a", "b"}, lambda x: x, bytearray(3)], ids=lambda t: type(t).__name__)
def test_an_argument_that_may_change_behind_its_identity_is_refused(front_end: str, thing: Any) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, option: Any = None) -> torch.Tensor:
            return x + 1

    compiled = compiled_by(front_end, Two().eval())
    with pytest.raises(fxopt.InputError, match=type(thing).__name__):
        compiled(image(), thing)
    assert compiled(image()).shape == (2, 3, 8, 8)


def test_a_models_own_check_fails_as_an_input_error() -> None:
    def body(_: Any, x: torch.Tensor) -> torch.Tensor:
        torch._assert(x.shape[2] == 8, "images are 8 pixels high")
        return x + 1

    model = Network(body).eval()
    for compiled in (fxopt.compile(model), fxopt.compile(model, (image(),))):
        with pytest.raises(fxopt.InputError, match="8 pixels high"):
            compiled(torch.randn(2, 3, 9, 8))


# -- backward --------------------------------------------------------------------------------------------------------


@front_ends
def test_a_plain_backward_says_that_nothing_requires_grad(front_end: str) -> None:
    """A compiled module's weights are frozen, so without an input that requires grad there is nothing to go back to."""
    compiled = compiled_by(front_end, convnet())
    result = compiled(image()).sum()
    assert not result.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad and does not have a grad_fn"):
        result.backward()
    assert "requires grad only where an input does" in " ".join((fxopt.CompiledModule.__doc__ or "").split())


# -- errors are data -------------------------------------------------------------------------------------------------


def test_every_error_is_one_of_a_family_and_survives_pickling() -> None:
    import pickle

    with pytest.raises(fxopt.FxoptError) as caught:
        fxopt.compile(convnet(), (image(),), passes=["nothing"])
    copied = pickle.loads(pickle.dumps(caught.value))
    assert type(copied) is type(caught.value)
    assert str(copied) == str(caught.value)
    assert copied.hint == caught.value.hint
