"""Networks that are made to be re-parameterised become what their own methods make of them, without these."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt.compare import relative_error
from graphs import operations, randomised
from zoo import import_timm

pytestmark = pytest.mark.zoo

#: Convolutions when trained, and when re-parameterised.
NETWORKS = {"repvgg_a0": (44, 22), "mobileone_s0": (191, 43), "fastvit_t8": (68, 52)}


@pytest.mark.parametrize(
    ("name", "front_end"),
    [*((name, "symbolic") for name in NETWORKS), ("fastvit_t8", "export")],
)
def test_branches_become_one_convolution(name: str, front_end: str) -> None:
    timm = import_timm()
    torch.manual_seed(0)
    model = randomised(timm.create_model(name, num_classes=10))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("gamma"):  # layer scale begins at 1e-5, where it hides what it scales
                parameter.uniform_(-0.5, 0.5)
    x = torch.randn(2, 3, 32, 32)
    fast = fxopt.compile(model, (x,) if front_end == "export" else None, backend="aten", verify=False, strict=True)
    with torch.no_grad():
        expected, actual = model(x), fast(x)
        own = timm.utils.reparameterize_model(model)(x)
    before, after = operations(fast.captured_graph), operations(fast.fused_graph)
    assert (before["conv2d"], after["conv2d"] + after["fxopt.convolution"]) == NETWORKS[name]
    assert not after.keys() & {"batch_norm", "add", "sub"}
    assert relative_error(expected, actual) < 1e-5
    assert relative_error(own, actual) < 1e-5
