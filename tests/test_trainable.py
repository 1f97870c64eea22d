"""`fxopt.compile(..., trainable=True)`: the rewritten graph has the original's gradients, through what was folded."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt import NoMatch, Pass, Rewriter, gradients, ir, trainable
from fxopt.models import randomize_fresh_norms

X = torch.Generator().manual_seed(1)
IMAGE = torch.randn(3, 4, 8, 8, generator=X)
ROWS = torch.randn(3, 6, 8, generator=X)


class Model(nn.Module):
    """Layers by name, and a forward that a table gives."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **options)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4)


def parameter(*sizes: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*sizes, generator=X))


def attention(m: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    return (q @ k.transpose(-1, -2) / math.sqrt(8) + m.table[m.places]).softmax(-1) @ v


def partly(m: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = m.norm(m.conv(x))
    return m.last(x)


#: What is rewritten, and by which passes.
TABLE: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, set[str]]] = {
    "norm behind a convolution": (
        lambda: Model(lambda m, x: m.norm(m.conv(x)).relu(), conv=conv(), norm=norm()),
        IMAGE,
        {"fold-batchnorm", "fuse-conv-activation"},
    ),
    "norm in front of a linear layer": (
        lambda: Model(lambda m, x: m.fc(m.norm(x)), fc=nn.Linear(6, 5), norm=nn.BatchNorm1d(6)),
        ROWS[:, :, 0],
        {"fold-batchnorm"},
    ),
    "norm across a ReLU": (
        lambda: Model(
            lambda m, x: m.conv(m.norm(x).relu()), conv=conv(), norm=norm(),
        ),
        IMAGE,
        {"fold-batchnorm"},
    ),
    "transposed, grouped": (
        lambda: Model(
            lambda m, x: m.norm(m.up(x)), up=nn.ConvTranspose2d(4, 4, 2, stride=2, groups=2), norm=norm()
        ),
        IMAGE,
        {"fold-batchnorm"},
    ),
    "a scale and a shift": (
        lambda: Model(
            lambda m, x: m.conv(x) * m.scale + m.shift, conv=conv(), scale=parameter(4, 1, 1), shift=parameter(4, 1, 1)
        ),
        IMAGE,
        {"fold-affine"},
    ),
    "parallel branches": (
        lambda: Model(
            lambda m, x: (m.a(m.wide(x)) + m.b(m.point(x)) + m.c(x)).relu(),
            wide=conv(bias=False), point=nn.Conv2d(4, 4, 1), a=norm(), b=norm(), c=norm(),
        ),
        IMAGE,
        {"fold-batchnorm", "merge-parallel-branches"},
    ),
    "concat in front of a convolution": (
        lambda: Model(
            lambda m, x: m.last(torch.cat([m.a(x), m.b(x)], 1)),
            a=conv(), b=nn.Conv2d(4, 4, 1), last=nn.Conv2d(8, 3, 3),
        ),
        IMAGE,
        set(),
    ),
    "attention with a trained bias": (
        lambda: Model(
            attention, q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8),
            table=parameter(11), places=torch.arange(6)[:, None] - torch.arange(6) + 5,
        ),
        ROWS,
        set(),
    ),
    "products written by hand": (
        lambda: Model(lambda m, x: x @ m.weight + m.bias, weight=parameter(8, 5), bias=parameter(5)),
        ROWS,
        {"spell-linear", "fold-affine"},
    ),
    "a weight that is computed": (
        lambda: Model(lambda m, x: m.norm(nn.functional.conv2d(x, m.weight * m.mask)),
                      weight=parameter(4, 4, 3, 3), mask=(torch.rand(4, 4, 3, 3, generator=X) > 0.5), norm=norm()),
        IMAGE,
        set(),
    ),
    "detached": (
        lambda: Model(lambda m, x: m.norm(m.conv(x).detach()) + m.norm(x), conv=conv(), norm=norm()),
        IMAGE,
        set(),
    ),
    "a part without gradients": (
        lambda: Model(partly, conv=conv(), norm=norm(), last=conv()),
        IMAGE,
        set(),
    ),
    "several results": (
        lambda: Model(lambda m, x: {"a": m.norm(m.conv(x)), "b": [x.sum((2, 3)), m.conv(x).relu()]},
                      conv=conv(), norm=norm()),
        IMAGE,
        set(),
    ),
}  # fmt: skip


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    randomize_fresh_norms(model)
    return model


