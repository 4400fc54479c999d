"""Loading prompts: what is accepted, what each error says, and that nothing but a `DataError` ever comes out."""

import csv
import gzip
import io
import json
import math
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from topd.errors import DataError
from topd.loading.data import load_prompts
from topd.loading.rows import PROMPT_COLUMNS

GOOD = [{"prompt": "What is 2+3?", "answer": 5}, {"prompt": "Is 7 prime?\nSay why.", "answer": "yes, it is"}]
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2+3?"}]


def write(folder: Path, name: str, content: object) -> str:
    """Writes bytes, text, or rows in the format of the name's ending; returns the path."""
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_bytes(content.encode())
    elif isinstance(content, pyarrow.Table):
        pyarrow.parquet.write_table(content, path)
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif name.endswith(".json"):
        path.write_text(json.dumps(content))
    elif name.endswith(".csv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
    else:
        data = "".join(json.dumps(row) + "\n" for row in content).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def message(source: str, **options: object) -> str:
    """The message of the `DataError`; it names the source first and can be printed."""
    with pytest.raises(DataError) as caught:
        load_prompts(source, **options)
    text = str(caught.value)
    check_message(text, source)
    return text


def check_message(text: str, source: str) -> None:
    assert text.startswith(repr(source))
    assert len(text) < 3000
    assert text.encode()  # no half characters: it can be printed


def broken_lines(text: str) -> list[str]:
    """The numbers that a message lists, as "line 3" or "row 3"."""
    return [line.strip().split(":")[0] for line in text.splitlines()[1:] if not line.startswith("  and ")]


# What is accepted


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.JSONL"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    data = load_prompts(write(tmp_path, name, GOOD))
    assert isinstance(data, datasets.Dataset)
    assert data.to_list() == [{**row, "answer": str(row["answer"])} for row in GOOD]
    assert data.features == {"prompt": datasets.Value("string"), "answer": datasets.Value("string")}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_conversations(tmp_path, name):
    extra = [{**message, "name": "x"} for message in TALK]
    data = load_prompts(write(tmp_path, name, [{"prompt": extra, "answer": 5}, {"prompt": extra[1:], "answer": 6}]))
    assert data.to_list() == [{"prompt": TALK, "answer": "5"}, {"prompt": TALK[1:], "answer": "6"}]


def test_parquet_rows(tmp_path):
    data = load_prompts(write(tmp_path, "a.parquet", [{"prompt": f"p{i}", "answer": i, "x": i} for i in range(2500)]))
    assert data["prompt"][2499] == "p2499"
    assert data["answer"][2499] == "2499"
    assert data.num_rows == 2500


@pytest.mark.parametrize("columns", [["problem"], ["question"], ["question", "problem"], ["problem", "prompt"]])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_the_first_prompt_column_is_taken_and_the_rest_is_left_out(tmp_path, name, columns):
    taken = next(column for column in PROMPT_COLUMNS if column in columns)
    row = {"id": "7", **{column: f"the {column}" for column in columns}}
    data = load_prompts(write(tmp_path, name, [row]))
    assert data.to_list() == [{"prompt": f"the {taken}"}]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (5, "5"),
        (5.0, "5"),
        (0.00001, "0.00001"),  # not 1e-05, which reads as e - 5
        ("He has 3*400=1200.\n#### 1,200", "1200"),  # GSM8K's form
        ("So it is\n#### (1, 2) ", "(1, 2)"),
        (-0.5, "-0.5"),
        (10**30, str(10**30)),
        (1e300, "1" + 300 * "0"),
        ("05", "05"),
        (None, None),
        (" ", None),
    ],
)
def test_answers_become_text(tmp_path, answer, text):
    rows = [{"prompt": "p", "answer": answer}, {"prompt": "q", "answer": "x"}]
    assert load_prompts(write(tmp_path, "a.jsonl", rows))["answer"][0] == text


