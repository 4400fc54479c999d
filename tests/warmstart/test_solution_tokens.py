"""Stage 1 trains on what the student will read and write when it generates, and never a student that cannot stop."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from tiny import tiny_model

from topd.embedded.tokenizer import build_tokenizer
from topd.errors import TOPDError
from topd.loading.prompts import prompt_ids
from topd.warmstart import WarmStartConfig, WarmStartTrainer
from topd.warmstart.tokens import as_generated, check_that_it_can_stop, endings

NO_END = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TOKENIZER = build_tokenizer()
EOS = TOKENIZER.eos_token_id


def talks(*answers: str, **more: Any) -> Dataset:
    return Dataset.from_list([
        {"prompt": [{"role": "user", "content": "what is 1+1?", "name": None}],
         "completion": [{"role": "assistant", "content": answer}], **more}
        for answer in answers
    ])  # fmt: skip


def trainer(out: Any, data: Dataset, template: str | None = None, **options: Any) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    settings: dict[str, Any] = {"kd_ratio": 0.0, "bf16": False, "use_cpu": True, "report_to": []} | options
    return WarmStartTrainer(
        tiny_model(0), args=WarmStartConfig(str(out), **settings), train_dataset=data, processing_class=tokenizer
    )


def test_a_template_without_end_token_trains_one_all_the_same(tmp_path) -> None:
    (row,) = trainer(tmp_path, talks("2"), NO_END).train_dataset
    assert TOKENIZER.decode(row["input_ids"]) == "what is 1+1?2<eos>"
    assert [token for token in row["labels"] if token != -100] == TOKENIZER("2<eos>")["input_ids"]


def test_rows_that_the_template_renders_whole_are_refused_where_it_writes_no_end(tmp_path) -> None:
    whole = Dataset.from_list([{"messages": [*row["prompt"], *row["completion"]]} for row in talks("2", "3")])
    with pytest.raises(TOPDError, match=r"No solution trains an end token .* would not learn to stop.* --eos_token"):
        trainer(tmp_path, whole, NO_END)
    assert trainer(tmp_path, whole).train_dataset


@pytest.mark.parametrize("packing", [False, True])
def test_a_length_that_cuts_every_end_is_refused_and_some_is_a_warning(tmp_path, caplog, packing: bool) -> None:
    answers = ["1+1=2, so the answer is 2", "2"]
    lengths = [len(TOKENIZER("what is 1+1?" + answer)["input_ids"]) + 1 for answer in answers]
    with pytest.raises(TOPDError, match=f"max_length {lengths[1] - 1} truncates them, raise it"):
        trainer(tmp_path, talks(*answers), packing=packing, max_length=lengths[1] - 1)
    trainer(tmp_path, talks(*answers), packing=packing, max_length=lengths[0] - 1)
    assert "1 of 2 solutions train no end token" in caplog.text
    caplog.clear()
    trainer(tmp_path, talks(*answers), packing=packing, max_length=lengths[0])
    assert "end token" not in caplog.text


def test_the_prompt_is_the_one_of_every_other_command_with_the_rows_own_options() -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = NO_END + "{% if thinking %} then {% endif %}"
    options = {"thinking": True}
    (row,) = as_generated(talks("2", chat_template_kwargs=options), tokenizer, [EOS], True)
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": "what is 1+1?"}], options)
    assert row["input_ids"] == prompt + TOKENIZER("2<eos>")["input_ids"]
    (whole,) = as_generated(talks("2", chat_template_kwargs=options), tokenizer, [EOS], False)
    assert whole["labels"] == whole["input_ids"] == row["input_ids"]


def test_without_any_end_token_nothing_is_trained() -> None:
    with pytest.raises(TOPDError, match="no end token"):
        as_generated(talks("2"), TOKENIZER, [], True)


def test_solutions_of_packed_rows_are_counted_one_by_one() -> None:
    rows = [{"labels": [-100, 5, 1, -100, 6, 7], "seq_lengths": [3, 3]}, {"labels": [-100, 1]}]
    assert endings(rows, [1, 9]) == (3, 2, [6, 7])
    assert "1 of 3 solutions" in str(check_that_it_can_stop(rows, TOKENIZER, [1, 9], 8))
    assert check_that_it_can_stop(rows[1:], TOKENIZER, [1], 8) is None


@pytest.mark.parametrize("other", ["tools", "more turns", "a tool call"])
def test_a_later_row_of_another_form_is_refused_and_not_cut(other: str) -> None:
    """The first row decides how all are tokenized: tools and later turns of others would be dropped."""
    plain, odd = {**talks("2")[0], "tools": None}, {**talks("3")[0], "tools": None}
    if other == "tools":
        odd["tools"] = [{"type": "function", "function": {"name": "add"}}]
    elif other == "more turns":
        odd["completion"] = [*odd["completion"], {"role": "user", "content": "sure?"}, *odd["completion"]]
    else:
        odd["completion"] = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}]
    with pytest.raises(TOPDError, match="one answer as text, without tools, as the first row has"):
        list(as_generated(Dataset.from_list([plain, odd]), TOKENIZER, [EOS], True))
