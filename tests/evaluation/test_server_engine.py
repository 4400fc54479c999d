"""Responses from a server: what is asked, and what happens when it fails."""

import json

import pytest
from fake_openai import fake_server, good_answer

from topd.cli.main import main
from topd.errors import ServerError
from topd.evaluation.engines import Request, Sampling
from topd.evaluation.server_engine import ServerEngine
from topd.teachers import openai_server
from topd.teachers.openai_server import TRIES, Limits

TEXT = [Request(n, f"prompt number {n}") for n in range(12)]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(openai_server, "FIRST_WAIT", 0.01)


def engine(server, concurrency=3, patience=10):
    return ServerEngine(server.url, "the-teacher", Limits(10, patience, concurrency))


def respond(made, requests=TEXT, sampling=None):
    return {n: response for batch in made.respond(requests, sampling or Sampling()) for n, response in batch}


def test_every_prompt_gets_its_own_response_with_few_requests_at_a_time():
    with fake_server() as server:
        responses = respond(engine(server))
    assert {n: response.text for n, response in responses.items()} == {
        request.number: f" echo {request.prompt}" for request in TEXT
    }
    assert not any(response.truncated for response in responses.values())
    assert {response.tokens for response in responses.values()} == {4}
    assert 1 <= server.most <= 3


