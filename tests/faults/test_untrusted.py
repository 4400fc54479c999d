"""Models and checkpoints from elsewhere: none of their files can run code."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, tiny_trainer

from topd.cli.main import main
from topd.embedded.pair import pair_folder
from topd.errors import ResumeError
from topd.loading.pair import load_pair
from topd.runs.checkpoints import CHECKSUMS

SAVES = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "max_completion_length": 6}
EMBEDDED = ["--data", "embedded", "--max_completion_length", "8", "--use_cpu", "true", "--bf16", "false"]


class Payload:
    """Pickled, it writes a file when it is loaded."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (Path.write_text, (self.witness, "code ran"))


@pytest.fixture
def witness(tmp_path):
    return tmp_path / "witness"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    tiny_trainer(out, **SAVES).train()
    return out


def train(out, student, *more):
    return main(
        ["train", "--model_name_or_path", str(student), "--teacher_model_name_or_path", "embedded:teacher",
         "--output_dir", str(out), *EMBEDDED, *more]
    )  # fmt: skip


def test_the_payload_would_run(witness):
    pickle.loads(pickle.dumps(Payload(witness)))
    assert witness.exists()


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "bare pickle"])
def test_a_checkpoint_with_code_in_it_is_refused(run, tmp_path, witness, file, zipped, fault):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    torch.save({"state": Payload(witness)}, folder / "checkpoint-1" / file, _use_new_zipfile_serialization=zipped)
    (folder / "checkpoint-1" / CHECKSUMS).unlink()  # they find damage, not people
    trainer = tiny_trainer(folder, student=tiny_model(5), **SAVES)
    with pytest.raises(ResumeError, match=r"run code|cut off or broken"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert not witness.exists()
    fault(f"code in {file} ({'zip' if zipped else 'bare pickle'})", "refused with a message; did not run")


def test_arguments_pickled_in_a_checkpoint_are_never_read(run, tmp_path, witness):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    torch.save(Payload(witness), folder / "checkpoint-1" / "training_args.bin")
    tiny_trainer(folder, student=tiny_model(5), **SAVES).train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    assert not witness.exists()


@pytest.mark.parametrize("command", ["train", "probe"])
def test_pickled_weights_are_not_read(tmp_path, witness, capsys, command, fault):
    folder = tmp_path / "student"
    shutil.copytree(pair_folder("student-standard"), folder)
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Payload(witness)}, folder / "pytorch_model.bin")
    if command == "train":
        assert train(tmp_path / "out", folder) == 2
    else:
        assert main(["probe", "--student", str(folder), "--teacher", "embedded:teacher", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "safetensors" in error
    assert "Traceback" not in error
    assert not witness.exists()
    fault(f"topd {command}: a model in pickled weights", "refused with a message; did not run")


@pytest.fixture
def with_code(tmp_path, witness, monkeypatch):
    """A student whose folder brings code; whoever is asked to allow it says yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = tmp_path / "student"
    shutil.copytree(pair_folder("student-standard"), folder)
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(witness)!r}).write_text('code ran')\n")

    def map_in(file, **entries):
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(config | entries))
        return folder

    return map_in


@pytest.mark.parametrize("command", ["train", "probe"])
def test_code_of_a_model_does_not_run_unasked(tmp_path, witness, capsys, with_code, command, fault):
    auto_map = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    folder = with_code("config.json", model_type="mine", auto_map=auto_map)
    if command == "train":
        assert train(tmp_path / "out", folder) == 2
    else:
        assert main(["probe", "--student", str(folder), "--teacher", "embedded:teacher", "--out", str(tmp_path)]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not witness.exists()
    fault(f"topd {command}: a model with code", "refused with a message; did not run")


def test_code_of_a_tokenizer_does_not_run(witness, with_code, fault):
    folder = with_code("tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": [None, "code.T"]})
    _, _, tokenizer = load_pair(str(folder), "embedded:teacher")
    assert tokenizer("what is 1+1?")["input_ids"]
    assert not witness.exists()
    fault("a tokenizer with code", "its tokenizer.json is read without it; did not run")


def test_only_safetensors_are_written(run):
    tiny_trainer(run / "saved").save_model(str(run / "saved"))
    for folder in (run / "checkpoint-2", run / "saved"):
        assert (folder / "model.safetensors").is_file()
        assert not list(folder.glob("pytorch_model*"))
