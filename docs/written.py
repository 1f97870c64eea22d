"""What the programs of this folder write into its pages: tables in Markdown, between two markers that stay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def fill(page: Path, begin: str, end: str, text: str) -> None:
    """Puts a text between the markers of a page, in the place of what was there."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
