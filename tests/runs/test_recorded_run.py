"""run.yaml: what a run was made of. It can be run again, is compared on resuming, and holds no secret."""

import json
import logging
import subprocess
import sys

import pytest
import torch
import yaml
from check.bad_pairs import padded_head
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import prompts, tiny_model, tiny_trainer
from transformers import AutoTokenizer

from topd.cli.main import main
from topd.cli.options import resume_from
from topd.cli.recipes import recipes
from topd.cli.train import parse
from topd.errors import ResumeError, SavingError
from topd.loading.options import PROVENANCE
from topd.runs.provenance import command_line, data_record, options_of, plain, read_run, weights_digest

SAVES = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


def run_again(folder, *more):
    """What `topd train --config run.yaml` parses."""
    return parse(["--config", str(folder / "run.yaml"), *more])


SMALL = [
    "--config", "recipe:embedded", "--model_name_or_path", "embedded:student-standard",
    "--teacher_model_name_or_path", "embedded:teacher", "--data", "embedded",
    "--per_device_train_batch_size", "4", "--max_completion_length", "16",
    "--window_length", "4", "--max_steps", "2", "--save_steps", "1", "--data_limit", "16",
]  # fmt: skip


def test_topd_train_writes_a_run_that_config_takes_again(tmp_path, capsys):
    out = tmp_path / "run"
    words = [*SMALL, "--output_dir", str(out), "--chat_template_kwargs", '{"a": true}']
    assert main(["train", *words]) == 0
    options, made_of = read_run(out)
    assert options["model_name_or_path"] == "embedded:student-standard"
    assert (options["data"], options["seed"], options["window_length"]) == ("embedded", 42, 4)
    assert made_of["command"].startswith("topd train --config recipe:embedded")
    assert made_of["versions"]["torch"] == torch.__version__
    assert made_of["precision"] == {"student": "float32", "teacher": "float32", "computed": "as stored"}
    assert made_of["data"]["rows"] == 16
    assert made_of["student"]["weights"] != made_of["teacher"]["weights"]

    first, again = parse(words), run_again(out)
    first[0].data = "embedded"
    assert [options_of(part) for part in again] == [options_of(part) for part in first]
    text = (out / "run.yaml").read_text()
    assert text.index("window_length") < text.index("# At their defaults") < text.index(f"{PROVENANCE}:")

    card = (out / "README.md").read_text()
    assert "fine-tuned version of `embedded:student-standard`" in card
    assert "None" not in card.split("## Quick start")[0]
    assert "| teacher |" in card
    assert "window_length: 4" in card
    capsys.readouterr()
    assert (
        main(["train", "--config", str(out / "run.yaml"), "--resume_from_checkpoint", "true", "--max_steps", "3"]) == 0
    )
    assert "max_steps: 2 -> 3" in read_run(out)[1]["resumed"][0]["changed"]
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 3


def test_every_recipe_is_the_same_after_a_run_has_written_it(tmp_path):
    from documents import ON_CPU

    for recipe in recipes().values():
        if "warmstart" in recipe.name:
            continue
        first = parse(["--config", str(recipe), *ON_CPU])
        written = tmp_path / recipe.name
        written.write_text(yaml.safe_dump(options_of(*first) | {PROVENANCE: {"command": "x"}}))
        assert [options_of(part) for part in parse(["--config", str(written)])] == [options_of(p) for p in first]


def test_a_run_in_python_is_recorded_too(tmp_path):
    trainer = tiny_trainer(tmp_path / "run", max_steps=1)
    trainer.train()
    options, made_of = read_run(tmp_path / "run")
    assert options["window_length"] == 5
    assert made_of["student"] | {"name": "a loaded Qwen3ForCausalLM"} == made_of["student"]
    assert made_of["data"] == {"rows": 64, "columns": ["prompt"], "digest": made_of["data"]["digest"]}
    assert made_of["teacher"]["weights"] == weights_digest(dict(tiny_model(1, width=96).named_parameters()))
    trainer.create_model_card(model_name="mine")
    assert "fine-tuned version of `a loaded Qwen3ForCausalLM`" in (tmp_path / "run" / "README.md").read_text()


