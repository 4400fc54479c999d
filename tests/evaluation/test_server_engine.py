"""Responses from a server: what is asked, and what happens when it fails."""

import pytest
from fake_openai import fake_server

from topd import openai_server
from topd.errors import ServerError
from topd.evaluation.responses import Request, Sampling
from topd.evaluation.server_engine import ServerEngine
from topd.openai_server import Limits

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
