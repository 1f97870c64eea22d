"""The command line, as somebody types it: results, JSON, exit codes, progress."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fxopt
from command_line import IMAGE, NET, command_line
from fxopt import doctor, plugins, terminal


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Runs a command line in a folder that has the models of `command_line.NET`."""
    with command_line(tmp_path, monkeypatch, capsys) as command:
        yield command


# -- results ---------------------------------------------------------------------------------------------------------


def test_compile_prints_the_report(run: Any) -> None:
    ran = run("compile", "net.py:build", *IMAGE)
    assert ran.code == 0
    assert "fold-batchnorm" in ran.out
    assert "verified: " in ran.out
    assert ran.err == ""


def test_compile_without_inputs_says_that_nothing_was_verified(run: Any) -> None:
    ran = run("compile", "net.py:build")
    assert ran.code == 0
    assert "captured by symbolic" in ran.out
    assert "not verified: " in ran.out


def test_compile_gives_the_report_as_json(run: Any) -> None:
    ran = run("compile", "net.py:build", *IMAGE, "--json", "--diff", "d.json")
    assert ran.code == 0
    assert ran.json["report"]["nodes"] == {"before": 3, "after": 1}
    assert ran.json["report"]["verdict"]["ok"] is True
    assert ran.json["inputs"] == ["2x3x8x8"]
    assert ran.json["diff"] == "d.json"
    assert json.loads(Path("d.json").read_text())
    assert "printed by the model" in ran.err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param(("--passes", "fold-batchnorm"), {"fold-batchnorm"}, id="passes names the only ones"),
        pytest.param(
            ("--passes", "fold-batchnorm,fuse-conv-activation", "--disable", "fold-batchnorm"),
            {"fuse-conv-activation"}, id="disable takes from them",
        ),
        pytest.param(("--passes", ""), set(), id="no passes at all"),
    ],
)  # fmt: skip
def test_passes_are_chosen(run: Any, options: tuple[str, ...], expected: set[str]) -> None:
    ran = run("compile", "net.py:build", *IMAGE, "--json", *options)
    assert {entry["name"] for entry in ran.json["report"]["passes"]} == expected


@pytest.mark.parametrize(
    ("options", "key", "expected"),
    [
        pytest.param(("--no-verify",), "verdict", None, id="no-verify compares nothing"),
        pytest.param(("--backend", "aten"), "backend", "aten", id="backend names one"),
        pytest.param(("--numerics", "bitwise"), "backend", "aten", id="bitwise numerics leaves oneDNN out"),
    ],
)
def test_options_reach_the_compiler(run: Any, options: tuple[str, ...], key: str, expected: Any) -> None:
    assert run("compile", "net.py:build", *IMAGE, "--json", *options).json["report"][key] == expected


def test_verify_each_compares_after_every_pass(run: Any) -> None:
    report = run("compile", "net.py:build", *IMAGE, "--json", "--verify-each").json["report"]
    assert [entry["verdict"]["ok"] for entry in report["passes"] if entry["rewrites"]] == [True, True]


@pytest.mark.parametrize("suffix", ["html", "dot", "json"])
def test_diff_saves_by_suffix(run: Any, suffix: str) -> None:
    ran = run("diff", "net.py:build", *IMAGE, "-o", f"picture.{suffix}")
    assert ran.code == 0
    assert f"saved picture.{suffix}" in ran.out
    assert Path(f"picture.{suffix}").stat().st_size > 100


def test_diff_of_one_pass(run: Any) -> None:
    ran = run("diff", "net.py:build", *IMAGE, "-o", "d.json", "--pass", "fold-batchnorm", "--json")
    assert ran.json["pass"] == "fold-batchnorm"
    assert ran.json["compute_nodes"] == {"before": 3, "after": 2}


def test_explain_tells_what_became_of_a_layer(run: Any) -> None:
    ran = run("explain", "net.py:build", "norm", *IMAGE)
    assert ran.code == 0
    assert "fold-batchnorm (norm-after-layer)" in ran.out
    assert run("explain", "net.py:build", "norm", "--json").json["subject"] == "norm"


def test_verify_tries_several_batch_sizes(run: Any) -> None:
    ran = run("verify", "net.py:build", *IMAGE, "--json", "--batches", "3")
    assert ran.code == 0
    assert ran.json["ok"] is True
    assert ran.json["count"] == 3
    assert "verified on 3 batches" in run("verify", "net.py:build", *IMAGE, "--batches", "3").out


def test_verify_keeps_the_batch_size_where_none_is_dynamic(run: Any) -> None:
    assert run("verify", "net.py:Sizes", "--shape", "2x6", "--dynamic-shapes", "none").code == 0


def test_passes_lists_names_origins_and_what_they_do(run: Any) -> None:
    listed = {entry["name"]: entry for entry in run("passes", "--json").json["passes"]}
    assert list(listed) == list(plugins.available())
    assert listed["fold-batchnorm"]["origin"] == "fxopt"
    assert listed["fold-batchnorm"]["default"] is True
    assert listed["fold-batchnorm"]["doc"].startswith("batch_norm(layer(x, W, b)) -> ")
    assert all(name in run("passes").out for name in listed)


