"""`fxopt.compile(..., trainable=True)`: the rewritten graph has the original's gradients, through what was folded."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import benchmark_models
import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt import NoMatch, Pass, Rewriter, gradients, ir, trainable
from trained_models import IMAGE, ROWS, TABLE, Model, X, conv, loss, made, norm, parameter


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


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "shufflenet_v2_x1_0", "mobilenet_v3_large"])
def test_networks_have_their_gradients(name: str) -> None:
    model, _, _ = getattr(benchmark_models, name)()
    tuned = fxopt.compile(model, (torch.randn(2, 3, 64, 64),), trainable=True)
    assert {result.status for result in tuned.report.passes} == {"done"}
    assert not [notice for notice in tuned.report.notices if "float64" in notice]
