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
from documents import DOCS, PAGES, ROOT, blocks, commands, name_of

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


def outside_tables_and_code(page):
    """The lines of a page that are neither a table nor code, with their numbers."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = line.lstrip().startswith("```")
        inside ^= fence
        if not (inside or fence or line.startswith(("|", ":::", "    ", "<"))):
            yield number, line


@each_page
def test_text_is_wrapped_at_120_characters(page):
    """A link or code without a space may be longer."""
    long = [number for number, line in outside_tables_and_code(page) if len(line) > 120 and splits(line)]
    assert long == []


def splits(line):
    """Whether a line has a place to break it: a space outside code."""
    return " " in re.sub(r"`[^`]*`", "", line).strip(" -,.:;")


def test_text_that_is_too_long_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{'a ' * 70}\n\n| {'b ' * 70} |\n\n```\n{'c ' * 70}\n```\n\n`{'d ' * 70}`.\n{'e ' * 50}\n")
    with pytest.raises(AssertionError, match=r"\[1\]"):
        test_text_is_wrapped_at_120_characters(page)


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120


def test_functions_that_are_linked_exist():
    """Links with a name in code, such as [`is_fork`](../src/topd/algorithm/forks.py), and the boxes of the picture."""
    page, picture = ROOT / "docs/how_it_works.md", ROOT / "docs/img/how_it_works.svg"
    named = {(file, name) for name, file in re.findall(r"\[`(\w+)`\]\((\.\./src/[^)]+)\)", page.read_text())}
    boxes = {(f"../{file}", name) for file, name in re.findall(r'href="\.\./\.\./([^"#]+)#(\w+)"', picture.read_text())}
    assert len(boxes) == 9
    assert boxes <= named, "each box is in the list under the picture"
    assert [link for link in sorted(named) if link[1] not in defined(page.parent / link[0])] == []


def defined(file):
    """Functions and classes at the top of a module."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, kinds)}


def test_names_in_the_table_of_formulas_exist():
    """Functions, classes, methods and options in the column "code" of paper_to_code.md."""
    source = "\n".join(file.read_text() for file in (ROOT / "src").rglob("*.py"))
    known = set(re.findall(r"^ *(?:def|class) (\w+)|^    (\w+): .*= _option\(", source, re.MULTILINE))
    known = {name for pair in known for name in pair}
    rows = re.findall(r"^\|[^\n]*$", (ROOT / "docs/paper_to_code.md").read_text(), re.MULTILINE)
    columns = [row.replace(r"\|", "").split("|")[2] for row in rows]
    named = {name.split(".")[-1] for column in columns for name in re.findall(r"`([A-Za-z_][\w.]*)`", column)}
    assert len(named) > 20
    assert named - known - {"rollout", "candidate", "regenerated"} == set()


def test_messages_that_are_explained_are_in_the_source():
    """Each part of a message in troubleshooting.md, between "..." and ";". One message is that of transformers."""
    texts = [text for file in (ROOT / "src").rglob("*.py") for text in strings(file)]
    page = (ROOT / "docs/troubleshooting.md").read_text().partition("## Messages")[2]
    messages = re.findall(r"^\| (.*?) \| .* \|$", page, re.MULTILINE)[1:]
    parts = {part.strip(" ?.,") for message in messages for part in re.split(r"\.\.\.|;| \(once.*\)", message)}
    assert len(messages) > 30
    unknown = {part for part in parts if not any(part in text for text in texts)}
    assert unknown == {"no file named model.safetensors"}


def strings(file):
    """The texts of a module; in f-strings, a null character for each value."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


OLD_WORDS = re.compile(r"\b(?:mend(?:s|ed)?|likeliest|told apart|of yours|go(?:es)? on|from nothing)\b", re.IGNORECASE)


@each_page
def test_pages_are_in_plain_english(page):
    """None of the phrases that were replaced everywhere."""
    assert OLD_WORDS.findall(documents.prose(page)) == []


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
        if words[1:] and words[1].endswith(".yaml"):
            words[1] = "recipe:embedded"
        for place, word in enumerate(words[:-1]):
            if word == "--config" and not words[place + 1].startswith(("recipe:", "studies/")):
                words[place + 1] = "recipe:embedded"
        documents.assert_parses(words)


def test_commands_with_mistakes_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\ntopd train --config recipe:embedded \\\n  --windw_length 3  # no\n```\n")
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
    assert sorted(nav) == sorted(["index.md", *(str(page.relative_to(ROOT / "docs")) for page in DOCS)])


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


def test_a_step_is_thirty_statements_in_functions_of_five_parameters():
    script = script_of("step_size")
    counts = script.functions()
    assert sum(count for count, _ in counts.values()) <= 30
    assert max(parameters for _, parameters in counts.values()) <= 5
    assert {"topd.algorithm.vocabulary", "topd.near_future.windows", "topd.training.losses"} <= script.modules_behind()


def test_the_step_rests_on_11_modules_and_no_module_is_longer_than_330_lines():
    assert len(script_of("step_size").modules_behind()) <= 11
    lines = {str(file): len(file.read_text().splitlines()) for file in (ROOT / "src").rglob("*.py")}
    assert {file: count for file, count in lines.items() if count > 330} == {}


def test_statements_are_counted_nested_ones_too_and_docstrings_not():
    source = 'def f(x):\n    """Text."""\n    if x:\n        y = 1\n\n    def g():\n        return 2\n'
    assert script_of("step_size").statements(ast.parse(source).body[0]) == 4  # if, y = 1, def g, return 2