def test_the_request_carries_the_settings_and_a_seed_of_its_own():
    sampling = Sampling(0.7, 0.9, 2, seed=5)
    with fake_server() as server:
        responses = respond(engine(server), TEXT[:2], sampling)
    assert all(response.truncated for response in responses.values())
    first, second = server.seen
    assert first["path"] == "/v1/completions"
    assert (first["temperature"], first["top_p"], first["top_k"], first["max_tokens"]) == (0.7, 0.9, -1, 2)
    neutral = {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    assert {name: first[name] for name in neutral} == neutral  # else the server takes the model's own
    assert first["model"] == "the-teacher"
    assert abs(first["seed"] - second["seed"]) == 1


def test_messages_go_through_the_server_s_chat_template():
    prompt = [{"role": "user", "content": "what is 2+3?"}]
    with fake_server() as server:
        responses = respond(
            engine(server), [Request(0, prompt)], Sampling(chat_template_kwargs={"enable_thinking": False})
        )
    assert responses[0].text == " echo what is 2+3?"
    assert server.seen[0]["path"] == "/v1/chat/completions"
    assert server.seen[0]["chat_template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize("status", [503, 429, 0])
def test_what_may_pass_is_tried_again(status):
    with fake_server(lambda n: status if n <= 4 else None) as server:
        assert len(respond(engine(server, concurrency=1), TEXT[:2])) == 2
    assert len(server.seen) == 6


def test_after_a_failure_what_is_under_way_is_kept_and_the_error_says_what_to_do():
    with fake_server(lambda n: 400 if n == 4 else None) as server:
        arrived = []
        batches = engine(server).respond(TEXT, Sampling())
        with pytest.raises(ServerError, match=r"400.*too long.*run the same command again"):
            arrived.extend(each for batch in batches for each in batch)
    assert 3 <= len(arrived) < len(TEXT)
    assert len(arrived) == len(server.seen) - 1


def test_a_server_that_dies_is_given_up_and_what_came_before_is_kept():
    with fake_server(lambda n: 503 if n > 4 else None) as server:
        arrived = []
        batches = engine(server, patience=0.2).respond(TEXT, Sampling())
        with pytest.raises(ServerError, match=r"has not answered for 0.2 s .*run the same command again"):
            arrived.extend(each for batch in batches for each in batch)
    assert len(arrived) == 4


def test_a_model_that_is_not_served_is_said():
    with fake_server() as server:
        ServerEngine(server.url + "/v1/", "the-teacher").check(TEXT, Sampling())
        with pytest.raises(ServerError, match="It serves: the-teacher"):
            ServerEngine(server.url, "another").check(TEXT, Sampling())


def spoilt(times, **changes):
    """An answer whose choice is changed the first `times` times; `content` is that of the message."""
    asked = []

    def answer(path, body):
        asked.append(body)
        good = good_answer(path, body)
        if len(asked) > times:
            return good
        choice = good["choices"][0]
        message = {name: value for name, value in changes.items() if name != "finish_reason"}
        if "message" in choice:
            choice["message"] |= message
        else:
            choice |= message
        return good | {"choices": [choice | {k: v for k, v in changes.items() if k == "finish_reason"}]}

    return answer


CHAT = [Request(0, [{"role": "user", "content": "what is 2+3?"}])]
SPOILT = {
    "abort": (TEXT[:1], {"finish_reason": "abort"}, "finish_reason 'abort'"),
    "error": (TEXT[:1], {"finish_reason": "error"}, "finish_reason 'error'"),
    "null": (CHAT, {"finish_reason": None}, "finish_reason None"),
    "null text": (TEXT[:1], {"text": None}, "returns no text"),
    "null content": (CHAT, {"content": None}, "returns no text"),
    "reasoning only": (CHAT, {"content": None, "reasoning_content": "2+3 is"}, "--reasoning-parser"),
    "reasoning only, of newer servers": (CHAT, {"content": "", "reasoning": "2+3 is"}, "--reasoning-parser"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_what_the_model_did_not_finish_is_asked_for_again_and_never_kept(kind):
    requests, changes, message = SPOILT[kind]
    with fake_server() as server:
        server.answer = spoilt(2, **changes)
        assert respond(engine(server), requests)[0].text.startswith(" echo ")
        server.answer, arrived = spoilt(1000, **changes), []
        with pytest.raises(ServerError, match=rf"{message}.*asked {TRIES} times.*run the same command again"):
            arrived.extend(engine(server).respond(requests, Sampling()))
    assert arrived == []


def test_solutions_are_not_kept_without_the_reasoning_that_led_to_them():
    with fake_server() as server:
        server.answer = spoilt(1000, reasoning_content="2+3 is")
        assert respond(engine(server), CHAT)[0].text == " echo what is 2+3?"  # an answer that can be judged
        made = ServerEngine(server.url, "the-teacher", Limits(10, 10, 3), with_reasoning=True)
        with pytest.raises(ServerError, match="--reasoning-parser"):
            respond(made, CHAT)


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [{"text": "5", "finish_reason": "stop"}]},
        {"choices": [{"text": "5"}], "usage": {"completion_tokens": 1}},
        {"choices": [{"text": 5, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}},
        {"choices": [{"text": "5", "finish_reason": "stop"}], "usage": {"completion_tokens": None}},
        {"choices": [{"text": "5", "finish_reason": "stop"}], "usage": {"completion_tokens": -3}},
        {"choices": [{"message": None, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}},
    ],
)
def test_a_response_in_another_form_is_named(answer):
    with fake_server() as server:
        server.answer = lambda *_: answer
        with pytest.raises(ServerError, match=rf"{server.url} answers /v1/completions in a form that is not OpenAI's"):
            respond(engine(server), TEXT[:1])


def test_half_a_character_does_not_keep_a_response_from_being_written():
    with fake_server() as server:
        server.answer = lambda path, body: (
            good_answer(path, body) | {"choices": [{"text": "a\ud800b", "finish_reason": "stop"}]}
        )
        assert respond(engine(server), TEXT[:1])[0].text.encode()


def test_generate_keeps_no_fragment(tmp_path):
    """Every second request is aborted by the server, with HTTP 200 and the text so far."""
    data, out = tmp_path / "prompts.jsonl", tmp_path / "solutions.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"problem number {n}"}) + "\n" for n in range(6)))
    with fake_server() as server:

        def answer(path, body):
            good = good_answer(path, body)
            if len(server.seen) % 2:
                good["choices"][0] |= {"text": " ech", "finish_reason": "abort"}
            return good

        server.answer = answer
        command = ["generate", "--teacher", "the-teacher", "--server", server.url, "--concurrency", "1"]
        assert main([*command, "--data", str(data), "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.with_suffix(".records.jsonl").read_text().splitlines()]
    assert sorted(record["text"] for record in records) == [f" echo problem number {n}" for n in range(6)]
