"""`make tutorial`: runs docs/tutorial.py, and writes what it consists of and what it printed into docs/tutorial.md.

The page shows each section of the program (what follows `# -- name ---`) between markers of that name, and behind it
what the program printed there. The pictures go to docs/images; that of the graph needs graphviz's `dot`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import tutorial
from tutorial_chart import chart

HERE = Path(__file__).resolve().parent
PAGE, PROGRAM, IMAGES = HERE / "tutorial.md", HERE / "tutorial.py", HERE / "images"
REGION = re.compile(r"<!-- (?P<name>[\w -]+): written by make tutorial -->.*?<!-- end of (?P=name) -->", re.S)


def sections() -> dict[str, str]:
    """The program's code by the names of its sections; "imports" is what is in front of the first."""
    _, text = PROGRAM.read_text(encoding="utf-8").split("from __future__ import annotations\n", 1)
    first, *rest = re.split(r"^# -- (.+?) -+$", text, flags=re.M)
    found = {"imports": first, **dict(zip(rest[::2], rest[1::2], strict=True))}
    return {name: code.strip() for name, code in found.items()}


def outputs(printed: str) -> dict[str, str]:
    """What the program printed, by the names of the sections."""
    plain = re.sub(r" +$", "", printed, flags=re.M).replace(f"{HERE.parent}/", "")
    _, *rest = re.split(r"^== (.+) ==$", plain, flags=re.M)
    return {name: text.strip() for name, text in zip(rest[::2], rest[1::2], strict=True)}


def filled(page: str, printed: dict[str, str]) -> str:
    """The page with every region written anew."""
    code = sections()

    def region(found: re.Match[str]) -> str:
        name = found["name"]
        text = f"```python\n{code[name]}\n```\n"
        if name in printed:
            text += f"\n```text\n{printed[name]}\n```\n"
        return f"<!-- {name}: written by make tutorial -->\n\n{text}\n<!-- end of {name} -->"

    return REGION.sub(region, page)


class Both(io.StringIO):
    """What is printed, kept, and shown as it comes."""

    def write(self, text: str) -> int:
        sys.__stdout__.write(text)
        return super().write(text)


def main() -> None:
    """Runs the program, and writes the page and its pictures."""
    os.chdir(HERE.parent)  # the program leaves its files in build/tutorial
    printed = Both()
    with contextlib.redirect_stdout(printed):
        results = tutorial.main()
    curves = {name: curve for name, curve in results.curves.items() if name != "hinge"}
    (IMAGES / "tutorial-losses.svg").write_text(chart("Cross-entropy in training", curves), encoding="utf-8")
    results.fast.diff().save(IMAGES / "tutorial.svg")
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), outputs(printed.getvalue())), encoding="utf-8")


if __name__ == "__main__":
    main()
