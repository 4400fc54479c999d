"""Adapter folders as models of `topd probe`, `topd correct` and `topd eval`: merged, from safetensors only."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TOKENIZER
from transformers import AutoModelForCausalLM

from topd.cli.main import main
from topd.embedded.pair import pair_folder
from topd.errors import TOPDError
from topd.evaluation.run import fingerprint
from topd.loading.models import loaded_model

peft = pytest.importorskip("peft")
IDS = torch.tensor([[5, 9, 12, 7, 30]])


@pytest.fixture
def adapter(tmp_path):
    """An adapter on the embedded student that changes what it says; and its logits, unmerged."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(pair_folder("student-standard"))
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(IDS).logits


@torch.no_grad()
def test_an_adapter_is_its_base_with_it_merged(adapter):
    folder, expected = adapter
    model, tokenizer = loaded_model(str(folder))
    assert not isinstance(model, peft.PeftModel)
    assert not model.training
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    alone = loaded_model("embedded:student-standard")[0](IDS).logits
    assert (alone - expected).abs().max() > 0.1
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()


def test_the_adapter_s_own_tokenizer_comes_first(adapter):
    folder, _ = adapter
    TOKENIZER.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": "of the adapter"}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    assert loaded_model(str(folder))[1].chat_template == "of the adapter"


def test_a_broken_tokenizer_of_the_adapter_is_not_said_to_be_its_base_s(adapter):
    folder, _ = adapter
    TOKENIZER.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(TOPDError, match=rf"Cannot load the tokenizer of {folder}: .* is the adapter's own") as refusal:
        loaded_model(str(folder))
    assert "cannot be loaded" not in str(refusal.value)
    (folder / "tokenizer_config.json").unlink()  # as the message says
    assert loaded_model(str(folder))[1].get_vocab() == TOKENIZER.get_vocab()


def test_the_base_may_be_named_as_anywhere_else(adapter):
    folder, _ = adapter
    say(folder, "embedded:student-standard")
    assert loaded_model(str(folder))[0].config.hidden_size


def say(folder, base):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


def test_what_cannot_be_loaded_is_said(adapter, tmp_path, monkeypatch):
    folder, _ = adapter
    say(folder, str(tmp_path / "gone"))
    with pytest.raises(TOPDError, match=r"belongs to .*gone, which cannot be loaded.*base_model_name_or_path"):
        loaded_model(str(folder))
    say(folder, "embedded:teacher")
    with pytest.raises(TOPDError, match="does not fit its base"):
        loaded_model(str(folder))
    say(folder, None)
    with pytest.raises(TOPDError, match="has no base_model_name_or_path"):
        loaded_model(str(folder))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(TOPDError, match=r"without adapter_model.safetensors, the only format that is read"):
        loaded_model(str(folder))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else found(name, *rest))
    with pytest.raises(TOPDError, match=r"needs peft: pip install 'peft"):
        loaded_model(str(folder))


CHECK = ["check", "--quick", "--teacher", "embedded:teacher", "--student"]
FEW = ("--per_device_train_batch_size", "2", "--max_completion_length", "12", "--use_cpu", "true", "--bf16", "false",
       "--gradient_checkpointing", "false", "--report_to", "none", "--max_steps", "1")  # fmt: skip


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_an_adapter_that_cannot_be_loaded_is_refused_before_any_weights(adapter, capsys, role):
    folder, _ = adapter
    (folder / "adapter_model.safetensors").unlink()
    names = {"student": "embedded:student-standard", "teacher": "embedded:teacher"} | {role: str(folder)}
    pair = [word for each, name in names.items() for word in (f"--{each}", name)]
    for command in (["check", "--quick"], ["train"], ["warmstart", "--data", "x"]):
        assert main([*command, *pair, "--use_cpu", "true", "--bf16", "false"]) == 2
        assert f"topd: {folder} contains an adapter without adapter_model.safetensors" in capsys.readouterr().err


def test_the_check_knows_adapters(adapter, tmp_path, capsys):
    folder, _ = adapter
    short = ["--max_completion_length", "32", "--window_length", "16", "--bf16", "false"]
    assert main([*CHECK, str(folder), *short]) == 0
    assert "is trained further" in " ".join(capsys.readouterr().out.split())
    assert main([*CHECK, str(folder), *short, "--use_peft", "true"]) == 2
    twice = ["--student", str(folder), "--teacher", str(folder), "--data", "embedded"]
    capsys.readouterr()
    assert main(["check", "--quick", *twice, *short, "--json"]) == 2
    assert "are the same model" in capsys.readouterr().out
    models = ["--student", str(folder), "--teacher", "embedded:student-standard", "--samples", "2"]
    assert main(["check", *models, "--max-new-tokens", "12", *short, "--json"]) == 0
    found = {each["check"]: each for each in json.loads(capsys.readouterr().out)["findings"]}
    assert "teacher" not in found["memory"]["found"].partition("(student)")[0]  # one set of weights


def test_a_warm_start_trains_an_adapter_further_and_saves_whole_weights(adapter, tmp_path):
    folder, expected = adapter
    data = tmp_path / "solutions.jsonl"
    data.write_text('{"prompt": "what is 2+3?", "completion": " 5"}\n' * 4)
    command = ["warmstart", "--student", str(folder), "--teacher", "embedded:student-standard", "--data", str(data)]
    few = [word for word in FEW if word not in ("--max_completion_length", "12")]
    assert main([*command, *few, "--learning_rate", "1e-5", "--output_dir", str(tmp_path / "warm")]) == 0
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "warm")(IDS).logits
    alone = AutoModelForCausalLM.from_pretrained(pair_folder("student-standard"))(IDS).logits
    assert 0 < (logits - expected).abs().mean() < 0.1 * (alone - expected).abs().mean()  # it began at the adapter


