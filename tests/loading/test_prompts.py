"""Prompts and solutions as token ids: one BOS, no null keys, one opening tag, the end token that belongs there."""

from __future__ import annotations

import signal
import threading
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model, tiny_trainer
from tokenizers.processors import TemplateProcessing

from topd.cli.probe import token_ids
from topd.embedded.tokenizer import build_tokenizer
from topd.errors import TOPDError
from topd.evaluation.engines import Request, Sampling, ids_of
from topd.loading import prompts as prompting
from topd.loading.prompts import closing_id, plain_messages, prompt_ids, solution_ids
from topd.near_future.sampling import sample_rollouts

TALK = [{"role": "user", "content": "what is 1+1?"}]
THINKS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'].split('</think>')[-1] }}<|end|>"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
)
"""As DeepSeek-R1's: it opens the reasoning, and drops it from a past turn."""
REFUSES_KEYS = (
    "{% for m in messages %}{% if 'tool_calls' in m %}{{ raise_exception('no tools') }}{% endif %}{{ m['content'] }}"
    "{% endfor %}"
)


def asked(data: Path, **template: Any) -> Namespace:
    """What `token_ids` reads of the options of `topd probe`."""
    return Namespace(
        data=str(data), source=str(data), split="train", rollouts=1, chat_template_kwargs=template, prompt_column=None,
        system_prompt=None, data_config=None,
    )  # fmt: skip


def tokenizer_with(template: str | None = None, bos: bool = False) -> Any:
    """The embedded one with tags; with `bos`, it begins every text with <unk>."""
    made = build_tokenizer()
    made.add_tokens(["<think>", "</think>", "\n"])
    made.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    made.chat_template = template or made.chat_template
    if bos:
        made.bos_token = "<unk>"
        made._tokenizer.post_processor = TemplateProcessing(
            single="<unk> $A", special_tokens=[("<unk>", made.unk_token_id)]
        )
    return made


def test_text_that_begins_with_bos_gets_no_second_one_in_any_command(tmp_path) -> None:
    tokenizer = tokenizer_with(bos=True)
    bare, rendered = tokenizer("what is 1+1?")["input_ids"], "<unk>what is 1+1?"
    assert bare[0] == tokenizer.bos_token_id
    assert tokenizer(rendered)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
    assert prompt_ids(tokenizer, rendered, {}) == bare
    assert ids_of(Request(0, rendered), tokenizer, Sampling()) == bare
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "<unk>what is 1+1?", "response": "2"}\n')
    (row,) = token_ids(asked(data), tokenizer, [tokenizer.eos_token_id], responses=True)
    assert row["prompt_ids"] == bare
    trainer = tiny_trainer(tmp_path / "run", tokenizer=tokenizer, method="opd")
    assert trainer._tokenize_prompts([rendered])[0] == [bare]
    rollouts = sample_rollouts(tiny_model(0), tokenizer, [rendered], max_new_tokens=1)
    assert rollouts.prompt_ids.tolist() == [bare]
    ids, written = solution_ids(tokenizer, rendered, "2", {}, tokenizer.eos_token_id)
    assert (ids, tokenizer.decode(written)) == (bare, "2<eos>")


def test_messages_get_the_bos_that_the_template_writes_and_no_other() -> None:
    tokenizer = tokenizer_with("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}", bos=True)
    assert prompt_ids(tokenizer, TALK, {}) == tokenizer("what is 1+1?")["input_ids"]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert prompt_ids(tokenizer, TALK, {}) == tokenizer("what is 1+1?", add_special_tokens=False)["input_ids"]


def test_null_keys_of_messages_do_not_reach_the_template(tmp_path) -> None:
    tokenizer = tokenizer_with(REFUSES_KEYS)
    talk = [{**TALK[0], "tool_calls": None, "name": None}]
    expected = prompt_ids(tokenizer, TALK, {})
    assert prompt_ids(tokenizer, talk, {}) == expected
    trainer = tiny_trainer(tmp_path, student=tiny_model(0), tokenizer=tokenizer, method="opd")
    assert trainer._tokenize_prompts([talk])[0] == [expected]


def test_what_is_no_null_stays() -> None:
    image = {"type": "image", "image": 1}
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "", "image": None}, image]},
        {"role": "x", "content": None},
    ]
    assert plain_messages(talk) == [
        {"role": "user", "content": [{"type": "text", "text": ""}, image]},
        {"role": "x", "content": None},
    ]


