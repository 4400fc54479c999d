"""What the README and docs/ say can be followed: links, code, commands, the table of options, the menu of the site."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib

import documents
import pytest
import yaml
from documents import PAGES, ROOT, blocks, commands, name_of

from topd.errors import TOPDError

each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
LINK = re.compile(r"\]\((?![a-z]+:)([^)#\s]*)(?:#([^)\s]*))?\)")


@each_page
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(documents.prose(page)):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{target} is not there"
        assert file.is_relative_to(ROOT), f"{target} is outside the project"
        if anchor:
            assert anchor in documents.anchors(file), f"{target}#{anchor} is not a heading"


def test_links_that_lead_nowhere_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    for text in ("[a](missing.md)", "[a](#missing)", "# A b\n[a](page.md#a-c)", "[a](../outside.md)"):
        page.write_text(text + "\n")
        with pytest.raises(AssertionError):
            test_links_lead_somewhere(page)
    page.write_text("# A `b`, c\n[a](#a-b-c) [b](page.md) [c](https://example.org) `[d](missing.md)`\n")
    test_links_lead_somewhere(page)


@each_page
def test_tests_that_are_named_exist(page):
    files = list((ROOT / "tests").rglob("*.py"))
    known = {file.stem for file in files}.union(
        *(re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE) for file in files)
    )
    named = re.findall(r"`[^`\n]*?\b(test_\w+)(?![\w*])", page.read_text(encoding="utf-8"))
    assert set(named) - known == set()
    paths = re.findall(r"`((?:tests|src|recipes|studies|examples)/[\w/.*-]+)", page.read_text(encoding="utf-8"))
    assert [path for path in paths if not list(ROOT.glob(path.rstrip("/.")))] == []


@each_page
def test_python_compiles(page):
    for block in blocks(page, "python"):
        ast.parse(block)


@each_page
def test_commands_are_parsed(page, tmp_path):
    """With a recipe in the place of files that are the reader's."""
    for words in commands(page):
        for place, word in enumerate(words[:-1]):
            if word == "--config" and not words[place + 1].startswith(("recipes/", "studies/")):
                words[place + 1] = "recipes/embedded.yaml"
        documents.assert_parses(words)


def test_commands_with_mistakes_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\ntopd train --config recipes/embedded.yaml \\\n  --windw_length 3  # no\n```\n")
    (words,) = commands(page)
    with pytest.raises(TOPDError, match="windw_length"):
        documents.assert_parses(words)
    page.write_text("```bash\ncd x\naccelerate launch --multi_gpu -m topd.cli probe ... --shar 0.1 --no\n```\n")
    (words,) = commands(page)
    assert words[:2] == ["probe", "--shar"]
    with pytest.raises(SystemExit):
        documents.assert_parses(words)


@each_page
def test_options_in_yaml_are_parsed(page, tmp_path):
    for number, block in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        extra = [] if "output_dir" in block else ["--output_dir", "runs/x"]
        documents.assert_parses(["train", "--config", str(file), *extra])


def script_of(name):
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_tables_of_results_are_what_the_studies_say():
    script = script_of("results_page")
    text = script.PAGE.read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == len(script.PLACE.findall(text)) >= 3
    assert script.results_page(text) == text, "run python docs/results_page.py"
    other = text.replace("| topd |", "| topd, changed |", 1)
    assert script.results_page(other) == text


def test_a_curve_that_one_seed_has_not_finished_leaves_its_cells_empty():
    script = script_of("results_page")
    points = [{"step": step, "accuracy": 0.25 * step, "tokens": 10 * step, "seconds": step} for step in range(3)]
    arms = {"a": {"curve": {"0": points[:2], "1": points}}, "b": {"curve": {"0": points}}}
    assert script._curve({"arms": arms}, ["a", "b"]).splitlines() == [
        "| step | 0 | 1 | 2 | tokens by step 2 | processor seconds |", "| --- | --- | --- | --- | --- | --- |",
        "| a | 0.0% | 25.0% |  |  |  |", "| b | 0.0% | 25.0% | 50.0% | 20 | 2 |",
    ]  # fmt: skip


def test_the_table_of_options_is_what_the_options_are():
    script = script_of("options_page")
    assert script.PAGE.read_text(encoding="utf-8") == script.options_page(), "run python docs/options_page.py"


def test_the_table_of_architectures_is_what_the_sweep_recorded():
    script = script_of("architectures_page")
    text = script.PAGE.read_text(encoding="utf-8")
    assert script.architectures_page(text, script.read_record()) == text, "run python docs/architectures_page.py"
    other = script.architectures_page(text, [{"class": "A", "way": "refused", "why": "b", "examined": "c"}])
    assert "| `A` | refused | b |  | c |" in other
    assert script.architectures_page(other, script.read_record()) == text


def menu(entry):
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in menu(part)]


def test_every_page_is_in_the_menu_once():
    nav = menu(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == sorted(["index.md", *(str(page.relative_to(ROOT / "docs")) for page in PAGES[1:])])


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "TOPDTrainer" in (tmp_path / "api" / "training.html").read_text()
    assert 'src="http' not in (tmp_path / "index.html").read_text()


def test_the_table_of_supported_versions_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = " ".join([*project["dependencies"], *project["optional-dependencies"]["peft"]])
    lock = (ROOT / "constraints.txt").read_text().splitlines()
    page = (ROOT / "docs/getting_started.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| ([\d.]+)[^|]* \| ([\d.]+) \| [\d.]+ \|$", page, re.MULTILINE)
    assert len(rows) == 7
    for name, lowest, locked in rows:
        assert re.search(rf"\b{name}>={re.escape(lowest)}(,| |$)", wanted)
        assert f"{name}=={locked}" in lock
