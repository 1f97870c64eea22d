"""For authors of passes: random whole networks, to see that a pass keeps them equal.

`networks()` is a hypothesis strategy. What it draws is a `Network`: a module that is a short program, and whose `repr`
can be pasted into a test. hypothesis is needed to draw, and only then: `pip install fxopt[dev]`.
"""

from fxopt.testing.network import Network
from fxopt.testing.strategy import networks

__all__ = ["Network", "networks"]
