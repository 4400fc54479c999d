"""The command line as its user meets it."""

import json
import platform
import re
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch

from topd.cli.help import own_options
from topd.cli.main import main
from topd.cli.recipes import FOLDER
from topd.cli.train import DataArguments, page, parse
from topd.errors import TOPDError
from topd.training.config import TOPDConfig
from topd.training.option_checks import CONTROLS
from topd.version import __version__


def test_help_answers_in_under_a_second_without_importing_torch():
    code = "import sys; from topd.cli.main import parser; parser().format_help(); print('torch' in sys.modules)"
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
    assert time.perf_counter() - started < 1


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert __version__ in capsys.readouterr().out


def test_the_command_line_wins_over_the_recipe():
    _, config, _ = parse(["--config", "recipe:embedded", "--method", "opd", "--window_length", "3"])
    assert (config.method, config.window_length) == ("opd", 3)
    _, config, _ = parse(["--config", "recipe:embedded", "--window-length", "4", "--no_shuffle_dataset"])
    assert (config.window_length, config.shuffle_dataset) == (4, False)


def message(capsys, *arguments):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "topd: " in error
    assert "Traceback" not in error
    return error


def test_mistakes_end_in_a_message_that_says_what_to_do(capsys, tmp_path):
    recipe = ("train", "--config", "recipe:embedded", "--output_dir", str(tmp_path))
    assert "--window_length" in message(capsys, *recipe, "--windw_length", "3")
    assert "no such file" in message(capsys, "train", "--config", "nowhere.yaml")
    assert "no such recipe. Available: embedded" in message(capsys, "train", "recipe:nowhere")
    assert "Did you mean --config recipe:embedded?" in message(capsys, "train", "recipes/embedded.yaml")
    assert "Several files with options" in message(capsys, "train", "recipe:embedded", "--config", "mine.yaml")
    assert "Specify the student and the teacher" in message(
        capsys, "train", "--output_dir", str(tmp_path), "--use_cpu", "true"
    )
    if not torch.accelerator.is_available():
        assert "add --use_cpu true" in message(capsys, "train")
    assert "topd demo build" in message(capsys, *recipe, "--model_name_or_path", "embedded:student")
    assert "contains no tokenizer" in message(capsys, *recipe, "--model_name_or_path", str(tmp_path))
    assert "no such file" in message(capsys, *recipe, "--data", "trian.jsonl")
    assert "must be at least 1" in message(capsys, *recipe, "--window_length", "0")
    assert "no checkpoint" in message(capsys, *recipe, "--resume_from_checkpoint", "true")
    assert "no such folder" in message(capsys, "report", "nowhere")
    (tmp_path / "bad.yaml").write_text("method: [topd\n")
    assert "not valid YAML" in message(capsys, "train", "--config", str(tmp_path / "bad.yaml"))
    (tmp_path / "typo.yaml").write_text("metod: topd\noutput_dir: x\n")
    assert "--method" in message(capsys, "train", "--config", str(tmp_path / "typo.yaml"))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "what is 1+1?"}\n{"prompt": \n')
    assert "line 2" in message(capsys, *recipe, "--data", str(tmp_path / "broken.jsonl"))


def test_train_saves_resumes_and_reports(tmp_path, capsys):
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"what is {a}+{b}×2?"}) + "\n" for a in range(1, 9) for b in (3, 4)))
    out = tmp_path / "run"
    common = [
        "train", "--config", "recipe:embedded", "--data", str(data), "--output_dir", str(out),
        "--save_steps", "1",
        "--per_device_train_batch_size", "4", "--max_completion_length", "24", "--window_length", "4",
        "--audit_steps", "1",
    ]  # fmt: skip
    assert main([*common, "--max_steps", "2"]) == 0
    told = capsys.readouterr()
    assert "2/2  loss " in told.out
    assert "tokens/response" in told.out
    assert f"topd report {out}" in told.out
    assert "{'loss'" not in told.out
    assert told.err == ""
    shown = told.out.splitlines()
    assert shown[0] == "Loading embedded:student-standard and embedded:teacher ..."
    assert shown[2] == "student   embedded:student-standard, 498,624 parameters, float32"
    assert f"data      {data}, 16 rows" in shown
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 2
    assert main([*common, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 3
    assert json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())["global_step"] == 3
    assert (out / "model.safetensors").is_file()
    assert main(["report", str(out)]) == 0
    assert "what is" in (out / "report.html").read_text()


def test_several_trackers_and_words_that_belong_to_no_option():
    recipe = ["--config", "recipe:embedded"]
    several = parse([*recipe, "--report_to", "tensorboard", "wandb", "--seed", "3"])[1]
    assert (several.report_to, several.seed) == (["tensorboard", "wandb"], 3)
    assert parse([*recipe, "--report_to", "trackio"])[1].report_to == ["trackio"]
    assert parse(recipe)[1].report_to == []
    with pytest.raises(TOPDError, match=r"one value: \['two'\].*several values as a list into the YAML file"):
        parse([*recipe, "--run_name", "one", "two"])


FILES = [
    ("seed: 1\nseed: 2\n", "'seed' appears more than once"),
    ("bf16: !!bool maybe\n", "'maybe' cannot be read as bool"),
    ("seed: " + "9" * 5000 + "\n", "cannot be read as int"),
    ("seed: 0x" + "f" * 5000 + "\n", "too large"),
    ("a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*{'a' if not i else f'b{i - 1}'}, *a]\n" for i in range(20)), "Unknown"),
    ('model_init_kwargs: \'{"a": 1, "a": 2}\'\n', "'a' appears more than once"),
]


