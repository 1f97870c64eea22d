"""The catalogue: what the default passes leave of well-known models, before and after, as a table.

    make catalogue                                  all of it, then docs/catalogue.md from what was found
    python tests/catalogue.py --only 'GoogLeNet'    those whose name matches; --again forgets earlier results

Each model runs in a process of its own under a time and memory limit, and leaves one JSON line in
build/catalogue.jsonl; what is there is not run again. The exit code is 1 if a model crashed, or its answer was wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import fxopt
from fxopt import buffers, cost, ir, ops
from sweep import in_own_process, read
from sweep_models import randomise
from taso import BENCHMARKS
from zoo import import_timm, import_torchvision, import_transformers

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "build" / "catalogue.jsonl"
TABLE = HERE.parent / "docs" / "catalogue.md"

Model = tuple[nn.Module, tuple[torch.Tensor, ...]]


# -- models ----------------------------------------------------------------------------------------------------------


class ConvNormSilu(nn.Sequential):
    """YOLO's unit."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs, eps=1e-3), nn.SiLU(inplace=True))


class Bottleneck(nn.Module):
    """1x1 and 3x3, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = ConvNormSilu(channels, channels), ConvNormSilu(channels, channels, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(self.first(x))


class CspBlock(nn.Module):
    """A cross-stage partial block (Wang et al., 2020) as in YOLO: two 1x1 of one input, bottlenecks on one, joined."""

    def __init__(self, channels: int = 128, bottlenecks: int = 3) -> None:
        super().__init__()
        half = channels // 2
        self.left, self.right = ConvNormSilu(channels, half), ConvNormSilu(channels, half)
        self.bottlenecks = nn.Sequential(*(Bottleneck(half) for _ in range(bottlenecks)))
        self.join = ConvNormSilu(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.join(torch.cat([self.bottlenecks(self.left(x)), self.right(x)], 1))


def torchvision_model(name: str, size: int = 224, **keywords: Any) -> Callable[[], Model]:
    """A model of torchvision with random weights, and an image of its own size."""

    def build() -> Model:
        model = import_torchvision().models.get_model(name, weights=None, **keywords)
        return model, (torch.randn(1, 3, size, size),)

    return build


def timm_model(name: str) -> Callable[[], Model]:
    """A model of timm with random weights, and an image of its own size."""

    def build() -> Model:
        model = import_timm().create_model(name)
        return model, (torch.randn(1, *model.default_cfg["input_size"]),)

    return build


def bert(attention: str) -> Callable[[], Model]:
    """BERT-base with random weights, and 128 tokens."""

    def build() -> Model:
        transformers = import_transformers()
        config = transformers.BertConfig(attn_implementation=attention)
        return transformers.BertModel(config), (torch.randint(0, config.vocab_size, (1, 128)),)

    return build


def benchmark(name: str) -> Callable[[], Model]:
    """One of TASO's and Tensat's graphs."""

    def build() -> Model:
        return BENCHMARKS[name].build(), (torch.randn(BENCHMARKS[name].shape),)

    return build


MODELS: dict[str, Callable[[], Model]] = {
    "GoogLeNet": torchvision_model("googlenet", init_weights=False),
    "Inception-v3": torchvision_model("inception_v3", 299, init_weights=False),
    "DenseNet-121": torchvision_model("densenet121"),
    "SqueezeNet 1.1": torchvision_model("squeezenet1_1"),
    "ResNeXt-50": torchvision_model("resnext50_32x4d"),
    "RepVGG-A0": timm_model("repvgg_a0"),
    "NASNet-A large": timm_model("nasnetalarge"),
    "YOLO CSP block": lambda: (CspBlock(), (torch.randn(1, 128, 80, 80),)),
    "ConvNeXt-T": torchvision_model("convnext_tiny"),
    "Swin-T": torchvision_model("swin_t"),
    "ViT-B/16": torchvision_model("vit_b_16"),
    "BERT-base": bert("sdpa"),
    "BERT-base, eager attention": bert("eager"),
}
GRAPHS: dict[str, Callable[[], Model]] = {f"TASO: {name}": benchmark(name) for name in BENCHMARKS}


# -- one model -------------------------------------------------------------------------------------------------------

KINDS = ("layers", "elementwise", "concat", "other")
_LAYERS = {"mm", "bmm", "matmul", "addmm", "baddbmm", "einsum", "linear", "scaled_dot_product_attention"}


def kind(node: fx.Node) -> str:
    """Which column counts a node; a batch norm in inference is elementwise."""
    name = ir.target_name(node)
    if node.target is ops.buffer:
        return "concat" if buffers.copied(node) else "other"  # nothing is done where every part is in place
    if ops.is_fused(node) or node.target in ops.CONVOLUTION_TARGETS or name in _LAYERS:
        return "layers"
    if cost.is_concat(node):
        return "concat"
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) or name in ("batch_norm", "hardswish", "prelu")
    return "elementwise" if pointwise else "other"


def numbers(module: fx.GraphModule) -> dict[str, Any]:
    """One side of a row."""
    found = Counter(kind(node) for node in module.graph.nodes if ir.is_compute(node))
    total = cost.of_module(module, cost.Device.cpu(2))
    copied = cost.copied_by_concat(module)
    return {**{name: found[name] for name in KINDS}, "concat_bytes": copied, **total.to_dict()}


def still_copying(fast: fxopt.CompiledModule) -> list[dict[str, Any]]:
    """The concats that copy after all passes: how many bytes, and each pass's reason for leaving them."""
    found = []
    for node in fast.fused_graph.graph.nodes:
        work = cost.of(node) if cost.is_concat(node) else None
        if work is not None and work.copied:
            # What the backend makes of it is another matter: the passes' own journal.
            reasons = [
                decline.reason.rpartition("copied: ")[2]
                for decline in fast.report.journal.declines.values()
                if decline.node == node.name and decline.pass_name == "allocate-buffers"
            ]
            found.append({"node": node.name, "bytes": work.copied, "reasons": reasons})
    return found


