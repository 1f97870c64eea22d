"""The layers: a file imports only files that stand above it in one list, so that data flows down once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxopt

ROOT = Path(fxopt.__file__).parent

#: Every file of fxopt, top to bottom.
LAYERS = (
    "errors",
    "trained",  # constants that training changes
    "ir",
    "hints",  # open sizes as numbers, for estimates
    "ops",
    "effects",
    "edit",
    "buffers",  # concats that copy nothing
    "work",  # what an operator computes and moves
    "cost",  # what that takes on a device
    "overloads",  # which one takes given arguments
    "spelling",  # operations as Python programs write them
    "expand",  # what symbolic tracing left whole, written out
    "normalize",
    "check",
    "capture.program",
    "capture.export",
    "capture.tracer",
    "capture.symbolic",
    "capture",
    "guards",  # which inputs a capture fits
    "pattern",
    "legality",  # what no rewrite may do
    "observe",  # what a rewrite must not change
    "journal",  # what was done, and what was not and why
    "rewrite",
    "driver",
    "compare",
    "agreement",  # of a capture with its original
    "state",  # what a model keeps between calls
    "pipeline",
    "lowering.weights",  # packed, and what they were packed from
    "lowering.backend",
    "lowering.executor",
    "lowering",
    "plugins",
    "report",
    "lowering.aten",
    "lowering.inductor",
    "lowering.in_place",
    "lowering.onednn_operators",
    "lowering.onednn_strides",
    "lowering.onednn_products",
    "lowering.onednn_convolutions",
    "lowering.onednn_buffers",
    "lowering.onednn",
    "program",  # one capture, rewritten, and lowered for each signature
    "held",  # which tensors a compiled model has
    "signature",  # what a program's lowering for a call depends on
    "trial",  # runs that only compare
    "session",  # all captures of one compiled model
    "frozen",  # a session as plain data
    "memory",  # what compiling left, given back
    "exporting",  # to torch.export, and from it
    "onnx_model",
    "looking",  # what a compiled model shows of itself
    "runtime",
    "gradients",  # of a rewritten graph and the original
    "trainable",
    "align",  # the nodes of two graphs
    "nodediff",
    "stages",  # the graphs between passes
    "graphdiff",
    "dot",
    "page",  # templates filled in
    "render",
    "training.moments",  # of shards, and of all of them
    "training.ranks",  # processes that train one model
    "training.normalise",
    "training.sync_batchnorm",
    "training",
    "compiler",
    "dynamo",  # behind torch.compile
    "verification",
    "evaluation.losses",  # of an example
    "evaluation.tally",  # sums of them
    "evaluation.batches",
    "evaluation.shards",  # of several processes
    "evaluation.evaluate",
    "evaluation",
    "testing.network",  # what a plugin's tests use
    "testing.oracle",
    "testing.builder",
    "testing.layers",
    "testing.branches",
    "testing.attention",
    "testing.moves",
    "testing.strategy",
    "testing",
    "models",  # what the command line names
    "bench.system",  # where this runs, and memory
    "bench.runtimes",  # eager, fxopt, peers
    "bench.result",
    "bench.table",
    "bench.chart",
    "bench.worker",
    "bench.measure",
    "bench",
    "doctor",
    "terminal",
    "cli.options",
    "cli.making",  # compiling what a command line names
    "cli.bench",
    "cli.evaluate",
    "cli.commands",
    "cli",
    "__main__",
)

#: A method that hands its work down to a later layer imports it when it is called, and only these do.
HANDED_DOWN = {
    ("session", "frozen"): "a session writes itself down",
    ("looking", "graphdiff"): "compiled.diff()",
    ("graphdiff", "render"): "diff.save()",
    ("graphdiff", "dot"): "diff.dot()",
    ("bench.result", "bench.table"): "print(benchmark)",
}


def name_of(file: Path) -> str:
    """`fxopt/capture/__init__.py` is `capture`."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(file): file for file in sorted(ROOT.rglob("*.py")) if file != ROOT / "__init__.py"}


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """The files of fxopt that a file imports, and whether it does so at once (not inside a function, nor for types)."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    late = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("fxopt.") in FILES else node.module for name in inside]
        else:
            assert not isinstance(node, ast.ImportFrom), f"{file}: relative import"
            continue
        for name in names:
            if name.startswith("fxopt.") and name.removeprefix("fxopt.") in FILES:
                yield name.removeprefix("fxopt."), node not in late


def test_every_file_has_its_layer() -> None:
    assert set(FILES) == set(LAYERS)
    assert len(set(LAYERS)) == len(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_imports_only_layers_above_it(name: str) -> None:
    above = LAYERS[: LAYERS.index(name)]
    for imported, at_once in imports(FILES[name]):
        if imported not in above:
            assert not at_once, f"{name} imports {imported}, which is below it"
            assert (name, imported) in HANDED_DOWN, f"{name} imports {imported}, which is below it, in a function"


def test_the_built_in_passes_use_nothing_but_public_names() -> None:
    public = set(fxopt.__all__) | set(FILES)
    for file in sorted((ROOT.parent / "passes").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fxopt":
                names = {alias.name for alias in node.names}
                assert not {name for name in names if name.startswith("_")}, f"{file.name} imports a private name"
                if node.module == "fxopt":
                    assert names <= public, f"{file.name} imports {names - public}"


def test_nothing_in_fxopt_imports_the_built_in_passes() -> None:
    for name, file in FILES.items():
        assert "import fxopt_passes" not in (text := file.read_text(encoding="utf-8")), name
        assert "from fxopt_passes" not in text, name
