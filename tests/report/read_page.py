"""A report page as a browser would build it, and what must hold of every page."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

from topd.report import write_report


class Page(HTMLParser):
    """The page as a browser would build it: elements with attributes, and the text of each kind of element."""

    INLINE = ("span", "b", "i", "a", "sup", "sub", "code", "strong", "em", "cite", "title", "text")
    VOID = ("meta", "link", "input", "br", "hr", "img")

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.INLINE:
            self.texts.append(("", " "))
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    @property
    def text(self) -> str:
        """All that a reader sees; script and style are not text."""
        return " ".join("".join(text for tag, text in self.texts if tag not in ("script", "style")).split())

    def all(self, tag: str, class_: str = "") -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag and class_ in (attrs.get("class") or "")]


def page_of(run: Path) -> Page:
    page = Page(write_report(run))
    assert not page.open, "every element is closed"
    return page


def assert_harmless(page: Page) -> None:
    script = (Path(sys.modules["topd.report.page"].__file__ or "").parent / "script.js").read_text(encoding="utf-8")
    data, code = [text for tag, text in page.texts if tag == "script"]
    assert code == script
    assert page.all("script") == [{"type": "application/json", "id": "futures"}, {}]
    json.loads(data)
    assert not set("<>&") & set(data), "nothing in the data can end its element"
    for tag, attrs in page.elements:
        assert tag not in ("img", "iframe", "object", "embed", "base", "audio", "video", "source")
        for name, value in attrs.items():
            assert not name.startswith("on"), f"<{tag} {name}>"
            if name in ("href", "src", "xlink:href", "action", "poster", "srcset", "data"):
                assert (value or "").startswith("#") or value == "data:,", f"<{tag} {name}={value}>"
            assert "url(" not in (value or "") or "url(#" in (value or "")
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", "".join(text for tag, text in page.texts if tag == "style"))
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids)), "ids are unique"
    fragments = {attrs["href"][1:] for _, attrs in page.elements if (attrs.get("href") or "").startswith("#")}
    assert fragments <= set(ids), "links lead somewhere"
