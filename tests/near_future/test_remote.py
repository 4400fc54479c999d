"""Windows and token losses from a server: the same as from the model in this process, whatever befalls the server."""

from pathlib import Path

import pytest
import torch
from near_future.fake_server import FakeServer, serving
from tiny import TOKENIZER, prompts, tiny_config, tiny_model, tiny_trainer

from topd import openai_server
from topd.errors import ContextError, ServerError, TokenizerMismatchError, TOPDError
from topd.near_future import LocalModel, RemoteTeacher, RemoteWindows, connect
from topd.near_future.remote_teacher import unpack
from topd.near_future.sampling import sample_rollouts
from topd.openai_server import Limits, OpenAIServer
from topd.training import TOPDTrainer
from topd.training.teacher_server import teacher_server, teacher_windows

EOS = TOKENIZER.eos_token_id
TEACHER = tiny_model(1, width=96)
PREFIXES = [
    torch.randint(3, 40, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 1, 9, 2, 7, 3, 4, 8, 6, 11)
]
FAST = Limits(timeout=5, patience=5, concurrency=4)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(openai_server, "FIRST_WAIT", 0.01)


@pytest.fixture
def fake():
    with serving(TEACHER, TOKENIZER) as server:
        yield server


def windows_of(fake: FakeServer, limits: Limits = FAST) -> RemoteWindows:
    return RemoteWindows(OpenAIServer(fake.url, limits), fake.name, [EOS])


def expected(length: int = 6):
    return LocalModel(TEACHER, TOKENIZER.pad_token_id, [EOS]).continue_(PREFIXES, length)


def check_windows(found, reference) -> None:
    assert torch.equal(found.mask, reference.mask)
    assert torch.equal(found.tokens, reference.tokens * reference.mask)


def test_windows_are_those_of_the_model_in_this_process(fake):
    fake.delay = 0.05
    check_windows(windows_of(fake).continue_(PREFIXES, 6), expected())
    assert [prompt for body in fake.requests for prompt in body["prompt"]].count(PREFIXES[0].tolist()) == 1
    assert all(body["return_token_ids"] and body["temperature"] == 0 for body in fake.requests)


def test_a_window_ends_with_eos_also_where_the_server_goes_on(fake):
    ending = int(expected().tokens[0, 2])
    windows = RemoteWindows(OpenAIServer(fake.url, FAST), fake.name, [ending])
    fake.complete = lambda body, original=fake.complete: original(body | {"stop_token_ids": []})  # type: ignore[method-assign]
    found = windows.continue_(PREFIXES, 6)
    check_windows(found, LocalModel(TEACHER, TOKENIZER.pad_token_id, [ending]).continue_(PREFIXES, 6))
    assert found.mask.sum() < found.mask.numel()


def test_no_prefixes_need_no_server():
    windows = RemoteWindows(OpenAIServer("http://127.0.0.1:9", FAST), "teacher", [EOS])
    assert windows.continue_([], 6).tokens.shape == (0, 6)


@pytest.mark.parametrize("faults", [["500"] * 3, ["reset"] * 2, ["500", "reset", "slow", "500"]])
def test_a_server_that_fails_now_and_then_is_asked_again(fake, faults):
    fake.faults = list(faults)
    check_windows(windows_of(fake, Limits(0.3, 10, 4)).continue_(PREFIXES, 6), expected())
    assert fake.faults == []


def test_requests_at_a_time_are_bounded(fake):
    fake.delay = 0.03
    windows_of(fake, Limits(5, 5, 2)).server.post_all("/v1/completions", [{"prompt": [4, 5], "max_tokens": 1}] * 8)
    assert fake.most_at_once == 2


def test_a_dead_server_is_waited_for_and_then_given_up_with_the_remedy(tmp_path, fake, caplog):
    options = tiny_config(tmp_path, teacher_window_server=fake.url, teacher_server_patience=0.3)
    server = teacher_server(options, has_weights=False)
    assert server is not None
    windows = teacher_windows(server, options, TOKENIZER, [EOS])
    fake.faults = ["500"] * 1000
    with pytest.raises(ServerError, match=r"teacher's server .*has not answered for 0.3 s .*resume_from_checkpoint"):
        windows.continue_(PREFIXES, 6)
    assert "trying for" in caplog.text


