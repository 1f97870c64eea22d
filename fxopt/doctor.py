"""What of fxopt's surroundings is installed and works: each thing is tried, not only looked for."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Literal

import torch

from fxopt import plugins
from fxopt.errors import FxoptError
from fxopt.pipeline import Progress

#: ok; absent: optional and not installed; broken: installed and does not work; wrong: gives a wrong answer.
Status = Literal["ok", "absent", "broken", "wrong"]

#: Import name, distribution, what it is for. None of them is needed to compile.
PEERS = (
    ("torchvision", "torchvision", "models to name, as torchvision.models:resnet50"),
    ("timm", "timm", "models to name, as timm:resnet18"),
    ("PIL", "pillow", "--input picture.jpg"),
    ("transformers", "transformers", "models"),
    ("onnxruntime", "onnxruntime", "comparing speeds with it"),
    ("openvino", "openvino", "comparing speeds with it"),
)
_IMPORT_SECONDS = 120


@dataclass(frozen=True)
class Finding:
    """One thing that was tried: its name, how it is, what was seen, and what to do about it.

    fxopt compiles without what is not `needed`.
    """

    name: str
    status: Status
    detail: str
    hint: str = ""
    needed: bool = True

    def to_dict(self) -> dict[str, Any]:
        """The finding for programs."""
        return asdict(self)


def examine(progress: Progress | None = None) -> tuple[Finding, ...]:
    """Tries everything, in order. Nothing raises: what fails is a finding."""
    found: list[Finding] = []
    for index, (name, check) in enumerate(_CHECKS):
        if progress is not None:
            progress(name, index, len(_CHECKS))
        try:
            found += check()
        except Exception as error:
            found.append(Finding(name, "broken", _said(error)))
    if progress is not None:
        progress("done", len(_CHECKS), len(_CHECKS))
    return tuple(found)


def _said(error: BaseException) -> str:
    if isinstance(error, FxoptError):
        return error.message
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


# -- the machine and torch -------------------------------------------------------------------------------------------


def _python() -> Iterator[Finding]:
    yield Finding("fxopt", "ok", f"{metadata.version('fxopt')} in {os.path.dirname(__file__)}")
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}, {sys.executable}")


def _torch() -> Iterator[Finding]:
    yield Finding("torch", "ok", f"{torch.__version__} in {os.path.dirname(torch.__file__)}")
    yield Finding("CPU", "ok", f"{torch.backends.cpu.get_cpu_capability()} kernels, {platform.machine()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    hint = f"more threads than cores slow each other: OMP_NUM_THREADS={cores}" if threads > cores else ""
    yield Finding("threads", "ok", f"{threads} of torch on {cores} cores", hint)
    if torch.cuda.is_available():
        yield Finding("CUDA", "ok", ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))
    else:
        yield Finding("CUDA", "absent", "torch sees no device")


def _onednn() -> Iterator[Finding]:
    from fxopt.lowering import onednn

    if not onednn.available():
        yield Finding("oneDNN", "absent", "this torch is built without it", "the aten backend runs instead")
        return
    version = next((line for line in torch.__config__.show().splitlines() if "MKL-DNN" in line), "")
    image, weight = torch.ones(1, 4, 4, 4), torch.ones(4, 4, 1, 1)
    operator = torch.ops.mkldnn._convolution_pointwise.default
    result = operator(image, weight, None, [0, 0], [1, 1], [1, 1], 1, "relu", [], "")
    right = bool((result == 4).all())
    detail = version.strip(" -").split(" (")[0].replace("Intel(R) MKL-DNN", "oneDNN") or "present"
    yield Finding("oneDNN", "ok" if right else "wrong", detail + (", fused convolution tried" if right else ""))


# -- fxopt's own -----------------------------------------------------------------------------------------------------


def _dependencies() -> Iterator[Finding]:
    for name in ("networkx", "graphviz", "rich", "click", "jinja2"):
        try:
            importlib.import_module(name)
            yield Finding(name, "ok", metadata.version(name))
        except Exception as error:
            yield Finding(name, "broken", _said(error), f"pip install --upgrade {name}")


def _plugins() -> Iterator[Finding]:
    known = plugins.available().values()
    built_in = sum(entry.default for entry in known)
    if built_in:
        yield Finding("passes", "ok", f"{built_in} built in, {len(known) - built_in} of plugins")
    else:
        yield Finding("passes", "broken", "no built-in pass is installed", "run: pip install -e . (from a checkout)")
    for entry in known:
        if not entry.default:
            yield Finding(f"plugin pass {entry.name}", "ok", f"of {entry.origin}; used where it is named")
    for name, error in plugins.broken().items():
        yield Finding(f"plugin {name}", "broken", error.message, error.hint or "")


def _backends() -> Iterator[Finding]:
    """Each backend compiles Conv+BN+ReLU and must give its answer."""
    for entry in plugins.backends():
        try:
            found = _try_backend(entry.name)
        except Exception as error:
            found = Finding(f"backend {entry.name}", "broken", _said(error), getattr(error, "hint", None) or "")
        if entry.origin != plugins.OWN_DISTRIBUTION:
            found = replace(found, detail=f"of {entry.origin}: {found.detail}")
        yield found


def _try_backend(name: str) -> Finding:
    from fxopt.compiler import compile
    from fxopt.verification import verify

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        model, image = torch.nn.Sequential(*layers).eval(), torch.randn(2, 3, 16, 16)
    compiled = compile(model, (image,), backend=name)
    seen = verify(model, compiled, image)
    if not seen:
        return Finding(f"backend {name}", "wrong", seen.wrong[0].reason, "please report it")
    ran = compiled.report.backend
    if ran != name:
        said = "; ".join(compiled.report.notices) or f"{ran} ran instead"
        return Finding(f"backend {name}", "absent", said)
    return Finding(f"backend {name}", "ok", f"Conv+BN+ReLU compiled and verified, error {seen.error:.1e}")


# -- beside it -------------------------------------------------------------------------------------------------------


def _dot() -> Iterator[Finding]:
    program = shutil.which("dot")
    if program is None:
        hint = "needed for .svg, .png and .pdf: install the graphviz package of the system"
        yield Finding("dot", "absent", "graphviz's program is not on the PATH", hint, needed=False)
        return
    done = subprocess.run([program, "-Tsvg"], input=b"digraph { a -> b }", capture_output=True, timeout=60, check=False)
    if done.returncode or b"<svg" not in done.stdout:
        yield Finding(
            "dot",
            "broken",
            done.stderr.decode(errors="replace").strip() or f"exit status {done.returncode}",
            "reinstall the graphviz package of the system",
            needed=False,
        )
        return
    version = subprocess.run([program, "-V"], capture_output=True, timeout=60, check=False).stderr
    yield Finding("dot", "ok", f"{version.decode(errors='replace').strip()} in {program}")


def _peer(module: str, distribution: str, use: str) -> Callable[[], Iterator[Finding]]:
    def check() -> Iterator[Finding]:
        if find_spec(module) is None:
            yield Finding(distribution, "absent", f"for {use}", f"pip install {distribution}", needed=False)
            return
        version = metadata.version(distribution)
        # In a process of its own: a peer whose compiled part does not fit this torch may take the process with it.
        command = [sys.executable, "-c", f"import {module}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)
        if done.returncode:
            last = next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")
            hint = f"only needed for {use}; it may be made for another torch"
            yield Finding(distribution, "broken", f"{version}; import {module}: {last}", hint, needed=False)
        else:
            yield Finding(distribution, "ok", f"{version}, for {use}")

    return check


_CHECKS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("fxopt", _python),
    ("torch", _torch),
    ("oneDNN", _onednn),
    ("dependencies", _dependencies),
    ("passes", _plugins),
    ("backends", _backends),
    ("dot", _dot),
    *((distribution, _peer(module, distribution, use)) for module, distribution, use in PEERS),
)
