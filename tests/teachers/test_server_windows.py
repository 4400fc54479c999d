"""Windows and token losses from a server: the same as from the model in this process, whatever befalls the server."""

from pathlib import Path

import pytest
import torch
from teachers.fake_server import FakeServer, serving
from tiny import TOKENIZER, prompts, tiny_config, tiny_model, tiny_trainer

from topd.errors import ContextError, ServerError, TokenizerMismatchError, TOPDError
from topd.near_future import LocalModel
from topd.near_future.sampling import sample_rollouts
from topd.teachers import openai_server
from topd.teachers.from_options import teacher_server
from topd.teachers.openai_server import TRIES, Limits, OpenAIServer
from topd.teachers.server_windows import ServerWindows, connect
from topd.teachers.top_k import TopKTeacher
from topd.training import TOPDTrainer

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


def windows_of(fake: FakeServer, limits: Limits = FAST) -> ServerWindows:
    return ServerWindows(OpenAIServer(fake.url, limits), fake.name, [EOS])


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
    windows = ServerWindows(OpenAIServer(fake.url, FAST), fake.name, [ending])
    fake.complete = lambda body, original=fake.complete: original(body | {"stop_token_ids": []})  # type: ignore[method-assign]
    found = windows.continue_(PREFIXES, 6)
    check_windows(found, LocalModel(TEACHER, TOKENIZER.pad_token_id, [ending]).continue_(PREFIXES, 6))
    assert found.mask.sum() < found.mask.numel()


def test_no_prefixes_need_no_server():
    windows = ServerWindows(OpenAIServer("http://127.0.0.1:9", FAST), "teacher", [EOS])
    assert windows.continue_([], 6).tokens.shape == (0, 6)


@pytest.mark.parametrize(
    ("faults", "timeout"), [(["500"] * 3, 60), (["reset"] * 2, 60), (["500", "reset", "slow", "500"], 4)]
)
def test_a_server_that_fails_now_and_then_is_asked_again(fake, faults, timeout):
    windows = windows_of(fake, Limits(timeout, 120, 4))
    windows.server.models()  # it is there
    fake.faults = list(faults)
    check_windows(windows.continue_(PREFIXES, 6), expected())
    assert fake.faults == []


def test_requests_at_a_time_are_bounded(fake):
    fake.delay = 0.03
    windows_of(fake, Limits(5, 5, 2)).server.post_all("/v1/completions", [{"prompt": [4, 5], "max_tokens": 1}] * 8)
    assert fake.most_at_once == 2


def test_a_dead_server_is_waited_for_and_then_given_up_with_the_remedy(tmp_path, fake, caplog):
    options = tiny_config(tmp_path, teacher_model_server_url=fake.url, teacher_server_kwargs={"patience": 0.3})
    server = teacher_server(options, has_weights=False)
    assert server is not None
    windows = connect(server, TOKENIZER, [EOS], options.teacher_server_model)
    fake.faults = ["500"] * 1000
    with pytest.raises(ServerError, match=r"teacher's server .*has not answered for 0.3 s .*resume_from_checkpoint"):
        windows.continue_(PREFIXES, 6)
    assert "trying for" in caplog.text


def test_a_server_that_comes_back_is_used(fake):
    windows = windows_of(fake, Limits(60, 120, 2))
    windows.server.models()
    fake.faults = ["reset"] * 8
    check_windows(windows.continue_(PREFIXES, 6), expected())


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
    known = TopKTeacher(windows_of(fake), known=3).known_tokens(rollouts)
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


# Answers that cannot be used: asked for again, never trained on


def every_choice(**changes):
    """Spoils an answer: each choice gets these entries."""
    return lambda answer: {"choices": [choice | changes for choice in answer["choices"]]}


def cut_short(answer):
    return {"choices": [choice | {"token_ids": choice["token_ids"][:-2]} for choice in answer["choices"]]}