@pytest.mark.parametrize(("value", "text"), [(Decimal("1.50"), "1.50"), (2.5, "2.5"), (7, "7")])
def test_parquet_numbers(tmp_path, value, text):
    assert load_prompts(write(tmp_path, "a.parquet", [{"prompt": "p", "answer": value}]))["answer"][0] == text


def test_the_word_infinity_is_an_answer(tmp_path):
    assert load_prompts(write(tmp_path, "a.csv", "prompt,answer\nlimit?,Infinity\n"))["answer"][0] == "Infinity"


def test_rows_without_any_answer_have_no_answer_column(tmp_path):
    assert load_prompts(write(tmp_path, "a.csv", "prompt,answer\np,\n")).column_names == ["prompt"]


def test_byte_order_mark_blank_lines_and_windows_line_ends(tmp_path):
    jsonl = b'\xef\xbb\xbf\r\n{"prompt": "a"}\r\n\r\n  \n{"prompt": "b\xe2\x80\xa8c"}'
    assert load_prompts(write(tmp_path, "a.jsonl", jsonl))["prompt"][:] == ["a", "b\u2028c"]
    assert load_prompts(write(tmp_path, "a.json", b'\xef\xbb\xbf[{"prompt": "a"}]'))["prompt"][:] == ["a"]
    assert load_prompts(write(tmp_path, "a.csv", b'\xef\xbb\xbf"prompt"\r\n"a"\r\n\r\nb\r\n'))["prompt"][:] == [
        "a",
        "b",
    ]


def test_csv_details(tmp_path):
    text = ',prompt, answer,,\n0,"a, ""b""\nc",1,,\n'
    assert load_prompts(write(tmp_path, "a.csv", text)).to_list() == [{"prompt": 'a, "b"\nc', "answer": "1"}]


def test_json_object_with_one_list(tmp_path):
    assert load_prompts(write(tmp_path, "a.json", {"version": 1, "data": GOOD})).num_rows == 2


def test_huge_lines(tmp_path):
    long = "x" * 5_000_000
    for name in ("a.jsonl", "a.csv"):
        assert load_prompts(write(tmp_path, name, [{"prompt": long}]))["prompt"][0] == long


def test_limit_keeps_the_first_rows_but_checks_all(tmp_path):
    source = write(tmp_path, "a.jsonl", GOOD)
    assert load_prompts(source, limit=1)["prompt"][:] == [GOOD[0]["prompt"]]
    assert load_prompts(source, limit=9).num_rows == 2
    assert broken_lines(message(write(tmp_path, "b.jsonl", [*GOOD, {"prompt": ""}]), limit=1)) == ["line 3"]


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "3"])
def test_bad_limit(tmp_path, limit):
    with pytest.raises(DataError, match=r"limit is .* whole number"):
        load_prompts(write(tmp_path, "a.jsonl", GOOD), limit=limit)


def test_assistant_turns_and_blank_system_text_inside_a_prompt(tmp_path):
    talk = [{"role": "system", "content": ""}, TALK[1], {"role": "assistant", "content": "5"}, TALK[1]]
    assert load_prompts(write(tmp_path, "a.jsonl", [{"prompt": talk}]))["prompt"][0] == talk


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_who_may_speak_last(tmp_path, role):
    assert load_prompts(write(tmp_path, "a.jsonl", [{"prompt": [{"role": role, "content": "x"}]}])).num_rows == 1


# Broken rows


