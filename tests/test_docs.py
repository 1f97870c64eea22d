"""The documentation is true: its code runs, its links lead somewhere, and no check and no pass is left out.

Every ```python block of a page runs in order in one namespace per page, so that a page reads as one session. A block
that begins with `>>>` is a doctest.
"""

from __future__ import annotations

import ast
import doctest
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import make_images
import pytest
import torch

from fxopt import check, plugins, render
from fxopt.pipeline import flat

CHECKOUT = Path(__file__).resolve().parent.parent
DOCS = CHECKOUT / "docs"
PAGES = (CHECKOUT / "README.md", *sorted(DOCS.rglob("*.md")))
PASS_PAGES = DOCS / "passes"
BLOCK = re.compile(r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!`)\[[^\]\n]*\]\((?P<target>[^)\s]+)\)")
#: A file of the project, named in prose: `fxopt/check.py`.
FILE = re.compile(r"`(?P<path>(?:fxopt|passes|tests|docs)/[\w/.-]+\.\w+)`")
DOCTEST_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def place(page: Path) -> str:
    """A page's path as it is shown in test names and messages."""
    return page.relative_to(CHECKOUT).as_posix()


def blocks(page: Path, kind: str) -> Iterator[tuple[int, str]]:
    """The fenced blocks of one kind: the line of the page on which each begins, and its text."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found["kind"] == kind:
            yield text.count("\n", 0, found.start("text")) + 1, textwrap.dedent(found["text"])


def run_doctest(text: str, scope: dict[str, Any], page: Path, line: int) -> None:
    """Runs one block of examples; AssertionError with what was expected and what came."""
    said: list[str] = []
    test = doctest.DocTestParser().get_doctest(text, {}, place(page), str(page), line - 1)
    test.globs = scope  # the parser takes a copy; names of one block are the next one's
    doctest.DocTestRunner(optionflags=DOCTEST_OPTIONS).run(test, out=said.append, clear_globs=False)
    assert not said, "".join(said)


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page, "python"))], ids=place)
def test_the_code_of_a_page_runs_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    registered = {**plugins._registered, **plugins._registered_backends}
    threads = torch.get_num_threads()
    module = ModuleType("docs_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses and pickle look for it
    scope = vars(module)
    try:
        for line, text in blocks(page, "python"):
            if text.startswith(">>>"):
                run_doctest(text, scope, page, line)
            else:
                exec(compile("\n" * (line - 1) + text, str(page), "exec", dont_inherit=True), scope)
    finally:
        torch.set_num_threads(threads)
        for name in {*plugins._registered, *plugins._registered_backends} - set(registered):
            plugins.unregister(name)


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    prose = BLOCK.sub("", page.read_text(encoding="utf-8"))
    targets = {found["target"].partition("#")[0] for found in LINK.finditer(prose)}
    local = {target for target in targets if target and "://" not in target}
    assert {target for target in local if not (page.parent / target).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=place)
def test_the_files_that_a_page_names_exist(page: Path) -> None:
    named = {found["path"] for found in FILE.finditer(page.read_text(encoding="utf-8"))}
    assert {path for path in named if not (CHECKOUT / path).exists()} == set()


@pytest.mark.parametrize("name", check.summary())
def test_the_contract_page_has_each_check(name: str) -> None:
    assert f"`{name}`" in (DOCS / "ir.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [current.name for current in flat(plugins.default_pipeline())])
def test_each_pass_of_the_default_pipeline_has_its_page(name: str) -> None:
    page = (PASS_PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {name}\n")
    current = plugins.named(name)
    assert [rule.name for rule in current.rules if f"`{rule.name}`" not in page] == []
    assert current.numerics in page


@pytest.mark.parametrize("name", make_images.pictures())
def test_a_page_shows_its_picture_and_it_is_current(name: str) -> None:
    picture = make_images.pictures()[name]
    (page,) = DOCS.rglob(f"{name}.md")
    assert f"]({os.path.relpath(picture, page.parent)})" in page.read_text(encoding="utf-8")
    if shutil.which("dot") is None:
        pytest.skip("without graphviz's dot")
    drawn = render.draw(make_images.difference(name), "svg").decode()
    assert texts(picture.read_text(encoding="utf-8")) == texts(drawn), f"python docs/make_images.py {name}"


def texts(svg: str) -> list[str]:
    """What a picture says. Where it says it differs between graphviz's versions."""
    return sorted(re.findall(r"<text[^>]*>([^<]*)", svg))


def test_every_page_is_on_the_map() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    mapped = {(DOCS / found["target"].partition("#")[0]).resolve() for found in LINK.finditer(index)}
    mapped |= {CHECKOUT / "README.md", DOCS / "README.md"}
    assert [place(page) for page in PAGES if page not in mapped] == []


def layers() -> dict[str, int]:
    """The table of docs/design.md: the row of each module or package (`fxopt.ir`, `fxopt.capture`)."""
    text = (DOCS / "design.md").read_text(encoding="utf-8").partition("## Decisions")[0]
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("| ")]
    found = {path: number for number, row in enumerate(rows) for path in re.findall(r"`(fxopt/[\w/]+)", row)}
    return {path.rstrip("/").replace("/", "."): number for path, number in found.items()}


def imports(file: Path) -> set[str]:
    """The modules of fxopt that a file imports while it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("fxopt"):
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


@pytest.mark.parametrize("module", layers())
def test_a_layer_imports_only_from_those_above_it(module: str) -> None:
    home, table = CHECKOUT / module.replace(".", "/"), layers()
    files = sorted(home.glob("*.py")) if home.is_dir() else [home.with_suffix(".py")]
    used = {name for file in files for name in imports(file)}
    below = {name for name in used & table.keys() if table[name] > table[module]}
    assert below == set()


@pytest.mark.parametrize(
    ("page", "kind", "file"),
    [
        pytest.param("writing-a-pass.md", "python", "example_plugin/fxopt_example_plugin.py", id="the pass"),
        pytest.param("writing-a-pass.md", "toml", "example_plugin/pyproject.toml", id="its distribution"),
        pytest.param("writing-a-backend.md", "python", "example_backend/fxopt_example_backend.py", id="the backend"),
        pytest.param("writing-a-backend.md", "toml", "example_backend/pyproject.toml", id="the backend's distribution"),
    ],
)
def test_a_page_on_writing_shows_the_example_as_it_is(page: str, kind: str, file: str) -> None:
    source = (CHECKOUT / "tests" / file).read_text(encoding="utf-8")
    assert source in [text for _, text in blocks(DOCS / page, kind)]