def one(name: str) -> dict[str, Any]:
    """One model's line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = (MODELS | GRAPHS)[name]()
    randomise(model).eval()
    start = time.perf_counter()
    fast = fxopt.compile(model, inputs)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        expected, actual = (pytree.tree_leaves(run(*inputs)) for run in (model, fast))
    pairs = [(a, b) for a, b in zip(actual, expected, strict=True) if isinstance(b, torch.Tensor)]
    report = fast.report
    return {
        "before": numbers(fast.captured_graph),
        "after": numbers(fast.fused_graph),
        "error": max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)) for a, b in pairs),
        "ok": report.verdict is not None and report.verdict.ok,
        "front_end": report.front_end,
        "seconds": round(seconds, 1),
        "undone": [f"{r.name}: {r.reason}" for r in report.passes if r.status in ("failed", "rolled back")],
        "concats": still_copying(fast),
    }


# -- the table -------------------------------------------------------------------------------------------------------

HEAD = """# The catalogue

What the default passes leave of well-known models, by `make catalogue` (`tests/catalogue.py`), on torch {torch},
torchvision {torchvision}, timm {timm}, transformers {transformers}. Random weights and batch-norm statistics, float32,
a batch of 1, each model's own resolution (BERT: 128 tokens), captured by torch.export.

Each cell is before → after, one number where nothing changed.

- **layers**: convolutions and matrix products (linear, matmul, attention), with what is fused into them.
- **elementwise**: operations on each element, batch norms in inference among them.
- **concat**: joins of tensors that copy a part. **other**: everything else that is a node, views among them.
- **MB moved**: bytes that the nodes read and write, weights included. **MB by concat**: what concats copy.
- **GFLOP**, **ms**: operations, and time under the roofline of a CPU of two threads (`fxopt/cost.py` says which). It
  ranks graphs; it does not predict a run.
