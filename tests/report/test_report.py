"""The report: what records say is on the page, what a model wrote is never run, and nothing is loaded."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_records import HOSTILE, candidate, record, write_arm, write_correct, write_probe, write_results
from read_page import Page, assert_harmless, page_of

from topd.cli.main import main
from topd.report import ReportError, write_report
from topd.report.case import Case, Window, typical
from topd.report.distances import binned_means, correlation
from topd.report.figures import arm_styles, curve_figures, thin
from topd.report.page import render
from topd.report.records import Arm, load_run
from topd.report.rollouts import Candidate, Rollout, align, choose_rollouts, shade, visible


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_results(tmp_path_factory.mktemp("run") / "demo")
    write_arm(run / "opd", [], logged=5, near_future=False)
    alarm = candidate(2, distance=0.05, fork=False, token="+")
    records = [record(step, candidates=[candidate(), alarm]) for step in (1, 3, 5)]
    write_arm(run / "topd", records, logged=5, guidance_weight=0.3)
    return run


@pytest.fixture(scope="module")
def page(demo: Path) -> Page:
    return page_of(demo)


# --- the whole page --------------------------------------------------------------------------------------------------


def test_a_demo_shows_everything(page: Page) -> None:
    assert_harmless(page)
    for expected in (
        "OPD and TOPD, 5 steps each.", "topd, audited rollouts of training 3 6 3 3 50.0",
        "topd, whole run: mean over 5 logged steps all – – – 30.0",
        "From the probe of the pair, before training", "From the whole run: medians over all training steps",
        "From 500 held-out problems after training, greedy",
        "Seed 7", "Total time 7 min", "torch 2.9.1",
        "+6.4 points", "95 % interval −2.8 to +10.0, p = 0.0008",
        "30.4 %", "29.23 %", "1.31 ×", "1.41 ×",
        "99.2", "55.2", "41.8", "74.8", "71.0–78.6", "81.2", "500 held-out problems",
        "38.9", "47.8", "48.2", "52.2", "another pair and another task",
        "All 6", "Forks 3", "False alarms 3",
        "what is 5+2×3?", "guided", "not used", "1.90 nats", "0.400", "0.050",
        "3 of 3 student tokens are matched to the same token",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "Some records could not be read" not in page.text


def test_every_figure_is_there_once_with_words(page: Page) -> None:
    figures = page.all("svg", "figure")
    assert len(figures) == len(page.all("figure")) == 10
    for figure in figures:
        assert figure["role"] == "img"
        assert len(figure["aria-label"] or "") > 40
    labels = " ".join(figure["aria-label"] or "" for figure in figures)
    assert "opd from 0.3 at step 1 to 0.06 at step 5" in labels
    assert "topd: rollout 0.5, scoring 0.1, windows 0.2, transport 0.05, loss 0.1, backward 0.2" in labels
    assert "3 forks, median 0.4; 3 false alarms, median 0.05" in labels


def test_forks_and_false_alarms_differ_by_more_than_colour(page: Page) -> None:
    cards = page.all("details", "card")
    assert [card["data-kind"] for card in cards] == ["fork"] * 3 + ["alarm"] * 3
    marks = page.all("a", "mark")
    assert sorted(mark["href"] or "" for mark in marks) == [f"#{card['id']}" for card in cards]
    assert {mark["title"] for mark in marks} == {"Fork, 1.90 nats", "False alarm, 0.30 nats"}
    assert {icon["href"] for icon in page.all("use") if icon["href"] in ("#icon-fork", "#icon-alarm")}
    assert "solid frame" in page.text
    assert "dotted frame" in page.text


def test_tokens_are_shaded_by_their_loss(page: Page) -> None:
    assert [mark["class"] for mark in page.all("a", "mark")][:2] == ["mark fork l4", "mark alarm l2"]
    assert {"class": "l6", "title": "5.50"} in page.all("span", "l6")
    assert [shade(loss) for loss in (None, 0.0, 0.05, 0.3, 0.5, 1.0, 2.0, 100.0)] == [0, 0, 1, 2, 3, 4, 5, 6]


def test_options_that_differ_come_first(page: Page) -> None:
    assert len(page.all("tr", "differ")) == 2
    assert re.search(r'guidance_weight – 0\.3 method "opd" "topd" window_length 50', page.text)


def test_one_arm_alone_is_a_run(tmp_path: Path) -> None:
    arm = write_arm(tmp_path / "topd", [record()])
    page = page_of(arm)
    assert_harmless(page)
    assert "TOPD, 10 steps." in page.text
    assert "Results" not in page.text
    assert len(page.all("details", "card")) == 1


def test_the_page_is_written_where_asked_and_is_the_same_each_time(demo: Path, page: Page, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    assert write_report(demo, out) == out
    assert out.read_bytes() == page.source.encode()
    assert write_report(write_arm(tmp_path / "topd", [record()])) == tmp_path / "topd" / "report.html"


# --- hostile text ----------------------------------------------------------------------------------------------------


def test_what_a_model_wrote_is_shown_and_never_run(tmp_path: Path) -> None:
    hostile = candidate(
        0, token=HOSTILE[0], decision=HOSTILE[4], student_window=HOSTILE, teacher_window=HOSTILE[::-1],
        plan=[[i, i, 0.07] for i in range(len(HOSTILE))],
    )  # fmt: skip
    spoken = {"tokens": HOSTILE, "token_loss": [3.0] * len(HOSTILE)}
    run = tmp_path / "<script>alert(0)"
    write_results(
        run, seed=HOSTILE[0], versions={HOSTILE[2]: HOSTILE[1]},
        arms=[{"name": "topd"}, {"name": HOSTILE[0], "greedy": 0.5}],
    )  # fmt: skip
    arm = run / 'a$x$"b&'
    write_arm(arm, [record(prompt="".join(HOSTILE), method=HOSTILE[1], rollout=spoken, candidates=[hostile])])
    (arm / "topd_config.json").write_text(json.dumps({HOSTILE[0]: HOSTILE[1], "method": HOSTILE[2]}))
    page = page_of(run)
    assert_harmless(page)
    for text in HOSTILE[:8]:
        assert text in page.text, text
    assert page.text.count("<script>alert(1)</script>") >= 5
    assert "🤖 émoji 😀‍🔥" in page.text
    assert "␀␛[31m␍�" in page.text
    assert "\x00" not in page.source
    assert "49" not in re.findall(r"prompt\">[^<]*", page.source)[0]


def test_the_policy_allows_only_our_own_script(page: Page) -> None:
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv")]
    assert policy is not None
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/]{43}='", policy)
    assert "http" not in policy


# --- records that are not as they should be --------------------------------------------------------------------------


def test_broken_lines_are_counted_and_the_rest_is_shown(tmp_path: Path) -> None:
    broken = ['{"version": 1, "step": 3, "met', "[1, 2]", "7", '{"candidates": [{}]}', '{"step": Infinity}', ""]
    page = page_of(write_arm(tmp_path / "topd", [record(1), *broken, record(2)]))
    assert "5 lines were left out of topd/audit.jsonl" in page.text
    assert len(page.all("article")) == 2


def test_one_broken_line(tmp_path: Path) -> None:
    page = page_of(write_arm(tmp_path / "topd", [record(1), "{"]))
    assert "1 line was left out" in page.text


def test_broken_files_are_named(tmp_path: Path) -> None:
    run = write_results(tmp_path / "demo")
    (write_arm(run / "topd", [record()]) / "trainer_state.json").write_text("{")
    page = page_of(run)
    assert "topd/trainer_state.json is not a JSON object" in page.text
    assert "No records were found for: opd" in page.text


@pytest.mark.parametrize("version", [2, 99, 0, "1", None])
def test_unknown_versions_are_refused(tmp_path: Path, version: Any) -> None:
    with pytest.raises(ReportError, match=r"audit\.jsonl has record version .* reads version 1"):
        write_report(write_arm(tmp_path / "topd", [record(version=version)]))
    with pytest.raises(ReportError, match=r"results\.json has record version"):
        write_report(write_results(tmp_path / "demo", version=version))
    assert not (tmp_path / "topd" / "report.html").exists()


@pytest.mark.parametrize("run", [".", "missing"])
def test_nothing_to_report_is_an_error(tmp_path: Path, run: str) -> None:
    with pytest.raises(ReportError, match=r"Give (the output folder of a run|one that topd demo)"):
        write_report(tmp_path / run)


def test_zero_candidates(tmp_path: Path) -> None:
    page = page_of(write_arm(tmp_path / "topd", [record(candidates=[])]))
    assert_harmless(page)
    assert "No candidates were recorded" in page.text
    assert len(page.all("article")) == 1
    assert not page.all("details", "card")


def test_distances_that_are_missing(tmp_path: Path) -> None:
    unknown = [candidate(distance=None, fork=False), candidate(2, distance=float("nan"), fork=True, token_loss=None)]
    page = page_of(write_arm(tmp_path / "topd", [record(candidates=unknown)]))
    assert_harmless(page)
    assert [card["data-kind"] for card in page.all("details", "card")] == ["unknown", "unknown"]
    assert "topd, audited rollouts of training 1 2 0 0 –" in page.text
    assert "not measured" in page.text
    assert "Distances" not in page.text


@pytest.mark.parametrize(
    "found",
    [
        {"version": 1},
        {"step": 1, "rollout": None, "candidates": None},
        {"rollout": {"tokens": ["a"], "token_loss": [None, 1.0]}, "candidates": [{"position": 999}]},
        {"candidates": [{"position": -3, "plan": [[9, 9, 1.0], [0, 0, 0.0]], "student_window": ["a"]}]},
    ],
)
def test_missing_keys_are_not_shown(tmp_path: Path, found: dict[str, Any]) -> None:
    page = page_of(write_arm(tmp_path / "topd", [found]))
    assert_harmless(page)
    assert "left out" not in page.text
    assert len(page.all("article")) == 1


@pytest.mark.parametrize(
    "results", [{}, {"arms": None}, {"arms": [None, 3]}, {"teacher": 1, "difference": [], "versions": "x"}]
)
def test_results_without_most_keys(tmp_path: Path, results: dict[str, Any]) -> None:
    run = write_arm(tmp_path / "topd", [record()])
    (run / "results.json").write_text(json.dumps(results))
    assert_harmless(page_of(run))


def test_metrics_that_are_not_finite_or_missing(tmp_path: Path) -> None:
    run = tmp_path / "topd"
    run.mkdir()
    log = [{"step": 1, "token_loss/mean": float("nan")}, {"step": 2, "token_loss/mean": 0.5}, {"loss": 1.0}, 3]
    log += [{"step": 3, "token_loss/mean": "0.1", "token_loss/q50": 0.0, "distance/q50": 0.2, "seconds/loss": 0}]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    page = page_of(run)
    assert_harmless(page)
    assert "Token loss by training step, in nats: topd 0.5 at step 2." in [
        figure["aria-label"] for figure in page.all("svg", "figure")
    ]


@pytest.mark.parametrize("odd", [1e308, -1e308, 10**400, "\ud800"], ids=["1e308", "-1e308", "10**400", "half"])
def test_values_that_no_run_can_have_do_not_keep_the_page_away(tmp_path: Path, odd: Any) -> None:
    """Numbers beyond every axis, half a surrogate pair: in each place of each record."""

    def spoil(value: Any, name: str = "") -> Any:
        if isinstance(value, dict):
            return {key: spoil(each, key) for key, each in value.items()}
        if isinstance(value, list):
            return [spoil(each, name) for each in value]
        same_kind = isinstance(value, str) if isinstance(odd, str) else isinstance(value, type(odd))
        return odd if same_kind and not isinstance(value, bool) and name != "version" else value

    write_arm(write_results(tmp_path), [record(3)], logged=3)
    write_probe(tmp_path / "probe")
    write_correct(tmp_path / "correct")
    for file in [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.jsonl")]:
        lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
        file.write_text("".join(json.dumps(spoil(json.loads(line))) + "\n" for line in lines))
    assert "</html>" in write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("scale", [1.0, 1e-9, 40.0])
def test_numbers_on_axes_are_plain(tmp_path: Path, scale: float) -> None:
    """Quantiles within one decade, too; nothing is left of matplotlib's own mark-up."""
    log = [{"step": step, "token_loss/q50": 2.1 * scale, "token_loss/q99": (5 - step) * scale} for step in (1, 2)]
    arm = tmp_path / "topd"
    arm.mkdir()
    (arm / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    page = page_of(arm)
    labels = [text for tag, text in page.texts if tag == "text"]
    assert not [label for label in labels if "$" in label or "\\" in label]
    assert {1.0: "10", 1e-9: "1e−08", 40.0: "1000"}[scale] in labels


def test_a_run_that_still_goes_on_is_read_from_its_checkpoint(tmp_path: Path) -> None:
    write_arm(tmp_path / "run" / "checkpoint-5", [], logged=5)
    run = load_run(tmp_path / "run")
    assert [arm.name for arm in run.arms] == ["run"]
    assert run.arms[0].series("token_loss/q99") == ([1, 2, 3, 4, 5], [3.0] * 5)


# --- size ------------------------------------------------------------------------------------------------------------


def test_the_newest_candidates_are_kept_and_the_rest_counted(tmp_path: Path) -> None:
    records = [record(step, candidates=[candidate(), candidate(2)]) for step in range(1, 201)]
    run = load_run(write_arm(tmp_path / "topd", records[::-1]))
    shown = choose_rollouts(run.arms, 300)
    assert [item.rollout.step for item in shown] == list(range(200, 50, -1))
    (tmp_path / "page.html").write_text(render([run], limit=300))
    page = Page(tmp_path / "page.html")
    assert len(page.all("details", "card")) == 300
    assert "100 older candidates left out" in page.text
    assert "topd, audited rollouts of training 200 400 400 0 0.0" in page.text
    assert "forks (400)" in page.text


def test_a_long_run_is_read_in_little_memory(tmp_path: Path) -> None:
    run = load_run(write_arm(tmp_path / "topd", [record(step) for step in range(1000)]), keep=10)
    (arm,) = run.arms
    assert [rollout.step for rollout in arm.rollouts] == list(range(999, 989, -1))
    assert (arm.audited, len(arm.points)) == (1000, 1000)


def test_measured_rollouts_go_before_others(tmp_path: Path) -> None:
    run = write_results(tmp_path / "demo")
    write_arm(run / "opd", [record(9, method="opd", candidates=[candidate(distance=None, fork=False)])] * 5)
    write_arm(run / "topd", [record(1)] * 5)
    assert [item.arm for item in choose_rollouts(load_run(run).arms, 7)] == ["opd"] * 2 + ["topd"] * 5


def test_a_page_with_long_windows_and_rollouts_stays_small(tmp_path: Path) -> None:
    tokens = [f" word{index % 97}" for index in range(5000)]
    window, other = tokens[:50], tokens[25:75]
    plan = [[i, (7 * i) % 50, 0.02] for i in range(50)]
    many = [
        candidate(position, student_window=window, teacher_window=other, plan=plan) for position in range(0, 4800, 40)
    ]
    long = {"tokens": tokens, "token_loss": [0.3] * len(tokens)}
    run = write_arm(tmp_path / "topd", [record(step, rollout=long, candidates=many) for step in range(17)])
    page = page_of(run)
    assert len(page.all("details", "card")) == 2000
    assert len(page.source.encode()) < 9_000_000
    assert "more candidates of this rollout left out" in page.text
    assert "older candidates left out" in page.text


def test_long_rollouts_are_shown_around_their_candidates() -> None:
    rollout = Rollout(1, "topd", "?", tuple("x" * 1000), (0.0,) * 1000, (Candidate(500, "x", 2.0, 0.5, True),))
    (shown,) = choose_rollouts([Arm("topd", rollouts=[rollout])], 10)
    assert [(piece.skipped, len(piece.text)) for piece in shown.pieces] == [
        (460, 0),
        (0, 40),
        (0, 1),
        (0, 40),
        (459, 0),
    ]


# --- parts -----------------------------------------------------------------------------------------------------------


def test_alignment_says_who_is_matched_to_whom() -> None:
    found = align(
        Candidate(
            0, "a", 1.0, 0.5, True, student_window=("a", "b"), teacher_window=("b", "c", "a"),
            plan=((0, 2, 0.5), (1, 0, 0.1), (1, 1, 0.38), (1, 2, 0.02)),
        )
    )  # fmt: skip
    assert found is not None
    assert found.best == {0: 2, 1: 1}
    assert (found.same, found.faint) == (1, True)
    assert [(i, j) for i, j, _ in found.links] == [(0, 2), (1, 1), (1, 0)]
    assert found.data == [["a", "b"], ["b", "c", "a"], [[0, 2, 0], [1, 1, 0], [1, 0, 1]], [[0, 2], [1, 1]]]


def test_a_window_without_a_plan_is_still_shown() -> None:
    found = align(Candidate(0, "a", 1.0, None, False, student_window=("a",)))
    assert found is not None
    assert (found.links, found.best, found.teacher) == ([], {}, [])
    assert align(Candidate(0, "a", 1.0, None, False)) is None


def test_tokens_are_made_visible() -> None:
    assert [visible(text) for text in ("a b", "  ", "", "\n\n", "\tx", "y" * 300)] == [
        "a b", "␣␣", "∅", "↵↵", "⇥x", "y" * 200 + "…",
    ]  # fmt: skip


def test_long_curves_are_thinned_without_bias() -> None:
    steps, values = thin(range(10_000), [float(step % 2) for step in range(10_000)])
    assert len(steps) == len(values) == 300
    assert values.mean() == pytest.approx(0.5, abs=0.01)
    assert [len(part) for part in thin([], [])] == [0, 0]


def test_correlation_is_in_the_caption() -> None:

    assert correlation(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 7.0])) == "0.993"
    assert correlation(np.array([1.0, 2.0, 3.0]), -np.array([2.0, 4.0, 7.0])) == "−0.993"
    assert correlation(np.ones(3), np.array([2.0, 4.0, 7.0])) == "–"


