"""An OpenAI-compatible server in this process, in token ids, on a tiny model; it can be made to fail."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from topd.near_future import LocalModel


@dataclass
class FakeServer:
    """What it does.

    Attributes:
        faults: what befalls the next completion requests, one each: "500", "400", "reset", "slow" (no answer), or
            "not json".
        text_only: leaves the token ids out, as servers do that know no `return_token_ids`.
        requests: bodies of the completion requests that it answered.
        most_at_once: the most completion requests that were open together.
        dead_after, silent_after: completion requests after which all others get a 500, or no answer.
        spoil: applied to each answer to a completion request.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    name: str = "teacher"
    context: int = 4096
    faults: list[str] = field(default_factory=list)
    text_only: bool = False
    requests: list[Any] = field(default_factory=list)
    most_at_once: int = 0
    delay: float = 0.0
    dead_after: float = math.inf
    silent_after: float = math.inf
    spoil: Callable[[Any], Any] = lambda answer: answer
    closing: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    _open: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _computing: threading.Lock = field(default_factory=threading.Lock)

    def models(self) -> Any:
        return {"data": [{"id": self.name, "max_model_len": self.context}]}

    def tokenize(self, body: Any) -> Any:
        return {"tokens": self.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])}

    def complete(self, body: Any) -> Any:
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        source = LocalModel(self.model, self.tokenizer.pad_token_id, body.get("stop_token_ids", []))
        with self._computing:
            windows = source.continue_([torch.tensor(prompt) for prompt in prompts], body["max_tokens"])
            choices = []
            for index, prompt in enumerate(prompts):
                new = windows.tokens[index][windows.mask[index]].tolist()
                ended = len(new) < body["max_tokens"] or new[-1] in body.get("stop_token_ids", [])
                choice: dict[str, Any] = {"index": index, "text": self.tokenizer.decode(new)}
                choice["finish_reason"] = "stop" if ended else "length"
                if body.get("return_token_ids") and not self.text_only:
                    choice |= {"token_ids": new, "prompt_token_ids": prompt}
                if body.get("prompt_logprobs") and not self.text_only:
                    choice["prompt_logprobs"] = self._log_probs(prompt, body["prompt_logprobs"])
                choices.append(choice)
        return {"choices": choices[::-1]}  # by `index`, not in order

    @torch.no_grad()
    def _log_probs(self, prompt: list[int], known: int) -> list[Any]:
        log_probs = self.model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
        entries: list[Any] = [None]
        for position, token in enumerate(prompt[1:]):
            likeliest = log_probs[position].topk(min(known, log_probs.shape[1])).indices.tolist()
            kept = {*likeliest, token}
            entries.append({str(v): {"logprob": float(log_probs[position, v]), "rank": 1} for v in kept})
        return entries

    def fault(self) -> str | None:
        with self._lock:
            return self.faults.pop(0) if self.faults else None

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
        try:
            time.sleep(self.delay)
            yield
        finally:
            with self._lock:
                self._open -= 1


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        known = self.path.partition("?")[0] == "/v1/models"
        self._answer(200, self.fake.models()) if known else self._answer(404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.partition("?")[0] == "/tokenize":
            self._answer(200, self.fake.tokenize(body))
            return
        if len(self.fake.requests) >= self.fake.silent_after:
            self.fake.closing.wait()
        fault = "500" if len(self.fake.requests) >= self.fake.dead_after else self.fake.fault()
        if fault == "reset":
            self.connection.close()
            self.close_connection = True
        elif fault == "not json":
            self._send(200, b"<html>hello</html>")
        elif fault in ("500", "400"):
            self._answer(int(fault), {"message": "it does not work"})
        else:
            if fault == "slow":
                self.fake.closing.wait()
            with self.fake.counted():
                self.fake.requests.append(body)
                self._answer(200, self.fake.spoil(self.fake.complete(body)))

    def _answer(self, status: int, content: Any) -> None:
        self._send(status, json.dumps(content).encode())

    def _send(self, status: int, content: bytes) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # who asked has gone
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(model: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Iterator[FakeServer]:
    """A fake server on a free port of this machine."""
    fake = FakeServer(model, tokenizer, **options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": fake}))
    server.daemon_threads = True
    fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        fake.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