@pytest.mark.parametrize(("text", "found"), FILES, ids=[found for _, found in FILES])
def test_a_config_file_that_means_two_things_or_nothing_is_refused(tmp_path, capsys, text, found):
    file = tmp_path / "mine.yaml"
    file.write_text(text + f"output_dir: {tmp_path}\n")
    assert found in message(capsys, "train", "--config", str(file))


def test_json_on_the_command_line_with_a_name_twice_is_refused(capsys):
    recipe = ("train", "--config", "recipe:embedded")
    assert "'a' appears more than once" in message(capsys, *recipe, "--chat_template_kwargs", '{"a": 1, "a": 2}')


def test_only_embedded_models_have_prompts_without_being_asked(capsys, tmp_path):
    names = ["--model_name_or_path", "org/student", "--teacher_model_name_or_path", "org/teacher"]
    told = message(capsys, "train", *names, "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false")
    assert "Specify the prompts for org/student: --data FILE.jsonl" in told
    assert "Specify the prompts for org/student" in message(
        capsys, "probe", "--student", "org/student", "--teacher", "org/teacher", "--out", str(tmp_path / "probe")
    )


def test_a_file_as_the_first_word_is_config():
    named = parse(["recipe:embedded", "--window_length", "4"])[1]
    given = parse(["--config=recipe:embedded", "--window_length", "4"])[1]
    assert named == given
    assert named.window_length == 4


def test_recipes_are_listed(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--config", "recipe:"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"^  recipe:[\w.-]+  +\S", shown, re.MULTILINE)) == len(list(FOLDER.glob("*.yaml"))) > 8


def test_env_names_versions_and_devices(capsys):
    assert main(["env"]) == 0
    shown = dict(line.removeprefix("- ").split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert shown["topd"] == __version__
    assert shown["torch"] == torch.__version__
    assert shown["Python"] == platform.python_version()
    assert {"transformers", "trl", "accelerate", "peft", "vllm", "datasets", "platform", "devices"} < set(shown)
    assert "bf16" in shown["CPU"]


def help_of(capsys, monkeypatch, *words):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_the_help_of_train_has_every_option_of_ours_in_groups_on_two_screens(capsys, monkeypatch):
    shown = help_of(capsys, monkeypatch, "train", "--help")
    lines = shown.splitlines()
    assert len(lines) < 130
    assert max(map(len, lines)) <= 120
    assert [line for line in lines if line.endswith(":") and line[0] != " "] == [
        "Method:", "Data:", "Models:", "Run:", "Processes:"
    ]  # fmt: skip
    listed = re.findall(r"^  --([\w-]+)", shown, re.MULTILINE)
    assert listed[:3] == ["config", "help-all", "method"]
    assert len(set(listed)) == len(listed)
    own = (own_options(TOPDConfig) | own_options(DataArguments)) & {
        each.name for k in page().kinds for each in fields(k)
    }
    assert own - set(listed) == {*CONTROLS}
    assert not [line for line in lines if line.startswith("  --") and not line[34:].strip()]


def test_help_all_has_every_option_with_its_whole_text(capsys, monkeypatch):
    shown = help_of(capsys, monkeypatch, "train", "--help-all")
    listed = set(re.findall(r"^  --([\w-]+)", shown, re.MULTILINE))
    every = {option.name for kind in page().kinds for option in fields(kind) if option.init}
    assert listed == every | {"config", "help-all", "num_processes", "accelerate_config"}
    assert "(0.10 = 10 %). The first ten steps" in " ".join(shown.split())
    short = help_of(capsys, monkeypatch, "warmstart", "-h")
    assert "--kd_ratio" in short
    assert len(short.splitlines()) < 80