def test_arms_have_different_styles() -> None:
    arms = [Arm(name, options={"method": name.split("-")[0]}) for name in ("opd", "topd", "topd-2", "other")]
    styles = arm_styles(arms)
    assert len(set(styles.values())) == 4
    assert styles["topd"] == arm_styles([Arm("my-run")])["my-run"]


def test_forward_kl_is_called_so() -> None:
    arm = Arm("opd", log=[{"step": 1, "token_loss/mean": 1.0}], options={"beta": 0.0})
    assert "KL(teacher ‖ student)" in curve_figures([arm])[0].caption
    arm.options["beta"] = 1.0
    assert "KL(student ‖ teacher)" in curve_figures([arm])[0].caption


def test_no_model_library_and_no_drawing_state_is_loaded() -> None:
    code = (
        "import sys, topd.report;"
        "print([name for name in ('torch', 'transformers', 'trl', 'matplotlib.pyplot') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_opd_arm_s_loss_is_its_token_loss(tmp_path):
    folder = tmp_path / "opd"
    folder.mkdir()
    (folder / "topd_config.json").write_text('{"method": "opd"}')
    (folder / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]}')
    (arm,) = load_run(folder).arms
    assert arm.series("token_loss/mean") == ([1, 2], [0.5, 0.25])


# --- analyses and several runs ---------------------------------------------------------------------------------------