BROKEN_PROMPTS = [
    ("", "the prompt is empty"),
    (" \n\t", "the prompt is blank"),
    (None, "the prompt is None"),
    (5, "the prompt is 5; write text or a list"),
    (True, "the prompt is True"),
    ({"role": "user", "content": "x"}, "write text or a list of messages"),
    ([], "the prompt is []"),
    (["text"], "message 1 of the prompt is not an object with role and content"),
    ([{"role": "user"}], "message 1 of the prompt is not an object with role and content"),
    ([{"content": "x"}], "message 1 of the prompt is not an object with role and content"),
    ([TALK[0], {"role": "human", "content": "x"}], "message 2 of the prompt has the role 'human'; use one of system"),
    ([{"role": ["user"], "content": "x"}], "has the role"),
    ([{"role": None, "content": "x"}], "has the role 'None'"),
    ([{"role": "user", "content": None}], "message 1 of the prompt is None; write text"),
    ([{"role": "user", "content": [{"type": "image"}]}], "message 1 of the prompt has a part of type 'image'"),
    ([{"role": "user", "content": " "}], "message 1 of the prompt is blank"),
    ([*TALK, {"role": "tool", "content": ""}], "message 3 of the prompt is empty"),
    ([*TALK, {"role": "assistant", "content": "5"}], "the last message of the prompt is the assistant's; end with"),
    (
        [TALK[1], {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}, TALK[1]],
        "message 2 of the prompt has tool",
    ),
    ("half \ud83d", "the prompt contains half a character"),
    ([{"role": "user", "content": "\udc00"}], "message 1 of the prompt contains half a character"),
]


@pytest.mark.parametrize(("prompt", "problem"), BROKEN_PROMPTS)
@pytest.mark.parametrize(("name", "place"), [("a.jsonl", "line 2"), ("a.json", "row 2")])
def test_broken_prompts(tmp_path, name, place, prompt, problem):
    good = {"prompt": TALK if isinstance(prompt, list) else "x"}
    text = message(write(tmp_path, name, [good, {"prompt": prompt}, good]))
    assert f"  {place}: " in text
    assert problem in text
    assert broken_lines(text) == [place]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ("NaN", "the answer is nan, not a number; write text, a number or null"),
        ("Infinity", "the answer is inf"),
        ("-Infinity", "the answer is -inf"),
        ("1e999", "the answer is inf"),
        ("true", "the answer is True; write text or a number"),
        ('["5"]', "the answer is ['5']; write"),
        ('{"x": 5}', "the answer is {'x': 5}"),
        ('"\\ud800"', "the answer contains half a character"),
        ("1" * 5000, "JSON with a number too long"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_broken_answers(tmp_path, answer, problem):
    text = message(write(tmp_path, "a.jsonl", f'{{"prompt": "p"}}\n\n{{"prompt": "p", "answer": {answer}}}\n'))
    assert problem in text
    assert broken_lines(text) == ["line 3"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"prompt": "x",}', "broken JSON at column"),
        ('{"prompt": "x"} {"prompt": "y"}', "broken JSON at column 17: Extra data (one object per line"),
        ("{", "broken JSON at column 2"),
        ('{"prompt": "a\tb"}', "Invalid control character"),
        ("5", "5 is not an object with `prompt`"),
        ('["x"]', "['x'] is not an object with `prompt`"),
        ("null", "None is not an object"),
        ("{}", "no `prompt`, `problem`, `question`, `messages`, `conversations` in []"),
        ('{"text": "x"}', "no `prompt`, `problem`, `question`, `messages`, `conversations` in ['text']; rename"),
        ('{"\\ud800": "x"}', "no `prompt`"),
        ('{"question": "x"}', "`question` is text, but in line 1 `prompt` is text; use one kind in all rows"),
        (
            '{"prompt": [{"role": "user", "content": "x"}]}',
            "`prompt` is a conversation, but in line 1 `prompt` is text",
        ),
    ],
)
def test_broken_jsonl_lines(tmp_path, line, problem):
    text = message(write(tmp_path, "a.jsonl", f'{{"prompt": "x"}}\n{line}\n{{"prompt": "y"}}'))
    assert problem in text
    assert broken_lines(text) == ["line 2"]


