"""Files appear whole or not at all, whatever is in them."""

import json
import os

import pytest

from topd.errors import TOPDError
from topd.runs.files import append_records, read_json, read_records, replacing, write_json, write_records, write_text

HALF = "half \ud800 a character"


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path):
    file = tmp_path / "result.json"
    write_json({"a": 1}, file)
    with pytest.raises(FileNotFoundError), replacing(file) as aside:  # noqa: PT012
        aside.write_text("half of it")
        (tmp_path / "nowhere" / "file").write_text("")
    assert json.loads(file.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["result.json"]
    with pytest.raises(TypeError):
        write_json({"a": object()}, file)
    assert json.loads(file.read_text()) == {"a": 1}


def test_readers_never_find_half_of_a_file(tmp_path):
    file = tmp_path / "result.json"
    write_json(["old"], file)
    with replacing(file) as aside:
        aside.write_text('["ne')
        assert json.loads(file.read_text()) == ["old"]
        aside.write_text('["new"]')
    assert json.loads(file.read_text()) == ["new"]


def test_links_are_followed_and_devices_are_written_directly(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "sub" / "file.json")
    write_json(1, tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "sub" / "file.json").read_text()) == 1
    write_text("nothing", tmp_path.__class__("/dev/null"))


def test_half_a_character_can_be_written_and_read_again(tmp_path):
    write_json({"text": HALF}, tmp_path / "value.json")
    assert read_json(tmp_path / "value.json", "") == {"text": HALF}
    write_records([{"text": HALF}], tmp_path / "records.jsonl")
    append_records([{"text": "é\u2028"}], tmp_path / "records.jsonl")
    assert read_records(tmp_path / "records.jsonl") == ([{"text": HALF}, {"text": "é\u2028"}], [])
    write_text(HALF, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == HALF.replace("\ud800", "?")


@pytest.mark.parametrize(
    "content", [b"", b'{"a": ', b"[" * 100_000, b"1" * 5000, b"\xff"], ids=lambda text: str(text)[:9]
)
def test_what_is_no_json_ends_in_a_message_with_the_remedy(tmp_path, content):
    file = tmp_path / "value.json"
    file.write_bytes(content)
    with pytest.raises(TOPDError, match=r"value.json cannot be read \(.*\)\. Write it again\."):
        read_json(file, "Write it again.")