def test_merge_writes_a_whole_model(adapter, tmp_path, capsys):
    folder, expected = adapter
    out = tmp_path / "whole"
    assert main(["merge", str(folder), "--out", str(out)]) == 0
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(out)(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert loaded_model(str(out))[1].get_vocab() == TOKENIZER.get_vocab()
    assert main(["merge", str(folder), "--out", str(out)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert main(["merge", str(out), "--out", str(tmp_path / "again")]) == 2
    assert "is not an adapter folder" in capsys.readouterr().err


def test_merge_writes_into_an_empty_folder_however_it_is_named(adapter, tmp_path, monkeypatch):
    """It is not replaced: it may be a mount point, a link, or lie in a folder that cannot be written."""
    for name in ("here", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", str(tmp_path / "link")):
        before = Path(out).stat().st_ino
        assert main(["merge", str(adapter[0]), "--out", out]) == 0
        assert Path(out).stat().st_ino == before
        assert not (Path(out) / ".part").exists()
        AutoModelForCausalLM.from_pretrained(out)


def test_merge_checks_that_it_can_write_before_it_loads(adapter, capsys, monkeypatch):
    monkeypatch.setattr("topd.loading.models.loaded_model", lambda *_: pytest.fail("weights are loaded"))
    assert main(["merge", str(adapter[0]), "--out", "/sys/merged"]) == 2
    assert "/sys/merged" in (said := capsys.readouterr().err)
    assert "Check its permissions, or use another path" in said


@pytest.mark.parametrize(("value", "dtype"), [(1e6, "float16"), (torch.nan, "auto")])
def test_a_merge_that_overflows_says_so(adapter, tmp_path, capsys, value, dtype):
    weights = load_file(adapter[0] / "adapter_model.safetensors")
    save_file({name: torch.full_like(weight, value) for name, weight in weights.items()},
              adapter[0] / "adapter_model.safetensors")  # fmt: skip
    assert main(["merge", str(adapter[0]), "--out", str(tmp_path / "out"), "--dtype", dtype]) == 2
    said = capsys.readouterr().err
    assert "computes NaN or infinite logits" in said
    assert "--dtype float32 or bfloat16" in said
    assert not (tmp_path / "out").exists()


def test_a_merge_that_fails_leaves_nothing_and_can_be_repeated(adapter, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    out.mkdir()
    command = ["merge", str(adapter[0]), "--out", str(out / "whole")]
    with monkeypatch.context() as patched:
        patched.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
        assert main(command) == 2
    assert "No space left" in capsys.readouterr().err
    assert list(out.iterdir()) == []
    (out / "whole").mkdir()
    (out / "whole" / "traceback.txt").write_text("of an earlier merge")
    assert main(command) == 0
    assert [path.name for path in out.iterdir()] == ["whole"]
    assert not (out / "whole" / "traceback.txt").exists()


def test_a_study_of_adapters(adapter, tmp_path):
    """Every run trains the same adapter further."""
    folder, _ = adapter
    out, file = tmp_path / "study", tmp_path / "study.yaml"
    study = {
        "student": str(folder), "teacher": "embedded:student-standard", "seeds": [0], "steps": 1, "held_out": 2,
        "curve_every": 1, "curve_problems": 2, "arms": {"opd": {"method": "opd"}},
        "options": {"per_device_train_batch_size": 2, "max_completion_length": 12},
    }  # fmt: skip
    file.write_text(json.dumps(study))
    assert main(["study", "--config", str(file), "--out", str(out)]) == 0
    record = json.loads((out / "runs" / "opd" / "0.json").read_text())
    assert record["metrics"]["loss"]["1"] > 0.01


def test_a_fingerprint_does_not_depend_on_the_order_in_which_peft_saves_a_set(adapter):
    folder, _ = adapter
    file, before = folder / "adapter_config.json", fingerprint(str(folder))
    config = json.loads(file.read_text())
    assert len(config["target_modules"]) > 1
    file.write_text(json.dumps(config | {"target_modules": config["target_modules"][::-1]}, indent=2))
    assert fingerprint(str(folder)) == before
    file.write_text(json.dumps(config | {"lora_alpha": 99}, indent=2))
    assert fingerprint(str(folder)) != before


def test_the_commands_take_adapters(adapter, tmp_path, capsys):
    folder, _ = adapter
    pair = ["--student", str(folder), "--teacher", "embedded:teacher"]
    few = ["--rollouts", "2", "--batch", "2", "--max-new-tokens", "12", "--window-length", "4"]
    assert main(["probe", *pair, *few, "--out", str(tmp_path / "probe")]) == 0
    assert main(["correct", *pair, *few, "--steps", "1", "--arms", "opd", "--out", str(tmp_path / "correct")]) == 0
    command = ["eval", "--model", str(folder), "--limit", "2", "--samples", "1", "--max-new-tokens", "8",
               "--benchmark", "embedded"]  # fmt: skip
    assert main([*command, "--out", str(tmp_path / "eval")]) == 0
    settings = json.loads((tmp_path / "eval" / "adapter" / "embedded.settings.json").read_text())
    assert settings["fingerprint"]
    assert main([*command, "--engine", "vllm", "--out", str(tmp_path / "vllm")]) == 2
    assert "topd merge" in capsys.readouterr().err
    words = ["generate", "--teacher", str(folder), "--data", "embedded", "--limit", "2", "--max-new-tokens", "8"]
    assert main([*words, "--out", str(tmp_path / "solutions.jsonl")]) == 0
