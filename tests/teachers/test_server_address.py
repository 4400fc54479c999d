"""Where a server is: secrets are sent to it and shown nowhere; this machine is reached without proxies."""

import base64
import logging

import pytest
from fake_openai import fake_server

from topd.cli.main import main
from topd.errors import ServerError
from topd.teachers.openai_server import Limits, OpenAIServer
from topd.teachers.server_address import parse_address, without_secrets

SECRETS = ("kim-the-user", "s3cret-word", "k3y-in-the-query")


def with_secrets(url: str) -> str:
    user, word, key = SECRETS
    return url.replace("http://", f"http://{user}:{word}@") + f"?api_key={key}"


def none_in(text: str) -> None:
    assert [secret for secret in SECRETS if secret in text] == []


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://host:8000/v1", "http://host:8000/v1"),
        ("https://kim:word@host:8000/v1", "https://***@host:8000/v1"),
        ("http://kim@host", "http://***@host"),
        ("http://host/v1?key=abc&x=1", "http://host/v1?key=***&x=***"),
        ("http://host:8000/@path", "http://host:8000/@path"),
        ("kim:word@host:8000", "***@host:8000"),
        ("http://kim:wo/rd@host", "http://***@host"),
        ("http://kim:w\nord@host", "http://***@host"),
    ],
)
def test_what_is_shown_of_an_address_holds_no_secret(url, shown):
    assert without_secrets(url) == shown
    assert without_secrets(shown) == shown


@pytest.mark.parametrize("url", ["kim:s3cret-word@host", "ftp://kim:s3cret-word@host", "http://kim:s3cret/word@host"])
def test_what_is_no_address_is_said_without_its_secrets(url):
    with pytest.raises(ServerError, match="is not a valid URL") as error:
        parse_address(url, "The server")
    assert "s3cret" not in str(error.value)


def test_user_password_and_query_reach_the_server():
    with fake_server() as server:
        client = OpenAIServer(with_secrets(server.url) + "&x=1")
        client.models()
        client.post("/v1/completions", {"prompt": "a", "max_tokens": 1})
    expected = "Basic " + base64.b64encode(":".join(SECRETS[:2]).encode()).decode()
    assert server.authorizations == [expected] * 2
    assert server.queries == [f"api_key={SECRETS[2]}&x=1"] * 2


def test_a_key_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-123\n")
    with fake_server() as server:
        OpenAIServer(server.url, key_variable="MY_KEY").models()
        monkeypatch.setenv("MY_KEY", "")
        with pytest.raises(ServerError, match="'MY_KEY' is not set"):
            OpenAIServer(server.url, key_variable="MY_KEY")
        monkeypatch.setenv("MY_KEY", "sk-\x01")
        with pytest.raises(ServerError, match="characters that no key has"):
            OpenAIServer(server.url, key_variable="MY_KEY")
    assert server.authorizations == ["Bearer sk-123"]


@pytest.mark.parametrize(
    ("url", "key", "warned"),
    [
        ("http://kim:word@127.0.0.1", None, "password"),
        ("http://example.org", "sk-1", "key"),
        ("http://example.org/?key=abc", None, "key"),
        ("http://127.0.0.1", "sk-1", None),
        ("https://kim:word@example.org", None, None),
        ("http://example.org", None, None),
    ],
)
def test_a_secret_that_would_travel_unencrypted_is_warned_of(url, key, warned, caplog, monkeypatch):
    monkeypatch.setenv("MY_KEY", key or "")
    with caplog.at_level(logging.WARNING):
        parse_address(url, "The teacher's server", "MY_KEY" if key else None)
    expected = f"The {warned} of the teacher's server at {url.split('//')[0]}//" if warned else ""
    assert caplog.text == "" if not warned else expected in caplog.text
    assert "word" not in caplog.text.replace("password", "")


def test_messages_hold_no_secret_even_where_the_server_repeats_it():
    with fake_server(lambda n: 400) as server:
        server.refusal = f"wrong key {SECRETS[2]} for {SECRETS[0]}"
        client = OpenAIServer(with_secrets(server.url))
        with pytest.raises(ServerError, match=r"wrong key \*\*\* for \*\*\*") as refused:
            client.post("/v1/completions", {})
    client.limits = Limits(patience=0.1)
    with pytest.raises(ServerError, match=r"has not answered for") as lost:
        client.post("/v1/completions", {})
    none_in(str(refused.value) + str(lost.value))


def test_a_secret_is_not_shown_as_a_url_has_it_either():
    with fake_server(lambda n: 400) as server:
        server.refusal = "no page /v1/completions?key=a%2Fb%40c, a/b%40c, a/b@c"
        with pytest.raises(ServerError, match=r"key=\*\*\*, \*\*\*, \*\*\*\. Fix"):
            OpenAIServer(server.url + "?key=a%2Fb%40c").post("/v1/completions", {})


@pytest.mark.parametrize("kept", ["http://***@host:8000", "http://host/v1?api_key=***", "http://host:8000/v1?***"])
def test_options_read_back_in_another_process_say_what_is_missing(kept, monkeypatch):
    monkeypatch.setattr("topd.teachers.server_address._given", {})
    with pytest.raises(ServerError, match=r"lacks its password or key.*teacher_server_key_env, --server-key-env"):
        OpenAIServer(kept)


def test_the_command_line_takes_a_key_and_shows_no_secret(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-456-abc")
    with fake_server(lambda n: 400) as server:
        server.refusal = "no such key: sk-456-abc"
        command = ["eval", "--model", "the-teacher", "--limit", "2", "--samples", "1", "--out", str(tmp_path)]
        assert main([*command, "--server", server.url, "--server-key-env", "MY_KEY"]) == 2
    captured = capsys.readouterr()
    assert "no such key: ***" in captured.err
    assert "sk-456" not in captured.out + captured.err
    assert server.authorizations[0] == "Bearer sk-456-abc"
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or "sk-456" not in path.read_text()


# Proxies


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_this_machine_is_reached_without_a_proxy(variable, monkeypatch):
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with fake_server() as server:
        assert OpenAIServer(server.url).models()
        assert OpenAIServer(server.url.replace("127.0.0.1", "localhost")).models()
        assert OpenAIServer(server.url.replace("127.0.0.1", "0.0.0.0")).models()  # as servers print it
        for host in ("127.1", "[::ffff:127.0.0.1]"):
            assert OpenAIServer(server.url.replace("127.0.0.1", host)).models()
    assert parse_address("http://localhost.:8000", "The server").is_loopback


def test_other_machines_are_reached_through_it(monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    with fake_server() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        assert OpenAIServer("http://teacher.example").models()


@pytest.mark.parametrize("proxy", ["gopher://kim:s3cret-word@host", "http://kim:s3cret-word@host:port"])
def test_a_proxy_that_is_none_is_said_without_its_password(proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(ServerError, match="through the proxy that HTTP_PROXY") as error:
        OpenAIServer("http://teacher.example").models()
    none_in(str(error.value))