def test_five_broken_lines_are_listed_and_the_rest_counted(tmp_path):
    lines = ['{"prompt": "x"}' if i % 3 else '{"prompt": 1}' for i in range(30)]  # lines 1, 4, ... 28
    text = message(write(tmp_path, "a.jsonl", "\n".join(lines)))
    assert broken_lines(text) == ["line 1", "line 4", "line 7", "line 10", "line 13"]
    assert "broken rows: 10; nothing was loaded" in text
    assert text.endswith("  and 5 more")
    assert " more" not in message(write(tmp_path, "b.jsonl", '{"prompt": 1}\n' * 5))


def test_not_utf8(tmp_path):
    lines = b'{"prompt": "x"}\n{"prompt": "caf\xe9"}\n{"prompt": ""}\n'
    for name, data in (("a.jsonl", lines), ("a.jsonl.gz", gzip.compress(lines))):
        text = message(write(tmp_path, name, data))
        assert "line 2: byte 16 of line 2 is not UTF-8; save" in text
        assert broken_lines(text) == [
            "line 2",
            "line 3",
        ]
    assert "byte 15 of line 2 is not" in message(write(tmp_path, "a.json", b'[\n{"prompt":"caf\xe9"}]'))
    text = message(write(tmp_path, "a.csv", b'prompt,answer\n"a\nb\xff",1\n,2\nc,3\n'))
    assert "line 3: byte 2 of line 3 is not UTF-8" in text
    assert broken_lines(text) == ["line 3", "line 4"]
    assert "is not UTF-8" in message(write(tmp_path, "b.csv", "prompt\nx\n".encode("utf-16")))
    assert "is not UTF-8" in message(write(tmp_path, "b.jsonl", '{"prompt": "x"}'.encode("utf-16")))


# Broken files


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
def test_empty_file(tmp_path, name):
    assert "the file is empty" in message(write(tmp_path, name, b""))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n \n"),
        ("a.jsonl", "\ufeff"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0)),  # a time stamp in a test's name would differ between workers
        ("a.json", "[]"),
        ("a.json", '{"data": []}'),
        ("a.csv", "prompt,answer\n"),
        ("a.csv", "\n\n"),
        ("a.parquet", pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())})),
    ],
)
def test_no_rows(tmp_path, name, content):
    assert "there are no rows. Write at least one" in message(write(tmp_path, name, content))


@pytest.mark.parametrize("name", ["a.txt", "a", "a.json.gz", "a.csv.gz", "a.xlsx", ".jsonl.bak"])
def test_unknown_ending(tmp_path, name):
    known = "unknown kind of file. Known endings: .jsonl, .jsonl.gz, .json, .csv, .parquet."
    assert known in message(write(tmp_path, name, "x"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"prompt": "x"},\n {"prompt": }]', "broken JSON at line 2, column 13: Expecting value"),
        ('{"prompt": "x"}\n{"prompt": "y"}', "broken JSON at line 2, column 1: Extra data (one object per line"),
        ("[", "broken JSON at column 2"),
        ("5", "write a list of objects"),
        ('"x"', "write a list of objects"),
        ("null", "write a list of objects"),
        ('{"prompt": "x"}', "an object with exactly one list"),
        ('{"a": [], "b": []}', "an object with exactly one list"),
        ("[" * 100_000, "nested too deep"),
        ('[{"prompt": "x"}, 5, {"prompt": "y"}]', "  row 2: 5 is not an object"),
    ],
)
def test_broken_json_files(tmp_path, content, problem):
    assert problem in message(write(tmp_path, "a.json", content))