def test_secrets_are_not_written():
    assert plain({"token": "s3", "eos_token": "x", "url": "http://me:pw@host:8000/v1?key=s3"}) == {
        "eos_token": "x", "url": "http://***@host:8000/v1?***",
    }  # fmt: skip
    secret = "not-to-be-seen"
    words = ["topd", "train", "--hub_token", secret, f"--hub-token={secret}", "--data", "a b"]
    words.append(f"https://u:{secret}@h/x?token={secret}")
    assert secret not in command_line(words)
    assert "'a b'" in command_line(words)
    _, config, _ = parse([*SMALL, "--hub_token", secret])
    assert config.hub_token == secret
    assert secret not in str(options_of(config))


# Resuming


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A run of two steps with checkpoints after both."""
    folder = tmp_path_factory.mktemp("earlier")
    tiny_trainer(folder, **SAVES).train()
    return folder


def resumed(earlier, out, caplog, **options):
    """The trainer after resuming at step 1, and what was reported."""
    caplog.clear()
    trainer = tiny_trainer(out, **SAVES | options)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(earlier / "checkpoint-1"))
    return trainer, caplog.text


def test_resuming_unchanged_reports_nothing(earlier, tmp_path, caplog):
    trainer, told = resumed(earlier, tmp_path, caplog)
    assert "Resuming with changed options" not in told
    assert "seen twice" not in told
    (entry,) = read_run(tmp_path)[1]["resumed"]
    assert (entry["from"], entry["changed"]) == ("checkpoint-1", [])
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)


CHANGES = [
    ({"dataset": prompts(32)}, "data's rows: 64 -> 32"),
    ({"seed": 7}, "seed: 42 -> 7"),
    ({"per_device_train_batch_size": 2}, "some rows of the data are seen twice or not at all"),
    ({"method": "opd-capped"}, "method: topd -> opd-capped"),
    ({"window_length": 6}, "window_length: 5 -> 6"),
    ({"lr_scheduler_type": "constant"}, "lr_scheduler_type: linear -> constant"),
    ({"learning_rate": 1e-4}, "learning_rate: 0.001 -> 0.0001"),
    ({"teacher": tiny_model(3, width=96)}, "teacher's weights: "),
    ({"teacher": tiny_model(1, width=64)}, "teacher's parameters: "),
]


@pytest.mark.parametrize(("options", "line"), CHANGES, ids=[line for _, line in CHANGES])
def test_each_change_on_resuming_is_reported_and_recorded(earlier, tmp_path, caplog, options, line):
    _, told = resumed(earlier, tmp_path, caplog, **options)
    assert "Resuming with changed options" in told
    assert "RANK" not in told
    assert line in told
    assert any(line in each for each in read_run(tmp_path)[1]["resumed"][0]["changed"])


def test_what_cannot_be_meant_is_refused(earlier, tmp_path, caplog):
    wide = {"student": tiny_model(0, width=96)}
    with pytest.raises(ResumeError, match=r"belongs to another run.*other names or shapes"):
        resumed(earlier, tmp_path, caplog, **wide)
    lora = {"trainer_options": {"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")}}
    with pytest.raises(ResumeError, match="other names or shapes"):
        resumed(earlier, tmp_path, caplog, **lora)
    assert not (tmp_path / "run.yaml").exists()


def test_an_adapter_is_not_put_on_another_base(tmp_path, caplog):
    def student(seed):
        return get_peft_model(tiny_model(seed), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    tiny_trainer(tmp_path / "a", student=student(0), **SAVES).train()
    with pytest.raises(ResumeError, match="base, under the adapter, has other weights"):
        resumed(tmp_path / "a", tmp_path / "b", caplog, student=student(4))


def test_an_adapter_that_is_scaled_otherwise_is_noticed(tmp_path, caplog):
    def student(alpha):
        config = LoraConfig(r=2, lora_alpha=alpha, target_modules=["q_proj"], task_type="CAUSAL_LM")
        return get_peft_model(tiny_model(0), config)

    tiny_trainer(tmp_path / "a", student=student(4), **SAVES).train()
    _, told = resumed(tmp_path / "a", tmp_path / "b", caplog, student=student(32))
    assert "student's adapters: r 2, lora_alpha 4, " in told
    assert "-> r 2, lora_alpha 32, " in told


def test_another_tokenizer_is_not_resumed_with(earlier, tmp_path, caplog):
    folder = padded_head(tmp_path / "model", role="student-standard", rows=48)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["new"])
    for model in (student := tiny_model(0), teacher := tiny_model(1, width=96)):
        model.resize_token_embeddings(48)
    with pytest.raises(ResumeError, match="the tokenizer differs"):
        resumed(earlier, tmp_path / "run", caplog, student=student, teacher=teacher, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("row", "other"),
    [
        ({"text": "1+1=2"}, {"text": "1+1=3"}),
        ({"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "user", "content": "b"}]}),
        ({"prompt": "a", "chat_template_kwargs": {"b": 1}}, {"prompt": "a", "chat_template_kwargs": {"b": 2}}),
        ({"story": "a"}, {"story": "b"}),
    ],
)
def test_other_rows_of_a_dataset_for_stage_1_are_noticed(row, other):
    one, two = (data_record(Dataset.from_list([each])) for each in (row, other))
    assert one["digest"] != two["digest"]


# The optimizer's settings on resuming


def test_learning_rate_weight_decay_betas_and_schedule_of_the_resumed_run_are_used(earlier, tmp_path, caplog):
    options = {
        "learning_rate": 5e-4, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.9, "max_steps": 3,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    trainer, _ = resumed(earlier, tmp_path, caplog, **options)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == [1e-3, 5e-4, 5e-4]
    group = trainer.optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.9), 0.1)


def test_a_longer_run_goes_on_with_its_own_schedule(earlier, tmp_path, caplog):
    trainer, _ = resumed(earlier, tmp_path, caplog, max_steps=4)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


# The folder


def test_a_second_run_into_one_folder_is_refused_and_auto_goes_on(earlier, tmp_path, caplog):
    with pytest.raises(ResumeError, match=r"up to checkpoint-2.*resume_from_checkpoint=True"):
        tiny_trainer(earlier, **SAVES).train()
    trainer = tiny_trainer(tmp_path, **SAVES)
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.state.global_step == 2
    again = tiny_trainer(tmp_path, **SAVES | {"max_steps": 3})
    again.train(resume_from_checkpoint="auto")
    assert len([entry for entry in again.state.log_history if "loss" in entry]) == 3


def test_a_folder_that_cannot_be_written_is_named_before_models_are_loaded(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(SavingError, match=r"Cannot write to .*run.*another --output_dir"):
            tiny_trainer(folder, student="nowhere/at-all")
        assert main(["train", *SMALL, "--output_dir", str(folder)]) == 2
        assert "Cannot write to" in capsys.readouterr().err


def test_auto_on_the_command_line_starts_from_scratch_and_then_goes_on(tmp_path, capsys):
    words = ["train", *SMALL, "--output_dir", str(tmp_path), "--method", "opd"]
    assert main([*words, "--resume_from_checkpoint", "true"]) == 2
    assert "or give auto" in capsys.readouterr().err
    assert main([*words, "--resume_from_checkpoint", "auto", "--max_steps", "1"]) == 0
    assert main([*words, "--resume_from_checkpoint", "auto"]) == 0
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 2


def test_weights_that_are_tied_are_not_missing_in_a_checkpoint(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path)
    model = trainer.model
    model.lm_head.weight = model.get_input_embeddings().weight
    told = []
    monkeypatch.setattr("transformers.trainer.logger.warning", told.append)
    missing = torch.nn.modules.module._IncompatibleKeys
    trainer._issue_warnings_after_load(missing(["lm_head.weight"], []))
    assert told == []
    trainer._issue_warnings_after_load(missing(["lm_head.weight", "model.norm.weight"], []))
    assert told == ["There were missing keys in the checkpoint model loaded: ['model.norm.weight']."]


def test_a_trained_model_is_not_replaced_without_asking(tmp_path):
    _, config, _ = parse([*SMALL, "--output_dir", str(tmp_path)])
    assert resume_from(config) is None
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resume_from(config) is None  # a model that no run of ours wrote, such as a copied student
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ResumeError, match=r"contains the trained model of an earlier run \(model.safetensors\)"):
        resume_from(config)
    config.resume_from_checkpoint = "auto"
    with pytest.raises(ResumeError, match="Use another --output_dir"):
        resume_from(config)


def test_what_trl_calls_by_old_names_is_not_told_to_the_user():
    code = "from topd import TOPDConfig, TOPDTrainer; TOPDConfig('x', use_cpu=True, bf16=False)"
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True)
    assert "FutureWarning" not in done.stderr
