"""The top of the page: the verdict in words, what was compared, and where each count comes from."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from made_evaluations import write_evaluation
from made_records import HOSTILE, candidate, record, write_arm, write_probe, write_results, write_study
from read_page import Page, assert_harmless, page_of

from topd.report import write_report
from topd.report.figures import curve_figures
from topd.report.records import Arm
from topd.report.summary import significant


def verdicts(page: Page) -> list[str]:
    """The sentences, as a reader sees them."""
    assert len(page.all("p", "verdict")) == page.source.count('<p class="verdict">')
    return [part.partition("</p>")[0] for part in page.source.split('<p class="verdict">')[1:]]


def greedy(**difference: Any) -> dict[str, Any]:
    return {"difference": {"greedy": difference}}


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (
            {"mean": -0.002, "low": -0.009, "high": 0.005, "p": 0.6},
            "TOPD is not significantly different from OPD on this pair: −0.2 points, −0.9 to +0.5, greedy, 500 "
            "problems, 1 training seed.",
        ),
        (
            {"mean": 0.021, "low": 0.008, "high": 0.034, "p": 0.002},
            "TOPD is significantly better than OPD on this pair: +2.1 points, +0.8 to +3.4, greedy, 500 problems, "
            "1 training seed.",
        ),
        (
            {"mean": -0.28, "low": -0.322, "high": -0.24},
            "TOPD is significantly worse than OPD on this pair: −28.0 points, −32.2 to −24.0, greedy, 500 problems, "
            "1 training seed.",
        ),
        (
            {"mean": 0.02, "low": 0.001, "high": 0.04, "p": 0.125},
            "TOPD is not significantly different from OPD on this pair: +2.0 points, +0.1 to +4.0, but p = 0.12, "
            "greedy, 500 problems, 1 training seed.",
        ),
    ],
)
def test_the_verdict_of_a_demo(tmp_path: Path, difference: dict[str, float], expected: str) -> None:
    page = page_of(write_results(tmp_path / "demo", **greedy(**difference)))
    assert verdicts(page) == [expected]
    assert page.source.index(expected) < page.source.index("<nav")


@pytest.mark.parametrize(
    "results", [{"difference": {}}, greedy(mean=0.1), greedy(mean=0.1, low=float("nan"), high=0.2)]
)
def test_no_comparison_no_verdict(tmp_path: Path, results: dict[str, Any]) -> None:
    assert verdicts(page_of(write_results(tmp_path / "demo", **results))) == []
    page = page_of(write_arm(tmp_path / "topd", [record()], logged=3))
    assert verdicts(page) == []
    assert "significant" not in page.text


def test_the_verdict_of_a_study_counts_the_other_arms(tmp_path: Path) -> None:
    """In the made records each arm is 2 points lower than the one before, and p is 0.04 after Holm's correction."""
    (one,) = verdicts(page_of(write_study(tmp_path / "one", ["topd"])))
    assert one == (
        "TOPD is not significantly different from OPD on this pair: −2.0 points, −5.0 to +0.0, greedy, 1,000 problems, "
        "2 training seeds."
    )
    (three,) = verdicts(page_of(write_study(tmp_path / "three", ["topd", "own tokens", "random places"])))
    assert three.endswith("2 of 2 other arms (own tokens and random places) are significantly different from OPD.")
    (only,) = verdicts(page_of(write_study(tmp_path / "only", ["own tokens"])))
    assert only == "None of 1 arm is significantly different from OPD."
    assert verdicts(page_of(write_study(tmp_path / "none", []))) == []


def test_p_after_the_correction_decides() -> None:
    interval = {"low": 0.01, "high": 0.03}
    assert significant(interval | {"p": 0.01, "p_holm": 0.049})
    assert not significant(interval | {"p": 0.01, "p_holm": 0.06})
    assert not significant({"low": -0.01, "high": 0.03, "p": 0.01})
    assert not significant({"p": 0.01})


