"""The before/after diff as pictures and as a page: valid, escaped, self-contained, and of use without `dot`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import fx, nn

import fxopt
from fxopt import dot, ir, render
from fxopt.graphdiff import GraphDiff

DOT = shutil.which("dot")

#: What would break out of DOT, HTML, XML, a script or a label, were it not escaped.
HOSTILE = (
    "</script><script>alert(1)</script>",
    "<b>bold</b>",
    '"];evil [label="owned',
    "back\\slash\\n\\N\\",
    "&lt;i&gt; &amp; &#60;",
    "<<table><tr><td>x</td></tr></table>>",
    "new\nline\x00\x1b[31m",
    "{{ 7 * 7 }}{% raw %}",
    "]]>-->",
)


@cache
def chain() -> GraphDiff:
    """Every status but changed: a fused layer, a dropped identity, a kept pool."""
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2))
    return fxopt.compile(model.eval(), (torch.randn(2, 4, 6, 6),)).diff()


@cache
def changed() -> GraphDiff:
    """Two graphs that differ in one operator."""
    graphs = []
    for operator in (torch.sin, torch.cos):
        graph = fx.Graph()
        graph.output(graph.create_node("call_function", operator, (graph.placeholder("x"),), name="wave"))
        graphs.append(graph)
    return fxopt.diff(*graphs)


@cache
def hostile() -> GraphDiff:
    """Module paths, lines and arguments that hold every hostile text, on both sides."""
    sides = []
    for operator in (torch.sin, torch.cos):
        graph = fx.Graph()
        value = graph.placeholder("x")
        for text in HOSTILE:
            value = graph.call_function(operator, (value, text), {"note": text})
            value.meta["origin"] = (ir.Origin(text, f"{text}:1 in {text}"),)
        graph.output(value)
        sides.append(graph)
    return fxopt.diff(*sides)


@cache
def empty() -> GraphDiff:
    """Two graphs without a node."""
    return fxopt.diff(fx.Graph(), fx.Graph())


DIFFS = {make.__doc__.rstrip("."): make for make in (chain, changed, hostile, empty)}  # type: ignore[union-attr]
every_diff = pytest.mark.parametrize("make", DIFFS.values(), ids=DIFFS.keys())


@pytest.fixture
def without_dot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH on which there is no `dot`."""
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


class Page(HTMLParser):
    """A page taken apart: its elements, its texts, and what its script is given."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def data(self) -> dict[str, dict[str, object]]:
        """The JSON that the page's script reads."""
        return next(json.loads(text) for text in self.texts if text.startswith('{"') or text == "{}")


# -- DOT -------------------------------------------------------------------------------------------------------------


def parsed(source: str) -> bool:
    """Whether DOT is well formed: by `dot` where it is installed, else by its quotes and braces."""
    if DOT is not None:
        done = subprocess.run([DOT, "-Tcanon"], input=source.encode(), capture_output=True, check=False)
        return done.returncode == 0 and not done.stderr
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", source, flags=re.DOTALL)
    return '"' not in bare and bare.count("{") == bare.count("}")


@every_diff
def test_dot_is_well_formed(make: object) -> None:
    assert parsed(dot.to_dot(make()))  # type: ignore[operator]


def test_what_stands_together_is_at_one_height_and_joined_by_an_arrow() -> None:
    diff = chain()
    pairs = [(old, new, bool(change)) for old, new, change in dot.together(diff)]
    fused = diff.groups[0]
    assert (fused.before[-1], fused.after[-1], True) in pairs
    assert {old for old, _, change in pairs if not change} == {n.name for n in diff.before if n.status == "kept"}
    source = dot.to_dot(diff)
    assert source.count("rank=same") == len(pairs)


@pytest.mark.parametrize(
    "status", dot.LOOKS, ids=lambda status: f"{status} is told by sign and border, not colour alone"
)
def test_looks(status: str) -> None:
    look = dot.LOOKS[status]  # type: ignore[index]
    others = [other for name, other in dot.LOOKS.items() if name != status]
    assert look.sign not in {other.sign for other in others}
    assert look.border not in {other.border for other in others}
    assert f"{look.sign} {status}" in dot.to_dot(chain()), "the legend has it"


def test_of_many_long_edges_the_longest_are_counted_and_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = fx.Graph()
    values = [graph.placeholder("x")]
    for _ in range(6):
        values.append(graph.call_function(torch.add, (values[-1], values[0])))
    graph.output(values[-1])
    diff = fxopt.diff(graph, fx.Graph())
    assert "further up" not in dot.to_dot(diff)
    drawn = dot.to_dot(diff).count("->")
    monkeypatch.setattr(dot, "MOST_ROWS_CROSSED", 16)
    source = dot.to_dot(diff)
    assert source.count("and 1 inputs from further up") == drawn - source.count("->") == 2


