"""The module that `fxopt.compile(..., trainable=True)` gives: how it is called, copied, kept and compiled again."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from trained_models import IMAGE, ROWS, TABLE, Model, conv, loss, made, norm, parameter


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
