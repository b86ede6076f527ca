"""Pages: HTML files made from Jinja2 templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .texts import shown


def render(template: Path, **values: Any) -> str:
    """Returns the HTML page that the template makes of the values.

    Values are escaped, except where the template marks one as safe. The template may extend and include files of its
    own folder, write a value with `shown`, and pass values to a script with `tojson`, which refuses nan and infinities.
    Raises jinja2.UndefinedError for a name that no value has.
    """
    pages = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["shown"] = shown
    pages.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return pages.get_template(template.name).render(values)
