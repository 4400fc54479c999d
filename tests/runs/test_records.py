"""Records that are written one by one, and found again."""

import json

import pytest

from topd.errors import TOPDError
from topd.runs.files import write_json
from topd.runs.records import earlier_records


def test_a_text_with_characters_that_end_lines_is_one_record(tmp_path):
    file, options = tmp_path / "records.jsonl", tmp_path / "options.json"
    records = [{"n": n, "text": f"a{end}b"} for n, end in enumerate("\u2028\u2029\x85\x0b\x0c\x1c\r\n")]
    file.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    write_json({"seed": 0}, options)
    before = file.read_bytes()
    assert earlier_records(file, options, {"seed": 0}) == records
    assert file.read_bytes() == before


RECORDS = [{"n": 0, "text": "2×3"}, {"n": 1, "text": "4×5"}]


@pytest.mark.parametrize("cut", range(1, len('{"n": 1, "text": "4×5"}\n'.encode()) + 1))
def test_wherever_an_interruption_cuts_the_last_record_the_next_one_is_whole(tmp_path, cut):
    file, options = tmp_path / "records.jsonl", tmp_path / "options.json"
    whole = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS).encode()
    file.write_bytes(whole[:-cut])
    write_json({"seed": 0}, options)
    kept = earlier_records(file, options, {"seed": 0})
    assert kept == RECORDS[: len(kept)]
    assert len(kept) == (2 if cut == 1 else 1)
    with file.open("a", encoding="utf-8") as more:
        more.write(json.dumps({"n": 2}) + "\n")
    assert earlier_records(file, options, {"seed": 0}) == [*kept, {"n": 2}]


@pytest.mark.parametrize(
    "broken", ['{"n": 1, "te', "[1]", '{"text": "no number"}', "\udcff", '{"n":' * 100_000], ids=lambda line: line[:20]
)
def test_a_broken_line_in_the_middle_costs_its_own_record_only(tmp_path, capsys, broken):
    file, options = tmp_path / "records.jsonl", tmp_path / "options.json"
    lines = [json.dumps({"n": n}) for n in range(4)]
    file.write_bytes("\n".join([lines[0], broken, *lines[2:], ""]).encode("utf-8", "surrogateescape"))
    before = file.read_bytes()
    write_json({"seed": 0}, options)
    assert earlier_records(file, options, {"seed": 0}, needs=["n"]) == [{"n": n} for n in (0, 2, 3)]
    assert file.read_text() == "\n".join([lines[0], *lines[2:], ""])
    assert (tmp_path / "records.jsonl.damaged").read_bytes() == before
    assert "line 2 is broken; 3 records are kept" in capsys.readouterr().err


@pytest.mark.parametrize("cut", ['{"seed": 0', "", "[0]", '{"a":' * 100_000], ids=lambda text: text[:20])
def test_damaged_options_end_in_a_message_and_the_records_stay(tmp_path, cut):
    file, options = tmp_path / "records.jsonl", tmp_path / "options.json"
    file.write_text('{"n": 0}\n{"n": ')
    options.write_text(cut)
    with pytest.raises(TOPDError, match=r"options.json .*If they are the same as now, delete .*options.json; else"):
        earlier_records(file, options, {"seed": 0})
    assert file.read_text() == '{"n": 0}\n{"n": '
