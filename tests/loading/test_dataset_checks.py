"""A dataset that cannot be trained on is refused before training, with what to do."""

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from tiny import prompts, tiny_trainer

from topd.errors import DataError
from topd.loading.dataset_checks import check_dataset, check_datasets, check_enough, check_prompts


def rows(*values):
    return Dataset.from_list([{"prompt": value} for value in values])


CHAT = [{"role": "user", "content": "what is 1+1?"}]


def test_fewer_rows_than_a_batch_and_no_data_are_refused_and_nothing_is_trained(tmp_path):
    trainer = tiny_trainer(tmp_path, dataset=prompts(3), gradient_accumulation_steps=2)
    with pytest.raises(DataError, match=r"8 prompts \(4 x 2 x 1.*train_dataset has 3.*lower per_device_train_batch"):
        trainer.train()
    trainer.train_dataset = None
    with pytest.raises(DataError, match="nothing to train on"):
        trainer.train()
    assert trainer.state.global_step == 0
    check_enough(prompts(8), trainer.args)


def test_splits_and_other_columns_are_named_with_what_to_write():
    with pytest.raises(DataError, match=r"the splits train, test.*train_dataset=dataset\['train'\]"):
        check_dataset(DatasetDict(train=rows("a"), test=rows("b")))
    with pytest.raises(DataError, match=r"its columns are messages.*row\['messages'\]\[:-1\]"):
        check_dataset(rows(CHAT).rename_column("prompt", "messages"))
    with pytest.raises(DataError, match=r"rename_column\('question', 'prompt'\)"):
        check_dataset(rows("a").rename_column("prompt", "question"))
    with pytest.raises(DataError, match="its columns are text"):
        check_dataset(rows("a").rename_column("prompt", "text"))
    with pytest.raises(DataError, match=r"eval_dataset\['b'\] has no column 'prompt'"):
        check_datasets(rows("a"), {"a": rows("a"), "b": rows("a").rename_column("prompt", "text")})


def test_an_evaluation_without_rows_would_evaluate_nothing():
    with pytest.raises(DataError, match="eval_dataset has no rows"):
        check_datasets(rows("a"), Dataset.from_list([]))
    with pytest.raises(DataError, match=r"eval_dataset\['b'\] has no rows"):
        check_datasets(rows("a"), {"a": rows("a"), "b": rows("a").select([])})


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "the prompt is None"),
        ("", "the prompt is empty"),
        (" \n", "the prompt is blank"),
        ([], r"the prompt is \[\]"),
        ([{"role": "user"}], "is not a message with role and content"),
        ([{"role": "user", "content": None}], "the user's message has no content"),
    ],
)
def test_prompts_that_are_no_prompts_are_named_by_their_row(value, found):
    good = CHAT if isinstance(value, list) else "what is 1+1?"
    with pytest.raises(DataError, match=f"row 1: .*{found}.*; row 3"):
        check_prompts([good, value, good, value])
    check_prompts([good, good])


def test_the_trainer_refuses_them_before_it_loads_a_model(tmp_path):
    with pytest.raises(DataError, match="row 1: the prompt is None"):
        tiny_trainer(tmp_path, dataset=rows("a", None), student="nowhere/at-all")
    with pytest.raises(DataError, match="no column 'prompt'"):
        tiny_trainer(tmp_path, dataset=rows(CHAT).rename_column("prompt", "messages"), student="nowhere/at-all")


def test_a_streams_prompts_are_checked_as_they_come(tmp_path):
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "what is 1+1?"}, {"prompt": ""}] * 8))
    with pytest.raises(DataError, match="the batch has prompts that cannot be used: row"):
        tiny_trainer(tmp_path, dataset=stream, shuffle_dataset=False).train()


def test_rows_without_a_prompt_are_named_wherever_they_come_from(tmp_path):
    trainer = tiny_trainer(tmp_path, dataset=IterableDataset.from_generator(lambda: iter([{"question": "1+1?"}] * 8)))
    with pytest.raises(DataError, match=r"the batch has no column 'prompt'.*rename_column\('question', 'prompt'\)"):
        trainer.train()
    for evaluate in (trainer.evaluate, trainer.predict):
        with pytest.raises(DataError, match="the batch has no column 'prompt'"):
            evaluate(rows("a").rename_column("prompt", "question"))


def test_images_for_a_student_of_text_are_refused_and_an_empty_column_is_left_out(tmp_path):
    rows = [row["prompt"] for row in prompts(8)]
    without = Dataset.from_dict({"prompt": rows, "images": [None, []] * 4})
    trainer = tiny_trainer(tmp_path, dataset=without, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
    conversations = [[{"role": "user", "content": row}] for row in rows]
    with_images = Dataset.from_dict({"prompt": conversations, "images": [["one.png"]] * 8})
    with pytest.raises(DataError, match="remove_columns\\('images'\\)"):
        tiny_trainer(tmp_path, dataset=with_images, max_steps=1).train()
