"""Programs of torch.export go in and come out, ONNX models come out: the rewritten graph, with the model's answer."""

from __future__ import annotations

import copy
import io
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

import fxopt
from convnets import convnet, image
from fxopt.capture.program import register_dataclasses
from fxopt.guards import Guards
from graphs import FRONT_ENDS, Network, TwoInputs, randomised


@dataclass
class Answer:
    """A result of a model's own type."""

    scores: torch.Tensor
    rows: torch.Tensor


class Options(nn.Module):
    """Takes a tensor, a dictionary, a number and what may be None; gives a dictionary with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Any, power: int = 1, *, extra: Any, scale: Any = None) -> Any:
        y = self.linear(x) ** power + extra["shift"]
        return {"scaled": y if scale is None else y * scale, "both": (y.relu(), x)}


def attention(m: Any, x: Any) -> Any:
    q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (m.q, m.k, m.v))
    weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
    return m.norm(x + (weights @ v).transpose(1, 2).flatten(2))


def inception(m: Any, x: Any) -> Any:
    """GoogLeNet's shape: sibling pointwise convolutions, two of which have another behind them, side by side."""
    return torch.cat([m.a(x), m.bb(m.b(x)), m.cc(m.c(x))], 1)


def block(inputs: int, outputs: int, kernel: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def siblings() -> nn.Module:
    parts = {"a": block(16, 16), "b": block(16, 8), "bb": block(8, 16, 3), "c": block(16, 8), "cc": block(8, 8, 3)}
    return randomised(Network(inception, **parts))


def attending() -> nn.Module:
    return Network(attention, q=nn.Linear(8, 8), k=nn.Linear(8, 8), v=nn.Linear(8, 8), norm=nn.LayerNorm(8)).eval()


def numbered() -> nn.Module:
    """Of integers."""
    return Network(lambda m, x: m.norm(m.table(x)).mean(1), table=nn.Embedding(9, 8), norm=nn.LayerNorm(8)).eval()


def answering() -> nn.Module:
    return TwoInputs(lambda m, x, y: Answer(m.linear(x).relu(), x + y), linear=nn.Linear(4, 3)).eval()


Call = tuple[tuple[Any, ...], dict[str, Any]]


def options(batch: int) -> Call:
    return (torch.randn(batch, 4), 2), {"scale": torch.randn(5), "extra": {"shift": torch.randn(5)}}


#: What builds a model, and a call of it for a batch.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Call]]] = {
    "norm and residual": (convnet, lambda batch: ((image(batch),), {})),
    "siblings and concat": (siblings, lambda batch: ((torch.randn(batch, 16, 14, 14),), {})),
    "attention and layer norm": (attending, lambda batch: ((torch.randn(batch, 6, 8),), {})),
    "integers": (numbered, lambda batch: ((torch.randint(0, 9, (batch, 6)),), {})),
    "structures": (lambda: Options().eval(), options),
    "dataclass": (answering, lambda batch: ((torch.randn(batch, 4), torch.randn(batch, 4)), {})),
}

models = pytest.mark.parametrize("name", MODELS)
front_ends = pytest.mark.parametrize("front_end", FRONT_ENDS)


def compiled(model: nn.Module, call: Call, front_end: str = "export", **options: Any) -> fxopt.CompiledModule:
    """A model compiled on a call, or traced and called with it."""
    args, kwargs = call
    if front_end == "export":
        return fxopt.compile(model, args, kwargs, **options)
    fast = fxopt.compile(model, **options)
    with torch.no_grad():
        fast(*args, **kwargs)
    return fast


def reloaded(program: ExportedProgram) -> ExportedProgram:
    """A program saved and loaded."""
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


def targets(program: ExportedProgram) -> Counter[str]:
    """How often each operator is in a program, by its qualified name."""
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


def assert_close(result: Any, expected: Any) -> None:
    pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(expected), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(torch.as_tensor(ours), theirs, rtol=1e-4, atol=1e-4)


# -- torch.export ----------------------------------------------------------------------------------------------------


@front_ends
@models
def test_a_program_comes_out_with_the_models_signature_and_answers(name: str, front_end: str) -> None:
    build, call = MODELS[name]
    model = build()
    fast = compiled(model, call(2), front_end)
    program = fast.exported()
    program.validate()
    assert not [target for target in targets(program) if not target.startswith(("aten.", "<built-in"))]
    for made in (program, reloaded(program)):
        for batch in (1, 2, 5):
            args, kwargs = call(batch)
            with torch.no_grad():
                result, expected = made.module()(*args, **kwargs), model(*args, **kwargs)
            assert type(result) is type(expected)
            assert_close(result, expected)


