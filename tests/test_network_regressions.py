"""What random networks found, shrunk: each was a wrong answer, a crash, or a pipeline that did not settle."""

from __future__ import annotations

import pytest

import fxopt
from fxopt import plugins
from fxopt.testing import Network, Oracle
from harness import captured, interpreted, rewritten

FOUND = [
    pytest.param(
        Network(
            """
                v1 = self.conv1(x)
                v2 = F.pad(v1, (1, 1, 0, 0))
                return self.conv2(x)
            """,
            layers={"conv1": "nn.Conv2d(4, 6, 5, padding=2)", "conv2": "nn.Conv2d(4, 4, 3, padding=1)"},
        ),
        id="a part of a merged layer is handed out, and another part may be viewed",
    ),
    pytest.param(
        Network(
            """
                v1 = torch.relu(x)
                v2 = torch.cat([v1, v1], 1)
                v3 = torch.stack([v2, v2], 1)
                return torch.cat([v3, v3], 1)
            """,
        ),
        id="a concat behind a buffer of fewer dimensions",
    ),
    pytest.param(
        Network(
            """
                v1 = x.transpose(1, 2)
                v2 = v1.mT
                v2 -= 2
                return v2, v1
            """,
        ),
        id="a write to an attribute of a value, which tracing took for a difference",
    ),
]


@pytest.mark.parametrize("network", FOUND)
def test_the_pipeline_keeps(network: Network) -> None:
    oracle = Oracle(network)
    module = captured(network, *oracle.inputs())
    rewritten(module, plugins.default_pipeline())
    assert not oracle.differences(interpreted(module))
    assert not rewritten(module, plugins.default_pipeline()).journal.rewrites


def test_siblings_of_a_known_rank_read_a_value_of_none() -> None:
    """Without shapes, a norm says how many dimensions its layer gives, and nothing says how many the layer takes."""
    network = Network(
        """
            v1 = self.conv1(x)
            v2 = self.conv2(x)
            v3 = self.norm(v1)
            v1.sub_(0.5)
            return v2, v3
        """,
        layers={
            "conv1": "nn.Conv2d(4, 4, 1)",
            "conv2": "nn.Conv2d(4, 4, 1)",
            "norm": "nn.BatchNorm2d(4, affine=False)",
        },
    )
    fast = fxopt.compile(network, verify=False, strict=True)
    assert not Oracle(network).differences(fast)
