"""Whatever happens to a command, it ends in one message that says what to do, and what was done is kept."""

import json
import resource
import shutil
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import jinja2
import pytest
from report.made_records import record, write_arm, write_correct
from transformers.utils.logging import enable_progress_bar

from topd.cli.main import main
from topd.embedded.pair import pair_folder
from topd.errors import SavingError, TOPDError, install
from topd.evaluation.engines import LocalEngine, Response
from topd.runs.checkpoints import saving_error
from topd.runs.guard import as_topd_error, guarded

STUDENT = "student=embedded:student-standard"
SMALL = ["--limit", "4", "--samples", "1", "--max-new-tokens", "8"]
PROMPTS = ["--data", "embedded", *SMALL, "--limit", "16"]
PAIR = [
    "--student", "embedded:student-standard", "--teacher", "embedded:teacher", "--data", "embedded",
    "--rollouts", "5", "--batch", "1", "--max-new-tokens", "24", "--window-length", "4",
]  # fmt: skip
COMMANDS = {
    "eval": ["eval", "--model", STUDENT, "--benchmark", "embedded", *SMALL, "--out", "OUT"],
    "generate": ["generate", "--teacher", "embedded:teacher", *PROMPTS, "--out", "OUT/mine.jsonl"],
    "probe": ["probe", *PAIR, "--out", "OUT"],
    "correct": ["correct", *PAIR, "--steps", "1", "--arms", "opd", "--out", "OUT"],
    "report": ["report", "OUT"],
    "case": ["case", "OUT"],
}
SETTINGS = {
    "eval": "student/embedded.settings.json", "generate": "mine.settings.json", "probe": "probe_options.json",
    "correct": "correct_options.json",
}  # fmt: skip


@contextmanager
def small_disk(limit):
    """No file grows beyond so many bytes: a limit of the system, which ends writing as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run(command, out):
    return main([part.replace("OUT", str(out)) for part in COMMANDS[command]])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder that a command has finished."""

    @cache
    def of(command):
        out = tmp_path_factory.mktemp(command)
        assert run(command, out) == 0
        return out

    return of


def records_of(out):
    (file,) = [path for path in out.rglob("*.jsonl") if "record" in path.name or "samples" in path.name]
    return file


