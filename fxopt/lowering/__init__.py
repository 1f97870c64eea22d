"""Backends: what each can take, its passes, and how a specialisation becomes something to call."""

from fxopt.lowering import executor
from fxopt.lowering.backend import Backend, Runner, Setting
from fxopt.lowering.weights import Weights

__all__ = ["Backend", "Runner", "Setting", "Weights", "executor"]
