"""fxopt: a graph-rewriting compiler on torch.fx that shows, proves and explains what it does.

Its names are in `__init__.pyi`; each is loaded when it is first asked for, because torch.export is slow to import.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
