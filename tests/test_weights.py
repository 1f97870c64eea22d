"""Weights are kept once: packed, and the folded ones that they were packed from emptied until somebody looks."""

from __future__ import annotations

import copy
import gc
import io
import re
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt import ir
from fxopt.lowering import Weights, onednn, onednn_products
from graphs import FRONT_ENDS, Network, randomised

pytestmark = [
    pytest.mark.skipif(not onednn.available(), reason="this torch has no oneDNN"),
    pytest.mark.filterwarnings("ignore::fxopt.FxoptNotice"),
]

front_ends = pytest.mark.parametrize("front_end", FRONT_ENDS)


def convnet() -> nn.Module:
    return randomised(
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32))
    )


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 20, 20)


def compiled(front_end: str, model: nn.Module, x: torch.Tensor, **options: object) -> fxopt.CompiledModule:
    fast = fxopt.compile(model, (x,), **options) if front_end == "export" else fxopt.compile(model, **options)
    fast(x)
    return fast


def emptied(fast: fxopt.CompiledModule) -> list[str]:
    """The names of the tensors that are empty now."""
    return [name for name, tensor in ir.tensors(fast._session.after).items() if tensor.numel() == 0]


WEIGHTS = ["0.weight_folded", "3.weight_folded"]


@front_ends
def test_folded_weights_that_are_packed_are_emptied_and_the_models_own_stay(front_end: str) -> None:
    model = convnet()
    before = copy.deepcopy(model.state_dict())
    fast = compiled(front_end, model, image())
    assert emptied(fast) == WEIGHTS
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@front_ends
def test_a_signature_to_come_finds_them_again(front_end: str) -> None:
    model = convnet()
    fast = compiled(front_end, model, image())
    packed = [id(special) for _, special in fast._session.packed.made()]
    for x in (image(5), image(1), image().to(memory_format=torch.channels_last)):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        assert emptied(fast) == WEIGHTS
    assert [id(special) for _, special in fast._session.packed.made()] == packed, "nothing is packed twice"


LOOKS: dict[str, Callable[[fxopt.CompiledModule], dict[str, torch.Tensor]]] = {
    "state_dict": lambda fast: fast.state_dict(),
    "named_parameters": lambda fast: dict(fast.named_parameters()),
    "modules": lambda fast: {f"{n}.weight_folded": m.weight_folded for n, m in fast.named_modules() if n},  # type: ignore[misc]
    "graph_module": lambda fast: ir.tensors(fast.graph_module),
    "fused_graph": lambda fast: ir.tensors(fast.fused_graph),
}


@front_ends
@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_who_looks_sees_the_same_bits_and_keeps_them(
    front_end: str, look: Callable[[fxopt.CompiledModule], dict[str, torch.Tensor]]
) -> None:
    model = convnet()
    expected = compiled(front_end, model, image(), backend="aten").state_dict()
    fast = compiled(front_end, model, image())
    seen = look(fast)
    fast(image(7))
    assert emptied(fast) == []
    for name in WEIGHTS:
        assert torch.equal(seen[name], expected[name])
        assert seen[name].stride() == expected[name].stride()


@front_ends
@pytest.mark.parametrize("looked", [False, True])
def test_what_was_seen_before_the_first_call_is_never_emptied(front_end: str, looked: bool) -> None:
    model, x = convnet(), image()
    fast = fxopt.compile(model)
    held = list(fast.parameters()) if looked else []
    fast(x)
    assert all(tensor.numel() for tensor in held)
    assert emptied(fast) == ([] if looked else WEIGHTS)


@front_ends
def test_copies_and_files_have_them(front_end: str) -> None:
    model, x = convnet(), image()
    fast = compiled(front_end, model, x)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for twin in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        torch.testing.assert_close(twin(x), model(x), rtol=1e-5, atol=1e-5)
        assert emptied(twin) == WEIGHTS


@front_ends
def test_to_and_the_portable_backend_after_it(front_end: str) -> None:
    model, x = convnet(), image()
    fast = compiled(front_end, model, x).double()
    torch.testing.assert_close(fast(x.double()), copy.deepcopy(model).double()(x.double()))


