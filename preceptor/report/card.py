"""The card of a trained model: what it is, what it learned from, and what it may not be used for."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_ON_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_TEXT = """\
---
{head}---

# {title}

A student that Preceptor trained. **Not for care**: nothing here says that it was tested on patients.

- **Base**: {base}
- **Learned from**: {rows:,} rows
{transductive}- **How good it is**: measured in its run, by `evaluate`; nothing here says so

## Settings

```yaml
{settings}```
"""


def card(title: str, base: str, settings: Mapping[str, Any], *, adapter: bool, rows: int, transductive: int) -> str:
    """The card as Markdown with a hub's header. `base` is a section, a folder, or a name on a hub (owner/name).

    `rows`: what was learned, of which `transductive` are about target cases.
    """
    head: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
    if _ON_HUB.fullmatch(base) and not Path(base).exists():
        head["base_model"] = base
    head["tags"] = ["preceptor", "clinical", *["transductive"] * bool(transductive)]
    said = f"- **Transductive**: {transductive:,} of them are about the target cases\n" if transductive else ""
    return _TEXT.format(
        head=yaml.safe_dump(head, sort_keys=False),
        title=title,
        base=f"`{base}`",
        rows=rows,
        transductive=said,
        settings=yaml.safe_dump(dict(settings), sort_keys=False),
    )