def test_sizes_are_in_the_table_and_not_in_the_picture() -> None:
    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x.reshape(x.shape[0] * 2, -1))

    diff = fxopt.compile(Flat().eval(), (torch.randn(4, 6),)).diff()
    sizes = [node for node in diff.before if node.size]
    assert sizes
    assert not any(f'"before-{diff.before.index(node)}"' in dot.to_dot(diff) for node in sizes)
    entries = {node.name for row in render.rows(diff) for _, node in row.before}
    assert {node.name for node in sizes} <= entries


def test_tooltips_tell_line_pass_rule_and_refusals() -> None:
    source = dot.to_dot(chain())
    assert "by fold-batchnorm (norm-after-layer)" in source
    assert "left by drop-identities: it pools" in source


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        pytest.param((), "", id="no module, no text"),
        pytest.param(("layer1.conv",), "layer1.conv", id="one module is written out"),
        pytest.param(("l.0.conv", "l.0.bn", "l.0"), "l.0.{conv, bn}", id="a common beginning is written once"),
        pytest.param(("l.0.bn", "l.0"), "l.0.bn", id="a module and its parent are the module"),
        pytest.param(("conv", "bn"), "conv, bn", id="without a common beginning there are no braces"),
        pytest.param(tuple("abcdef"), "a, b, c, d, 2 more", id="many are counted"),
    ],
)
def test_module_paths(modules: tuple[str, ...], text: str) -> None:
    assert dot.module_text(modules) == text


def test_a_fused_node_says_what_is_fused_into_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.conv(x) + x.sigmoid())

    diff = fxopt.compile(Block().eval(), (torch.randn(2, 4, 6, 6),)).diff()
    fused = next(node for node in diff.after if node.status == "added")
    assert dot.title_text(fused) == "fxopt.convolution (residual, relu)"
    line = Block.forward.__code__.co_firstlineno + 1
    assert f"your code: tests/test_render.py:{line} in forward" in dot.to_dot(diff)


# -- hostile names ---------------------------------------------------------------------------------------------------


def test_hostile_names_are_shown_as_they_are_in_the_picture() -> None:
    diff = hostile()
    if DOT is None:
        with pytest.raises(fxopt.RenderError):
            render.draw(diff, "svg")
        return
    tree = ElementTree.fromstring(render.draw(diff, "svg"))
    name = "{http://www.w3.org/2000/svg}"
    assert {element.tag.removeprefix(name) for element in tree.iter()} <= {
        *("svg", "g", "title", "polygon", "text", "a", "path", "polyline")
    }
    texts = {element.text for element in tree.iter(f"{name}text")}
    for text in HOSTILE:
        shown = re.sub(r"[\n\x00\x1b]", "\ufffd", text)
        assert any(entry is not None and entry.replace("\xa0", " ") == shown for entry in texts), text


def test_hostile_names_are_text_in_the_page() -> None:
    diff = hostile()
    page = Page(render.to_html(diff))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert "i" not in {tag for tag, _ in page.tags}
    assert "evil" not in " ".join(name for _, attributes in page.tags for name in attributes)
    words = " ".join(str(node["search"]) for node in page.data().values())
    for text in HOSTILE:
        assert text.lower() in words
    assert "49" not in "".join(page.texts), "no name is taken for a template"


def test_a_model_with_hostile_names_is_drawn() -> None:
    model = nn.Sequential()
    model.add_module('</script><b>"', nn.Conv2d(2, 2, 1))
    model.add_module("<&>", nn.ReLU())
    page = Page(render.to_html(fxopt.compile(model.eval(), (torch.randn(2, 2, 4, 4),)).diff()))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert any('</script><b>"' in str(node["search"]) for node in page.data().values())


# -- the page --------------------------------------------------------------------------------------------------------