def leaves(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def loss(result: Any) -> torch.Tensor:
    return sum((leaf.double() * torch.arange(leaf.numel()).reshape(leaf.shape).cos()).sum() for leaf in leaves(result))


@pytest.mark.parametrize("name", TABLE)
def test_input_gradients_are_the_originals(name: str) -> None:
    build, x, passes = TABLE[name]
    model = made(build).double()
    tuned = fxopt.compile(model, (x.double(),), trainable=True)
    assert {result.status for result in tuned.report.passes} == {"done"}
    assert passes <= {result.name for result in tuned.report.passes if result.rewrites}
    ours, theirs = (x.double().clone().requires_grad_() for _ in range(2))
    loss(tuned(ours)).backward()
    loss(model(theirs)).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-11)


def test_a_model_may_write_to_its_input() -> None:
    model = Model(lambda m, x: m.conv(x.mul_(2)), conv=conv())
    tuned, x = fxopt.compile(model, (IMAGE.clone(),), trainable=True), IMAGE.clone()
    tuned(x)
    assert torch.equal(x, 2 * IMAGE)


def test_parameter_gradients_go_through_the_folding_map() -> None:
    model = made(TABLE["norm behind a convolution"][0]).double()
    conv, norm = model.conv, model.norm
    tuned = fxopt.compile(model, (IMAGE.double(),), trainable=True)
    loss(tuned(IMAGE.double())).backward()
    loss(model(IMAGE.double())).backward()
    folded = {name.removeprefix("graph_module."): value.grad for name, value in tuned.named_parameters()}
    assert set(folded) == {"conv.weight_folded", "conv.bias_folded"}
    weight, bias = folded["conv.weight_folded"], folded["conv.bias_folded"]
    root = torch.rsqrt(norm.running_var + norm.eps)
    scale = (norm.weight * root)[:, None, None, None]  # W' = s W, b' = s (b - mean) + beta
    close = torch.testing.assert_close
    close(conv.weight.grad, scale * weight)
    close(conv.bias.grad, scale.flatten() * bias)
    close(norm.bias.grad, bias)
    close(norm.weight.grad, root * ((conv.weight * weight).sum((1, 2, 3)) + (conv.bias - norm.running_mean) * bias))


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam])
def test_a_fine_tune_lowers_the_loss_and_leaves_the_model_alone(optimiser: Any) -> None:
    model = made(TABLE["parallel branches"][0])
    before = copy.deepcopy(model.state_dict())
    tuned = fxopt.compile(model, (IMAGE,), trainable=True)
    target = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    steps = optimiser(tuned.parameters(), lr=0.01)
    losses = []
    for _ in range(8):
        steps.zero_grad()
        error = nn.functional.mse_loss(tuned(IMAGE), target)
        error.backward()
        steps.step()
        losses.append(float(error.detach()))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fast = fxopt.compile(tuned, (IMAGE,))
    with torch.no_grad():
        torch.testing.assert_close(fast(IMAGE), tuned(IMAGE), rtol=1e-4, atol=1e-5)


# -- what a number is now says nothing of what it will be --------------------------------------------------------------


def names(tuned: fxopt.TrainableModule, *, undone: bool = False) -> set[str]:
    """The trained parameters. No pass failed, and none was undone unless so expected."""
    assert {result.status for result in tuned.report.passes} == ({"rolled back"} if undone else {"done"})
    return {name.removeprefix("graph_module.") for name, value in tuned.named_parameters() if value.requires_grad}


def test_a_shift_of_zero_stays() -> None:
    model = Model(lambda m, x: m.norm(m.conv(x)), conv=conv(bias=False), norm=norm()).eval()  # fresh: beta = mean = 0
    assert names(fxopt.compile(model, (IMAGE,), trainable=True)) == {"conv.weight_folded", "conv.bias_folded"}
    assert "conv.bias_folded" not in dict(fxopt.compile(model, (IMAGE,)).named_parameters())


def test_a_shift_of_zero_stays_in_front_of_a_relu() -> None:
    model = Model(lambda m, x: m.conv(m.norm(x).relu()), conv=conv(), norm=norm()).eval()
    tuned = fxopt.compile(model, (IMAGE,), trainable=True, verify=False)
    assert names(tuned) == {"norm.shift", "conv.weight_folded", "conv.bias"}