def test_a_server_that_comes_back_is_used(fake):
    limits = Limits(1, 20, 2)
    fake.faults = ["reset"] * 8
    check_windows(windows_of(fake, limits).continue_(PREFIXES, 6), expected())


@pytest.mark.parametrize(("fault", "message"), [("400", "refuses /v1/completions: HTTP 400"), ("not json", "not JSON")])
def test_what_repeating_cannot_mend_is_said_at_once(fake, fault, message):
    fake.faults = [fault]
    with pytest.raises(ServerError, match=message):
        windows_of(fake).continue_(PREFIXES[:1], 6)
    assert fake.requests == []


def test_connecting_checks_name_tokenizer_and_token_ids(fake):
    server = OpenAIServer(fake.url, FAST)
    assert connect(server, TOKENIZER, [EOS]).model == "teacher"
    assert connect(server, TOKENIZER, [EOS], "teacher").context == 4096
    with pytest.raises(ServerError, match=r"does not serve 'other', but: teacher. .*teacher_server_model"):
        connect(server, TOKENIZER, [EOS], "other")
    fake.text_only = True
    with pytest.raises(ServerError, match=r"returns text only.*vLLM"):
        connect(server, TOKENIZER, [EOS])


def test_a_server_that_cuts_text_differently_is_refused(fake):
    fake.tokenizer = type("Reversed", (), {"encode": lambda self, text, **_: TOKENIZER.encode(text)[::-1]})()
    with pytest.raises(TokenizerMismatchError, match=r"do not share a tokenizer.*there and .* here"):
        connect(OpenAIServer(fake.url, FAST), TOKENIZER, [EOS])


def test_a_server_that_changes_prompts_is_refused(fake):
    original = fake.complete

    def with_bos(body):
        answer = original(body)
        for choice in answer["choices"]:
            choice["prompt_token_ids"] = [0, *choice["prompt_token_ids"]]
        return answer

    fake.complete = with_bos  # type: ignore[method-assign]
    with pytest.raises(ServerError, match=r"changes the prompts"):
        windows_of(fake).continue_(PREFIXES, 6)


def test_the_server_tells_the_teacher_s_log_probabilities_of_the_response(fake):
    rollouts = sample_rollouts(tiny_model(0), TOKENIZER, PREFIXES[:4], max_new_tokens=7)
    known = unpack(RemoteTeacher(windows_of(fake), known=3).hidden(rollouts))
    mask = rollouts.loss_mask.bool()
    logits = TEACHER(rollouts.input_ids, attention_mask=rollouts.attention_mask).logits.detach()
    log_probs = logits[:, rollouts.prompt_ids.shape[1] - 1 : -1].log_softmax(-1)
    sampled = log_probs.gather(-1, rollouts.response_ids[..., None]).squeeze(-1)
    assert torch.equal(known.tokens[mask][:, 0], rollouts.response_ids[mask])
    assert torch.allclose(known.log_probs[mask][:, 0], sampled[mask], atol=1e-4)
    for tokens, given, row in zip(known.tokens[mask], known.log_probs[mask], log_probs[mask], strict=True):
        there = given > -torch.inf
        assert torch.allclose(given[there], row[tokens[there]], atol=1e-4)
        assert {*row.topk(3).indices.tolist(), int(tokens[0])} == set(tokens[there].tolist())


