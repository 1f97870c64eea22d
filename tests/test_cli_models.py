"""Models and inputs as the command line names them: factories, shapes, pictures, norms that never saw data."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fxopt
from command_line import command_line
from fxopt import models
from fxopt.models import Shape


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs a command line in a folder that has the models of `command_line.NET`."""
    with command_line(tmp_path, monkeypatch, capsys) as command:
        yield command


@pytest.mark.parametrize("name", ["net.py:build", "net.py:Small", "net.py:MODEL", "net:build", "torch.nn:ReLU"])
def test_a_model_is_named(run: Any, name: str) -> None:
    assert isinstance(models.load_model(name), torch.nn.Module)


def test_two_files_of_one_name_stay_two_modules(run: Any, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "net.py").write_text("import torch\nbuild = torch.nn.ReLU\n")
    first, second = models.load_model("net.py:build"), models.load_model("other/net.py:build")
    assert (type(first).__name__, type(second).__name__) == ("Small", "ReLU")


def test_the_seed_fixes_weights_and_inputs(run: Any) -> None:
    def weight(seed: int) -> torch.Tensor:
        return models.load_model("net.py:build", seed).conv.weight

    assert torch.equal(weight(1), weight(1))
    assert not torch.equal(weight(1), weight(2))
    shape = [Shape.parse("2x3")]
    assert torch.equal(models.draw(shape, 1)[0][0], models.draw(shape, 1)[0][0])
    assert not torch.equal(models.draw(shape, 1)[0][0], models.draw(shape, 2)[0][0])


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("1x3x224x224", (1, 3, 224, 224), torch.float32),
        ("7", (7,), torch.float32),
        ("0x4", (0, 4), torch.float32),
        ("2x3:float16", (2, 3), torch.float16),
        ("2x3:bool", (2, 3), torch.bool),
        ("2x3:complex64", (2, 3), torch.complex64),
        ("50x4:int64", (50, 4), torch.int64),
        ("50x4:uint8", (50, 4), torch.uint8),
        ("name=50x4:int64:3", (50, 4), torch.int64),
    ],
)
def test_a_shape_is_drawn(text: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parsed = Shape.parse(text)
    drawn = parsed.draw(torch.Generator().manual_seed(0))
    assert (tuple(drawn.shape), drawn.dtype) == (shape, dtype)
    if dtype in (torch.int64, torch.uint8):
        assert drawn.min() == 0
        assert parsed.below - drawn.max() in range(1, 11)
    assert parsed.name == ("name" if "=" in text else None)


@pytest.mark.parametrize("text", ["", "x", "1x", "-1x2", "1x2:", "1x2:float", "2x3:float32:5", "2x3:int64:0", "=2x3"])
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(fxopt.UsageError):
        Shape.parse(text)


def test_ids_and_arguments_by_name(run: Any) -> None:
    words = ("net.py:Words", "--shape", "2x7:int64:50", "--shape", "mask=2x7:bool")
    assert run("compile", *words).code == 0
    ran = run("verify", *words, "--json")
    assert ran.code == 0
    assert ran.json["inputs"] == ["2x7:int64", "mask=2x7:bool"]


def test_a_picture_is_resized_and_scaled(run: Any, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is an extra")
    image.new("RGB", (20, 10), (255, 51, 0)).save(tmp_path / "picture.png")
    pixels = models.read_picture("picture.png", Shape.parse("2x3x8x6"))
    assert pixels.shape == (2, 3, 8, 6)
    assert torch.equal(pixels[1, :, 3, 4], torch.tensor([1.0, 0.2, 0.0]))
    assert models.read_picture("picture.png", Shape.parse("1x1x8x6")).unique().numel() == 1
    ran = run("verify", "net.py:build", "--input", "picture.png", "--shape", "1x3x8x8", "--json")
    assert ran.code == 0
    default = run("compile", "net.py:build", "--input", "picture.png", "--json")
    assert default.json["inputs"] == ["1x3x224x224"]


def test_a_picture_needs_pillow(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "picture.png").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "PIL", None)
    ran = run("compile", "net.py:build", "--input", "picture.png")
    assert ran.code == 4
    assert "needs Pillow" in ran.err
    assert "pip install pillow" in ran.err


@pytest.mark.parametrize(
    ("name", "options", "randomized"),
    [
        pytest.param("net.py:build", (), 0, id="never a file's, unasked"),
        pytest.param("net.py:build", ("--randomize-norms",), 1, id="a file's where asked"),
        pytest.param("net:build", (), 1, id="a package's"),
        pytest.param("net:build", ("--no-randomize-norms",), 0, id="not a package's where told so"),
    ],
)
def test_norms_that_never_saw_data_are_randomized(
    run: Any, name: str, options: tuple[str, ...], randomized: int
) -> None:
    ran = run("compile", name, *options, "--json")
    assert ran.json["norms_randomized"] == randomized
    assert ("got random statistics" in ran.err) is bool(randomized)


def test_norms_of_a_trained_model_are_left_alone() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3))
    assert models.randomize_fresh_norms(model) == 2
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[1].reset_parameters()
    assert models.randomize_fresh_norms(model) == 0
    assert torch.equal(model[0].running_mean, before["0.running_mean"])


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["torchvision.models:resnet18", "timm:resnet18"])
def test_models_of_the_zoos(run: Any, name: str) -> None:
    pytest.importorskip(re.split(r"[.:]", name)[0])
    ran = run("verify", name, "--shape", "1x3x32x32", "--batches", "2", "--json")
    assert ran.code == 0
    assert ran.json["norms_randomized"] == 20
    assert 0 < ran.json["error"] < 2e-5


@pytest.mark.zoo
def test_a_model_that_timm_does_not_have(run: Any) -> None:
    pytest.importorskip("timm")
    ran = run("compile", "timm:resnet81")
    assert ran.code == 2
    assert "there are: resnet18" in ran.err
