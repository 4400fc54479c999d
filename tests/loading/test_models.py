"""Adapter folders as models of `topd probe`, `topd correct` and `topd eval`: merged, from safetensors only."""

import importlib.util
import json
import shlex

import pytest
import torch
from safetensors.torch import load_file
from tiny import TOKENIZER
from transformers import AutoModelForCausalLM

from topd.cli.main import main
from topd.embedded.pair import pair_folder
from topd.errors import TOPDError
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
    with pytest.raises(TOPDError, match=r"needs peft: pip install 'topd\[peft\]'"):
        loaded_model(str(folder))


CHECK = ["check", "--quick", "--teacher", "embedded:teacher", "--student"]
TRAIN, WARM_START = (["train", "--config", "recipe:embedded"],
                     ["warmstart", "--config", "recipe:embedded-warmstart", "--data", "x"])  # fmt: skip


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (CHECK, "student"),
        (["check", "--quick", "--student", "embedded:student-standard", "--teacher"], "teacher"),
        ([*TRAIN, "--model_name_or_path"], "student"),
        ([*TRAIN, "--teacher_model_name_or_path"], "teacher"),
        ([*WARM_START, "--model_name_or_path"], "student"),
        ([*WARM_START, "--teacher_model_name_or_path"], "teacher"),
    ],
)
def test_training_and_its_check_refuse_an_adapter_before_any_weights(adapter, capsys, command, role):
    folder, _ = adapter
    (folder / "adapter_model.safetensors").write_bytes(b"not read")
    assert main([*command, str(folder)]) == 2
    message = capsys.readouterr().err
    assert f"topd: {folder} holds an adapter of " in message
    assert f"the {role} must be a whole model. Merge it once" in message
    assert ("--use_peft true" in message) == (role == "student")


def test_what_the_refusal_says_makes_a_model_that_is_taken(adapter, capsys):
    folder, expected = adapter
    assert main([*CHECK, str(folder)]) == 2
    python, option, program = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert (python, option) == ("python", "-c")
    exec(program)
    whole = f"{folder}-merged"
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(whole)(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert main([*CHECK, whole, "--max_completion_length", "96", "--window_length", "16", "--bf16", "false"]) == 0


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
    assert "holds an adapter" in capsys.readouterr().err