def test_the_verdict_of_an_evaluation_names_both_models(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label, chance in (("a-opd", 0.5), ("b-topd", 0.95), ("c-other", 0.5)):
        for name in ("aime24", "mine"):
            write_evaluation(tmp_path / label, name, rng.random((40, 5)) < chance)
    better, same = verdicts(page_of(tmp_path))
    assert better.startswith("b-topd is significantly better than a-opd: +4")
    assert better.endswith("mean of aime24 and mine, temperature 0.6, 80 problems.")
    assert same.startswith("c-other is not significantly different from a-opd: ")
    assert verdicts(page_of(tmp_path / "a-opd")) == []


RUN = {
    "seed": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "learning_rate": 2e-6,
    "provenance": {
        "versions": {"topd": "0.1.0", "torch": "2.13.0"}, "precision": {"student": "float32"}, "device": "cpu",
        "processes": 2, "data": {"rows": 4096, "digest": "d1"},
        "student": {"name": "/somewhere/small", "architecture": "Q", "parameters": 500_000},
        "teacher": {"name": "org/big", "architecture": "Q", "parameters": 30_000_000_000},
    },
}  # fmt: skip


def test_pair_data_batch_precision_and_versions_are_at_the_top(tmp_path: Path) -> None:
    run = write_results(tmp_path / "demo")
    for name in ("opd", "topd"):
        (write_arm(run / name, [], logged=2) / "run.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))
    page = page_of(run)
    assert_harmless(page)
    top = page.source[page.source.index("<h1>") : page.source.index("<nav")]
    for name, value in (
        ("Pair", "small (0.5 M) distilled from org/big (30.0 B)"), ("Data", "4,096 prompts, digest d1"),
        ("Batch", "64 rollouts per step (8 per device × 4 accumulation steps × 2 processes), learning rate 2e-06"),
        ("Precision", "student float32"), ("Device", "2 × cpu"), ("Seed", "3; 7"), ("Total time", "7 min"),
        ("Versions", "topd 0.1.0, torch 2.13.0"),
    ):  # fmt: skip
        assert f"<dt>{name}</dt><dd>{value}</dd>" in top, name


def test_every_count_names_its_source(tmp_path: Path) -> None:
    run = write_results(tmp_path / "demo")
    write_arm(
        run / "topd", [record(step, candidates=[candidate(), candidate(2, fork=False)]) for step in (1, 2)], logged=4
    )
    write_probe(run / "probe")
    page = page_of(run)
    for expected in (
        "topd, audited rollouts of training 2 4 2 2 50.0",
        "topd, whole run: mean over 4 logged steps all – – – 30.0",
        "probe before training 6 12 6 6 25.0 (20.0 to 30.0)",
        "This list: 12 candidates of probe; 4 candidates of topd.",
    ):
        assert expected in page.text, expected


def test_sections_are_linked_in_order_with_options_before_forks(tmp_path: Path) -> None:
    run = write_results(tmp_path / "demo")
    write_arm(run / "topd", [record()], logged=3)
    page = page_of(run)
    assert page.source.index("</header>") < page.source.index("<nav") < page.source.index("<main")
    links = [
        part.partition('"')[0] for part in page.source.partition("<nav")[2].partition("</nav>")[0].split('href="#')[1:]
    ]
    assert links == ["results", "training", "distances", "options", "forks", "rollouts"]
    assert [attrs["id"] for attrs in page.all("section") if "id" in attrs] == links
    style = page.source.partition("<style>")[2].partition("</style>")[0]
    assert "position: sticky; top: 0" in style.partition("\nnav {")[2].partition("}")[0]


def test_candidates_are_sorted_by_distance_whatever_they_come_from(tmp_path: Path) -> None:
    distances = [0.1, 0.7, None, 0.3]
    run = write_arm(tmp_path / "topd", [record(s, candidates=[candidate(distance=d)]) for s, d in enumerate(distances)])
    write_probe(run / "probe")
    page = page_of(run)
    shown = [part.partition("<")[0].strip() for part in page.source.split("<i>D<sub>OT</sub></i>")[1:]]
    assert shown[0] == "0.700"
    assert shown[-1] == "not measured"
    assert len(shown) == 16
    assert shown[:-1] == sorted(shown[:-1], reverse=True)
    assert [card["id"] for card in page.all("details", "card")] == [f"c{rank}" for rank in range(1, 17)]
    assert 'data-by="10"' in page.source


def test_an_evaluation_loss_is_drawn_where_it_is_recorded(tmp_path: Path) -> None:
    log = [{"step": step, "token_loss/mean": 1.0} for step in (1, 2, 3)] + [{"step": 3, "eval_loss": 0.8}]
    with_it = curve_figures([Arm("topd", log=[{"step": 1, "eval_loss": 0.9}, *log])])
    assert [figure.title for figure in with_it] == ["Token loss", "Evaluation loss"]
    assert "topd from 0.9 at step 1 to 0.8 at step 3" in with_it[1].svg
    assert [figure.title for figure in curve_figures([Arm("topd", log=log[:3])])] == ["Token loss"]


def test_accuracy_during_training_is_drawn_and_its_newest_responses_are_shown(tmp_path: Path) -> None:
    run = write_arm(tmp_path / "topd", [record()], logged=3)
    state = json.loads((run / "trainer_state.json").read_text())
    state["log_history"] += [
        {"step": step, "eval_accuracy": 0.1 * step, "eval_accuracy_low": 0.0, "eval_accuracy_high": 0.5}
        for step in (1, 3)
    ]
    (run / "trainer_state.json").write_text(json.dumps(state))
    rows = [(1, "what is 1+1?", "early", False), (3, "what is 1+1?", "so it is 2" + "!" * 700 + "end", True)]
    rows += [(3, "what is 2×3?", HOSTILE[0], False)]
    (run / "eval_responses.jsonl").write_text("".join(
        json.dumps({"version": 1, "step": step, "problem": problem, "response": response, "answer": "2",
                    "right": right, "ended": right}) + "\n" for step, problem, response, right in rows
    ) + "{broken\n")  # fmt: skip
    page = page_of(run)
    assert_harmless(page)
    for expected in (
        "2 responses to held-out problems, step 3", "so it is 2!!!", "!!!end", " … ", "right", "wrong, truncated",
        "1 line was left out of topd/eval_responses.jsonl", "Share of held-out problems solved during training",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "early" not in page.text
    assert "from 0.1 at step 1 to 0.3 at step 3" in page.source


@pytest.mark.parametrize(("values", "from_zero"), [((0.90, 0.95), False), ((0.1, 0.9), True), ((0.0, 0.0), True)])
def test_axes_show_the_change_and_say_so(values: tuple[float, float], from_zero: bool) -> None:
    log = [{"step": step, "token_loss/mean": value} for step, value in enumerate(values, 1)]
    (figure,) = curve_figures([Arm("topd", log=log)])
    assert ("does not start at 0" in figure.caption) is not from_zero
    ticks = [float(text.partition("<")[0].replace("−", "-")) for text in figure.svg.split(">") if "</text" in text
             and text[:1].isdigit()]  # fmt: skip
    assert (0.0 in ticks) is from_zero


def test_lines_are_named_at_their_ends_and_do_not_overlap() -> None:
    arms = [Arm(name, log=[{"step": s, "token_loss/mean": 1.0 - 0.1 * s} for s in (1, 2)]) for name in ("a", "b", "c")]
    (figure,) = curve_figures(arms)
    texts = [part for part in figure.svg.split("<text")[1:] if part.partition(">")[2][:1] in ("a", "b", "c")]
    assert len(texts) == 3
    heights = sorted(float(text.partition('transform="translate(')[2].split()[1].rstrip(')"')) if "translate(" in text
                     else float(text.partition(' y="')[2].partition('"')[0]) for text in texts)  # fmt: skip
    assert all(later - earlier > 8 for earlier, later in pairwise(heights))
    assert "legend" not in figure.svg


def test_the_page_of_several_runs_has_a_verdict_for_each(tmp_path: Path) -> None:
    first = write_results(tmp_path / "a", **greedy(mean=0.1, low=0.05, high=0.15))
    second = write_results(tmp_path / "b", **greedy(mean=0.1, low=-0.05, high=0.15))
    page = Page(write_report(first, tmp_path / "page.html", compare=[second]))
    assert ["better" in text for text in verdicts(page)] == [True, False]
