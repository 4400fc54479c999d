"""`topd probe`: the command, its files, and going on after an interruption."""

import json
from dataclasses import replace

import pytest
from tiny import TOKENIZER, tiny_model

from topd.analysis.probe import ProbeOptions
from topd.analysis.probe_command import OPTIONS, RECORDS, RESULT, ProbeRun, run_probe
from topd.cli.main import main
from topd.errors import TOPDError

ARGUMENTS = ["probe", "--rollouts", "6", "--batch", "2", "--max-new-tokens", "24", "--window-length", "5", "3"]


def run(out, *more):
    code = main([*ARGUMENTS, "--out", str(out), *more])
    return code, json.loads((out / RESULT).read_text()) if (out / RESULT).exists() else None


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    out = tmp_path_factory.mktemp("probe")
    code, result = run(out, "--cost", "cosine", "sqeuclidean")
    assert code == 0
    return out, result


def test_the_file_has_what_it_promises(probed):
    out, result = probed
    assert set(result["groups"]) == {"high", "random", "low"}
    for row in result["groups"].values():
        assert row["q1"] <= row["median"] <= row["q3"]
        assert row["low"] <= row["median"] <= row["high"]
        assert row["n"] >= 6
    for name in ("pearson", "spearman", "pearson_nll", "spearman_nll", "false_alarm_share"):
        assert set(result[name]) == {"value", "low", "high"}
    assert list(result["variants"]) == [
        f"rollout/student/{cost}/{length}" for cost in ("cosine", "sqeuclidean") for length in (5, 3)
    ]
    assert result["readings"] == {"rollout": "rollout/student/cosine/5"}
    records = [json.loads(line) for line in (out / RECORDS).read_text().splitlines()]
    assert [record["rollout"] for record in records] == list(range(6))
    low = [p["distance"][result["variant"]] for r in records for p in r["places"] if p["group"] == "low"]
    assert result["low_loss_share"] == pytest.approx(
        sum(each <= result["threshold"] for each in low) / len(low), abs=0.01
    )
    counts = {group: sum(p["group"] == group for r in records for p in r["places"]) for group in result["groups"]}
    assert len(set(counts.values())) == 1  # equal numbers
    for record in records:
        assert len(record["tokens"]) == len(record["token_loss"])
        for place in record["places"]:
            assert place["token"] == record["tokens"][place["position"]]
            assert len(place["student_window"]) <= 5


def test_all_readings_of_the_student_s_window_stand_side_by_side(tmp_path, capsys):
    code, result = run(tmp_path, "--student-window", "candidate", "all")
    assert code == 0
    shown = capsys.readouterr().out
    assert list(result["readings"]) == ["candidate", "rollout", "regenerated"]
    assert result["variant"] == "candidate/student/cosine/5"
    table = shown[shown.index("in each reading") :]
    for word in ("candidate", "rollout", "regenerated", " 0.2", " 8.0", " 11.0", " 29.2", "begins with candidate"):
        assert word in table, word
    records = [json.loads(line) for line in (tmp_path / RECORDS).read_text().splitlines()]
    places = [place for record in records for place in record["places"]]
    for place in places:
        assert place["student_window"][0] == place["token"]  # the candidate's own window
        assert place["begins_with_candidate"] == (place["other_windows"]["regenerated"][0] == place["token"])
        assert list(place["other_windows"]) == ["rollout", "regenerated"]
    high = [place for place in places if place["group"] == "high"]
    main = result["variants"]["regenerated/student/cosine/5"]["groups"]["high"]
    share = sum(place["begins_with_candidate"] for place in high) / len(high)
    assert main["begins_with_candidate"]["value"] == pytest.approx(share)
    near = [place["distance"]["candidate/student/cosine/5"] < 0.02 for place in high]
    assert result["groups"]["high"]["near_zero"]["value"] == pytest.approx(sum(near) / len(near))
    assert result["groups"]["high"]["near_zero"]["low"] <= sum(near) / len(near)


def test_an_interrupted_probe_goes_on_and_ends_the_same(probed, tmp_path):
    out, result = probed
    lines = (out / RECORDS).read_text().splitlines(keepends=True)
    (tmp_path / RECORDS).write_text("".join(lines[:3]) + lines[3][:40])  # one batch, half of the next, a torn line
    (tmp_path / OPTIONS).write_text((out / OPTIONS).read_text())
    code, again = run(tmp_path, "--cost", "cosine", "sqeuclidean")
    assert code == 0
    assert (tmp_path / RECORDS).read_text() == (out / RECORDS).read_text()
    assert again["groups"] == result["groups"]


def test_a_broken_line_in_the_middle_costs_its_batch_only(probed, tmp_path, capsys):
    out, result = probed
    lines = (out / RECORDS).read_text().splitlines(keepends=True)
    (tmp_path / RECORDS).write_text("".join([*lines[:2], lines[2][:40] + "\n", *lines[3:]]))
    (tmp_path / OPTIONS).write_text((out / OPTIONS).read_text())
    code, again = run(tmp_path, "--cost", "cosine", "sqeuclidean")
    assert code == 0
    assert "4 of 6 rollouts are done" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / RECORDS).read_text().splitlines(keepends=True) == [*lines[:2], *lines[4:], *lines[2:4]]
    assert again["groups"] == result["groups"]
    assert again["tokens"] == result["tokens"]