def test_what_was_fused_is_plain_aten_again_and_what_was_folded_stays_folded() -> None:
    program = compiled(siblings(), MODELS["siblings and concat"][1](2)).exported()
    found = targets(program)
    assert found["aten.conv2d.default"] == 3
    assert found["aten.batch_norm.default"] == 0
    assert found["aten.relu.default"] == 3
    assert [name for name in program.state_dict if "weight" in name] == [
        "b.0.weight_folded_merged", "bb.0.weight_folded", "cc.0.weight_folded"
    ]  # fmt: skip


def test_a_programs_tensors_are_its_own() -> None:
    model, (x,) = convnet(), (image(),)
    program = compiled(model, ((x,), {})).exported()
    with torch.no_grad():
        before = program.module()(x)
        for parameter in model.parameters():
            parameter.zero_()
        assert_close(program.module()(x), before)


def test_a_program_knows_the_layers_and_lines_that_its_operators_come_from() -> None:
    program = compiled(convnet(), ((image(),), {})).exported()
    (convolution,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    (path,) = {path for path, _ in convolution.meta["nn_module_stack"].values()}
    assert path in ("conv", "norm", "skip")
    assert "graphs.py" in convolution.meta["stack_trace"]


def test_constants_of_the_call_are_constants_of_the_program() -> None:
    program = compiled(Options().eval(), options(2)).exported()
    args, kwargs = options(2)
    with pytest.raises(AssertionError, match="power == 2"):
        program.module()(args[0], 3, **kwargs)


def test_the_captures_guards_are_the_programs() -> None:
    model = Network(lambda m, x: x + 1 if x.shape[0] % 2 else x - 1).eval()
    program = reloaded(compiled(model, ((torch.zeros(4, 3),), {})).exported())
    assert_close(program.module()(torch.zeros(6, 3)), torch.full((6, 3), -1.0))
    with pytest.raises(AssertionError, match="% 2"):
        program.module()(torch.zeros(3, 3))


def test_a_model_that_is_another_at_batch_1_is_exported_for_its_examples_sizes() -> None:
    model = Network(lambda m, x: x + 1 if x.shape[0] == 1 else x - 1).eval()
    fast = compiled(model, ((torch.zeros(4, 3),), {}))
    with pytest.warns(fxopt.FxoptNotice, match="another branch at batch 1"):
        program = fast.exported()
    with pytest.raises(AssertionError, match="== 4"):
        program.module()(torch.zeros(1, 3))


def test_what_was_captured_for_one_batch_is_exported_for_it_without_a_notice(recwarn: pytest.WarningsRecorder) -> None:
    model = Network(lambda m, x: x + 1 if x.shape[0] == 1 else x - 1).eval()
    fast = compiled(model, ((torch.zeros(1, 3),), {}), dynamic_shapes=None)
    assert_close(fast.exported().module()(torch.zeros(1, 3)), torch.ones(1, 3))
    assert not [warning for warning in recwarn if warning.category is fxopt.FxoptNotice]


def test_a_counter_goes_on_counting_in_the_program_and_is_not_the_models() -> None:
    def count(m: Any, x: Any) -> Any:
        m.count += 1
        return x * m.count

    model = Network(count, count=torch.zeros(())).eval()
    x = torch.ones(2, 3)
    run = fxopt.compile(model, (x,)).exported().module()
    assert [float(run(x)[0, 0]) for _ in range(2)] == [1.0, 2.0]
    assert float(model.count) == 0.0


def test_before_shapes_are_known_there_is_no_program() -> None:
    with pytest.raises(fxopt.UsageError, match="shapes are not known yet"):
        fxopt.compile(convnet()).exported()


def test_a_graph_of_autocast_is_no_program() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        fast = compiled(convnet(), ((image(),), {}))
    with pytest.raises(fxopt.UsageError, match="under autocast"):
        fast.exported()


def test_what_torch_export_refuses_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = compiled(convnet(), ((image(),), {}))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("not today")

    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(fxopt.ExportError, match="not today"):
        fast.exported()


def test_a_program_with_another_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    x = image()
    fast = compiled(convnet(), ((x,), {}))
    other = torch.export.export(convnet(), (x,))
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: other)
    with pytest.raises(fxopt.VerificationError, match="exported program"):
        fast.exported()


# -- and back --------------------------------------------------------------------------------------------------------


def exported(model: nn.Module, call: Call, opened: bool = True) -> ExportedProgram:
    args, kwargs = call
    register_dataclasses(model(*args, **kwargs))  # torch.export wants it of its caller
    if not opened:
        return torch.export.export(model, args, kwargs)
    shapes = torch.export.ShapesCollection()
    for tensor in (leaf for leaf in args if isinstance(leaf, torch.Tensor)):
        shapes[tensor] = {0: Dim.AUTO}
    return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)  # type: ignore[arg-type]


