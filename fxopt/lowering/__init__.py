"""Backends: what each can take, its passes, and how a specialisation becomes something to call."""

from fxopt.lowering.backend import Backend, Setting

__all__ = ["Backend", "Setting"]
