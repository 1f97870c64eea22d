"""Fills in the templates of pages and charts, in which every value is escaped and every name has to be known."""

from __future__ import annotations


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