@models
def test_a_program_is_compiled_in_its_models_place(name: str) -> None:
    build, call = MODELS[name]
    model = build()
    fast = fxopt.compile(reloaded(exported(model, call(2))))
    assert not fast.report.notices
    for batch in (1, 2, 5):
        args, kwargs = call(batch)
        with torch.no_grad():
            result, expected = fast(*args, **kwargs), model(*args, **kwargs)
        assert type(result) is type(expected)
        assert_close(result, expected)


def test_what_comes_out_goes_in_again() -> None:
    model, x = convnet(), image()
    program = fxopt.compile(exported(model, ((x,), {}))).exported()
    fast = fxopt.compile(program)
    assert "fold-batchnorm" not in {rewrite.pass_name for rewrite in fast.report.rewrites}
    with torch.no_grad():
        assert_close(fast(image(3) * 0 + 1), model(torch.ones(3, 3, 8, 8)))


def test_a_programs_layers_are_explained_as_the_models() -> None:
    fast = fxopt.compile(exported(convnet(), ((image(),), {})))
    assert "fold-batchnorm" in str(fast.explain("norm"))
    assert fast.report.model == "ExportedProgram"


def test_a_programs_guards_hold() -> None:
    fast = fxopt.compile(exported(convnet(), ((image(2),), {}), opened=False))
    with pytest.raises(fxopt.InputError, match="== 2"):
        fast(image(3))


def test_a_program_takes_its_arguments_by_name_too() -> None:
    model, ((x, power), kwargs) = Options().eval(), options(2)
    fast = fxopt.compile(exported(model, ((x, power), kwargs)))
    with torch.no_grad():
        assert_close(fast(extra=kwargs["extra"], x=x, scale=kwargs["scale"], power=power), model(x, power, **kwargs))


def test_example_inputs_may_be_others_than_the_programs() -> None:
    model = convnet()
    fast = fxopt.compile(exported(model, ((image(2),), {})), (x := image(3),))
    assert fast.report.verdict is not None
    with torch.no_grad():
        assert_close(fast(x), model(x))


def test_a_compiled_program_is_copied_and_converted() -> None:
    model, x = convnet(), image()
    twin = copy.deepcopy(fxopt.compile(exported(model, ((x,), {}))))
    with torch.no_grad():
        assert_close(twin(x), model(x))
        assert_close(twin.double()(x.double()), model.double()(x.double()))


TRAINING = {
    "norm": nn.BatchNorm2d(3),
    "dropout": nn.Dropout(0.5),
}


@pytest.mark.parametrize("layer", TRAINING)
def test_a_program_of_training_mode_is_refused(layer: str) -> None:
    program = torch.export.export(nn.Sequential(TRAINING[layer], nn.ReLU()).train(), (image(),))
    with pytest.raises(fxopt.UsageError, match=r"training mode.*(batch_norm|dropout)"):
        fxopt.compile(program)


def test_a_norm_without_statistics_is_not_taken_for_training() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    x = image()
    with torch.no_grad():
        assert_close(fxopt.compile(exported(model, ((x,), {})))(x), model(x))


# -- ONNX ------------------------------------------------------------------------------------------------------------


def run_onnx(path: Path, call: Call) -> list[torch.Tensor]:
    """What ONNX Runtime gives for a call."""
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {leaf_name: leaf.numpy() for leaf_name, leaf in tensors(call)}
    assert given.keys() == {entry.name for entry in session.get_inputs()}
    return [torch.from_numpy(array) for array in session.run(None, given)]


def tensors(call: Call) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a call under the names that they have in ONNX: those of `forward`, and of what is in them."""
    args, kwargs = call
    by_place = zip(("x", "y"), args, strict=False)
    found = [(name, leaf) for name, leaf in (*by_place, *kwargs.items()) if isinstance(leaf, torch.Tensor)]
    return found + [(f"extra_{key}", leaf) for key, leaf in kwargs.get("extra", {}).items()]


def written(fast: fxopt.CompiledModule, folder: Path, **options: Any) -> Any:
    """The ONNX model, which onnx's checker accepts."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    path = folder / "model.onnx"
    fast.to_onnx(path, **options)
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path)


def kinds(model: Any) -> Counter[str]:
    """How often each operator is in an ONNX model."""
    return Counter(node.op_type for node in model.graph.node)


