"""What importing fxopt costs, and that nothing optional is loaded before it is used."""

from __future__ import annotations

import json
import subprocess
import sys

#: Packages that fxopt or its extras need for something that few do; torch itself imports networkx and numpy.
RARE = {
    "click", "graphviz", "hypothesis", "jinja2", "onnx", "onnxruntime", "onnxscript", "openvino", "PIL", "rich",
    "sklearn", "timm", "torchvision", "transformers",
}  # fmt: skip


def told(program: str) -> dict[str, float | list[str]]:
    """What a fresh process prints: JSON."""
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    found: dict[str, float | list[str]] = json.loads(run.stdout)
    return found


def test_importing_takes_under_50_ms_beyond_torch() -> None:
    found = told(
        "import json, sys, time, torch\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "import fxopt\n"
        "seconds = time.process_time() - start\n"
        "print(json.dumps({'seconds': seconds, 'modules': sorted(set(sys.modules) - before)}))"
    )
    assert found["seconds"] < 0.05
    assert not [name for name in found["modules"] if name.startswith(("fxopt.", "torch."))]


def test_what_is_rarely_needed_is_not_loaded_to_compile() -> None:
    found = told(
        "import json, sys, torch, fxopt\n"
        "before = set(sys.modules)\n"
        "model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()\n"
        "fxopt.compile(model, (torch.zeros(2, 3, 8, 8),))\n"
        "print(json.dumps({'modules': sorted(sys.modules), 'before': sorted(before)}))"
    )
    assert not RARE & set(found["before"])
    assert not RARE & set(found["modules"])


def test_names_are_there_before_they_are_loaded() -> None:
    found = told(
        "import json, fxopt\n"
        "listed = set(dir(fxopt)) >= set(fxopt.__all__)\n"
        "kinds = [type(getattr(fxopt, name)).__name__ for name in fxopt.__all__]\n"
        "print(json.dumps({'listed': listed, 'kinds': kinds, 'bench': fxopt.bench.Fxopt.__name__}))"
    )
    assert found["listed"]
    assert "function" in found["kinds"]
    assert found["bench"] == "Fxopt"
