"""For the site: links to files of the repository that are no pages become plain text, and README's first screen the index."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)([^)]+)\)")
_MARK = "<!-- the first screen of README.md -->"
_END = "<!-- end of the first screen -->"


def first_screen(readme: str) -> str:
    """README up to the mark that ends its first screen, without its title."""
    return readme.split(_END)[0].split("\n", 1)[1].strip()


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs for every page before it is rendered."""
    docs = Path(config["docs_dir"])
    if _MARK in markdown:
        markdown = markdown.replace(_MARK, first_screen((docs.parent / "README.md").read_text()))

    def plain(match: re.Match[str]) -> str:
        target = (docs / Path(page.file.src_uri).parent / (match[2] + match[3].split("#")[0])).resolve()
        return match[0] if target.is_relative_to(docs) else match[1]

    return _OUTSIDE.sub(plain, markdown)