OUTPUTS = {
    "structures": ["scaled", "both_0", "both_1"],
    "dataclass": ["scores", "rows"],
}


@front_ends
@models
def test_onnx_runtime_gives_the_models_answer(name: str, front_end: str, tmp_path: Path) -> None:
    build, call = MODELS[name]
    model = build()
    found = written(compiled(model, call(2), front_end), tmp_path)
    assert kinds(found)["BatchNormalization"] == 0
    assert {entry.domain for entry in found.opset_import} <= {""}
    assert [entry.name for entry in found.graph.output] == OUTPUTS.get(name, ["output"])
    assert found.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    for batch in (1, 2, 5):
        args, kwargs = call(batch)
        with torch.no_grad():
            assert_close(run_onnx(tmp_path / "model.onnx", (args, kwargs)), pytree.tree_leaves(model(*args, **kwargs)))


def test_the_rewrites_survive_in_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model, ((x,), _) = siblings(), MODELS["siblings and concat"][1](2)
    torch.onnx.export(model, (x,), tmp_path / "original.onnx", dynamo=True, verbose=False, optimize=False)
    before = kinds(onnx.load(tmp_path / "original.onnx"))
    after = kinds(written(compiled(model, ((x,), {})), tmp_path))
    assert (before["Conv"], before["BatchNormalization"], before["Relu"]) == (5, 5, 5)
    assert (after["Conv"], after["BatchNormalization"], after["Relu"]) == (3, 0, 3)


def test_a_guard_that_onnx_cannot_ask_closes_the_sizes(tmp_path: Path) -> None:
    model = Network(lambda m, x: x + 1 if x.shape[0] % 2 else x - 1).eval()
    fast = compiled(model, ((torch.zeros(4, 3),), {}))
    with pytest.warns(fxopt.FxoptNotice, match="ONNX cannot ask"):
        found = written(fast, tmp_path)
    assert [size.dim_value for size in found.graph.input[0].type.tensor_type.shape.dim] == [4, 3]


@pytest.mark.parametrize("opset", [18, 20])
def test_the_version_of_the_operators_can_be_chosen(opset: int, tmp_path: Path) -> None:
    found = written(compiled(convnet(), ((image(),), {})), tmp_path, opset=opset)
    assert [entry.version for entry in found.opset_import] == [opset]


def test_large_weights_go_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.onnx_model.MOST_INSIDE", 1000)
    model = nn.Linear(64, 64).eval()
    written(fxopt.compile(model, (torch.randn(2, 64),)), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}


def counting(m: Any, x: Any) -> Any:
    m.count += 1
    return x * m.count


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "an operator that ONNX lacks": (
        lambda m, x: torch.linalg.eigh(x @ x.mT)[0], r"linalg_eigh[\s\S]*graphs.py:\d+ in"
    ),
    "a write that outlives the call": (counting, "writes to count"),
    "a result that is no tensor": (lambda m, x: (x, 3), "gives 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_onnx_cannot_hold_is_an_error_that_names_it(case: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    body, said = REFUSED[case]
    fast = fxopt.compile(Network(body, count=torch.zeros(())).eval(), (torch.randn(2, 3, 3),))
    with pytest.raises(fxopt.ExportError, match=said):
        fast.to_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = compiled(nn.ReLU().eval(), ((torch.zeros(2, 3),), {}))
    pytest.importorskip("onnx")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(fxopt.UsageError, match=rf"(?s){package}.*fxopt\[onnx\]"):
        fast.to_onnx(tmp_path / "model.onnx")


def test_a_wide_softmax_stays_one_operator(tmp_path: Path) -> None:
    model = Network(lambda m, x: F.softmax(m.linear(x), -1), linear=nn.Linear(4, 4)).eval()
    assert kinds(written(fxopt.compile(model, (torch.randn(2, 4),)), tmp_path)) == {"Gemm": 1, "Softmax": 1}


def test_stand_ins_that_the_guards_refuse_are_not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fxopt.compile(torch.nn.Linear(3, 2).eval(), (torch.zeros(2, 3),))
    monkeypatch.setattr(Guards, "refusal", lambda *args: "a branch depends on it")
    with pytest.raises(fxopt.ExportError, match="a branch depends on it"):
        fast.exported()


def test_a_program_that_could_not_be_compared_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = fxopt.compile(torch.nn.Linear(3, 2).eval(), (torch.zeros(2, 3),))

    def refuse(*args: Any) -> Any:
        raise fxopt.InputError("the model takes no such numbers")

    monkeypatch.setattr(fast._session, "_run_original", refuse)
    with pytest.warns(fxopt.FxoptNotice, match="was not compared: the model takes no such numbers"):
        fast.exported()
