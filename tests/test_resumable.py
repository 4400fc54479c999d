"""Records that are written one by one, and found again."""

import json

import pytest

from topd.resumable import earlier_records, write_options


def test_a_text_with_characters_that_end_lines_is_one_record(tmp_path):
    file, options = tmp_path / "records.jsonl", tmp_path / "options.json"
    records = [{"n": n, "text": f"a{end}b"} for n, end in enumerate("\u2028\u2029\x85\x0b\x0c\x1c\r\n")]
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    write_options(options, {"seed": 0})
    before = file.read_bytes()
    assert earlier_records(file, options, {"seed": 0}, limit=100) == records
    assert file.read_bytes() == before


RECORDS = [{"n": 0, "text": "2×3"}, {"n": 1, "text": "4×5"}]


@pytest.mark.parametrize("cut", range(1, len('{"n": 1, "text": "4×5"}\n'.encode()) + 1))
def test_wherever_an_interruption_cuts_the_last_record_the_next_one_is_whole(tmp_path, cut):
    file, options = tmp_path / "records.jsonl", tmp_path / "options.json"
    whole = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
    file.write_bytes(whole[:-cut])
    write_options(options, {"seed": 0})
    kept = earlier_records(file, options, {"seed": 0}, limit=100)
    assert kept == RECORDS[: len(kept)]
    assert len(kept) == (2 if cut == 1 else 1)
    with file.open("a", encoding="utf-8") as more:
        more.write(json.dumps({"n": 2}) + "\n")
    assert earlier_records(file, options, {"seed": 0}, limit=100) == [*kept, {"n": 2}]