def message(capsys):
    error = capsys.readouterr().err
    assert "topd: " in error
    assert "Traceback" not in error
    return " ".join(error.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_ends_in_a_message_and_the_same_command_goes_on(tmp_path, capsys, command, fault):
    if command == "report":
        write_arm(tmp_path, [record()])
    if command == "case":
        write_correct(tmp_path)
    for limit in (100, 1000):  # settings, records or a page
        with small_disk(limit):
            assert run(command, tmp_path) == 2
        assert "The disk is full" in message(capsys)
        assert not list(tmp_path.rglob("*.part"))
    assert run(command, tmp_path) == 0
    fault(f"disk full, topd {command}", "a message; resumes when started again")


@pytest.mark.parametrize("command", SETTINGS)
def test_a_damaged_settings_file_ends_in_a_message(finished, tmp_path, capsys, command, fault):
    shutil.copytree(finished(command), tmp_path, dirs_exist_ok=True)
    settings = tmp_path / SETTINGS[command]
    records = records_of(tmp_path)
    whole, before = settings.read_text(), records.read_bytes()
    for damaged in (whole[:40], "[" * 100_000, '["another"]'):
        settings.write_text(damaged)
        capsys.readouterr()
        assert run(command, tmp_path) == 2
        assert f"If they are the same as now, delete {settings}" in message(capsys)
        assert records.read_bytes() == before
    fault(f"topd {command}: a settings file that is cut or nested too deep", "a message; the records stay")


@pytest.mark.parametrize("command", SETTINGS)
def test_a_broken_line_in_the_middle_of_the_records_costs_no_other(finished, tmp_path, capsys, command, fault):
    shutil.copytree(finished(command), tmp_path, dirs_exist_ok=True)
    records = records_of(tmp_path)
    lines = records.read_text().splitlines(keepends=True)
    assert len(lines) > 1
    records.write_text("".join([lines[0][:30] + "\n", *lines[1:]]))
    assert run(command, tmp_path) == 0
    assert f"line 1 is broken; {len(lines) - 1} records are kept" in message(capsys)
    assert records.read_text().splitlines(keepends=True) == [*lines[1:], lines[0]]
    fault(f"topd {command}: a broken line in the middle of the records", "the others are kept, this one is made again")


def test_half_a_character_does_not_stop_a_command_at_each_start(tmp_path, capsys, monkeypatch, fault):
    monkeypatch.setattr(LocalEngine, "_response", lambda self, row: Response("half \ud800 of it", False, len(row)))
    assert run("eval", tmp_path) == 0
    assert run("eval", tmp_path) == 0  # from what was kept
    lines = (tmp_path / "student" / "embedded.samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["half \ud800 of it"] * 4
    assert run("generate", tmp_path) == 2
    assert "No solution is left" in message(capsys)
    fault("a model writes half a character", "kept escaped; topd generate counts it and leaves it out")


def test_a_chat_template_that_raises(tmp_path, capsys, fault):
    shutil.copytree(pair_folder("student-standard"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ raise_exception('no user role') }}")
    (tmp_path / "mine.jsonl").write_text('{"problem": "what is 1+1?", "answer": "2"}\n')
    command = ["eval", "--model", str(tmp_path / "model"), "--benchmark", str(tmp_path / "mine.jsonl"), *SMALL[2:]]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "The chat template cannot render a conversation: no user role" in message(capsys)
    fault("a chat template that raises", "a message; what was done is kept")


@pytest.mark.parametrize("command", ["eval", "generate", "probe", "correct"])
def test_an_output_folder_that_cannot_be(tmp_path, capsys, command):
    (tmp_path / "out").write_text("a file")
    assert run(command, tmp_path / "out") == 2
    assert "A file exists where a folder is needed" in message(capsys)


@pytest.mark.parametrize("name", ["..", "..=embedded:student-standard", "runs/.."])
def test_results_are_not_written_above_out(tmp_path, capsys, name):
    assert main(["eval", "--model", name, *SMALL, "--out", str(tmp_path / "out")]) == 2
    assert [path.name for path in tmp_path.iterdir()] in ([], ["out"])
    assert "Traceback" not in message(capsys)


OUT_OF_RANGE = {
    "probe --temperature nan": "--temperature positive",
    "probe --seed -1": "--seed must be in",
    "correct --steps 0": "--steps must be at least 1",
    "correct --learning-rate nan": "--learning-rate must be positive",
    "correct --guidance-weight nan": "--guidance-weight must not be negative",
    "eval --temperature nan": "--temperature must not be negative",
    "eval --seed -1": "--seed must not be negative",
    "eval --gain nan": "--gain must be above 0",
}


@pytest.mark.parametrize("words", OUT_OF_RANGE)
def test_numbers_out_of_range_are_refused_before_models_are_loaded(tmp_path, capsys, monkeypatch, words):
    command, *given = words.split()
    for loads in ("pair.load_pair", "models.loaded_model"):
        monkeypatch.setattr(f"topd.loading.{loads}", lambda *_: pytest.fail("weights are loaded"))
    assert main([command, *given, "--out", str(tmp_path)]) == 2
    assert OUT_OF_RANGE[words] in message(capsys)


def test_two_benchmarks_with_one_label_are_refused_before_one_is_answered(tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.jsonl").write_text(f'{{"problem": "{folder}", "answer": "2"}}\n')
    files = [str(tmp_path / folder / "test.jsonl") for folder in ("a", "b")]
    assert main(["eval", "--model", STUDENT, "--benchmark", *files, *SMALL, "--out", str(tmp_path / "out")]) == 2
    assert "Two benchmarks have the same label (test). Name them" in message(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["probe", "correct"])
def test_the_analyses_hide_progress_bars_of_loading_weights(tmp_path, capsys, command):
    enable_progress_bar()
    assert run(command, tmp_path) == 0
    assert "Loading weights" not in capsys.readouterr().err


def test_generate_checks_that_it_can_write_before_it_loads(capsys, monkeypatch):
    monkeypatch.setattr("topd.loading.models.loaded_model", lambda *_: pytest.fail("weights are loaded"))
    assert main(["generate", "--teacher", "embedded:teacher", *PROMPTS, "--out", "/sys/out/mine.jsonl"]) == 2
    assert "Check its permissions, or use another path" in message(capsys)


@pytest.mark.parametrize("command", ["eval", "generate", "probe", "correct"])
def test_an_unknown_dtype_is_named(tmp_path, capsys, command):
    words = [part.replace("OUT", str(tmp_path)) for part in COMMANDS[command]]
    with pytest.raises(SystemExit):
        main([*words, "--dtype", "float12"])
    assert "--dtype: invalid choice: 'float12'" in capsys.readouterr().err


def test_an_error_of_ours_ends_in_a_message_and_a_traceback_in_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("topd.report.page.render", lambda runs: {}["a key"])
    write_arm(tmp_path, [record()])
    assert run("report", tmp_path) == 2
    said = "Stopped by KeyError: 'a key' If this names an option, correct it; otherwise it may be a bug. The traceback"
    assert said in message(capsys)
    assert "write_report" in (tmp_path / "traceback.txt").read_text()


def test_an_old_traceback_does_not_outlive_a_good_run(tmp_path):
    (tmp_path / "traceback.txt").write_text("old")
    with guarded(tmp_path):
        pass
    assert (tmp_path / "traceback.txt").exists()  # of a command that only reads the folder
    with pytest.raises(TOPDError), guarded(tmp_path, remove=True):
        raise TOPDError("x")
    assert (tmp_path / "traceback.txt").exists()
    with guarded(tmp_path, remove=True):
        pass
    assert not (tmp_path / "traceback.txt").exists()


def test_what_is_missing_is_installed_by_its_own_name():
    assert install("eval") == "pip install 'math-verify>=0.9'"
    assert install("no-such-extra") == "pip install -e '.[no-such-extra]' in a checkout of topd"


def test_the_traceback_finds_a_place_where_the_folder_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file"):
        with pytest.raises(Exception, match=rf"The traceback is in {tmp_path}/topd/traceback.txt"), guarded(folder):
            raise RecursionError
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    assert "traceback" not in str(as_topd_error(ValueError("odd"), None))


def test_what_is_ours_and_what_a_user_does_stay_as_they_are():
    with pytest.raises(SavingError, match="mine"), guarded(None):
        raise SavingError("mine")
    with pytest.raises(KeyboardInterrupt), guarded(None):
        raise KeyboardInterrupt
    denied = PermissionError(13, "Permission denied", "/mine/out")
    for error in (as_topd_error(denied, None), saving_error("The model", Path("/mine"), denied)):
        assert "Check its permissions" in str(error)
        assert "Free space" not in str(error)
    assert install("report") in str(as_topd_error(ImportError(name="matplotlib"), None))
    assert "chat template" in str(as_topd_error(jinja2.TemplateSyntaxError("odd", 1), Path("/nowhere/at/all")))
