"""What the system tells: where this runs, what a process holds in memory, and the most that it has held."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Memory:
    """Bytes of resident memory of a runtime's process; None where the system does not tell.

    `model` is what the process held when the model and its inputs were there, and the runtime had not begun: Python,
    torch and the original weights. `peak` is the most that it held from then on, while the runtime was built and run,
    beyond `model`. `held` is what it still held beyond `model` when it was built and had run. The original model stays
    alive all the while, as it does for a caller who keeps it; what processes of a compiler took is not in it.
    """

    model: int | None
    peak: int | None
    held: int | None

    def to_dict(self) -> dict[str, Any]:
        """The numbers for programs."""
        return asdict(self)


def resident() -> int | None:
    """Bytes that this process holds now (VmRSS); None where there is no /proc."""
    return _from_status("VmRSS")


def peak() -> int | None:
    """The most bytes that this process has held: VmHWM, or the system's count of resources where there is no /proc."""
    found = _from_status("VmHWM")
    if found is not None or sys.platform == "win32":
        return found
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def forget_peak() -> None:
    """Lets `peak` begin anew with what is held now, where the system can; else it goes on from the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _from_status(key: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":")), None)


def beyond(total: int | None, base: int | None) -> int | None:
    """The part of `total` above `base`, at least 0."""
    return None if total is None or base is None else max(0, total - base)


def machine() -> dict[str, str]:
    """What the numbers depend on, in words: the processor, its cores for this process, Python, torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "processor": _processor() or platform.processor() or platform.machine(),
        "cores": str(cores),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
