"""The client of all servers: what it waits for, for how long, and what it says."""

import threading
import time
from types import SimpleNamespace

import httpx2
import pytest
from fake_openai import fake_server

from topd.errors import ServerError
from topd.openai_server import FIRST_WAIT, LONGEST_WAIT, Limits, OpenAIServer

PATH, BODY = "/v1/completions", {"prompt": "a b c", "max_tokens": 4}


class NotWaiting(threading.Event):
    """Keeps what would be waited, instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float] = []

    def wait(self, timeout=None) -> bool:
        self.waits.append(timeout)
        return False


def test_waits_are_doubled_and_shortened_at_random():
    with fake_server(lambda n: 503 if n <= 4 else None) as server:
        client = OpenAIServer(server.url, Limits(patience=1000))
        client.models()
        stop = NotWaiting()
        assert client._request("POST", PATH, BODY, stop)["choices"][0]["text"] == " echo a b c"
    waits = stop.waits
    assert len(waits) == 4
    assert all(FIRST_WAIT * 2**k / 2 <= wait <= FIRST_WAIT * 2**k for k, wait in enumerate(waits))
    assert len({wait / FIRST_WAIT / 2**k for k, wait in enumerate(waits)}) == 4


def test_waits_stop_growing_however_often_it_fails():
    client = OpenAIServer("http://127.0.0.1:1", Limits(patience=1000))
    client._reached = True
    outcomes = iter([503] * 1100 + [200])  # doubled so often, a wait would be more than a float holds
    client._client = SimpleNamespace(request=lambda *_, **__: httpx2.Response(next(outcomes), json={}))
    stop = NotWaiting()
    assert client._request("POST", PATH, BODY, stop) == {}
    assert len(stop.waits) == 1100
    assert LONGEST_WAIT / 2 <= stop.waits[-1] <= LONGEST_WAIT


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://localhost:1/v1", "http://no-such-host.invalid:80"])
def test_a_server_that_never_answered_is_given_up_soon(url, monkeypatch):
    monkeypatch.setattr("topd.openai_server.FIRST_CONTACT", 0.4)
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"cannot be reached .*ConnectError.*mend the address"):
        OpenAIServer(url).models()
    assert time.monotonic() - began < 4


def test_a_first_answer_that_never_comes_is_given_up_soon(monkeypatch):
    monkeypatch.setattr("topd.openai_server.ASKING", 0.2)
    monkeypatch.setattr("topd.openai_server.FIRST_CONTACT", 0.1)
    with fake_server() as server:
        server.models = lambda: time.sleep(2)
        with pytest.raises(ServerError, match=r"cannot be reached .*ReadTimeout"):
            OpenAIServer(server.url).models()


def test_a_server_that_has_answered_once_is_waited_for_longer(monkeypatch):
    monkeypatch.setattr("topd.openai_server.FIRST_CONTACT", 0.0)
    with fake_server(lambda n: 503 if n <= 3 else None) as server:
        client = OpenAIServer(server.url, Limits(patience=20))
        assert list(client.models()) == ["the-teacher"]
        assert client.post(PATH, BODY)["choices"]


def test_patience_is_counted_from_the_first_failure_not_from_the_beginning():
    """A request that takes longer than the patience and then fails is still sent again."""
    slow_then_bad = iter([503, None])

    def fault(n):
        status = next(slow_then_bad)
        time.sleep(0.6 if status else 0)
        return status

    with fake_server(fault) as server:
        client = OpenAIServer(server.url, Limits(patience=0.8))
        client.models()
        assert client.post(PATH, BODY)["choices"]


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "localhost", "ftp://127.0.0.1:1", "http://"])
def test_what_is_no_address_is_said_at_once(url):
    with pytest.raises(ServerError, match=r"is no address. Write http://HOST:PORT"):
        OpenAIServer(url)


@pytest.mark.parametrize("answer", [{}, [], {"data": None}, {"data": [{"name": "x"}]}])
def test_another_kind_of_server_is_named(answer):
    with fake_server() as server:
        server.models = lambda: answer
        with pytest.raises(ServerError, match="not OpenAI's"):
            OpenAIServer(server.url).models()


def test_answers_come_in_the_order_of_the_requests_however_they_arrive():
    with fake_server(lambda n: time.sleep(0.1 if n == 1 else 0)) as server:
        answers = OpenAIServer(server.url).post_all(PATH, [BODY | {"prompt": str(n)} for n in range(6)])
    assert [answer["choices"][0]["text"] for answer in answers] == [f" echo {n}" for n in range(6)]


def test_after_an_interruption_the_client_works_again():
    with fake_server() as server:
        client = OpenAIServer(server.url, Limits(concurrency=2))
        arriving = client.answers([(PATH, BODY)] * 20)
        next(arriving)
        arriving.close()
        assert client.post(PATH, BODY)["choices"]
    assert len(server.seen) < 21