def test_other_settings_do_not_mix(probed, tmp_path, capsys):
    out, _ = probed
    for name in (RECORDS, OPTIONS):
        (tmp_path / name).write_text((out / name).read_text())
    code, _ = run(tmp_path, "--seed", "3")
    assert code == 2
    assert "other settings (options)" in capsys.readouterr().err
    assert (tmp_path / RECORDS).read_text() == (out / RECORDS).read_text()


def test_the_cost_is_said_before_and_the_paper_stands_beside(tmp_path, capsys):
    run(tmp_path)
    shown = capsys.readouterr().out
    assert "6 rollouts of up to 24 tokens (144 at most)" in " ".join(shown.split())
    assert "0.566" in shown
    assert "--student_window rollout --fork_threshold" in " ".join(shown.split())
    assert "in each reading" not in shown  # one reading needs no comparison


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--student", "embedded:teacher"], "Name both --student and --teacher"),
        (["--share", "2"], "--share must be in (0, 1]"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--student", "embedded:nobody", "--teacher", "embedded:teacher"], "no embedded model 'nobody'"),
        (["--data", "nothing.jsonl"], "There is no such file"),
        (["--max-new-tokens", "9999"], "do not fit"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, capsys, more, message):
    assert main([*ARGUMENTS, "--out", str(tmp_path), *more]) == 2
    assert message in capsys.readouterr().err


def test_given_responses_are_measured_and_nothing_is_sampled(tmp_path):
    said = {
        "what is 2+3×4?": " first 3×4=12, leaving 2+12. then 2+12=14. so the answer is 14",
        "what is 5+1?": " first 5+1=6. so the answer is 6",
    }
    data = tmp_path / "said.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in said.items()))
    code, result = run(tmp_path / "out", "--data", str(data), "--given-responses")
    assert code == 0
    assert result["rollouts"] == 2  # as many as there are, not as many as asked for
    records = [json.loads(line) for line in (tmp_path / "out" / RECORDS).read_text().splitlines()]
    for record, response in zip(records, said.values(), strict=True):
        text = "".join(record["tokens"])
        assert len(record["tokens"]) <= 24  # --max-new-tokens
        assert text
        assert response.startswith(text.removesuffix("<eos>"))


@pytest.mark.parametrize(("data", "says"), [('{"prompt": "1+1="}\n', "no `response`"), ("", "empty")])
def test_missing_responses_end_in_a_message(tmp_path, capsys, data, says):
    (tmp_path / "d.jsonl").write_text(data)
    code, _ = run(tmp_path / "out", "--data", str(tmp_path / "d.jsonl"), "--given-responses")
    assert code == 2
    assert says in capsys.readouterr().err


def test_the_embedded_task_has_no_given_responses(tmp_path, capsys):
    assert run(tmp_path, "--given-responses")[0] == 2
    assert "no given responses" in capsys.readouterr().err


def test_records_of_other_prompts_responses_or_weights_are_not_reused(tmp_path):
    model, run = tiny_model(0), ProbeRun("a", "b", "c", 2, 1, 20, 1.0, True, ProbeOptions(0.1, (2,)))
    rows = [{"prompt_ids": [3, 4, 5 + row], "response_ids": list(range(3, 23))} for row in range(2)]

    def records(rows, run=run):
        run_probe(run, model, tiny_model(1), TOKENIZER, rows, tmp_path)
        return [json.loads(line) for line in (tmp_path / RECORDS).read_text().splitlines()]

    records(rows)
    changed = [{**rows[0], "prompt_ids": [9, 9]}, {**rows[1], "response_ids": list(range(23, 3, -1))}]
    found = {record["rollout"]: record for record in records(changed)}
    assert found[0]["prompt"] == TOKENIZER.decode([9, 9])
    assert "".join(found[1]["tokens"]) == "".join(map(TOKENIZER.decode, changed[1]["response_ids"]))
    with pytest.raises(TOPDError, match=r"other settings \(weights\)"):
        records(changed, replace(run, weights={"student": "retrained"}))


def test_random_places_differ_from_batch_to_batch(tmp_path):
    model, tokenizer = tiny_model(0), TOKENIZER
    prompt = {"prompt_ids": [3, 4, 5], "response_ids": list(range(3, 23))}
    options = ProbeOptions(0.1, (2,))
    same = ProbeRun("a", "b", "c", 6, 1, 20, 1.0, True, options)
    run_probe(same, model, tiny_model(1), tokenizer, [prompt], tmp_path)
    records = [json.loads(line) for line in (tmp_path / RECORDS).read_text().splitlines()]
    drawn = {tuple(p["position"] for p in record["places"] if p["group"] == "random") for record in records}
    assert len(drawn) > 1  # the rollouts are equal, and each is a batch