- **error**: the largest difference from eager over eager's largest value.
"""
#: Where a cell's number is, what divides it, its digits behind the point.
AMOUNTS = (("bytes_moved", 1e6, 1), ("concat_bytes", 1e6, 1), ("flops", 1e9, 2), ("seconds", 1e-3, 1))
COLUMNS = ("model", *KINDS, "MB moved", "MB by concat", "GFLOP", "ms", "error")


def _change(before: str, after: str) -> str:
    return before if before == after else f"{before} → {after}"


def _row(name: str, line: dict[str, Any]) -> str:
    name = name.removeprefix("TASO: ")
    if "crash" in line:
        return f"| {name} | crashed: {line['crash'].splitlines()[-1][:80]} |" + " |" * (len(COLUMNS) - 2)
    sides = line["before"], line["after"]
    cells = [_change(*(str(side[count]) for side in sides)) for count in KINDS]
    for key, unit, digits in AMOUNTS:
        texts = ["?" if side[key] is None else f"{side[key] / unit:.{digits}f}" for side in sides]
        cells.append(_change(*texts))
    return f"| {name} | {' | '.join(cells)} | {line['error']:.0e} |"


def _left_out(name: str, line: dict[str, Any]) -> str | None:
    unknown = line["before"]["unknown_operations"], line["after"]["unknown_operations"]
    return f"- {name}: {unknown[0]} → {unknown[1]} operations whose work is not known" if any(unknown) else None


def table(lines: dict[str, dict[str, Any]]) -> str:
    """docs/catalogue.md."""
    versions = {
        "torch": torch.__version__, "torchvision": import_torchvision().__version__,
        "timm": import_timm().__version__, "transformers": import_transformers().__version__,
    }  # fmt: skip
    text = [HEAD.format(**{name: version.partition("+")[0] for name, version in versions.items()})]
    heading = f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}"
    for title, group in (("Models", MODELS), ("TASO's and Tensat's benchmark graphs", GRAPHS)):
        text.append(f"## {title}\n\n{heading}")
        text += [_row(name, lines[name]) for name in group if name in lines]
        text.append("")
    text.append(
        "The graphs of the second table are in `tests/taso.py`, at the sizes that the two papers name, without norms."
    )
    done = {name: lines[name] for name in MODELS | GRAPHS if name in lines and "crash" not in lines[name]}
    left_out = [found for name, line in done.items() if (found := _left_out(name, line))]
    if left_out:
        text += ["\nNot in bytes, operations and time:\n", *left_out]
    copying = {name: line["concats"] for name, line in done.items() if line["concats"]}
    if copying:
        text.append("\n## Concats that still copy, and why\n")
        for name, concats in copying.items():
            reasons = Counter(
                re.sub(r"_?\d+", "", reason) for entry in concats for reason in entry["reasons"] or ["no pass takes it"]
            )
            said = "; ".join(f"{count}x {reason}" for reason, count in reasons.most_common())
            text.append(f"- {name}: {sum(entry['bytes'] for entry in concats) / 1e6:.1f} MB in {len(concats)}; {said}")
    bad = {name: line for name, line in lines.items() if name in done and is_bad(line)}
    if bad:
        text.append("\n## What fails\n")
        text += [f"- {name}: {'; '.join(line['undone']) or 'not verified'}" for name, line in bad.items()]
    missing = [name for name in MODELS | GRAPHS if name not in lines]
    if missing:
        text.append("\nNot run yet: " + "; ".join(missing) + ".")
    return "\n".join(text) + "\n"


def is_bad(line: dict[str, Any]) -> bool:
    """Whether a line shows a crash, a wrong answer or a pass undone."""
    return "crash" in line or not line["ok"] or bool(line["undone"])


def main() -> int:
    """Runs what is missing, one by one, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that the names shall contain")
    parser.add_argument("--again", action="store_true", help="run what has results, too")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--seconds", type=int, default=1800, help="time limit of one model")
    parser.add_argument("--gigabytes", type=int, default=16, help="limit of one model's address space")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one)))
        return 0
    options.results.parent.mkdir(parents=True, exist_ok=True)
    known = read(options.results)
    chosen = [name for name in MODELS | GRAPHS if re.search(options.only, name)]
    for name in chosen:
        if name in known and not options.again:
            continue
        known[name] = in_own_process(name, options.seconds, options.gigabytes, __file__)
        with options.results.open("a") as file:
            file.write(json.dumps(known[name]) + "\n")
        print(f"{name}: {'BAD' if is_bad(known[name]) else 'ok'} in {known[name]['wall']} s", flush=True)
    options.table.write_text(table(known))
    return int(any(is_bad(known[name]) for name in chosen))


if __name__ == "__main__":
    sys.exit(main())
