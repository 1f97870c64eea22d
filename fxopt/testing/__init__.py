"""For authors of passes: random whole networks, and whether what was made of one still gives what it gave.

`networks()` is a hypothesis strategy. What it draws is a `Network`: a module that is a short program, and whose `repr`
can be pasted into a test. `Oracle(network).differences(compiled)` says what a compiled one does otherwise. hypothesis
is needed to draw, and only then: `pip install fxopt[dev]`.
"""

from fxopt.testing.network import Network
from fxopt.testing.oracle import Oracle
from fxopt.testing.strategy import networks

__all__ = ["Network", "Oracle", "networks"]
