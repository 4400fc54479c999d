"""The client of all servers: what it waits for, for how long, and what it says."""

import gzip
import itertools
import random
import threading
import time
import tracemalloc

import pytest
from fake_openai import fake_server

from topd.errors import ServerError
from topd.teachers import openai_server
from topd.teachers.openai_server import (
    FIRST_WAIT,
    LONGEST_WAIT,
    TRIES,
    Limits,
    OpenAIServer,
    UnusableAnswer,
    WaitingStopped,
    waits,
)  # fmt: skip

PATH, BODY = "/v1/completions", {"prompt": "a b c", "max_tokens": 4}


@pytest.fixture
def short_waits(monkeypatch):
    monkeypatch.setattr(openai_server, "FIRST_WAIT", 0.01)


def test_waits_are_doubled_and_shortened_at_random():
    found = list(itertools.islice(waits(random.Random(0)), 5))
    assert all(FIRST_WAIT * 2**k / 2 <= wait <= FIRST_WAIT * 2**k for k, wait in enumerate(found))
    assert len({wait / FIRST_WAIT / 2**k for k, wait in enumerate(found)}) == 5


def test_waits_stop_growing_however_often_it_fails():
    found = list(itertools.islice(waits(random.Random(0)), 1100))  # doubled so often, more than a float holds
    assert LONGEST_WAIT / 2 <= found[-1] <= LONGEST_WAIT


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://localhost:1/v1", "http://no-such-host.invalid:80"])
def test_a_server_that_never_answered_is_given_up_soon(url, monkeypatch):
    monkeypatch.setattr("topd.teachers.openai_server.FIRST_CONTACT", 0.4)
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"cannot be reached .*ConnectError.*correct the address"):
        OpenAIServer(url).models()
    assert time.monotonic() - began < 4


def test_a_first_answer_that_never_comes_is_given_up_soon(monkeypatch):
    monkeypatch.setattr("topd.teachers.openai_server.ASKING", 0.2)
    monkeypatch.setattr("topd.teachers.openai_server.FIRST_CONTACT", 0.1)
    with fake_server() as server:
        server.models = lambda: time.sleep(2)
        with pytest.raises(ServerError, match=r"cannot be reached .*ReadTimeout"):
            OpenAIServer(server.url).models()


def test_a_server_that_has_answered_once_is_waited_for_longer(monkeypatch):
    monkeypatch.setattr("topd.teachers.openai_server.FIRST_CONTACT", 0.0)
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
    with pytest.raises(ServerError, match=r"is not a valid URL. Write http://HOST:PORT"):
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


# A deadline for each request; waiting ends when it is asked to


@pytest.mark.parametrize("drip", [0.05, 0.2])
def test_a_server_that_drips_its_answer_byte_by_byte_meets_the_deadline(drip, short_waits):
    with fake_server() as server:
        client = OpenAIServer(server.url, Limits(timeout=1, patience=1.5))
        client.models()
        server.drip = drip
        began = time.monotonic()
        with pytest.raises(ServerError, match=r"has not answered for 1.5 s .*no complete answer within 1 s"):
            client.post(PATH, BODY)
    assert time.monotonic() - began < 8


def test_a_slow_answer_that_comes_within_the_deadline_counts():
    with fake_server() as server:
        server.drip = 0.002
        assert OpenAIServer(server.url, Limits(timeout=30)).post(PATH, BODY)["choices"]


@pytest.mark.parametrize("fault", ["drips", "fails"])
def test_waiting_ends_at_once_when_asked(fault):
    with fake_server(lambda n: 503 if fault == "fails" else None) as server:
        client = OpenAIServer(server.url, Limits(timeout=300, patience=600))
        client.models()
        server.drip, asked = 0.2 if fault == "drips" else 0.0, threading.Event()
        client.stopped = asked.is_set
        threading.Timer(0.5, asked.set).start()
        began = time.monotonic()
        with pytest.raises(WaitingStopped):
            client.post_all(PATH, [BODY] * 4)
        assert time.monotonic() - began < 5


# Every answer is looked at where it arrives


def deep() -> bytes:
    return b"[" * 200_000 + b"]" * 200_000


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (deep(), "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b'{"choices": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"", "not JSON"),
        (None, "form that is not OpenAI's: None"),
        ([], "form that is not OpenAI's"),
        ({"choices": []}, "form that is not OpenAI's"),
        ({"choices": [None]}, "form that is not OpenAI's"),
    ],
)
def test_an_answer_of_another_form_names_the_server(answer, message):
    with fake_server() as server:
        server.answer = lambda *_: answer
        client = OpenAIServer(server.url, name="The teacher's server")
        with pytest.raises(ServerError, match=message) as error:
            client.post(PATH, BODY, lambda _, found: found["choices"][0]["text"])
        assert f"The teacher's server at {server.url}" in str(error.value)
        assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("answer", "headers", "message"),
    [
        ({"error": {"message": "engine is dead"}}, {}, "answers with an error: .*engine is dead"),
        (b"no gzip at all", {"Content-Encoding": "gzip"}, "cannot be decompressed"),
    ],
)
def test_an_answer_that_may_be_better_next_time_is_asked_for_again(answer, headers, message, short_waits):
    good = {"choices": [1]}
    with fake_server() as server:
        client = OpenAIServer(server.url)
        server.answer, server.headers = lambda *_: answer, headers
        with pytest.raises(ServerError, match=rf"{message}.*asked {TRIES} times"):
            client.post(PATH, BODY)
        assert len(server.seen) == TRIES
        server.headers = {}
        server.answer = lambda *_: good if len(server.seen) > 2 * TRIES - 1 else {"error": "not now"}
        assert client.post(PATH, BODY) == good


def test_what_the_reader_cannot_use_is_asked_for_again(short_waits):
    def read(number, answer):
        if len(server.seen) < 3:
            raise UnusableAnswer("stutters")
        return number, answer["usage"]["completion_tokens"]

    with fake_server() as server:
        assert OpenAIServer(server.url).post(PATH, BODY, read) == (0, 4)
    assert len(server.seen) == 3


def test_a_small_answer_that_unpacks_to_a_large_one_is_refused(monkeypatch):
    monkeypatch.setattr(openai_server, "MOST_BYTES", 2**22)
    packed = gzip.compress(bytes(2**27), compresslevel=1)
    assert len(packed) < 2**20
    with fake_server() as server:
        server.answer, server.headers = lambda *_: packed, {"Content-Encoding": "gzip"}
        tracemalloc.start()
        with pytest.raises(ServerError, match="with more than 4 MiB"):
            OpenAIServer(server.url).post(PATH, BODY)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < 2**26


@pytest.mark.parametrize("status", [400, 503])
def test_what_the_server_writes_cannot_move_the_cursor(status, monkeypatch):
    monkeypatch.setattr(openai_server, "FIRST_CONTACT", 0.0)
    evil = "\x1b[2J\x1b]0;title\x07 gone\r\n \x9b31m \u202etxet"
    with fake_server(lambda n: status) as server:
        server.refusal = evil
        with pytest.raises(ServerError) as error:
            OpenAIServer(server.url).post(PATH, BODY)
    assert str(error.value).isprintable()
    assert "gone" in str(error.value)
