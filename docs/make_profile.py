"""`make profile`: where the time of compiled models goes, into docs/benchmarks.md.

    python docs/make_profile.py                  every model of docs/benchmark_models.py, two threads
    python docs/make_profile.py --only 'resnet'  those whose name matches; the page has no others then

Each model runs in a process of its own. Kernels are torch's profiler's, their own time on the calling thread; what a
call takes without the profiler and no kernel accounts for is dispatch.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from written import fill

PAGE = Path(__file__).resolve().parent / "benchmarks.md"
BEGIN, END = "<!-- profile: written by make profile -->", "<!-- end of profile -->"

#: Kinds of kernels, by the operators that are one.
KINDS = {
    "layers": r"convolution|_linear|linear$|addmm|::mm$|bmm|matmul",
    "attention": r"scaled_dot_product|flash_attention|_softmax",
    "conversions": r"copy|clone|contiguous|::cat$|roll|constant_pad",
    "norms, pools": r"norm|pool|mean|::sum$",
}
COLUMNS = (*KINDS, "elementwise", "dispatch")


@dataclass(frozen=True)
class Profile:
    """A model's seconds a call and operations, the seconds of each kind, and the machine's rate of matrix products."""

    name: str
    seconds: float
    flops: int
    kinds: dict[str, float]
    rate: float


def median(function: Callable[[], Any], count: int) -> float:
    """The median seconds of a call, behind two to warm up."""
    taken = []
    for number in range(count + 2):
        start = time.perf_counter()
        function()
        taken += [time.perf_counter() - start] if number > 1 else []
    return statistics.median(taken)


def profile(name: str, threads: int) -> Profile:
    """One model, compiled and run in this process."""
    import benchmark_models

    import fxopt

    torch.set_num_threads(threads)
    model, args, kwargs = getattr(benchmark_models, name)()
    fast = fxopt.compile(model, args, kwargs)
    with torch.no_grad():
        seconds = median(lambda: fast(*args, **kwargs), 15)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            for _ in range(5):
                fast(*args, **kwargs)
        square = torch.randn(2048, 2048)
        rate = 2 * 2048**3 / median(lambda: square @ square, 9)
    kinds: Counter[str] = Counter()
    for event in found.key_averages():
        kind = next((kind for kind, words in KINDS.items() if re.search(words, event.key)), "elementwise")
        kinds[kind] += event.self_cpu_time_total / 5e6
    kinds["dispatch"] = max(0.0, seconds - sum(kinds.values()))
    assert fast.report.work_after is not None
    return Profile(name, seconds, fast.report.work_after.work.flops, dict(kinds), rate)


def table(profiles: list[Profile], threads: int) -> str:
    """The table of the page."""
    rate = statistics.median(one.rate for one in profiles)
    lines = [
        f"The machine multiplies two matrices of 2048 by 2048 at {rate / 1e9:.0f} GFLOP/s, on {threads} threads.",
        "",
        f"| model | GFLOP | ms | GFLOP/s | of a product's | {' | '.join(COLUMNS)} |",
        f"| --- | ---: | ---: | ---: | ---: |{' ---: |' * len(COLUMNS)}",
    ]
    for one in profiles:
        whole = max(one.seconds, sum(one.kinds.values()))
        shares = " | ".join(f"{one.kinds.get(kind, 0.0) / whole:.0%}" for kind in COLUMNS)
        speed = one.flops / one.seconds
        lines.append(
            f"| {one.name} | {one.flops / 1e9:.1f} | {1000 * one.seconds:.1f} | {speed / 1e9:.0f} | "
            f"{speed / rate:.0%} | {shares} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Profiles, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the names shall contain")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    import benchmark_models

    names = [name for name in benchmark_models.NAMES if re.search(options.only, name)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        profiles = pool.starmap(profile, [(name, options.threads) for name in names], chunksize=1)
    fill(PAGE, BEGIN, END, table(profiles, options.threads))


if __name__ == "__main__":
    main()
