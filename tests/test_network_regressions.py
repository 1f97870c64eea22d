"""What random networks found, shrunk: each was a wrong answer, a crash, or a pipeline that did not settle."""

from __future__ import annotations

import pytest

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
]


@pytest.mark.parametrize("network", FOUND)
def test_the_pipeline_keeps(network: Network) -> None:
    oracle = Oracle(network)
    module = captured(network, *oracle.inputs())
    rewritten(module, plugins.default_pipeline())
    assert not oracle.differences(interpreted(module))
    assert not rewritten(module, plugins.default_pipeline()).journal.rewrites