def test_a_shift_of_zero_does_not_enter_a_padded_convolution() -> None:
    model = Model(lambda m, x: m.conv(m.norm(x)), conv=conv(), norm=norm()).eval()
    tuned = fxopt.compile(model, (IMAGE,), trainable=True, verify=False)
    assert names(tuned) == {"norm.weight", "norm.bias", "conv.weight", "conv.bias"}


def test_a_trained_number_is_no_literal() -> None:
    model = Model(
        lambda m, x: x * m.share * (1 + torch.erf(x / math.sqrt(2))), share=nn.Parameter(torch.tensor(0.5))
    ).eval()
    assert names(fxopt.compile(model, (ROWS,), trainable=True, verify=False)) == {"share"}


def test_a_trained_mask_is_not_known() -> None:
    model = Model(
        lambda m, x: torch.softmax(m.q(x) @ m.k(x).transpose(-1, -2) + m.mask, -1) @ x,
        q=nn.Linear(8, 8), k=nn.Linear(8, 8), mask=nn.Parameter(torch.zeros(6, 6)),
    ).eval()  # fmt: skip
    assert "mask" in names(fxopt.compile(model, (ROWS,), trainable=True, verify=False))


def test_what_parameters_are_computed_from_stays_the_parameter() -> None:
    tuned = fxopt.compile(made(TABLE["a weight that is computed"][0]), (IMAGE,), trainable=True)
    assert names(tuned) == {"weight", "norm.weight", "norm.bias"}
    tuned = fxopt.compile(made(TABLE["attention with a trained bias"][0]), (ROWS,), trainable=True)
    assert "table" in names(tuned)


def test_what_the_model_freezes_stays_frozen() -> None:
    model = made(lambda: nn.Sequential(conv(), norm(), nn.ReLU(), conv(), norm()))
    model[:2].requires_grad_(False)
    tuned = fxopt.compile(model, (IMAGE,), trainable=True)
    assert names(tuned) == {"3.weight_folded", "3.bias_folded"}
    tuned.requires_grad_()  # what passes made of frozen weights is no parameter
    assert names(tuned) == {"3.weight_folded", "3.bias_folded"}


def heads(**options: Any) -> Callable[[], nn.Module]:
    return lambda: Model(
        lambda m, x: m.q(x).cos() * m.k(x).sin(), q=nn.Linear(8, 64), k=nn.Linear(8, 64, **options)
    )  # fmt: skip


def test_a_frozen_weight_does_not_become_part_of_a_trained_one() -> None:
    model = made(heads())
    x = torch.randn(64, 8, generator=X)
    merged = {"weight_merged", "bias_merged"}
    assert {name.rpartition(".")[2] for name in names(fxopt.compile(model, (x,), trainable=True))} == merged
    model.q.requires_grad_(False)
    tuned = fxopt.compile(model, (x,), trainable=True)
    assert names(tuned) == {"k.weight", "k.bias"}
    model = made(lambda: nn.Sequential(conv(), norm()))
    model[0].requires_grad_(False)
    tuned = fxopt.compile(model, (IMAGE,), trainable=True)
    assert names(tuned) == {"1.weight", "1.bias"}
    assert "frozen" in str(tuned.explain("1"))


def test_trained_siblings_of_a_frozen_layer_are_merged_without_it() -> None:
    model = made(
        lambda: Model(
            lambda m, x: m.q(x).cos() * m.k(x).sin() + m.v(x).exp(),
            q=nn.Linear(8, 64, bias=False),
            k=nn.Linear(8, 64, bias=False),
            v=nn.Linear(8, 64, bias=False),
        )
    )
    model.q.requires_grad_(False)
    tuned = fxopt.compile(model, (torch.randn(64, 8, generator=X),), trainable=True)
    assert {name.rpartition(".")[2] for name in names(tuned)} == {"weight_merged"}
    assert torch.equal(tuned.graph_module.q.weight, model.q.weight)


def test_what_was_folded_from_frozen_weights_is_as_frozen() -> None:
    model = made(lambda: Model(lambda m, x: m.last(m.norm(m.conv(x))), conv=conv(), norm=norm(), last=norm()))
    model.requires_grad_(False)
    model.last.requires_grad_()
    assert names(fxopt.compile(model, (IMAGE,), trainable=True)) == {"last.weight", "last.bias"}


