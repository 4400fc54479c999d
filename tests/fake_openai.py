"""An OpenAI-compatible server of a few lines, with faults."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[[int], int | None]
"""From the number of the request (from 1) to a status, None for a good answer, or 0 to hang up."""


class FakeServer(ThreadingHTTPServer):
    """Answers a prompt with " echo " and the prompt, cut to `max_tokens` words.

    Attributes:
        seen: bodies of all requests for responses, in the order of arrival.
        most: requests that were under way at the same time, at most.
        models: what it answers when asked for its models; tests replace it.
        answer: what it answers to (path, body); bytes are sent as they are, with `headers`; tests replace it.
        refusal: what it writes where it refuses.
        drip: seconds between two bytes of every answer to a POST.
        authorizations: the Authorization headers of all requests, and queries: what followed the "?".
    """

    def __init__(self, fault: Fault) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fault, self.seen, self.lock = fault, [], threading.Lock()
        self.now = self.most = 0
        self.models: Callable[[], Any] = lambda: {"data": [{"id": "the-teacher"}]}
        self.answer: Callable[[str, dict[str, Any]], Any] = good_answer
        self.headers: dict[str, str] = {}
        self.refusal = ""
        self.drip = 0.0
        self.authorizations: list[str | None] = []
        self.queries: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._note()
        self._send(200, self.server.models())

    def do_POST(self) -> None:
        self._note()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append({"path": self.path, **body})
            status = self.server.fault(len(self.server.seen))
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            if status == 0:
                self.close_connection = True
            elif status is not None:
                said = self.server.refusal or ("the prompt is too long" if status == 400 else "not now")
                self._send(status, said.encode() if self.server.refusal else {"error": {"message": said}})
            else:
                self._send(200, self.server.answer(self.path, body))
        finally:
            with self.server.lock:
                self.server.now -= 1

    def _note(self) -> None:
        self.path, _, query = self.path.partition("?")
        self.server.authorizations.append(self.headers.get("Authorization"))
        self.server.queries.append(query)

    def _send(self, status: int, value: Any) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        headers = {"Content-Length": str(len(data))} | self.server.headers
        try:
            if self.server.drip and self.command == "POST":
                self._drip(status, headers, data)
                return
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # who asked has gone
            self.close_connection = True

    def _drip(self, status: int, headers: dict[str, str], data: bytes) -> None:
        """Status line and headers byte by byte too."""
        head = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
        for byte in f"HTTP/1.1 {status} OK\r\n{head}\r\n".encode() + data:
            self.wfile.write(bytes([byte]))
            time.sleep(self.server.drip)

    def log_message(self, *_: Any) -> None:
        pass


def good_answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
    chat = path.endswith("/chat/completions")
    words = ["echo", *(body["messages"][-1]["content"] if chat else body["prompt"]).split()]
    kept = words[: body["max_tokens"]]
    text = " ".join(["", *kept])
    choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    reason = "stop" if len(kept) == len(words) else "length"
    return {"choices": [choice | {"finish_reason": reason}], "usage": {"completion_tokens": len(kept)}}


@contextmanager
def fake_server(fault: Fault = lambda _: None) -> Iterator[FakeServer]:
    server = FakeServer(fault)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