@every_diff
@pytest.mark.parametrize("drawn", [True, False], ids=["with dot", "without dot"])
def test_the_page_needs_nothing_else(make: object, drawn: bool, request: pytest.FixtureRequest) -> None:
    if not drawn:
        request.getfixturevalue("without_dot")
    page = Page(render.to_html(make()))  # type: ignore[operator]
    assert not {"link", "img", "iframe", "object", "image", "use"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not {"src", "href", "xlink:href"} & {name for name, value in attributes.items() if value}
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_page_knows_every_node_and_what_belongs_to_it() -> None:
    diff = chain()
    page = Page(render.to_html(diff))
    nodes = page.data()
    assert len(nodes) == len(diff.before) + len(diff.after)
    norm = next(key for key, node in nodes.items() if str(node["title"]).startswith("batch_norm"))
    statuses = [nodes[str(key)]["status"] for key in nodes[norm]["related"]]  # type: ignore[attr-defined]
    assert sorted(statuses) == ["added", "removed", "removed"], "its group: what went with it, and what came"
    entries = [a["data-node"] for _, a in page.tags if "data-node" in a]
    assert sorted(map(str, entries)) == sorted(nodes), "each node stands in the table once"
    if DOT is not None:
        drawn = {a["id"] for tag, a in page.tags if tag == "g" and "node" in str(a.get("class")).split()}
        assert drawn == set(nodes), "and in the picture"


def test_the_page_has_numbers_passes_search_and_legend() -> None:
    page = Page(render.to_html(chain()))
    texts = " ".join(" ".join(page.texts).split())
    assert "5 operations before, 2 after." in texts.replace("  ", " ")
    for words in ("batch_norm 1 → 0", "fuse-conv-activation", "− 4 removed", "+ 1 added", "= 3 kept"):
        assert words in texts
    assert any(tag == "input" and a.get("id") == "search" for tag, a in page.tags)


@every_diff
def test_the_table_has_each_node_once_and_keeps_both_orders(make: object) -> None:
    diff: GraphDiff = make()  # type: ignore[operator]
    table = render.rows(diff)
    for side in ("before", "after"):
        found = [node.name for row in table for _, node in getattr(row, side)]
        assert sorted(found) == sorted(node.name for node in getattr(diff, side))
    kept = [row for row in table if row.status == "kept"]
    for side in ("before", "after"):
        places = [int(row_side[0][0].rpartition("-")[2]) for row in kept for row_side in [getattr(row, side)]]
        assert places == sorted(places)


# -- files -----------------------------------------------------------------------------------------------------------

MAGIC = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF", "dot": b"digraph", "html": b"<!doctype", "json": b"{"}


@pytest.mark.parametrize("suffix", MAGIC, ids=lambda suffix: f"saves .{suffix}")
def test_save(suffix: str, tmp_path: Path) -> None:
    diff, path = chain(), tmp_path / f"diff.{suffix.upper()}"
    if DOT is None and suffix in render.PICTURES:
        with pytest.raises(fxopt.RenderError, match="graphviz"):
            diff.save(path)
    else:
        assert diff.save(str(path)) == path
        assert path.read_bytes().startswith(MAGIC[suffix])


def test_an_unknown_suffix_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(fxopt.UsageError, match=r"(?s)'diff.gif'.*\.html \.svg"):
        chain().save(tmp_path / "diff.gif")


@pytest.mark.parametrize("suffix", ["svg", "png", "pdf"], ids=lambda suffix: f".{suffix} names the package to install")
@pytest.mark.usefixtures("without_dot")
def test_pictures_without_dot(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(fxopt.RenderError, match=r"(?s)not installed.*package graphviz.*\.html"):
        chain().save(tmp_path / f"diff.{suffix}")
    assert not (tmp_path / f"diff.{suffix}").exists()


@pytest.mark.parametrize("suffix", ["html", "dot", "json"], ids=lambda suffix: f".{suffix} needs no dot")
@pytest.mark.usefixtures("without_dot")
def test_files_without_dot(suffix: str, tmp_path: Path) -> None:
    assert chain().save(tmp_path / f"diff.{suffix}").read_bytes().startswith(MAGIC[suffix])


@pytest.mark.usefixtures("without_dot")
def test_without_dot_the_page_is_a_table_and_says_why() -> None:
    page = Page(render.to_html(chain()))
    assert "svg" not in {tag for tag, _ in page.tags}
    assert any("no picture, only the table" in text and "graphviz" in text for text in page.texts)
    table = next(a for _, a in page.tags if a.get("id") == "table")
    assert "hidden" not in table


@pytest.mark.parametrize(
    ("script", "message"),
    [
        pytest.param(
            "echo 'Error: trouble in init_rank' >&2; exit 1", "trouble in init_rank", id="its complaint is told"
        ),
        pytest.param("exit 3", "exit status 3", id="its silence too"),
        pytest.param(
            "exec sleep 20", r"did not lay out 11 nodes in 0.2 seconds", id="it may take so long and no longer"
        ),
    ],
)
def test_a_dot_that_fails(script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "dot"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("FXOPT_DOT_SECONDS", "0.2" if "sleep" in script else "20")
    diff = chain()
    with pytest.raises(fxopt.RenderError, match=message):
        render.draw(diff, "svg")
    assert "no picture, only the table" in render.to_html(diff)


def test_a_saved_diff_is_drawn_again_from_its_json(tmp_path: Path) -> None:
    diff = chain()
    again = GraphDiff.from_dict(json.loads(diff.save(tmp_path / "diff.json").read_text()))
    assert render.to_html(again) == render.to_html(diff)