UNUSABLE = {
    "abort": (every_choice(finish_reason="abort"), "breaks an answer off .finish_reason 'abort'"),
    "error": (every_choice(finish_reason="error", token_ids=None), "breaks an answer off .finish_reason 'error'"),
    "null": (every_choice(finish_reason=None), "breaks an answer off .finish_reason None"),
    "empty": (every_choice(token_ids=[]), "ends a window after 0 of 6 tokens, without an end token"),
    "cut short": (cut_short, "ends a window after . of 6 tokens, without an end token"),
    "an error with HTTP 200": (lambda _: {"error": {"message": "CUDA"}}, "answers with an error: .*CUDA"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_window_that_the_server_breaks_off_is_asked_for_again(fake, kind):
    spoil, message = UNUSABLE[kind]
    windows = windows_of(fake)
    fake.spoil = lambda answer: answer if len(fake.requests) > 3 else spoil(answer)
    check_windows(windows.continue_(PREFIXES, 6), expected())
    fake.spoil = spoil
    with pytest.raises(ServerError, match=rf"The server at {fake.url[:-3]} {message}.*asked {TRIES} times"):
        windows.continue_(PREFIXES, 6)


def test_a_window_that_ends_early_with_an_end_token_is_whole(fake):
    ending = int(expected().tokens[0, 2])
    found = ServerWindows(OpenAIServer(fake.url, FAST), fake.name, [ending]).continue_(PREFIXES[:1], 6)
    assert found.mask.sum(-1).tolist() == [3]


@pytest.mark.parametrize("token", [TEACHER.config.vocab_size, -1, 10**30, None, "5", True, 2.0, [3]])
def test_what_is_no_token_of_the_student_is_refused(fake, token):
    windows = connect(OpenAIServer(fake.url, FAST), TOKENIZER, [EOS], vocabulary=TEACHER.config.vocab_size)
    fake.spoil = every_choice(token_ids=[token] * 6)
    with pytest.raises(ServerError, match=rf"The server at {fake.url[:-3]} returns .* as a token id"):
        windows.continue_(PREFIXES[:1], 6)


SHAPES = {
    "null": lambda answer: None,
    "a list": lambda answer: [answer],
    "a text": lambda answer: "choices",
    "no choices": lambda answer: {},
    "null choices": lambda answer: {"choices": None},
    "no index": lambda answer: {"choices": [{"token_ids": [4] * 6}]},
    "an index twice": lambda answer: {"choices": answer["choices"] * 2},
    "null as a choice": lambda answer: {"choices": [None]},
    "a number for tokens": every_choice(token_ids=7),
    "null for tokens": every_choice(token_ids=None),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_windows_in_another_form_end_in_a_message_that_names_the_server(fake, shape):
    fake.spoil = SHAPES[shape]
    with pytest.raises(ServerError, match=rf"The server at {fake.url[:-3]} "):
        windows_of(fake).continue_(PREFIXES[:2], 6)


def log_probs_as(change):
    """Spoils an answer: the log-probabilities of the last token."""

    def spoil(answer):
        for choice in answer["choices"]:
            choice["prompt_logprobs"][-1] = change(choice["prompt_logprobs"][-1])
        return answer

    return spoil


def value(number):
    return lambda entries: {token: {"logprob": number} for token in entries}


LOG_PROBS = {
    "NaN": (value(float("nan")), "gives nan as the log-probability .*bfloat16"),
    "-inf": (value(float("-inf")), "gives -inf as the log-probability"),
    "inf": (value(float("inf")), "gives inf as the log-probability"),
    "above 0": (value(0.12), r"probabilities that add up to 3\.38.*raw_logprobs"),
    "more than 1 in all": (value(-0.1), r"probabilities that add up to 2\.7"),
    "null": (value(None), "form that is not OpenAI's"),
    "a word": (value("likely"), "form that is not OpenAI's"),
    "no entries": (lambda _: None, "form that is not OpenAI's"),
    "not the sampled token": (lambda _: {"0": {"logprob": -0.5}}, "form that is not OpenAI's"),
    "no token id": (lambda entries: entries | {"word": {"logprob": -9.0}}, "form that is not OpenAI's"),
    "beyond the vocabulary": (
        lambda entries: entries | {"99999": {"logprob": -9.0}},
        "of token 99999; the student has",
    ),
}


@pytest.mark.parametrize("kind", LOG_PROBS)
def test_what_is_no_log_probability_is_refused(fake, kind):
    rollouts = sample_rollouts(tiny_model(0), TOKENIZER, PREFIXES[:2], max_new_tokens=4)
    windows = connect(OpenAIServer(fake.url, FAST), TOKENIZER, [EOS], vocabulary=TEACHER.config.vocab_size)
    change, message = LOG_PROBS[kind]
    fake.spoil = log_probs_as(change)
    with pytest.raises(ServerError, match=rf"The server at {fake.url[:-3]} .*{message}"):
        TopKTeacher(windows, known=2).known_tokens(rollouts)


def test_a_log_probability_just_above_0_is_rounding(fake):
    rollouts = sample_rollouts(tiny_model(0), TOKENIZER, PREFIXES[:2], max_new_tokens=4)
    fake.spoil = log_probs_as(
        lambda entries: {token: {"logprob": 1e-6 if i == 0 else -50.0} for i, token in enumerate(entries)}
    )
    known = TopKTeacher(windows_of(fake), known=2).known_tokens(rollouts)
    assert known.log_probs.max() == 0


@pytest.mark.parametrize("answer", [{}, {"tokens": None}, {"tokens": ["x"]}, [], None])
def test_a_tokenizer_s_answer_in_another_form_is_named(fake, answer):
    fake.tokenize = lambda body: answer  # type: ignore[method-assign]
    with pytest.raises(ServerError, match="answers /tokenize in a form that is not OpenAI's"):
        connect(OpenAIServer(fake.url, FAST), TOKENIZER, [EOS])


@pytest.mark.parametrize("context", ["long", -1, True, 2.5])
def test_a_context_that_is_no_number_of_tokens_is_refused(fake, context):
    fake.context = context
    with pytest.raises(ServerError, match="answers /v1/models in a form"):
        connect(OpenAIServer(fake.url, FAST), TOKENIZER, [EOS])


def run(out: Path, **options) -> list[dict[str, float]]:
    torch.manual_seed(0)
    trainer = tiny_trainer(out, student=tiny_model(0), teacher=options.pop("teacher", TEACHER), **options)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_training_with_windows_from_a_server_is_training_with_local_ones(tmp_path, fake):
    local = run(tmp_path / "local", student_window="rollout")
    remote = run(tmp_path / "remote", student_window="rollout", teacher_model_server_url=fake.url)
    for ours, reference in zip(remote, local, strict=True):
        compared = {
            k: v for k, v in reference.items() if not k.startswith(("seconds/", "step_time", "rollouts_per_second"))
        }
        assert {k: ours[k] for k in compared} == pytest.approx(compared, rel=1e-4, nan_ok=True)
    assert sum(len(body["prompt"]) for body in fake.requests) > 20


@pytest.mark.parametrize("method", ["opd", "topd"])
def test_training_without_the_teacher_s_weights_is_the_same_where_all_tokens_are_known(tmp_path, fake, method):
    options = {"method": method, "student_window": "rollout", "opd_loss": "one_pass"}
    local = run(tmp_path / "local", **options)
    vocabulary = TEACHER.config.vocab_size
    remote = run_without_weights(tmp_path / "remote", fake, loss_top_k=vocabulary, **options)
    for ours, reference in zip(remote, local, strict=True):
        compared = {k: v for k, v in reference.items() if k.startswith(("loss", "token_loss", "distance", "guidance"))}
        assert {k: ours[k] for k in compared} == pytest.approx(compared, rel=1e-3, nan_ok=True)
        assert ours["token_loss/outside_top_k"] == pytest.approx(0, abs=1e-5)


def test_the_metric_says_how_much_of_the_student_the_loss_cannot_see(tmp_path, fake):
    few, more = (
        run_without_weights(tmp_path / str(known), fake, loss_top_k=known, method="opd", max_steps=1)[0]
        for known in (1, 12)
    )
    assert 0 < more["token_loss/outside_top_k"] < few["token_loss/outside_top_k"] < 1
    assert few["loss"] < more["loss"]  # merging tokens only takes away


def run_without_weights(out: Path, fake: FakeServer, **options) -> list[dict[str, float]]:
    torch.manual_seed(0)
    args = tiny_config(out, teacher_model_server_url=fake.url, **options)
    trainer = TOPDTrainer(
        model=tiny_model(0), args=args, train_dataset=prompts(), eval_dataset=prompts(4), processing_class=TOKENIZER
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_options_that_need_the_teacher_s_weights_are_refused(tmp_path):
    wrong = {"embedding": "teacher", "guidance_context": "teacher", "temperature": 0.7, "beta": 0.0}
    with pytest.raises(TOPDError, match=r"embedding=teacher .*, nor .*, nor temperature=0.7"):
        TOPDTrainer(tiny_model(0), args=tiny_config(tmp_path, teacher_model_server_url="http://x", **wrong))
    with pytest.raises(TOPDError, match="needs a teacher"):
        TOPDTrainer(tiny_model(0), args=tiny_config(tmp_path), train_dataset=prompts())


def test_a_server_with_too_short_a_context_is_named(tmp_path, fake):
    fake.context = 30
    with pytest.raises(ContextError, match="teacher's server's context of 30"):
        run(tmp_path, teacher_model_server_url=fake.url, max_completion_length=40)