@front_ends
def test_an_answer_that_a_packed_kernel_gets_wrong_is_computed_from_what_was_emptied(front_end: str) -> None:
    model, x = convnet(), image()
    x[0, 0, 5, 5] = float("nan")  # oneDNN's relu makes a number of it
    fast = compiled(front_end, model, x)
    assert fast.report.backend == "aten"
    assert emptied(fast) == []
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5, equal_nan=True)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "a grouped convolution": (lambda: nn.Conv2d(8, 16, 3, groups=4), (2, 8, 9, 9), True),
    "a depthwise convolution": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 9, 9), True),
    "a 3d convolution": (lambda: nn.Conv3d(3, 5, 3), (2, 3, 6, 6, 6), True),
    "an odd number of channels": (lambda: nn.Conv2d(7, 13, 3), (2, 7, 9, 9), True),
    "a transposed convolution": (lambda: nn.ConvTranspose2d(8, 8, 3), (2, 8, 9, 9), False),
    "a product of a few pixels": (lambda: nn.Conv2d(150, 70, 1), (1, 150, 4, 4), True),
    "a product of ATen's": (lambda: nn.Conv2d(8, 16, 1), (2, 8, 9, 9), False),
}


@pytest.mark.skipif(not onednn_products.has_mkl(), reason="this torch is built without MKL")
@pytest.mark.parametrize(("layer", "shape", "packed"), LAYERS.values(), ids=LAYERS.keys())
def test_every_kind_of_packed_weight_is_unpacked_to_the_bit(
    layer: Callable[[], nn.Module], shape: tuple[int, ...], packed: bool
) -> None:
    made = layer()
    norm = (nn.BatchNorm3d if len(shape) == 5 else nn.BatchNorm2d)(made.out_channels)  # type: ignore[arg-type]
    model, x = randomised(nn.Sequential(made, norm)), torch.randn(shape)
    expected = compiled("export", model, x, backend="aten").state_dict()["0.weight_folded"]
    fast = compiled("export", model, x)
    assert emptied(fast) == (["0.weight_folded"] if packed else [])
    seen = fast.state_dict()["0.weight_folded"]
    assert torch.equal(seen, expected)
    assert seen.stride() == expected.stride()


def test_numbers_that_do_not_come_back_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(150, 70, 1), nn.BatchNorm2d(70)).eval()
    with torch.no_grad():
        model[0].weight[3, 4] = float("inf")  # type: ignore[index, operator]
    x = torch.randn(1, 150, 4, 4)
    fast = compiled("export", model, x)
    assert emptied(fast) == [], "MKL's are unpacked by products, and inf * 0 is NaN"


def test_a_weight_that_something_else_reads_is_kept() -> None:
    def body(m: Network, x: torch.Tensor) -> torch.Tensor:
        weight = torch.ones(8, 8, 3, 3) * m.scale
        return torch.conv2d(x, weight) + (weight * x.mean()).sum()

    model = Network(body, scale=torch.full((8, 1, 1, 1), 0.5)).eval()
    x = torch.randn(2, 8, 9, 9)
    fast = compiled("export", model, x)
    assert len(list(fast._session.packed.made())) == 1
    assert emptied(fast) == []
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def living() -> int:
    """The bytes of all tensors that live, each memory once; packed ones count as plain ones of their size."""
    gc.collect()
    found = {}
    for held in gc.get_objects():
        if issubclass(type(held), torch.Tensor) and type(held).__name__ != "FakeTensor" and not held.is_meta:
            if held.layout is torch.strided:
                found[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
            else:
                found[id(held)] = held.numel() * held.element_size()
    return sum(found.values())


@front_ends
def test_beside_the_model_there_is_one_copy_of_its_weights(front_end: str) -> None:
    model = randomised(nn.Sequential(*[part for _ in range(6) for part in (nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64))]))
    x = torch.randn(1, 64, 20, 20)
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    before = living()
    fast = compiled(front_end, model, x)
    assert 0.9 * size < living() - before < 1.1 * size
    fast(torch.cat([x, x]))
    assert living() - before < 1.1 * size


# -- without the original --------------------------------------------------------------------------------------------