@pytest.mark.parametrize(
    ("content", "problem", "lines"),
    [
        (
            "prompt,answer\na,1\n\nb\nc,2,3\n",
            "1 fields, the header has 2; quote text with commas",
            ["line 4", "line 5"],
        ),
        ('prompt,answer\n"a\nb",1\nc\n', "1 fields", ["line 4"]),
        ('prompt,answer\na,1\n"b,2\nc,3\n', "broken CSV (unexpected end of data)", ["line 3"]),
        ('prompt,answer\n"a"b,1\nc,2\nd\n', "broken CSV (',' expected after '\"')", ["line 2", "line 4"]),
        ("prompt,answer\n ,1\n", "the prompt is blank", ["line 2"]),
        ("prompt\ra\rb", "broken CSV", ["line 1"]),
        ("prompt,answer,prompt\na,1,b\n", "more than one column is called ['prompt']; rename", []),
        ("prompt,x,x\na,1,b\n", "more than one column is called ['x']", []),
        (
            "text;answer\na;1\n",
            "no `prompt`, `problem`, `question`, `messages`, `conversations` in ['text;answer']",
            [],
        ),
        ("Prompt\na\n", "in ['Prompt']", []),
    ],
)
def test_broken_csv_files(tmp_path, content, problem, lines):
    text = message(write(tmp_path, "a.csv", content))
    assert problem in text
    assert broken_lines(text) == lines


def test_broken_parquet_files(tmp_path):
    good = Path(write(tmp_path, "good.parquet", GOOD[1:] * 500)).read_bytes()
    assert "cannot be read (" in message(write(tmp_path, "a.parquet", b"no parquet at all"))
    assert "write or download it again" in message(write(tmp_path, "a.parquet", good[:-20]))
    assert "in ['text', 'answer']; rename" in message(write(tmp_path, "a.parquet", [{"text": "x", "answer": "y"}]))
    text = message(write(tmp_path, "a.parquet", [{"prompt": "x"}, {"prompt": None}, {"prompt": "  "}]))
    assert broken_lines(text) == ["row 2", "row 3"]
    text = message(write(tmp_path, "a.parquet", [{"prompt": "x", "answer": a} for a in (1.5, math.nan, math.inf)]))
    assert "row 2: the answer is nan" in text
    assert broken_lines(text) == ["row 2", "row 3"]
    assert "write text or a list" in message(write(tmp_path, "a.parquet", [{"prompt": {"role": "user"}}]))
    not_utf8 = pyarrow.array([b"x", b"\xff\xfe", b"y"]).view(pyarrow.string())
    text = message(write(tmp_path, "a.parquet", pyarrow.table({"prompt": not_utf8})))
    assert broken_lines(text) == ["row 2"]
    assert "write text as UTF-8" in text
    twice = pyarrow.Table.from_arrays([pyarrow.array(["x"])] * 2, ["prompt", "prompt"])
    assert "more than one column is called ['prompt']" in message(write(tmp_path, "a.parquet", twice))


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(os.urandom(999) + b'{"prompt": "x"}\n' * 999)
    for data in (b'{"prompt": "x"}\n', whole[:-30], whole[:100] + b"\0" * 50 + whole[150:]):
        assert "cannot be read (" in message(write(tmp_path, "a.jsonl.gz", data))


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(*_args: object) -> None:
        raise PermissionError(13, "Permission denied")

    source = write(tmp_path, "a.jsonl", GOOD)
    monkeypatch.setattr("builtins.open", refuse)
    assert "Permission denied). Check its permissions" in message(source)


# Nothing there, folders, the Hub


def test_missing_file_suggests_close_names(tmp_path, monkeypatch):
    write(tmp_path, "train.jsonl", GOOD)
    text = message(str(tmp_path / "trian.jsonl"))
    assert "no such file or folder; did you mean 'train.jsonl'?" in text
    assert "Hub names have the form" in text
    assert "did you mean" not in message(str(tmp_path / "nowhere" / "train.jsonl"))
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'train.jsonl'?" in message("train.json")


@pytest.mark.parametrize(
    "source", ["", " ", "a\0b", "x" * 5000, "csv", "text", "../..x/", "a/b/c", "s3://x/y", "\udcff"]
)
def test_names_that_cannot_be_on_the_hub(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "secret.csv", "prompt\nx\n")  # datasets.load_dataset("csv") would load it
    with pytest.raises(DataError, match="Hub names have the form owner/name"):
        load_prompts(source)


def test_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "no such file" in message(str(tmp_path / "pipe.jsonl"))


