"""What vLLM is asked, and what is read from its outputs; vLLM itself is replaced."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from tiny import TOKENIZER, tiny_model

from topd.errors import ContextError, TOPDError
from topd.evaluation.engines import Request, Response, Sampling, VllmEngine

TALK = [{"role": "user", "content": "what is 1+1?"}]


@dataclass
class Completion:
    text: str
    finish_reason: str
    token_ids: list[int]


@dataclass
class Output:
    outputs: list[Completion]


class FakeLLM:
    """Answers with the prompt's number of tokens, and is cut where `max_tokens` is below 4."""

    def __init__(self, **options: Any) -> None:
        self.options, self.asked = options, []

    def generate(self, prompts: list[dict[str, Any]], params: list[dict[str, Any]], use_tqdm: bool) -> list[Output]:
        self.asked.append((prompts, params))
        return [
            Output(
                [Completion(f"{len(prompt['prompt_token_ids'])}", "stop" if one["max_tokens"] >= 4 else "length", [5])]
            )
            for prompt, one in zip(prompts, params, strict=True)
        ]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)


def engine(**options: Any) -> VllmEngine:
    return VllmEngine("folder", TOKENIZER, tiny_model(0).config, **options)


@pytest.mark.usefixtures("vllm")
def test_prompts_go_as_token_ids_each_with_its_own_seed() -> None:
    made = engine(together=2, dtype="bfloat16")
    requests = [Request(7, "what is 1+1?"), Request(8, TALK), Request(100_007, "what is 1+1?")]
    found = list(made.respond(requests, Sampling(0.6, 0.9, 16, seed=3)))
    ids = TOKENIZER("what is 1+1?")["input_ids"]
    assert [len(batch) for batch in found] == [2, 1]
    assert found[0] == [(7, Response(str(len(ids)), False, 1)), (8, Response(str(len(ids)), False, 1))]
    assert made.llm.options == {"model": "folder", "dtype": "bfloat16"}
    prompts, params = made.llm.asked[0]
    assert [prompt["prompt_token_ids"] for prompt in prompts] == [ids, ids]
    assert (params[0]["temperature"], params[0]["top_p"], params[0]["max_tokens"]) == (0.6, 0.9, 16)
    neutral = {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    assert {name: params[0][name] for name in neutral} == neutral
    seeds = [one["seed"] for _, batch in made.llm.asked for one in batch]
    assert len(set(seeds)) == 3


@pytest.mark.usefixtures("vllm")
def test_what_the_limit_ends_is_truncated() -> None:
    ((_, response),) = next(iter(engine().respond([Request(0, "what is 1+1?")], Sampling(max_new_tokens=3))))
    assert response.truncated


@pytest.mark.usefixtures("vllm")
def test_a_response_that_cannot_fit_is_refused_beforehand() -> None:
    with pytest.raises(ContextError, match="to at most"):
        engine().check([Request(0, "what is 1+1?")], Sampling(max_new_tokens=100_000))


def test_without_vllm_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(TOPDError, match=r"pip install 'trl\[vllm\].*--server URL"):
        engine()
