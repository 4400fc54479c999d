"""`topd check` and the checks with which `topd train` begins, as their user meets them."""

import json
from types import SimpleNamespace

import pytest
from bad_pairs import other_end, other_tokenizer, padded_head
from safetensors.torch import load_file
from tiny import tiny_trainer

from topd.cli.main import main
from topd.embedded.pair import pair_folder

RECIPE = ["--config", "recipe:embedded"]
PAIR = ["--student", "embedded:student-standard", "--teacher", "embedded:teacher"]
TINY = [
    "--max_steps",
    "1",
    "--per_device_train_batch_size",
    "2",
    "--max_completion_length",
    "6",
    "--window_length",
    "3",
]


def test_without_any_option_the_embedded_pair_shows_that_the_installation_is_whole(capsys):
    assert main(["check", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("embedded:long-student from embedded:long-teacher")
    assert out.rstrip().endswith("All 15 checks passed.")
    assert "what to do" in out


def test_a_pair_and_nothing_else(capsys):
    """Defaults as in `topd train`: 512 new tokens are too many for models with a context of 256."""
    assert main(["check", *PAIR, "--quick", "--json"]) == 2
    told = json.loads(capsys.readouterr().out)
    assert told["line"] == "Check failed: 1 error (context)."


def test_json_and_strict(capsys):
    options = ["--dtype", "bfloat16", "--learning_rate", "1e-6", "--quick", "--json"]
    assert main(["check", *RECIPE, *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "warning"
    assert told["line"] == "Passed with 1 warning (precision)."
    assert {"check", "verdict", "found", "remedy"} == told["findings"][0].keys()
    assert main(["check", *RECIPE, *options, "--strict"]) == 1


def test_errors_have_exit_status_2_and_models_are_not_loaded_then(tmp_path, capsys):
    teacher = other_tokenizer(tmp_path / "teacher")
    (teacher / "model.safetensors").unlink()
    assert main(["check", *RECIPE, "--teacher", str(teacher), "--json"]) == 2
    assert "vocabulary" in json.loads(capsys.readouterr().out)["line"]


def test_json_is_all_that_is_printed(tmp_path, capfd):
    teacher = padded_head(tmp_path / "teacher")
    capfd.readouterr()
    assert main(["check", *RECIPE, "--teacher", str(teacher), "--samples", "1", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["verdict"] == "ok"
    assert len(told["findings"]) == 15


def message(capsys, *arguments):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("topd: ")
    assert "Traceback" not in error
    return error


def test_mistakes_end_in_a_message(capsys, tmp_path):
    assert "Specify the student and the teacher" in message(capsys, "check", "--window_length", "16")
    assert "--window_length" in message(capsys, "check", *PAIR, "--windw_length", "3")
    assert "contains no tokenizer" in message(capsys, "check", "--student", str(tmp_path), *PAIR[2:])
    assert "no such file" in message(capsys, "check", *PAIR, "--data", "nothing.jsonl")
    assert "at least 1" in message(capsys, "check", *PAIR, "--samples", "0")


def test_train_begins_with_the_quick_checks(tmp_path, capsys):
    teacher = other_end(tmp_path / "teacher")
    train = [
        "train",
        *RECIPE,
        *TINY,
        "--teacher_model_name_or_path",
        str(teacher),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    error = message(capsys, *train)
    assert "end tokens: the teacher ends at" in error
    assert "generation_config.json" in error
    assert "--preflight false trains anyway" in error
    assert main([*train, "--preflight", "false"]) == 0


def test_train_shows_warnings_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("topd.check.machine.shutil.disk_usage", lambda _: SimpleNamespace(free=15_000_000))
    room = ["--save_total_limit", "3"]  # for two checkpoints of 6 MB, not for four
    assert main(["train", *RECIPE, *TINY, *room, "--output_dir", str(tmp_path)]) == 0
    assert "topd: disk: " in capsys.readouterr().err


@pytest.mark.parametrize("method", ["opd", "topd"])
def test_a_padded_teacher_trains_like_the_teacher_itself(tmp_path, method):
    """Cut to the student's rows it is the teacher again: the same steps, bit for bit."""
    weights = []
    for name, teacher in (("a", pair_folder("teacher")), ("b", padded_head(tmp_path / "teacher"))):
        student = str(pair_folder("student-standard"))
        trainer = tiny_trainer(tmp_path / name, student=student, teacher=str(teacher), method=method, max_steps=1)
        trainer.train()
        weights.append({key: value.clone() for key, value in trainer.model.state_dict().items()})
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])


def test_a_padded_student_is_cut_and_saved_so(tmp_path):
    student = padded_head(tmp_path / "student", role="student-standard")
    trainer = tiny_trainer(tmp_path / "run", student=str(student), teacher=str(pair_folder("teacher")), max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert load_file(tmp_path / "saved" / "model.safetensors")["model.embed_tokens.weight"].shape[0] == 47
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["vocab_size"] == 47


def test_loaded_models_are_cut_too(tmp_path):
    from transformers import AutoModelForCausalLM

    teacher = AutoModelForCausalLM.from_pretrained(padded_head(tmp_path / "teacher"))
    trainer = tiny_trainer(tmp_path / "run", student=str(pair_folder("student-standard")), teacher=teacher, max_steps=1)
    trainer.train()
    assert trainer.teacher_model.config.vocab_size == 47