def test_hub_offline():
    text = message("nobody/no-such-dataset")
    assert "cannot be read (Couldn't reach" in text
    assert "HF_HUB_OFFLINE" in text
    assert "no such file or folder" in text


def test_hub_names_configurations_and_splits(monkeypatch):
    asked = []

    def load(*name: str, split: str) -> datasets.Dataset:
        asked.append((*name, split))
        return datasets.Dataset.from_list([{"question": "x", "answer": 5, "level": 1}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_prompts("openai/gsm8k:main", split="test").to_list() == [{"prompt": "x", "answer": "5"}]
    load_prompts("openai/gsm8k")
    assert asked == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "train")]


@pytest.mark.parametrize(
    "error",
    [
        datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
        ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']"),
        ConnectionError(),
        KeyError("x"),
    ],
)
def test_whatever_the_hub_raises_is_a_message(monkeypatch, error):
    def fail(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    text = message("a/b")
    assert "\n" not in text
    assert (str(error)[:20] or "ConnectionError") in text
    assert "owner/name:configuration" in text


def test_saved_folders(tmp_path):
    data = datasets.Dataset.from_list(
        [{"problem": "x", "answer": 5, "other": 1}, {"problem": "y", "answer": 6, "other": 2}]
    )
    data.with_format("numpy", columns=["other"]).save_to_disk(tmp_path / "one")
    assert load_prompts(str(tmp_path / "one")).to_list() == [
        {"prompt": "x", "answer": "5"},
        {"prompt": "y", "answer": "6"},
    ]
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "parts")
    assert load_prompts(str(tmp_path / "parts"), split="test")["prompt"][:] == ["y"]
    assert "no split 'dev'. Choose one of ['train', 'test']" in message(str(tmp_path / "parts"), split="dev")
    data.rename_column("problem", "text").save_to_disk(tmp_path / "other")
    assert "no `prompt`, `problem`, `question`, `messages`, `conversations` in ['text'" in message(
        str(tmp_path / "other")
    )
    datasets.Dataset.from_list([{"prompt": "x"}, {"prompt": ""}]).save_to_disk(tmp_path / "broken")
    assert broken_lines(message(str(tmp_path / "broken"))) == ["row 2"]


def test_folder_without_a_dataset(tmp_path):
    (tmp_path / "weights.bin").write_text("x")
    assert "Use a data file, a folder written by save_to_disk, or one" in message(str(tmp_path))


def test_damaged_saved_folder(tmp_path):
    datasets.Dataset.from_list(GOOD[1:]).save_to_disk(tmp_path / "a")
    (tmp_path / "a" / "data-00000-of-00001.arrow").write_bytes(b"rubbish")
    assert "cannot be read (" in message(str(tmp_path / "a"))


def test_offsets_that_point_out_of_a_saved_file(tmp_path):
    datasets.Dataset.from_list([{"prompt": "7 bytes"}] * 3).save_to_disk(tmp_path / "a")
    path = tmp_path / "a" / "data-00000-of-00001.arrow"
    good = path.read_bytes()
    offsets = bytes([7, 0, 0, 0, 14, 0, 0, 0])
    assert good.count(offsets) == 1
    path.write_bytes(good.replace(offsets, bytes([7, 0, 0, 0x70, 14, 0, 0, 0x70])))  # unchecked, this crashes Python
    assert "cannot be read (" in message(str(tmp_path / "a"))


def test_the_module_loads_no_heavy_library():
    heavy = ("datasets", "pandas", "pyarrow", "torch")
    code = f"import sys, topd.loading.data; print([m for m in {heavy} if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# A Dataset or a DataError, whatever the input


def accept_or_explain(source: str) -> None:
    """Loads; a dataset keeps its promises and a `DataError` can be printed. Any other exception fails the test."""
    try:
        data = load_prompts(source)
    except DataError as error:
        check_message(str(error), source)
        return
    assert data.num_rows
    assert set(data.column_names) <= {"prompt", "answer"}
    for row in data:
        prompt = row["prompt"]
        assert prompt.strip() if isinstance(prompt, str) else prompt[-1]["role"] != "assistant"
        assert row.get("answer") is None or row["answer"].strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