def test_passes_says_which_plugins_are_broken(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "broken", lambda: {"a: b": fxopt.PluginError("the plugin 'b' could not be loaded")})
    assert run("passes", "--json").json["broken"] == {"a: b": "the plugin 'b' could not be loaded"}
    assert "the plugin 'b' could not be loaded" in run("passes").err
    monkeypatch.setattr(doctor, "PEERS", ())
    assert {entry.status for entry in doctor._plugins()} == {"ok", "broken"}


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        pytest.param([doctor.Finding("torch", "ok", "here")], 0, id="all well"),
        pytest.param([doctor.Finding("timm", "broken", "no", needed=False)], 0, id="broken, but not needed"),
        pytest.param([doctor.Finding("rich", "broken", "no")], 4, id="broken and needed"),
        pytest.param([doctor.Finding("oneDNN", "wrong", "5 instead of 4")], 1, id="a wrong answer"),
    ],
)
def test_doctor_fails_where_something_needed_does(
    run: Any, monkeypatch: pytest.MonkeyPatch, findings: list[doctor.Finding], code: int
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda progress: tuple(findings))
    ran = run("doctor", "--json")
    assert ran.code == code
    assert ran.json["ok"] is (code == 0)
    assert ran.json["findings"][0]["name"] == findings[0].name
    assert findings[0].detail in run("doctor").out


def test_doctor_tries_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = {distribution for _, distribution, _ in doctor.PEERS}
    monkeypatch.setattr(doctor, "_CHECKS", [(name, check) for name, check in doctor._CHECKS if name not in peers])
    found = {finding.name: finding.status for finding in doctor.examine()}
    assert {found[name] for name in ("torch", "passes", "backend aten", "networkx")} == {"ok"}
    assert set(found.values()) <= {"ok", "absent"}


def test_doctor_survives_a_check_that_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises() -> Iterator[doctor.Finding]:
        raise RuntimeError("bad luck")
        yield

    monkeypatch.setattr(doctor, "_CHECKS", [("luck", raises)])
    assert doctor.examine() == (doctor.Finding("luck", "broken", "RuntimeError: bad luck"),)


@pytest.mark.parametrize(
    ("module", "status", "said"),
    [
        pytest.param("json", "ok", "", id="a module that imports"),
        pytest.param("undone", "broken", "OSError: a library is missing", id="a module that raises"),
        pytest.param("no_such_module", "absent", "", id="a module that is not there"),
    ],
)
def test_doctor_imports_peers(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, status: str, said: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    (found,) = doctor._peer(module, "fxopt", "tests")()
    assert found.status == status
    assert said in found.detail
    assert not found.needed or status == "ok"


# -- exit codes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        pytest.param(("compile", "net.py"), 2, "names no model", id="2: a model without a factory"),
        pytest.param(("compile", "none.py:build"), 2, "there is no file none.py", id="2: a file that is not there"),
        pytest.param(("compile", "net.py:biuld"), 2, "there are: build", id="2: a factory that is not there"),
        pytest.param(("compile", "no_such.module:f"), 2, "no module 'no_such'", id="2: a module that is not there"),
        pytest.param(("compile", "torch.no_such:f"), 2, "no module 'torch.no_such'", id="2: a submodule, likewise"),
        pytest.param(("compile", "net.py:wide"), 2, "needs arguments: width", id="2: a factory that needs arguments"),
        pytest.param(("compile", "net.py:number"), 2, "gives int, not an nn.Module", id="2: a factory of ints"),
        pytest.param(("compile", "net.py:neighbour"), 2, "is module, neither", id="2: what is no factory"),
        pytest.param(("compile", "net.py:build", "--shape", "2xx3"), 2, "'2xx3' is no shape", id="2: a shape"),
        pytest.param(("compile", "net.py:build", "--shape", "2:flot"), 2, "no dtype is named", id="2: a dtype"),
        pytest.param(("compile", "net.py:build", "--passes", "no-such"), 2, "no pass is named", id="2: a pass"),
        pytest.param(("compile", "net.py:build", "--disable", "no-such"), 2, "no pass is named", id="2: disabled"),
        pytest.param(("compile", "net.py:build", "--backend", "none"), 2, "no backend is named", id="2: a backend"),
        pytest.param(("compile", "net.py:build", "--input", "none.jpg"), 2, "does not exist", id="2: a picture's path"),
        pytest.param(("diff", "net.py:build", "-o", "d.bmp"), 2, "a diff is not saved as", id="2: a suffix"),
        pytest.param(("diff", "net.py:build", "-o", "none/d.svg"), 2, "there is no folder", id="2: a folder"),
        pytest.param(("diff", "net.py:build", "--pass", "no-such"), 2, "no-such", id="2: a pass to draw"),
        pytest.param(("explain", "net.py:build", "nrom"), 2, "there are: norm", id="2: a layer"),
        pytest.param(("verify", "net.py:build"), 2, "verify needs inputs", id="2: verify without inputs"),
        pytest.param(("verify", "net.py:build", *IMAGE, "--batches", "0"), 2, "0 is not in", id="2: no batches"),
        pytest.param(("no-such",), 2, "No such command", id="2: a command"),
        pytest.param(("passes", "--no-such"), 2, "No such option", id="2: an option"),
        pytest.param(("compile", "net.py:Branch"), 3, "give an example input: --shape", id="3: not traceable"),
        pytest.param(("compile", "net.py:Branch", "--shape", "2x3"), 3, "torch.export cannot", id="3: not exportable"),
        pytest.param(("compile", "net.py:raises"), 4, "RuntimeError: no weights here", id="4: a factory that raises"),
        pytest.param(("compile", "undone:f"), 4, "OSError: a library is missing", id="4: a module that raises"),
        pytest.param(("compile", "undone.py:f"), 4, "running undone.py raised OSError", id="4: a file that raises"),
        pytest.param(("compile", "faulty:f"), 4, "No module named 'no_such_thing_at_all'", id="4: a module's import"),
        pytest.param(("compile", "net.py:build", "--shape", "2x4x8x8"), 4, "to have 3 channels", id="4: inputs"),
        pytest.param(("compile", "net.py:build", "--input", "net.py"), 4, "cannot be read", id="4: what is no picture"),
        pytest.param(("verify", "net.py:Sizes", "--shape", "2x6"), 4, "--dynamic-shapes none", id="4: a batch size"),
    ],
)  # fmt: skip
def test_exit_codes_and_messages(run: Any, arguments: tuple[str, ...], code: int, said: str) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out.replace("printed by the model\n", "")) == (code, "")
    assert said in ran.err
    assert "Traceback" not in ran.err
    as_json = run(*arguments, "--json")
    error = as_json.json["error"]
    assert as_json.code == error["exit_code"] == code
    assert said in f"{error['message']} {error['hint']}"
    assert set(error) == {"type", "message", "pass", "rule", "node", "line", "hint", "exit_code"}