def test_no_numbers_are_trained_that_the_model_has_not() -> None:
    x = torch.randn(64, 8, generator=X)
    assert names(fxopt.compile(made(heads(bias=False)), (x,), trainable=True)) == {"q.weight", "q.bias", "k.weight"}
    siblings = made(lambda: Model(lambda m, x: m.a(x).cos() * m.b(x), a=nn.Conv2d(4, 4, 1), b=conv()))
    assert names(fxopt.compile(siblings, (IMAGE,), trainable=True)) == {"a.weight", "a.bias", "b.weight", "b.bias"}
    cross = made(
        lambda: Model(
            lambda m, x: m.a(x) + m.b(x),
            a=nn.Conv2d(4, 4, (3, 1), padding=(1, 0)),
            b=nn.Conv2d(4, 4, (1, 3), padding=(0, 1)),
        )
    )
    with_everything = fxopt.compile(cross, (IMAGE,), trainable=True)
    assert names(with_everything) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_a_weight_that_two_read_stays_one() -> None:
    model = made(
        lambda: Model(
            lambda m, x: m.first(m.conv(x)) + m.second(m.conv(x.relu())), conv=conv(), first=norm(), second=norm()
        )
    )
    tuned = fxopt.compile(model, (IMAGE,), trainable=True)
    assert {"conv.weight", "conv.bias"} <= names(tuned)
    assert "reads it, too" in str(tuned.explain("first"))
    tied = made(lambda: Model(lambda m, x: nn.functional.linear(x, m.w) @ m.w, w=parameter(8, 8)))
    assert names(fxopt.compile(tied, (ROWS,), trainable=True)) == {"w"}
    alike = made(
        lambda: Model(lambda m, x: x @ m.w + x.cos() @ m.w_transposed, w=nn.Parameter(torch.zeros(8, 8)),
                      w_transposed=nn.Parameter(torch.zeros(8, 8)))
    )  # fmt: skip
    assert len(names(fxopt.compile(alike, (ROWS,), trainable=True, verify=False))) == 2


# -- gradients that are wrong ------------------------------------------------------------------------------------------


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


def test_a_backward_pass_of_the_models_own_is_refused() -> None:
    model = Model(lambda m, x: _Reversed.apply(m.conv(x)), conv=conv())
    with pytest.raises(fxopt.VerificationError, match="captured graph has other gradients"):
        fxopt.compile(model, (IMAGE,), trainable=True)


def _drop_zeros(rewriter: Rewriter) -> None:
    for node in list(rewriter.graph.nodes):
        if node.target is torch.ops.aten.add.Tensor and node.args[1].op == "get_attr":
            rewriter.substitute(node, lambda node=node: node.args[0], rule="zero")


def test_a_pass_that_loses_a_gradient_is_undone() -> None:
    model = Model(lambda m, x: x.cos() + m.bias, bias=nn.Parameter(torch.zeros(8))).eval()
    bad = Pass("drop-zeros", run=_drop_zeros, numerics="bitwise")
    tuned = fxopt.compile(model, (ROWS,), trainable=True, passes=(bad,))
    (result,) = tuned.report.passes
    assert result.status == "rolled back"
    assert "gradient of bias" in result.reason
    assert names(tuned, undone=True) == {"bias"}
    with pytest.raises(fxopt.VerificationError, match="gradient of bias"):
        fxopt.compile(model, (ROWS,), trainable=True, passes=(bad,), strict=True)


def _write_again(rewriter: Rewriter) -> None:
    for node in list(rewriter.graph.nodes):
        weight = ir.tensor(node.args[1]) if node.target is torch.ops.aten.mul.Tensor else None
        if weight is not None and weight.is_complex():

            def build(node: fx.Node = node, weight: torch.Tensor = weight) -> fx.Node:
                return rewriter.call(node.target, node.args[0], rewriter.constant(weight * 1, "same"))

            assert not isinstance(rewriter.substitute(node, build, rule="same", nodes=[node]), NoMatch)


def test_complex_parameters_are_leaves_too() -> None:
    model = Model(
        lambda m, x: (x * m.w).abs(), w=nn.Parameter(torch.randn(8, dtype=torch.complex64, generator=X))
    ).eval()
    again = Pass("again", run=_write_again)
    tuned = fxopt.compile(model, (ROWS,), trainable=True, passes=(again,))
    assert [result.status for result in tuned.report.passes] == ["done"]
    assert names(tuned) == {"same"}


