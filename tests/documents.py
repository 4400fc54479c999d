"""The project's documents as tests read them: pages, blocks of code, links, and `topd` commands without running."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from topd.cli.check import check_parser, parsed
from topd.cli.main import parser
from topd.cli.train import parse
from topd.cli.warmstart import parse as parse_warmstart

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, *sorted((ROOT / "studies").glob("*.md"))]
FENCE = re.compile(r"^(`{3,})(\w*)[^\n]*\n(.*?)^\1[ \t]*$", re.MULTILINE | re.DOTALL)
ON_CPU = ("--use_cpu", "true", "--bf16", "false")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [found[3] for found in FENCE.finditer(page.read_text(encoding="utf-8")) if found[2] == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(page: Path) -> Iterator[list[str]]:
    """The `topd` commands of a page's bash blocks."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            yield from commands_of(line)


def commands_of(line: str) -> Iterator[list[str]]:
    """The words of a `topd` command without `topd` and what launches it; "..." stands for what was said before."""
    words = shlex.split(line, comments=True)
    for start, (before, word) in enumerate(zip(["", *words], words, strict=False), 1):
        if (start == 1 and word == "topd") or (before, word) == ("-m", "topd.cli"):
            yield [each for each in words[start:] if each != "..."]


def assert_parses(words: Sequence[str]) -> None:
    """A command's options are known to its parser, and have values that it takes. Nothing is run."""
    name, *options = words
    if name == "train":
        parse([*options, *ON_CPU])
    elif name == "warmstart":
        parse_warmstart([*options, *ON_CPU])
    elif name == "check":
        parsed([*check_parser().parse_known_args(options)[1], *ON_CPU])
    else:
        assert callable(parser().parse_args(words).run)
