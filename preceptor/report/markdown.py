"""Markdown from the templates in this folder, one for each language. What data says can't leave its line or cell."""

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from preceptor.core.records import Language

_GAPS = re.compile(r"\n{3,}")
_MARKS = re.compile(r"[\\`|\[\]]")


def rendered(name: str, language: Language, **values: Any) -> str:
    """The template of that name and language, filled in. What is marked `safe` stands as it is."""
    told = _environment().get_template(f"{name}.{language}.md").render(values)
    return _GAPS.sub("\n\n", told).strip() + "\n"


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("preceptor", "report"),
        autoescape=False,  # noqa: S701  Markdown has other marks than HTML: `_plain` sees to both
        finalize=_plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, Markup):
        line = " ".join(value.split()).replace("&", "&amp;").replace("<", "&lt;")
        return _MARKS.sub(r"\\\g<0>", line)
    return f"{value:,}" if isinstance(value, int) else value
