"""What pages and charts share: templates, in which every value is escaped and every name has to be known, and paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fxopt.errors import UsageError


def filled(template: str, **values: object) -> str:
    """The text of `fxopt/templates/<template>` with `values`, functions among them."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fxopt", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text: str = environment.get_template(template).render(**values)
    return text


def kind_of(path: Path, suffixes: Sequence[str], what: str) -> str:
    """How a path's suffix says to save `what`. Raises UsageError where it is none of `suffixes`."""
    kind = path.suffix.removeprefix(".").lower()
    if kind not in suffixes:
        hint = "its suffix says how: " + " ".join(f".{suffix}" for suffix in suffixes)
        raise UsageError(f"{what} is not saved as {path.name!r}", hint=hint)
    return kind
