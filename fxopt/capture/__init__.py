"""Model -> IR: by symbolic tracing (no inputs) or by torch.export (with inputs), both into the one normal form."""

from fxopt.capture.export import capture_export
from fxopt.capture.program import Captured, Inputs, private_copy
from fxopt.capture.symbolic import capture_symbolic

__all__ = ["Captured", "Inputs", "capture_export", "capture_symbolic", "private_copy"]
