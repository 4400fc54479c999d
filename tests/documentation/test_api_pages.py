"""The public names are on the pages of docs/api, and each says what it is."""

import importlib
import inspect
import re

import pytest
import yaml
from documents import ROOT

import topd
import topd.near_future

PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
SHOWN = re.compile(r"^::: ([\w.]+)\n((?: {4}.*\n)*)", re.MULTILINE)


def found(path):
    """The object of a dotted path."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            value = getattr(value, name)
        return value
    raise ModuleNotFoundError(path)


def on_page(page):
    """Objects of a page: those named, and of a named module what it defines, or the members that are listed."""
    for path, options in SHOWN.findall(page.read_text()):
        value = found(path)
        if not inspect.ismodule(value):
            yield path, value
            continue
        members = (yaml.safe_load(options) or {}).get("options", {}).get("members")
        own = [n for n, each in vars(value).items() if getattr(each, "__module__", "") == path and n[0] != "_"]
        yield from ((f"{path}.{name}", getattr(value, name)) for name in members or own)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_is_shown_exists_and_says_what_it_is(page):
    shown = dict(on_page(page))
    assert shown
    assert [path for path, value in shown.items() if not inspect.getdoc(value)] == []


def test_every_public_name_is_shown():
    shown = [value for page in PAGES for _, value in on_page(page)]
    for module in (topd, topd.near_future):
        names = [name for name in module.__all__ if name != "__version__"]
        assert [name for name in names if not any(getattr(module, name) is value for value in shown)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_public_functions_say_what_their_arguments_are(page):
    """Where a docstring lists arguments, it lists all."""
    silent = []
    for path, value in on_page(page):
        if not inspect.isfunction(value):
            continue
        doc, names = inspect.getdoc(value) or "", list(inspect.signature(value).parameters)
        if "Args:" in doc:
            said = doc.partition("Args:")[2]
            silent += [f"{path}: {name}" for name in names if not re.search(rf"\b{name}\b", said)]
    assert silent == []