def test_an_error_names_the_user_s_own_line(run: Any) -> None:
    line = next(number for number, text in enumerate(NET.splitlines(), 1) if "neighbour.REASON" in text)
    assert f"net.py:{line} in raises" in run("compile", "net.py:raises").err


@pytest.fixture
def miscompiler() -> Iterator[str]:
    """A pass that gives a wrong answer: relu becomes gelu."""
    aten = torch.ops.aten
    rule = fxopt.Rule(
        "wrong",
        fxopt.call(aten.relu.default, fxopt.var("x"), name="relu"),
        lambda match, rewriter: rewriter.call(aten.gelu.default, match["x"]),
    )
    yield fxopt.register(fxopt.Pass("miscompile", rules=(rule,), numerics="bitwise")).name
    plugins.unregister("miscompile")


def test_exit_code_1_is_a_wrong_answer(run: Any, miscompiler: str) -> None:
    wrong = ("net.py:build", *IMAGE, "--passes", miscompiler)
    ran = run("verify", *wrong, "--no-verify")
    assert ran.code == 1
    assert "WRONG on 4 of 4 batches" in ran.out
    as_json = run("verify", *wrong, "--no-verify", "--json")
    assert as_json.code == 1
    assert as_json.json["ok"] is False
    strict = run("compile", *wrong, "--strict", "--json")
    assert strict.code == 1
    assert strict.json["error"]["type"] == "VerificationError"


def test_a_pass_that_was_rolled_back_is_no_failure(run: Any, miscompiler: str) -> None:
    ran = run("compile", "net.py:build", *IMAGE, "--passes", miscompiler, "--json")
    assert ran.code == 0
    assert [entry["status"] for entry in ran.json["report"]["passes"]] == ["rolled back"]


def test_what_fxopt_did_not_expect_is_4_with_a_traceback(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug() -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(plugins, "available", bug)
    ran = run("passes", "--json")
    assert ran.code == ran.json["error"]["exit_code"] == 4
    assert ran.json["error"]["message"] == "a bug"
    assert "Traceback" in ran.err


def test_an_interrupt_is_130(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(plugins, "available", interrupt)
    ran = run("passes")
    assert ran.code == 130
    assert "interrupted" in ran.err


COMMANDS = ("", "compile", "diff", "explain", "passes", "verify", "doctor", "bench", "evaluate")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_has_the_exit_codes(run: Any, command: str, option: str) -> None:
    ran = run(*([command] if command else []), option)
    assert ran.code == 0
    codes = [int(line.split()[0]) for line in ran.out.partition("Exit codes:")[2].splitlines() if line.strip()]
    assert codes == [0, 1, 2, 3, 4]


def test_version(run: Any) -> None:
    assert run("--version").out == f"fxopt, version {fxopt.__version__}\n"


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fxopt", "passes", "--json"], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["passes"]


def test_a_reader_that_leaves_early_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    terminal.show({}, "text", as_json=True)
    assert sys.stdout.writable()


# -- progress --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with terminal.progress() as told:
        told("fold-batchnorm", 1, 5)
        told("done", 5, 5)
    assert "fold-batchnorm" in sys.stderr.getvalue()


def test_progress_is_silent_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with terminal.progress() as told:
        told("fold-batchnorm", 1, 5)
    assert sys.stderr.getvalue() == ""