def test_the_graph_to_train_is_compared_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = trainable._plain

    def spoiled(*args: Any) -> fx.GraphModule:
        module = plain(*args)
        with torch.no_grad():
            next(module.parameters()).mul_(2)
        return module

    monkeypatch.setattr(trainable, "_plain", spoiled)
    with pytest.raises(fxopt.VerificationError, match="graph to train gives another answer"):
        fxopt.compile(made(TABLE["norm behind a convolution"][0]), (IMAGE,), trainable=True)


def test_rewrites_whose_gradients_were_not_compared_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "changed_by", lambda *args: ([], {("fold-batchnorm", "norm-after-layer")}))
    tuned = fxopt.compile(made(TABLE["norm behind a convolution"][0]), (IMAGE,), trainable=True)
    (notice,) = tuned.report.notices
    assert notice.startswith("fuse-conv-activation (activation) found nothing in float64")


def test_a_model_that_does_not_run_in_float64_says_so() -> None:
    model = Model(lambda m, x: nn.functional.linear(x.float(), m.fc.weight), fc=nn.Linear(8, 8)).eval()
    with pytest.raises(fxopt.VerificationError, match="does not run"):
        fxopt.compile(model, (ROWS,), trainable=True)
    fxopt.compile(model, (ROWS,), trainable=True, verify=False)(ROWS)


# -- the module --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned() -> fxopt.TrainableModule:
    return fxopt.compile(made(TABLE["norm behind a convolution"][0]), (IMAGE,), trainable=True)


def nested(m: Any, batch: dict[str, Any], *, mask: torch.Tensor, flag: bool = False) -> dict[str, Any]:
    return {"y": m.fc(batch["x"][0]) + mask, "flag": flag}


def test_any_signature() -> None:
    model = made(lambda: Model(nested, fc=nn.Linear(8, 8)))
    batch, kwargs = {"x": [ROWS]}, {"mask": ROWS, "flag": True}
    tuned = fxopt.compile(model, (batch,), kwargs, trainable=True)
    got = tuned(batch, **kwargs)
    assert got["flag"] is True
    torch.testing.assert_close(got["y"], model(batch, **kwargs)["y"])
    fast = fxopt.compile(tuned, (batch,), kwargs)
    torch.testing.assert_close(fast(batch, **kwargs)["y"], got["y"])


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), ROWS),
        (lambda: nn.GRU(8, 8, batch_first=True), ROWS),
        (lambda: Model(lambda m, x: x.transpose(1, 2) @ m.w, w=parameter(6, 4)), ROWS),
    ],
    ids=["encoder layer", "GRU", "product"],
)
def test_layers_that_torch_computes_another_way_where_a_weight_is_trained(layer: Any, x: torch.Tensor) -> None:
    model = made(layer)
    tuned = fxopt.compile(model, (x,), trainable=True)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(tuned(x), model(x), rtol=1e-4, atol=1e-5)