def test_text_parts_are_joined_for_every_template_of_text(tmp_path) -> None:
    tokenizer = tokenizer_with("{% for m in messages %}{{ '' + m['content'] }}{% endfor %}")
    parts = [
        {"role": "user", "content": [{"type": "text", "text": part, "image": None} for part in ("what is ", "1+1?")]}
    ]
    expected = prompt_ids(tokenizer, TALK, {})
    assert prompt_ids(tokenizer, parts, {}) == expected
    trainer = tiny_trainer(tmp_path, student=tiny_model(0), tokenizer=tokenizer, method="opd")
    assert trainer._tokenize_prompts([parts])[0] == [expected]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no users') }}", "cannot render a conversation: no users"),
        (None, "has no chat template"),
        ("{% for i in range(9999) %}{% for j in range(2000) %}{% endfor %}{% endfor %}x", "more than 0.1 s"),
    ],
)
def test_training_says_what_is_wrong_with_the_template(tmp_path, monkeypatch, template, says) -> None:
    monkeypatch.setattr(prompting, "TEMPLATE_SECONDS", 0.1)
    trainer = tiny_trainer(tmp_path, student=tiny_model(0), tokenizer=tokenizer_with(), method="opd")
    trainer.processing_class.chat_template = template
    with pytest.raises(TOPDError, match=says):
        trainer._tokenize_prompts([TALK])


@pytest.mark.parametrize("written", ["1</think>2", "<think>\n1</think>2", "<think>1</think>2<|end|>"])
def test_reasoning_that_the_template_opens_is_kept_and_opened_once(written: str) -> None:
    tokenizer = tokenizer_with(THINKS)
    closing = closing_id(tokenizer, [tokenizer.eos_token_id, 0, *tokenizer.encode("<|end|>")], {}, True)
    ids, response = solution_ids(tokenizer, TALK, written, {}, closing)
    assert ids == prompt_ids(tokenizer, TALK, {})
    assert tokenizer.decode(ids + response) == "what is 1+1?<think>\n1</think>2<|end|>"


def test_the_end_of_a_turn_closes_conversations_and_the_end_of_text_closes_text() -> None:
    tokenizer = tokenizer_with(THINKS)
    (turn,) = tokenizer.encode("<|end|>")
    ends = [tokenizer.eos_token_id, turn]
    assert closing_id(tokenizer, ends, {}, conversational=True) == turn
    assert closing_id(tokenizer, ends, {}, conversational=False) == tokenizer.eos_token_id
    assert closing_id(tokenizer, ends[:1], {}, conversational=True) == tokenizer.eos_token_id  # it ends at no turn
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    assert closing_id(tokenizer, ends, {}, conversational=True) == tokenizer.eos_token_id


def test_given_responses_follow_the_prompt_as_generated_ones_do(tmp_path) -> None:
    tokenizer = tokenizer_with(THINKS)
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": [{"role": "user", "content": "what is 1+1?"}], "response": "<think>\\n1</think>2"}\n')
    (turn,) = tokenizer.encode("<|end|>")
    (row,) = token_ids(asked(data), tokenizer, [tokenizer.eos_token_id, turn], responses=True)
    assert tokenizer.decode(row["prompt_ids"] + row["response_ids"]) == "what is 1+1?<think>\n1</think>2<|end|>"


def test_analyses_read_prompts_with_the_options_of_the_template(tmp_path) -> None:
    tokenizer = tokenizer_with("{{ messages[0]['content'] }}{% if enable_thinking is false %} then {% endif %}")
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": [{"role": "user", "content": "what is 1+1?"}]}\n')
    (row,) = token_ids(asked(data, enable_thinking=False), tokenizer, [tokenizer.eos_token_id])
    assert tokenizer.decode(row["prompt_ids"]) == "what is 1+1? then "


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x", "more than 0.5 s"),
        ("{{ 'a' * 3000 }}", "writes 3,000 characters"),
        (" {% for m in messages %}{% endfor %}", "writes nothing"),
        ("{{ raise_exception('no users') }}", "no users"),
        ("{% if %}", "cannot render"),
    ],
)
def test_a_template_that_hangs_or_fails_ends_in_a_message(monkeypatch, template: str, says: str) -> None:
    monkeypatch.setattr(prompting, "TEMPLATE_SECONDS", 0.5)
    monkeypatch.setattr(prompting, "TEMPLATE_CHARACTERS", 2000)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TOPDError, match=f"cannot render a conversation: .*{says}|{says} a conversation"):
        prompt_ids(tokenizer_with(template), TALK, {})
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_another_thread_renders_too() -> None:
    tokenizer, found = tokenizer_with(), []
    thread = threading.Thread(target=lambda: found.append(prompt_ids(tokenizer, TALK, {})))
    thread.start()
    thread.join()
    assert found == [prompt_ids(tokenizer, TALK, {})]


def test_options_that_the_template_does_not_read_are_reported_once(caplog) -> None:
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if enable_thinking %}x{% endif %}"
    tokenizer = tokenizer_with(template)
    for _ in range(2):
        prompt_ids(tokenizer, TALK, {"enable_thinking": True})
    assert caplog.text == ""
    for _ in range(2):
        prompt_ids(tokenizer, TALK, {"enable_thinkng": True})
    assert caplog.text.count("does not use enable_thinkng of chat_template_kwargs: misspelt") == 1
