"""Ways to run a model: eager PyTorch, fxopt, and peers, each imported only where it is asked for.

A runtime is a function of the model and its arguments that gives something to call as the model is called. It runs in
a process of its own (see `fxopt.bench.worker`), under torch.no_grad, with the model in eval mode, and may do with the
model what it likes. It is named in that process again, so it must be a module-level function, or an object that
pickles. A ModuleNotFoundError says that the runtime is not installed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxopt import plugins
from fxopt.capture.program import FlatModel, Inputs
from fxopt.compiler import choose_passes
from fxopt.errors import UsageError


@dataclass(frozen=True)
class Built:
    """What a runtime made of a model: what to call, and what is worth telling.

    `call` takes the model's own arguments. `stages` are parts of the building, in seconds; the one named "import" is
    not counted as building.
    """

    call: Callable[..., Any]
    version: str = ""
    stages: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()


#: Makes a runtime of a model in eval mode, its positional and its named arguments.
Prepare = Callable[[torch.nn.Module, tuple[Any, ...], dict[str, Any]], Built]


class _Stages(dict[str, float]):
    """Seconds by name, each from the end of the one before it."""

    def __init__(self) -> None:
        super().__init__()
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self[name] = now - self._last
        self._last = now


def _flat(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """The model as a function of tensors alone, and these: what exporters take, whatever the model's arguments are."""
    inputs = Inputs.flatten(args, kwargs)
    return FlatModel(model, inputs).eval(), inputs.tensors


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    if not kwargs and all(isinstance(argument, torch.Tensor) for argument in args):
        return list(args)
    return [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]


# -- torch's own -----------------------------------------------------------------------------------------------------


