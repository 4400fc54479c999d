"""What topd train shows: a line a log, tables at the end, and nothing of the libraries."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from topd.runs.console import ConsoleCallback, duration, formatted
from topd.runs.summary import print_summary, where_to_look

LOG = [
    {"step": step, "loss": 0.5 / step, "token_loss/mean": 0.4 / step, "false_alarm_share": 0.25 * step,
     "forks/per_rollout": 2.0, "completions/mean_length": 51.6, "learning_rate": 3e-4, "step_time": 1.5,
     "seconds/rollout": 0.9, "seconds/windows": 0.3, "grad_norm": 1.0}
    for step in (1, 2)
] + [{"step": 2, "train_runtime": 200.0, "train_loss": 0.4}]  # fmt: skip


def shown(main: bool = True) -> tuple[ConsoleCallback, SimpleNamespace, io.StringIO]:
    text = io.StringIO()
    state = SimpleNamespace(is_world_process_zero=main, global_step=0, max_steps=20, logging_steps=1)
    return ConsoleCallback(Console(file=text, width=60)), state, text


STEPS, EPOCHS = SimpleNamespace(logging_strategy="steps"), SimpleNamespace(logging_strategy="epoch")


def test_a_log_is_one_line_whatever_the_width() -> None:
    lines, state, text = shown()
    lines.on_train_begin(STEPS, state, None)
    state.global_step = 20
    lines.on_log(None, state, None, logs=LOG[0])
    lines.on_log(None, state, None, logs=LOG[-1])
    assert text.getvalue().splitlines() == [
        "20 steps; one line every 1.",
        "20/20  loss  0.5000  token loss  0.4000  false alarms  25%  forks  2.0     52 tokens  lr 3.0e-04"
        "    1.50 s/step  0 s left",
    ]


def test_the_time_that_is_left_counts_the_steps_of_this_start(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 100.0, 145.0])
    monkeypatch.setattr("topd.runs.console.time.monotonic", lambda: next(clock))
    lines, state, text = shown()
    state.global_step = 10
    lines.on_train_begin(STEPS, state, None)
    lines.on_log(None, state, None, logs={"eval_loss": 1.0, "eval_runtime": 15.0})  # eval_on_start
    state.global_step = 13
    lines.on_log(None, state, None, logs={"loss": 1.0})
    assert "20 steps, resuming after step 10; one line every 1." in text.getvalue()
    assert text.getvalue().endswith("1 min 10 s left\n")  # 30 s for 3 steps, 7 to go


def test_a_line_an_epoch_is_not_called_a_line_every_so_many_steps() -> None:
    lines, state, text = shown()
    lines.on_train_begin(EPOCHS, state, None)
    assert text.getvalue() == "20 steps.\n"


def test_a_resumed_run_says_which_steps_took_the_time(tmp_path: Path) -> None:
    text = io.StringIO()
    print_summary(LOG, [], 20, 12, Console(file=text, width=80))
    assert "20 steps, of which 8 in 3 min 20 s" in " ".join(text.getvalue().split())


def test_the_time_of_evaluations_is_said_apart(tmp_path: Path) -> None:
    text = io.StringIO()
    evaluations = [{"step": step, "eval_accuracy": 0.1 * step, "eval_runtime": 15.0} for step in (1, 2)]
    print_summary([*evaluations, *LOG], [], 2, 0, Console(file=text, width=80))
    said = " ".join(text.getvalue().split())
    assert "2 steps in 3 min 20 s, 30 s of them evaluation" in said
    assert "accuracy, held-out problems 10.0% 20.0% 15.0%" in said
    text = io.StringIO()
    print_summary([*evaluations, *LOG], [], 2, 1, Console(file=text, width=80))
    assert "2 steps, of which 1 in 3 min 20 s, 15 s of them evaluation" in " ".join(text.getvalue().split())


def test_only_the_main_process_speaks_and_an_evaluation_has_its_own_line() -> None:
    lines, state, text = shown(main=False)
    lines.on_log(None, state, None, logs=LOG[0])
    assert text.getvalue() == ""
    assert formatted({"eval_loss": 0.25, "eval_runtime": 3.0}) == ["evaluation loss 0.2500"]
    interval = {"eval_accuracy_low": 0.476, "eval_accuracy_high": 0.612}
    shares = {"eval_ended": 0.995, "eval_repeated": 0.02, "eval_mean_length": 145.2}
    assert formatted({"eval_accuracy": 0.545} | interval | shares) == [
        "accuracy 54.5% (47.6% to 61.2%)", "ended 99.5%", "repeated 2.0%", "  145 tokens",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (3599, "59 min 59 s"), (7500, "2 h 05 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_summary_says_how_it_went_and_where_the_time_went(tmp_path: Path) -> None:
    text = io.StringIO()
    print_summary(LOG, where_to_look(tmp_path), 2, console=Console(file=text, width=80))
    said = " ".join(text.getvalue().split())
    for expected in (
        "2 steps in 3 min 20 s", "loss, nats 0.5000 0.2500 0.3750", "token loss, nats 0.4000 0.2000 0.3000",
        "false alarms among candidates 25.0% 50.0% 37.5%", "forks/rollout 2.00", "rollout 0.900 75%",
        "windows 0.300 25%", "Model: ",
    ):  # fmt: skip
        assert expected in said, expected
    assert "evaluation loss" not in said
    assert "transport" not in said


def test_places_of_checkpoints_audit_and_page(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    assert where_to_look(folder)[1].startswith("Audit: none (--audit_steps 10")
    for step in range(10, 90, 10):
        (folder / f"checkpoint-{step}").mkdir()
    (folder / "audit.jsonl").write_text("{}\n{}\n")
    assert where_to_look(folder) == [
        f"Model: {folder}", f"Checkpoints: {folder}/checkpoint-N, after steps 10, 20, ..., 80",
        f"Audit: {folder / 'audit.jsonl'}, 2 rollouts with their candidates",
        f"Report page: topd report '{folder}'",
    ]  # fmt: skip


def test_from_python_the_callback_prints_a_header_and_the_libraries_print_nothing(tmp_path: Path, capsys: Any) -> None:
    from tiny import tiny_trainer

    from topd import ConsoleCallback as Public

    text = io.StringIO()
    trainer = tiny_trainer(
        tmp_path,
        trainer_options={"callbacks": [Public(Console(file=text, width=200))]},
        disable_tqdm=False,
        max_steps=1,
    )
    trainer.train()
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert "ConsoleCallback" in names
    assert not {"PrinterCallback", "ProgressCallback"} & set(names)
    assert capsys.readouterr().out == ""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    lines = [line.split(maxsplit=1) for line in text.getvalue().splitlines()]
    assert [name for name, _ in lines[:6]] == ["student", "teacher", "data", "method", "batch", "computed"]
    told = dict(lines[:6])
    assert told["student"].endswith(f"{parameters:,} parameters, float32")
    assert told["data"] == "a dataset, 64 rows"
    assert told["method"] == "topd, windows of 5 tokens"
    assert told["batch"] == "4 rows per step (4 per process and batch, 1 accumulated, 1 process)"
    assert told["computed"] == "as stored, on cpu"
    assert lines[6:8] == [["1", "steps; one line every 1."], ["1/1", lines[7][1]]]