def test_autocast() -> None:
    model = made(TABLE["norm behind a convolution"][0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tuned = fxopt.compile(model, (IMAGE,), trainable=True)
        loss(tuned(IMAGE)).backward()
    assert all(value.grad is not None for value in tuned.parameters())
    linear = nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.GELU()).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tuned = fxopt.compile(linear, (ROWS,), trainable=True)
    assert tuned.report.rewrites
    with pytest.raises(fxopt.InputError, match="same autocast"):
        tuned(ROWS)


def test_compiled_in_inference_mode() -> None:
    model = made(TABLE["norm behind a convolution"][0])
    with torch.inference_mode():
        tuned = fxopt.compile(model, (IMAGE,), trainable=True)
        tuned(IMAGE)
    loss(tuned(IMAGE)).backward()


def test_as_a_part_of_another_model() -> None:
    tuned = fxopt.compile(made(TABLE["norm behind a convolution"][0]), (IMAGE,), trainable=True)
    whole = nn.Sequential(tuned, nn.Flatten(), nn.Linear(256, 2))
    again = fxopt.compile(whole, (IMAGE,), trainable=True)
    fast = fxopt.compile(whole, (IMAGE,))
    with torch.no_grad():
        torch.testing.assert_close(again(IMAGE), whole(IMAGE), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fast(IMAGE), whole(IMAGE), rtol=1e-4, atol=1e-5)


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 4)).eval()
    tuned = fxopt.compile(model, (torch.arange(6).reshape(2, 3),), trainable=True)
    tuned(torch.arange(6).reshape(2, 3)).sum().backward()


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("counts", torch.zeros(3))
        self.register_buffer("first", self.counts[:1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.counts.add_(1)
        return self.fc(x) * self.first


def test_buffers_that_share_memory_go_on_sharing_it() -> None:
    model, x = _Shared().eval(), torch.ones(2, 4)
    tuned = fxopt.compile(model, (x,), trainable=True)
    for _ in range(3):
        torch.testing.assert_close(tuned(x), model(x))


def test_graphs_to_look_at_are_frozen(tuned: fxopt.TrainableModule) -> None:
    for graph in (tuned.captured_graph, tuned.fused_graph):
        assert not any(value.requires_grad for value in graph.parameters())


def test_what_the_model_refuses_is_said_as_ever() -> None:
    model = nn.Linear(4, 4)
    for args in ((torch.zeros(2, 5),), (torch.zeros(2, 4), torch.zeros(2, 4))):
        with pytest.raises(fxopt.InputError):
            fxopt.compile(model, args, trainable=True)
    branch = Model(lambda m, x: m.fc(x) if x.sum() > 0 else x, fc=nn.Linear(8, 8)).eval()
    with pytest.raises(fxopt.CaptureError):
        fxopt.compile(branch, (ROWS,), trainable=True)
    with torch.inference_mode():
        model = nn.Linear(4, 4)
    with pytest.raises(fxopt.UsageError, match="inference tensor"):
        fxopt.compile(model, (torch.zeros(2, 4),), trainable=True)


def test_options_that_make_no_sense() -> None:
    model = conv()
    for arguments, options, said in (
        ((), {}, "example inputs"),
        ((IMAGE,), {"backend": "onednn"}, "stops before lowering"),
    ):
        with pytest.raises(fxopt.UsageError, match=said):
            fxopt.compile(model, *arguments, trainable=True, **options)
    with pytest.raises(fxopt.UsageError, match="no parameter of the model requires grad"):
        fxopt.compile(model.requires_grad_(False), (IMAGE,), trainable=True)


def test_it_takes_other_batches_and_refuses_what_it_was_not_captured_for(tuned: fxopt.TrainableModule) -> None:
    for batch in (0, 1, 5):
        assert tuned(torch.zeros(batch, 4, 8, 8)).shape == (batch, 4, 8, 8)
    for x in (torch.zeros(1, 4, 9, 9), IMAGE.double()):
        with pytest.raises(fxopt.InputError, match="does not fit this call"):
            tuned(x)


def test_another_branch_is_refused() -> None:
    def branch(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.conv(x) if x.shape[0] > 1 else x

    tuned = fxopt.compile(Model(branch, conv=conv()).eval(), (IMAGE,), trainable=True)
    with pytest.raises(fxopt.InputError, match="branch"):
        tuned(IMAGE[:1])


def test_training_mode_is_a_notice(tuned: fxopt.TrainableModule) -> None:
    with pytest.warns(fxopt.FxoptNotice, match="norms stay folded"):
        assert tuned.train().training
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not tuned.eval().training


def test_conversions(tuned: fxopt.TrainableModule) -> None:
    assert tuned.to(torch.float32) is tuned
    with pytest.raises(fxopt.UsageError, match="convert the original"):
        tuned.double()


def test_copies_and_files() -> None:
    torch.manual_seed(0)
    tuned = fxopt.compile(nn.Sequential(conv(), norm()), (IMAGE,), trainable=True)
    twin = copy.deepcopy(tuned)
    with torch.no_grad():
        next(twin.parameters()).zero_()
        assert not torch.equal(twin(IMAGE), tuned(IMAGE))
        twin.load_state_dict(tuned.state_dict())
        assert torch.equal(twin(IMAGE), tuned(IMAGE))
        file = io.BytesIO()
        torch.save(tuned, file)
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            read = torch.load(file, weights_only=False)
        assert torch.equal(read(IMAGE), tuned(IMAGE))


def test_it_explains_itself(tuned: fxopt.TrainableModule) -> None:
    assert "fold-batchnorm" in str(tuned.explain("norm"))
    assert "trained parameters" in repr(tuned)
    before, after = tuned.diff("fold-batchnorm").compute_nodes()
    assert after == before - 1
