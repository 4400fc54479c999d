"""For mkdocs: the README is the first page, and files of the repository that a page links to become pages too.

In the repository a link to ../src/topd/... opens the file; in the site it opens a page that shows it. Markdown files
outside docs/ become ordinary pages. Pictures whose boxes are links are put into their page.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
PICTURE = re.compile(r"!\[[^\]]*\]\((img/\w+\.svg)\)")
BOX = re.compile(r'(?<=<a href=")\.\./\.\./([^"#]+)#\w+')
FROM_README = re.compile(r'(?<=src="|set=")docs/')


def on_files(files: Files, config: Any) -> Files:
    """Add the first page, and a page for each linked file outside docs/."""
    files.append(File.generated(config, "index.md", content=_read("README.md")))
    waiting = [(page.content_string, page.src_uri) for page in files.documentation_pages()]
    added = {"README.md"}
    while waiting:
        for target in sorted(_linked(*waiting.pop()) - added):
            if (ROOT / target).is_file() and not target.startswith("docs/"):
                added.add(target)
                content = _read(target) if target.endswith(".md") else _shown(target)
                files.append(File.generated(config, _page_of(target), content=content))
                if target.endswith(".md"):
                    waiting.append((content, _page_of(target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at the site's pages, and put pictures with links into the page."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    here = posixpath.dirname(uri) or "."
    markdown = PICTURE.sub(lambda picture: _inline(picture[0], ROOT / "docs" / here / picture[1], here), markdown)
    markdown = FROM_README.sub("", markdown) if uri == "index.md" else markdown
    return LINK.sub(lambda link: posixpath.relpath(_page_of(_target(link[1], uri)), here), markdown)


def _inline(usual: str, picture: Path, here: str) -> str:
    """The picture itself, with links to the site's pages; as usual where it has no links."""
    svg = picture.read_text(encoding="utf-8")
    if not BOX.search(svg):
        return usual
    return f"<div>{BOX.sub(lambda box: posixpath.relpath(_built(_page_of(box[1])), here), svg)}</div>"


def _linked(markdown: str, uri: str) -> set[str]:
    return {_target(link, uri) for link in LINK.findall(markdown)}


def _target(link: str, uri: str) -> str:
    """What a link means, as a path from the repository's root."""
    path = "README.md" if uri == "index.md" else uri if (ROOT / uri).is_file() else f"docs/{uri}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def _page_of(target: str) -> str:
    """The site's path of a file of the repository."""
    if target == "README.md":
        return "index.md"
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return target if target.endswith(".md") else f"source/{target}.md"


def _built(page: str) -> str:
    return page.removesuffix(".md") + ".html"


def _read(target: str) -> str:
    return (ROOT / target).read_text(encoding="utf-8")


def _shown(target: str) -> str:
    language = Path(target).suffix.lstrip(".") or "text"
    return f"---\nsearch:\n  exclude: true\n---\n# {target}\n\n``````{language}\n{_read(target)}\n``````\n"