@front_ends
def test_with_the_original_let_go_no_more_is_held_than_the_model_was(front_end: str) -> None:
    x = torch.randn(1, 64, 20, 20)
    empty = living()
    model = randomised(nn.Sequential(*[part for _ in range(6) for part in (nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64))]))
    size = living() - empty
    fast, expected = compiled(front_end, model, x), model(x).detach()
    fast.discard_original()
    del model
    assert living() - empty < 1.05 * size
    torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
    assert "verified" in str(fast.report)
    assert fast.explain("0").rewrites


REFUSED: dict[str, Callable[[fxopt.CompiledModule], object]] = {
    "a call on args[0]: f32[3, 3, 20, 20] needs": lambda fast: fast(image(3)),
    "a look at the graphs or tensors needs": lambda fast: list(fast.parameters()),
    "a copy needs": copy.deepcopy,
    "a conversion needs": lambda fast: fast.double(),
}


@front_ends
@pytest.mark.parametrize("said", REFUSED)
def test_what_would_need_the_original_is_refused(front_end: str, said: str) -> None:
    model, x = convnet(), image()
    fast = compiled(front_end, model, x)
    fast.discard_original()
    fast.discard_original()
    with pytest.raises(fxopt.UsageError, match=re.escape(said)):
        REFUSED[said](fast)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


@front_ends
def test_a_write_to_what_is_still_shared_is_seen_and_one_to_what_is_packed_does_no_harm(front_end: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Flatten(2), nn.Linear(324, 2)).eval()
    x = torch.randn(1, 3, 20, 20)
    fast, expected = compiled(front_end, model, x, disable=("merge-siblings",)), model(x)
    fast.discard_original()
    with torch.no_grad():
        model[0].weight.zero_()  # type: ignore[operator, union-attr]
    torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        model[2].weight.zero_()  # type: ignore[operator, union-attr]
    with pytest.raises(fxopt.StaleWeightsError):
        fast(x)


@front_ends
def test_a_write_to_a_module_that_stays_whole_is_seen(front_end: str) -> None:
    model, x = nn.Sequential(nn.LSTM(4, 6)).eval(), torch.randn(5, 2, 4)
    fast, expected = compiled(front_end, model, x), model(x)
    fast.discard_original()
    torch.testing.assert_close(fast(x), expected)
    with torch.no_grad():
        model[0].weight_ih_l0.zero_()  # type: ignore[operator, union-attr]
    with pytest.raises(fxopt.StaleWeightsError):
        fast(x)


# -- by itself -------------------------------------------------------------------------------------------------------


def holding(tensor: torch.Tensor) -> fx.GraphModule:
    """A graph that reads one tensor."""
    graph = fx.Graph()
    graph.output((graph.get_attr("held"),))
    leaf = pytree.tree_flatten(((), {}))[1]
    module = ir.new_module(graph, ir.Interface(leaf, leaf, ()))
    ir.set_attribute(module, "held", tensor)
    return module


KEPT: dict[str, tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor] | None, bool]] = {
    "what is unpacked to the bit is emptied": (torch.randn(4, 3), lambda packed: packed / 2, True),
    "other numbers": (torch.randn(4, 3), lambda packed: packed, False),
    "no way back": (torch.randn(4, 3), None, False),
    "a part of a larger memory": (torch.randn(8, 3)[:4], lambda packed: packed / 2, False),
}


@pytest.mark.parametrize(("weight", "unpack", "gone"), KEPT.values(), ids=KEPT.keys())
@pytest.mark.parametrize("shared", [False, True], ids=["own", "the caller's"])
def test_what_is_emptied(
    weight: torch.Tensor, unpack: Callable[[torch.Tensor], torch.Tensor] | None, gone: bool, shared: bool
) -> None:
    held, before = weight.view(weight.shape), weight.clone()
    packed, module = Weights(), holding(held)
    special = packed.once(("twice",), weight, lambda: weight * 2, unpack)
    packed.own([module], [weight] if shared else [])
    packed.release(weight)
    assert (held.numel() == 0) is (gone and not shared)
    assert packed.once(("twice",), before, lambda: before * 2) is not special
    packed.restore(holding(torch.zeros(1)))
    assert (held.numel() == 0) is (gone and not shared), "another module's"
    packed.restore(module)
    assert torch.equal(held, before)
    assert packed.once(("twice",), held, lambda: None) is special, "known under its new place"