NAMES = ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9)
KEYS = st.sampled_from(["prompt", "problem", "question", "answer", "role", "content", "x"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "human"]), "content": SCALARS}
)
ROWS = st.lists(
    VALUES
    | st.fixed_dictionaries({"prompt": VALUES | SCALARS | st.lists(MESSAGES, max_size=3)}, optional={"answer": VALUES}),
    max_size=4,
)


@settings(max_examples=60)
@given(name=st.sampled_from(NAMES), data=st.binary(max_size=200))
def test_random_bytes(folder, name, data):
    accept_or_explain(write(folder, name, data))


@settings(max_examples=60)
@given(name=st.sampled_from(["b.jsonl", "b.jsonl.gz", "b.json"]), rows=ROWS)
def test_random_json(folder, name, rows):
    accept_or_explain(write(folder, name, rows))


@settings(max_examples=40)
@given(text=st.text(st.sampled_from('abc,"\n\r\t\0 é'), max_size=60))
def test_random_csv(folder, text):
    accept_or_explain(write(folder, "c.csv", "prompt,answer\n" + text))


@settings(max_examples=100)
@given(
    name=st.sampled_from(NAMES),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from(["set", "cut", "add"]), st.binary(min_size=1, max_size=4)),
        min_size=1,
        max_size=3,
    ),
)
def test_mutated_good_files(folder, name, edits):
    rows = [{"prompt": f'p "{i}", é', "answer": str(i)} for i in range(4)]
    data = bytearray(Path(write(folder, name, rows)).read_bytes())
    for place, edit, new in edits:
        start = int(place * len(data))
        data[start : start + (0 if edit == "add" else len(new))] = b"" if edit == "cut" else new
    accept_or_explain(write(folder, name, bytes(data)))


@settings(max_examples=25)
@given(place=st.floats(0, 1), new=st.binary(max_size=6), file=st.integers(0, 2))
def test_mutated_saved_folders(tmp_path_factory, place, new, file):
    saved = tmp_path_factory.mktemp("saved")
    datasets.Dataset.from_list(GOOD[1:]).save_to_disk(saved)
    path = sorted(saved.iterdir())[file]
    data = bytearray(path.read_bytes())
    start = int(place * len(data))
    data[start : start + len(new)] = new
    path.write_bytes(bytes(data))
    accept_or_explain(str(saved))


@settings(max_examples=40)
@given(source=st.text(max_size=12) | st.from_regex(r"[a-z.]{1,5}/[a-z.]{1,5}(:[a-z]{0,3})?", fullmatch=True))
def test_random_sources(source):
    accept_or_explain(source)


@settings(max_examples=30)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), min_size=1, max_size=5),
    name=st.sampled_from(NAMES),
)
def test_good_text_comes_back_unchanged(folder, texts, name):
    rows = [{"prompt": text, "answer": text} for text in texts]
    if name == "a.csv":
        buffer = io.StringIO(newline="")
        csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows([["prompt", "answer"], *([text, text] for text in texts)])
        source = write(folder, name, buffer.getvalue())
    else:
        source = write(folder, name, rows)
    assert load_prompts(source).to_list() == rows


def test_a_name_that_appears_twice_in_an_object_is_a_broken_row(tmp_path):
    file = tmp_path / "twice.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b", "answer": "1", "answer": "2"}\n')
    with pytest.raises(DataError, match=r"line 2: 'answer' appears more than once"):
        load_prompts(str(file))
    (tmp_path / "twice.json").write_text('[{"prompt": "a", "prompt": "b"}]')
    with pytest.raises(DataError, match=r"'prompt' appears more than once"):
        load_prompts(str(tmp_path / "twice.json"))