def run(out: Path, **options) -> list[dict[str, float]]:
    torch.manual_seed(0)
    trainer = tiny_trainer(out, student=tiny_model(0), teacher=options.pop("teacher", TEACHER), **options)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_training_with_windows_from_a_server_is_training_with_local_ones(tmp_path, fake):
    local = run(tmp_path / "local", student_window="rollout")
    remote = run(tmp_path / "remote", student_window="rollout", teacher_window_server=fake.url)
    for ours, reference in zip(remote, local, strict=True):
        compared = {k: v for k, v in reference.items() if not k.startswith(("seconds/", "step_time"))}
        assert {k: ours[k] for k in compared} == pytest.approx(compared, rel=1e-4, nan_ok=True)
    assert sum(len(body["prompt"]) for body in fake.requests) > 20


@pytest.mark.parametrize("method", ["opd", "topd"])
def test_training_without_the_teacher_s_weights_is_the_same_where_all_tokens_are_known(tmp_path, fake, method):
    options = {"method": method, "student_window": "rollout", "opd_loss": "one_pass"}
    local = run(tmp_path / "local", **options)
    vocabulary = TEACHER.config.vocab_size
    remote = run_without_weights(tmp_path / "remote", fake, teacher_top_k=vocabulary, **options)
    for ours, reference in zip(remote, local, strict=True):
        compared = {k: v for k, v in reference.items() if k.startswith(("loss", "token_loss", "distance", "guidance"))}
        assert {k: ours[k] for k in compared} == pytest.approx(compared, rel=1e-3, nan_ok=True)
        assert ours["token_loss/unseen"] == pytest.approx(0, abs=1e-5)


def test_the_metric_says_how_much_of_the_student_the_loss_cannot_see(tmp_path, fake):
    few, more = (
        run_without_weights(tmp_path / str(known), fake, teacher_top_k=known, method="opd", max_steps=1)[0]
        for known in (1, 12)
    )
    assert 0 < more["token_loss/unseen"] < few["token_loss/unseen"] < 1
    assert few["loss"] < more["loss"]  # merging tokens only takes away


def run_without_weights(out: Path, fake: FakeServer, **options) -> list[dict[str, float]]:
    torch.manual_seed(0)
    args = tiny_config(out, teacher_window_server=fake.url, **options)
    trainer = TOPDTrainer(
        model=tiny_model(0), args=args, train_dataset=prompts(), eval_dataset=prompts(4), processing_class=TOKENIZER
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_options_that_need_the_teacher_s_weights_are_refused(tmp_path):
    wrong = {"embedding": "teacher", "guidance_context": "teacher", "temperature": 0.7, "beta": 0.0}
    with pytest.raises(TOPDError, match=r"embedding=teacher .*, nor .*, nor temperature=0.7"):
        TOPDTrainer(tiny_model(0), args=tiny_config(tmp_path, teacher_window_server="http://x", **wrong))
    with pytest.raises(TOPDError, match="needs a teacher"):
        TOPDTrainer(tiny_model(0), args=tiny_config(tmp_path), train_dataset=prompts())


def test_no_step_is_lost_when_the_server_is_given_up(tmp_path, fake):
    options = {"student_window": "rollout", "teacher_window_server": fake.url, "max_steps": 4}
    whole = run(tmp_path / "whole", **options)
    asked = len(fake.requests)
    original = fake.complete

    def dies_in_the_third_step(body):
        if len(fake.requests) > asked * 1.5:
            fake.faults = ["500"] * 10_000
        return original(body)

    fake.complete = dies_in_the_third_step  # type: ignore[method-assign]
    with pytest.raises(ServerError, match="has not answered"):
        run(tmp_path / "cut", teacher_server_patience=0.3, **options)
    checkpoint = max((tmp_path / "cut").glob("checkpoint-*"))
    done = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 0 < done < 4
    fake.faults, fake.complete = [], original  # type: ignore[method-assign]
    trainer = tiny_trainer(tmp_path / "cut", student=tiny_model(0), teacher=TEACHER, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[:done] == pytest.approx([entry["loss"] for entry in whole][:done])
    assert len(losses) == 4


def test_a_server_with_too_short_a_context_is_named(tmp_path, fake):
    fake.context = 30
    with pytest.raises(ContextError, match="teacher's server's context of 30"):
        run(tmp_path, teacher_window_server=fake.url, max_completion_length=40)
