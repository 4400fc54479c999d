"""A wrong server is told within seconds, before any weights are loaded; a run writes no secret of its server."""

import copy
import json
import pickle
import shutil
import time

import pytest
import torch
from fake_openai import fake_server
from teachers.fake_server import serving
from tiny import TOKENIZER, prompts, tiny_config, tiny_model

from topd.cli.main import main
from topd.embedded.pair import pair_folder
from topd.errors import ServerError
from topd.report.page import write_report
from topd.teachers.openai_server import OpenAIServer
from topd.training import TOPDTrainer

NOBODY = "http://127.0.0.1:1"
RECIPE = ["--config", "recipe:embedded"]
ALONE = ["--model_name_or_path", "embedded:student-standard", "--teacher_model_name_or_path", ""]


@pytest.fixture
def no_weights(monkeypatch):
    def loaded(*_, **__):
        pytest.fail("weights are loaded")

    monkeypatch.setattr("transformers.modeling_utils.PreTrainedModel.from_pretrained", loaded)


@pytest.mark.parametrize("patience", [0.5, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "command",
    [
        ["train", *RECIPE],
        ["train", *RECIPE, "--preflight", "false"],
        ["train", *RECIPE, *ALONE],
        ["eval", "--limit", "4", "--model", "someone"],
        ["generate", "--teacher", "someone", "--data", "embedded", "--limit", "4"],
    ],
)
def test_a_wrong_address_is_told_in_seconds(command, patience, no_weights, tmp_path, capsys, monkeypatch):
    if patience:
        monkeypatch.setattr("topd.teachers.openai_server.FIRST_CONTACT", patience)
    if command[0] == "train":
        options = ["--teacher_model_server_url", NOBODY, "--output_dir", str(tmp_path)]
    else:
        options = ["--server", NOBODY, "--out", str(tmp_path / "out.jsonl")]
    began = time.monotonic()
    assert main([*command, *options]) == 2
    error = capsys.readouterr().err
    assert time.monotonic() - began < 20  # 5 s, and a busy machine
    assert f"server at {NOBODY} cannot be reached" in error
    assert "connection attempts failed" in error
    assert "correct the address" in error
    assert "Traceback" not in error


def test_a_wrong_name_is_told_before_weights_are_loaded(no_weights, tmp_path, capsys):
    with fake_server() as server:
        args = tiny_config(tmp_path, teacher_model_server_url=server.url, teacher_server_model="another")
        with pytest.raises(ServerError, match="does not serve 'another', but: the-teacher"):
            TOPDTrainer("embedded:student-standard", args=args)
        assert main(["eval", "--model", "another", "--server", server.url, "--out", str(tmp_path)]) == 2
    assert "It serves: the-teacher" in capsys.readouterr().err


def server_row(capsys, url, *options):
    status = main(["check", *RECIPE, "--quick", "--json", "--teacher_model_server_url", url, *options])
    findings = json.loads(capsys.readouterr().out)["findings"]
    return status, next(finding for finding in findings if finding["check"] == "teacher's server")


def test_check_has_a_row_for_the_server(capsys, monkeypatch):
    monkeypatch.setattr("topd.teachers.openai_server.FIRST_CONTACT", 0.5)
    status, row = server_row(capsys, NOBODY)
    assert (status, row["verdict"]) == (2, "error")
    assert "cannot be reached" in row["found"]
    assert row["remedy"].startswith("Start it first")
    with serving(tiny_model(1), TOKENIZER) as fake:
        status, row = server_row(capsys, fake.url)
        assert (status, row["verdict"]) == (0, "ok")
        assert "serves 'teacher' with a context of 4,096" in row["found"]
        fake.text_only = True
        assert "returns text only" in server_row(capsys, fake.url)[1]["found"]
        assert server_row(capsys, fake.url, "--method", "opd")[1]["found"] == "method=opd does not use it"


def test_check_knows_a_server_that_is_the_whole_teacher(capsys, tmp_path):
    """Without weights plain OPD asks it too, some options cannot be, and no weights are looked for."""
    alone = ["--server-alone", "--method", "opd"]
    with serving(tiny_model(1), TOKENIZER) as fake:
        assert "serves 'teacher'" in server_row(capsys, fake.url, *alone)[1]["found"]
        status, row = server_row(capsys, fake.url, "--server-alone", "--embedding", "teacher_hidden")
        assert (status, row["verdict"]) == (2, "error")
        assert "cannot have embedding=teacher_hidden" in row["found"]
        shutil.copytree(pair_folder("teacher"), tmp_path / "teacher")
        (tmp_path / "teacher" / "model.safetensors").unlink()
        command = ["check", *RECIPE, *alone, "--json", "--teacher", str(tmp_path / "teacher")]
        assert main([*command, "--teacher_model_server_url", fake.url]) == 0
        capsys.readouterr()
        assert main(command) == 2
        assert "--server-alone says that the teacher is on a server" in capsys.readouterr().err
        assert main(["check", *ALONE, "--teacher_model_server_url", fake.url]) == 2
        assert "--teacher NAME --server-alone" in capsys.readouterr().err


SECRETS = ("kim-the-user", "s3cret-word", "k3y-in-the-query")


def with_secrets(url):
    user, word, key = SECRETS
    return url.replace("http://", f"http://{user}:{word}@") + f"?api_key={key}"


def none_in(text):
    assert [secret for secret in SECRETS if secret in text] == []


@pytest.mark.parametrize("method", ["topd", "opd"])
def test_a_run_writes_no_secret_of_its_server(tmp_path, method):
    with serving(tiny_model(1), TOKENIZER) as fake:
        url = with_secrets(fake.url)
        args = tiny_config(
            tmp_path, teacher_model_server_url=url, method=method, max_steps=1, save_strategy="steps", save_steps=1
        )
        trainer = TOPDTrainer(tiny_model(0), args=args, train_dataset=prompts(), processing_class=TOKENIZER)
        trainer.train()
        trainer.save_model(str(tmp_path))
        trainer.save_state()
    write_report(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"topd_config.json", "training_args.bin", "report.html"} <= {path.name for path in files}
    for path in files:
        none_in(path.read_bytes().decode(errors="replace"))
    kept = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert kept.teacher_model_server_url.startswith("http://***@127.0.0.1")


def test_copies_of_the_options_reach_the_server_in_this_process(tmp_path):
    with fake_server() as server:
        args = tiny_config(tmp_path, teacher_model_server_url=with_secrets(server.url))
        none_in(str(args) + str(args.to_dict()))
        for each in (args, copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
            OpenAIServer(each.teacher_model_server_url).models()
    assert len(set(server.authorizations)) == 1
    assert server.authorizations[0]
