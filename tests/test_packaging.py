"""The wheel as a stranger gets it: built, installed beside a plugin, and used outside the checkout.

The editable install that the other tests run on finds every file of the checkout whether or not the package lists it,
so here a wheel goes into an environment of its own. That environment borrows torch and the other dependencies from the
running one through a .pth file, behind its own packages: fxopt and the plugin can come only from the wheels.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).resolve().parent.parent
PLUGIN = CHECKOUT / "tests" / "example_plugin"
PLUGIN_PASS = "fold-double-negation"
BACKEND = CHECKOUT / "tests" / "example_backend"
SOURCES = ("pyproject.toml", "LICENSE", "README.md", "fxopt", "passes")


def run(command: Sequence[str | Path], cwd: Path) -> str:
    """Standard output of a command that sees none of this process's Python settings; its error output if it fails."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(source: Path, work: Path) -> Path:
    """Build in a copy: a build folder left in the checkout by an earlier build would hide what is missing."""
    copy = work / "source"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    out = work / "dist"
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy], cwd=work)
    (wheel,) = out.glob("*.whl")
    return wheel


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds fxopt's wheel and two plugins', and a folder that is not the checkout."""

    folder: Path

    @property
    def bin(self) -> Path:
        return self.folder / "env" / ("Scripts" if os.name == "nt" else "bin")

    def python(self, script: str) -> Any:
        """What a script assigned to `answer`, by way of JSON."""
        file = self.folder / "script.py"
        file.write_text(f"{textwrap.dedent(script)}\nimport json\nprint(json.dumps(answer))\n")
        return json.loads(run([self.bin / "python", "-I", file], cwd=self.folder).splitlines()[-1])


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "checkout"
    source.mkdir()
    for name in SOURCES:
        path = CHECKOUT / name
        if path.is_dir():
            shutil.copytree(path, source / name)
        else:
            shutil.copy(path, source / name)
    return build_wheel(source, folder)


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("installed")
    environment = Environment(folder)
    venv.create(folder / "env", with_pip=False)
    plugins = []
    for source in (PLUGIN, BACKEND):
        (folder / source.name).mkdir()
        plugins.append(build_wheel(source, folder / source.name))
    target = environment.bin / "python"
    pip = [sys.executable, "-m", "pip", "--python", target, "install", "--no-index", "--no-deps", wheel, *plugins]
    run(pip, cwd=folder)
    # Only now: with the running environment in sight, pip would take its fxopt for an installed one.
    own = Path(run([target, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=folder).strip())
    borrowed = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    (own / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))
    return environment


def test_wheel_carries_every_file_of_the_package(wheel: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(CHECKOUT / folder).as_posix()}"
        for package, folder in {"fxopt": "fxopt", "fxopt_passes": "passes"}.items()
        for path in (CHECKOUT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        carried = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert carried == expected


def test_fxopt_comes_from_the_wheel(installed: Environment) -> None:
    files = installed.python(
        """
        import fxopt, fxopt_example_plugin, fxopt_passes
        answer = [module.__file__ for module in (fxopt, fxopt_example_plugin, fxopt_passes)]
        """
    )
    outside = [file for file in files if not Path(file).is_relative_to(installed.folder / "env")]
    assert outside == []


def test_installed_passes_are_listed_with_their_origin(installed: Environment) -> None:
    origins = installed.python(
        """
        import fxopt
        answer = {pass_.name: str(pass_.origin) for pass_ in fxopt.passes()}
        """
    )
    assert "fxopt-example-plugin" in origins[PLUGIN_PASS]
    builtin = {name: origin for name, origin in origins.items() if name != PLUGIN_PASS}
    assert builtin, "the built-in passes are missing"
    assert not any("fxopt-example-plugin" in origin for origin in builtin.values())


NEGATED_TWICE = """
import fxopt, torch

class NegatedTwice(torch.nn.Module):
    def forward(self, x):
        return -(-x)

model, x = NegatedTwice().eval(), torch.randn(2, 3)
before = x.clone()
"""


def test_compile_uses_a_plugin_pass_that_is_named(installed: Environment) -> None:
    answer = installed.python(
        NEGATED_TWICE
        + f"""
fast = fxopt.compile(model, (x,), passes=[{PLUGIN_PASS!r}], strict=True)
y = fast(x)
targets = [str(node.target) for node in fast.fused_graph.graph.nodes if node.op == "call_function"]
equal = torch.equal(y, model(x))
y.add_(1)
answer = {{"targets": targets, "equal": equal, "input kept": torch.equal(x, before)}}
"""
    )
    assert answer == {"targets": ["aten.clone.default"], "equal": True, "input kept": True}


def test_an_installed_plugin_leaves_the_default_pipeline_alone(installed: Environment) -> None:
    report = installed.python(
        NEGATED_TWICE
        + """
answer = fxopt.compile(model, (x,)).report.to_dict()
"""
    )
    assert PLUGIN_PASS not in json.dumps(report)


def test_an_installed_backend_can_be_named_and_changes_nothing_else(installed: Environment) -> None:
    answer = installed.python(
        """
        import fxopt, torch
        model, x = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU()).eval(), torch.randn(2, 8)
        backends = {entry.name: entry.origin for entry in fxopt.backends()}
        reports = [fxopt.compile(model, (x,), backend=name, strict=True).report for name in ("auto", "addmm")]
        answer = [backends["addmm"], backends["aten"], [report.backend for report in reports]]
        """
    )
    assert answer[:2] == ["fxopt-example-backend", "fxopt"]
    assert answer[2][0] != "addmm"
    assert answer[2][1] == "addmm"


def test_console_script_lists_the_plugin_pass(installed: Environment) -> None:
    printed = run([installed.bin / "fxopt", "passes", "--json"], cwd=installed.folder)
    assert PLUGIN_PASS in printed
    assert json.loads(printed)