def eager(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    """The model as it is."""
    return Built(model, f"torch {torch.__version__}")


def channels_last(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    """The model and its images in channels-last memory; the conversion of the images is part of each call."""
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def converted(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() == 4:
            return value.contiguous(memory_format=torch.channels_last)
        return value

    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(converted, (args, kwargs))
        return model(*args, **kwargs)

    return Built(call, f"torch {torch.__version__}")


def fx_fuse(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    """torch.fx.experimental.optimization.fuse: batch norms folded into convolutions."""
    from torch.fx.experimental.optimization import fuse

    return Built(fuse(model), f"torch {torch.__version__}")


def jit(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    """torch.jit: traced, frozen, optimize_for_inference, and run twice, after which its profile is used."""
    flat, tensors = _flat(model, args, kwargs)
    traced = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(_Tuple(flat).eval(), tensors)))
    for _ in range(2):
        traced(*tensors)
    return Built(lambda *args, **kwargs: traced(*_tensors(args, kwargs)), f"torch {torch.__version__}")


class _Tuple(torch.nn.Module):
    """Gives the results as a tuple, which tracing takes, where the model gives a list."""

    def __init__(self, flat: torch.nn.Module) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.flat(*tensors))


def inductor(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    """torch.compile by TorchInductor with freezing and cold caches; it compiles at the first call."""
    stages = _Stages()
    functorch: Any = import_module("torch._functorch.config")
    settings: Any = import_module("torch._inductor.config")
    import_module("torch._inductor.compile_fx")
    stages.end("import")
    # The folder of its caches is a fresh one in each process (see fxopt.bench.worker).
    settings.freezing = True
    settings.fx_graph_cache = False
    functorch.enable_autograd_cache = False
    return Built(torch.compile(model), f"torch {torch.__version__}", stages)


# -- fxopt -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fxopt:
    """fxopt.compile with the options that it takes. As a runtime's name: `fxopt`, `fxopt:aten`, `fxopt:no-PASS`."""

    backend: str = "auto"
    disable: tuple[str, ...] = ()
    passes: Any = "default"
    numerics: Any = "reassociate"
    verify: bool | str = True

    def __call__(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
        from fxopt import __version__
        from fxopt.compiler import compile

        fast = compile(
            model,
            args,
            kwargs or None,
            backend=self.backend,
            disable=self.disable,
            passes=self.passes,
            numerics=self.numerics,
            verify=self.verify,
        )
        report = fast.report
        undone = [f"{done.name}: {done.status}" for done in (*report.passes, *report.lowering) if done.status != "done"]
        notes = (f"backend {report.backend}", f"{report.before} -> {report.after} nodes", *undone, *report.notices)
        return Built(fast, f"fxopt {__version__}", dict(report.seconds), notes)


def _fxopt(name: str) -> Fxopt:
    """The options of a name: `fxopt`, then any of `:BACKEND`, `:no-PASS`, `:no-passes`, `:bitwise`."""
    backend, numerics = "auto", "reassociate"
    disable: list[str] = []
    passes: str | tuple[str, ...] = "default"
    for option in name.split(":")[1:]:
        if option == "no-passes":
            passes = ()
        elif option.startswith("no-"):
            choose_passes(disable=(option.removeprefix("no-"),))  # a name that no pass has raises here
            disable.append(option.removeprefix("no-"))
        elif option in ("bitwise", "reassociate", "approximate"):
            numerics = option
        else:
            plugins.backend(option)
            backend = option
    return Fxopt(backend, tuple(disable), passes, numerics)


# -- peers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on the CPU: exported with the sizes of the example, all its graph optimisations, or none of them.

    What is exported is the model, or with `rewritten` what fxopt makes of it.
    """

    rewritten: bool = False
    optimised: bool = True

    def __call__(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
        stages = _Stages()
        ort = import_module("onnxruntime")
        for needed in ("onnx", "onnxscript"):
            import_module(needed)
        stages.end("import")
        file = Path(tempfile.mkdtemp()) / "model.onnx"
        self.write(model, args, kwargs, file)
        stages.end("export")
        session = ort.InferenceSession(str(file), self.options(), providers=["CPUExecutionProvider"])
        stages.end("session")
        names = [entry.name for entry in session.get_inputs()]

        def call(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
            given = (tensor.numpy() for tensor in _tensors(args, kwargs))
            return [torch.from_numpy(array) for array in session.run(None, dict(zip(names, given, strict=True)))]

        return Built(call, f"onnxruntime {ort.__version__}", stages)

    def write(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], file: Path) -> None:
        """Exports to a file."""
        if self.rewritten:
            from fxopt.compiler import compile

            compile(model, args, kwargs or None, dynamic_shapes=None, backend="aten").to_onnx(file)
        else:
            flat, tensors = _flat(model, args, kwargs)
            torch.onnx.export(flat, tensors, file, dynamo=True, verbose=False, external_data=True)

    def options(self) -> Any:
        """onnxruntime.SessionOptions, on as many threads as torch has."""
        ort = import_module("onnxruntime")
        options = ort.SessionOptions()
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_ENABLE_ALL if self.optimised else levels.ORT_DISABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        return options


def openvino(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Built:
    """OpenVINO on the CPU: converted with the sizes of the example, for latency, in float32 throughout."""
    stages = _Stages()
    ov = import_module("openvino")
    stages.end("import")
    flat, tensors = _flat(model, args, kwargs)
    sizes = [list(tensor.shape) for tensor in tensors]
    converted = ov.convert_model(_Tuple(flat).eval(), example_input=tensors, input=sizes)
    stages.end("convert")
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = ov.compile_model(converted, "CPU", options)
    stages.end("compile")

    def call(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        given = [tensor.numpy() for tensor in _tensors(args, kwargs)]
        return [torch.from_numpy(array) for array in compiled(given, share_inputs=True).values()]

    return Built(call, f"openvino {metadata.version('openvino')}", stages)


# -- by name ---------------------------------------------------------------------------------------------------------

RUNTIMES: Mapping[str, Prepare] = {
    "eager": eager,
    "fxopt": Fxopt(),
    "channels_last": channels_last,
    "fx_fuse": fx_fuse,
    "jit": jit,
    "inductor": inductor,
    "onnxruntime": OnnxRuntime(),
    "openvino": openvino,
}


def named(names: Sequence[str]) -> dict[str, Prepare]:
    """The runtimes of these names; "all" stands for all of `RUNTIMES`.

    Raises UsageError for a name that no runtime, backend or pass has.
    """
    found: dict[str, Prepare] = {}
    for name in names:
        if name == "all":
            found.update(RUNTIMES)
        elif name in RUNTIMES:
            found[name] = RUNTIMES[name]
        elif name.startswith("fxopt:"):
            found[name] = _fxopt(name)
        else:
            hint = f"there are: {', '.join(RUNTIMES)}, fxopt:BACKEND, fxopt:no-PASS, fxopt:no-passes"
            raise UsageError(f"no runtime is named {name!r}", hint=hint)
    return found
