"""For mkdocs: the README is the first page, and files of the repository that a page links to become pages too.

In the repository a link to ../src/topd/... opens the file; in the site it opens a page that shows it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the first page, and a page for each linked file outside docs/."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    linked = {target for page in files.documentation_pages() for target in _linked(page.content_string, page.src_uri)}
    for target in sorted(linked):
        if (ROOT / target).is_file() and not target.startswith("docs/"):
            files.append(File.generated(config, _page_of(target), content=_shown(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the site's pages."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    here = posixpath.dirname(uri) or "."
    return LINK.sub(lambda link: posixpath.relpath(_page_of(_target(link[1], uri)), here), markdown)


def _linked(markdown: str, uri: str) -> set[str]:
    return {_target(link, uri) for link in LINK.findall(markdown)}


def _target(link: str, uri: str) -> str:
    """What a link means, as a path from the repository's root."""
    folder = "" if uri == "index.md" else posixpath.join("docs", posixpath.dirname(uri))
    return posixpath.normpath(posixpath.join(folder, link))


def _page_of(target: str) -> str:
    """The site's path of a file of the repository."""
    return target.removeprefix("docs/") if target.startswith("docs/") else f"source/{target}.md"


def _shown(target: str) -> str:
    text, language = (ROOT / target).read_text(encoding="utf-8"), Path(target).suffix.lstrip(".") or "text"
    return f"---\nsearch:\n  exclude: true\n---\n# {target}\n\n``````{language}\n{text}\n``````\n"