def test_a_probe_is_shown_beside_the_paper(tmp_path: Path) -> None:
    page = page_of(write_probe(tmp_path / "mine"))
    assert_harmless(page)
    for expected in (
        "Before training: small against big, 6 rollouts.", "12 candidates of probe",
        "Median D_OT, high-loss (n = 12)", "0.400", "0.566", "0.250", "0.126",
        "25.0", "20.0 to 30.0", "29.2", "teacher/cosine/50", "6 of 8 false alarms", "Probe, rollout 1", "Forks 6",
        "False alarms 6",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert "high-loss median 0.25" in " ".join(figure["aria-label"] or "" for figure in page.all("svg", "figure"))


def test_the_readings_of_the_student_s_window_are_shown_side_by_side(tmp_path: Path) -> None:
    page = page_of(write_probe(tmp_path / "mine", readings=("candidate", "regenerated")))
    assert_harmless(page)
    for expected in (
        "D_OT below 0.02, low-loss, %", "62.5 (50.0 to 75.0)", "11.0", "Window begins with the candidate, high-loss, %",
        "Pearson, teacher's NLL and D_OT", "0.710",
    ):  # fmt: skip
        assert expected in page.text, expected
    labels = [figure["aria-label"] or "" for figure in page.all("svg", "figure")]
    (histograms,) = [label for label in labels if label.startswith("Histograms")]
    assert "regenerated, high-loss 0.0%, random 0.0%, low-loss 0.0%" in histograms
    one = page_of(write_probe(tmp_path / "one"))
    assert "in each reading" not in one.text
    assert "probe before training 6 12 6 6 25.0 (20.0 to 30.0)" in one.text


def test_the_teacher_s_nll_is_drawn_against_distance_with_its_trend_and_binned_means(tmp_path: Path) -> None:
    page = page_of(write_probe(tmp_path / "mine", rollouts=12, places=4))
    labels = [figure["aria-label"] or "" for figure in page.all("svg", "figure")]
    (nll,) = [label for label in labels if label.startswith("Teacher's NLL against")]
    records = [json.loads(line) for line in (tmp_path / "mine" / "probe_records.jsonl").read_text().splitlines()]
    high = [place for record in records for place in record["places"] if place["group"] == "high"]
    x, y = (np.array([find(place) for place in high]) for find in (
        lambda place: place["teacher_nll"], lambda place: place["distance"]["student/cosine/50"]
    ))  # fmt: skip
    assert f"Pearson r = {np.corrcoef(x, y)[0, 1]:.3f}".replace("-", "−") in nll
    assert "48 candidates" in nll
    assert page.text.count("linear trend") == 2  # token loss, and the teacher's NLL
    assert page.text.count("bin mean ± SE") == 2


def test_binned_means_by_hand() -> None:
    x = np.array([0.0] * 5 + [8.0] * 6 + [4.0] * 4)  # the four in the middle are too few
    y = np.array([0.1] * 5 + [0.2, 0.4] * 3 + [0.9] * 4)
    centre, mean, error = binned_means(x, y)
    assert centre.tolist() == [0.0, 8.0]
    assert mean == pytest.approx([0.1, 0.3])
    assert error == pytest.approx([0.0, np.std([0.2, 0.4] * 3, ddof=1) / np.sqrt(6)])


def test_local_correction_is_shown_with_its_cases(tmp_path: Path) -> None:
    page = page_of(write_correct(tmp_path / "mine", forks=45))
    assert_harmless(page)
    for expected in (
        "At each of 45 forks the student takes 5 gradient steps", "−0.100", "0.04", "0.204", "Rollout 1, token 4",
        "D_OT 0.400, ends right", "5 more cases in the records",
    ):  # fmt: skip
        assert expected in page.text, expected
    assert len(page.all("details", "case")) == 40


def test_what_analyses_quote_is_never_run(tmp_path: Path) -> None:
    run = write_arm(tmp_path / "topd", [record()])
    write_probe(run / "probe", tokens=HOSTILE)
    write_correct(run / "correct", tokens=HOSTILE)
    page = page_of(run)
    assert_harmless(page)
    assert page.text.count("<script>alert(1)</script>") >= 5


def test_runs_are_compared_on_the_same_axes(tmp_path: Path) -> None:
    folders = []
    for name in ("first", "second"):
        folders.append(write_results(tmp_path / name / "demo"))
        write_arm(folders[-1] / "topd", [record()], logged=5)
    write_probe(folders[1] / "probe")
    out = write_report(folders[0], tmp_path / "page.html", compare=folders[1:])
    page = Page(out)
    assert_harmless(page)
    names = ["first/demo", "second/demo"]
    for name in names:
        assert f"Results: {name}" in page.text
    assert f"Probe: {names[1]}" in page.text
    labels = [figure["aria-label"] or "" for figure in page.all("svg", "figure")]
    (loss,) = [label for label in labels if label.startswith("Token loss by")]
    assert all(f"{name} from 0.3 at step 1" in loss for name in names)


def test_the_page_of_a_warm_start_shows_both_of_its_losses(tmp_path: Path) -> None:
    log = [{"step": step, "loss": 1.0, "forward_kl": 0.5 / step, "cross_entropy": 1.5 / step} for step in (1, 2, 3)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    labels = [figure["aria-label"] or "" for figure in page_of(tmp_path).all("svg", "figure")]
    assert any(label.startswith("Forward KL by training step") and "0.5 at step 1" in label for label in labels)
    assert any(label.startswith("Cross-entropy by training step") and "1.5 at step 1" in label for label in labels)


def test_runs_of_different_pairs_in_one_folder_are_not_put_on_one_page(tmp_path: Path) -> None:
    for name, weights in (("a", "1"), ("b", "1"), ("c", "2")):
        folder = write_arm(tmp_path / name, [record()])
        made_of = {"student": {"weights": weights}, "teacher": {"weights": "t"}, "data": {"digest": "d"}}
        (folder / "run.yaml").write_text(json.dumps({"provenance": made_of}))
    with pytest.raises(ReportError, match=r"runs of different pairs or data.*topd report .*/a --compare .*/b .*/c"):
        write_report(tmp_path)
    shutil.rmtree(tmp_path / "c")
    assert [arm.name for arm in load_run(tmp_path).arms] == ["a", "b"]


def test_newer_and_broken_analyses(tmp_path: Path) -> None:
    probe = write_probe(tmp_path / "probe")
    records = probe / "probe_records.jsonl"
    records.write_text(records.read_text() + '{"places": [{"group": "high"}]}\n{"torn')
    assert "2 lines were left out of probe_records.jsonl" in page_of(probe).text
    (probe / "probe.json").write_text('{"version": 2}')
    with pytest.raises(ReportError, match=r"probe\.json has record version 2"):
        write_report(probe)


# --- the case study --------------------------------------------------------------------------------------------------


def test_a_case_is_text_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_correct(tmp_path / "mine")
    assert main(["case", str(run), "--out", str(tmp_path / "case.svg")]) == 0
    printed = capsys.readouterr().out
    assert "what is 5+2?" in printed
    assert "fork 2" in printed  # the middle one
    assert re.search(r"opd +2 \[5\] \+ \[2\]|opd +\[2\] \[5\] \[\+\] 2|opd +2 \[5\] \[\+\] \[2\]", printed)
    picture = (tmp_path / "case.svg").read_text()
    assert picture.count("D_OT") == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--fork", "9"], "numbered 1 to 3"), (["--out", "x.nothing"], r"\.svg, \.png or \.pdf")],
)
def test_a_case_that_cannot_be_had(tmp_path: Path, capsys: Any, arguments: list[str], says: str) -> None:
    assert main(["case", str(write_correct(tmp_path / "mine")), *arguments]) == 2
    assert re.search(says, capsys.readouterr().err)


def test_the_typical_case_is_among_those_that_changed() -> None:
    def case(opd: float, topd: float, changed: bool) -> Case:
        after = ("b",) if changed else ("a",)
        told = (("before", ("a",), 0.5), ("opd", ("a",), opd), ("topd", after, topd))
        return Case(0, 0, "", ("b",), tuple(Window(*each, None) for each in told))

    cases = [case(0.4, 0.4, False)] * 5 + [case(0.4, 0.1, True), case(0.4, 0.3, True), case(0.1, 0.5, True)]
    assert typical(cases) == 6
    assert typical(cases[:5]) == 0
