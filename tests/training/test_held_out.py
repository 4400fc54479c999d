"""Accuracy on held-out problems during training: what `topd eval` would say, and training is not disturbed."""

from __future__ import annotations

import json
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import TOKENIZER, prompts, tiny_config, tiny_model, tiny_trainer
from transformers import EarlyStoppingCallback, TrainerCallback

from topd.cli.main import main
from topd.embedded.pair import pair_folder
from topd.embedded.tokenizer import build_tokenizer
from topd.errors import ContextError, TOPDError
from topd.evaluation import while_training
from topd.evaluation.results import RESULT
from topd.evaluation.while_training import KEPT_RESPONSES, ends_in_a_loop
from topd.training.several_teachers import MOPDTrainer

EVERY_STEP: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 32}
EMBEDDED = EVERY_STEP | {"eval_benchmark": "embedded", "eval_benchmark_limit": 10}
SHORT = EMBEDDED | {"eval_benchmark_limit": 4}


def embedded_trainer(out: Path, **options: Any) -> Any:
    """Short training of the embedded pair."""
    student, teacher = (str(pair_folder(name)) for name in ("student-standard", "teacher"))
    return tiny_trainer(out, student=student, teacher=teacher, max_completion_length=96, **options)


def evaluations(trainer: Any) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]


def responses(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "eval_responses.jsonl").read_text().splitlines()]


def evaluated(model: Path, out: Path, *options: str) -> dict[str, Any]:
    """What `topd eval` says of a model, and its samples."""
    assert main(["eval", "--model", f"m={model}", "--out", str(out), *options]) == 0
    (found,) = json.loads((out / "m" / RESULT).read_text())["benchmarks"].values()
    (file,) = (out / "m").glob("*.samples.jsonl")
    return found | {"records": [json.loads(line) for line in file.read_text().splitlines()]}


def test_training_is_the_same_with_and_without_it_and_topd_eval_says_the_same(tmp_path: Path) -> None:
    sampled = {"eval_samples": 2, "eval_temperature": 0.6}
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    alone = embedded_trainer(tmp_path / "alone", **options)
    alone.train()
    trainer = embedded_trainer(tmp_path / "run", eval_on_start=True, **options, **EMBEDDED, **sampled)
    trainer.train()
    for ours, theirs in zip(trainer.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    assert [entry["step"] for entry in evaluations(trainer)] == [0, 1]
    words = ["--benchmark", "embedded", "--limit", "10", "--samples", "2", "--temperature", "0.6"]
    found = evaluated(tmp_path / "run" / "checkpoint-1", tmp_path / "eval", *words)
    last = evaluations(trainer)[-1]
    records = sorted(found["records"], key=lambda each: (each["sample"], each["problem"]))
    assert 0 < last["eval_accuracy"] < 1
    assert [last[f"eval_accuracy{end}"] for end in ("", "_low", "_high")] == [
        found["accuracy"][name] for name in ("mean", "low", "high")
    ]
    assert last["eval_mean_length"] == pytest.approx(found["tokens_mean"])
    assert last["eval_ended"] == 1 - found["truncated"] / 20
    kept = [each for each in responses(tmp_path / "run") if each["step"] == 1]
    assert len(kept) == KEPT_RESPONSES
    assert [each["response"] for each in kept] == [records[i * 10 // KEPT_RESPONSES]["text"] for i in range(8)]
    assert [each["right"] for each in kept] == [records[i * 10 // KEPT_RESPONSES]["right"] for i in range(8)]


def test_a_chat_model_answers_in_its_template_beside_an_evaluation_loss(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}so {{ m['content'] }} makes {% endfor %}"
    file = tmp_path / "mine.jsonl"
    rows = [{"problem": f"{n}+{n}", "answer": str(2 * n)} for n in range(1, 5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = tiny_trainer(
        tmp_path / "run", tokenizer=tokenizer, max_steps=2, **EVERY_STEP, eval_benchmark=f"mine={file}",
        trainer_options={"eval_dataset": {"a": prompts(4), "b": prompts(2)}},
    )  # fmt: skip
    trainer.train()
    (first, second) = evaluations(trainer)  # once, not once for each dataset
    assert (first["step"], second["step"]) == (1, 2)
    assert first["eval_a_loss"] > 0
    trainer.save_model(str(tmp_path / "saved"))
    greedy = ("--samples", "1", "--temperature", "0", "--max-new-tokens", "20")
    found = evaluated(tmp_path / "saved", tmp_path / "eval", "--benchmark", f"mine={file}", *greedy)
    assert found["settings"]["chat"]
    assert second["eval_accuracy"] == found["accuracy"]["mean"] == 0
    assert second["eval_ended"] == 1 - found["truncated"] / 4
    kept = [each for each in responses(tmp_path / "run") if each["step"] == 2]
    assert [each["response"] for each in kept] == [record["text"] for record in found["records"]]
    assert len({each["response"] for each in kept}) > 1
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_accuracy"} <= metrics.keys()
    assert metrics["eval_accuracy"] == 0


def test_the_best_model_by_accuracy_is_kept_and_training_stops_early(tmp_path: Path, monkeypatch: Any) -> None:
    accuracies = iter([0.2, 0.6, 0.4, 0.5, 0.9])
    monkeypatch.setattr(while_training, "figures", lambda *_: {"accuracy": next(accuracies)})
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    trainer = tiny_trainer(
        tmp_path, **SHORT, **best, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2,
        learning_rate=1e-3, trainer_options={"callbacks": [EarlyStoppingCallback(early_stopping_patience=2)]},
    )  # fmt: skip
    trainer.train()
    assert trainer.args.greater_is_better
    assert trainer.state.global_step == 4
    assert (trainer.state.best_metric, trainer.state.best_global_step) == (0.6, 2)
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "checkpoint-2"
    best_weights = type(trainer.model).from_pretrained(tmp_path / "checkpoint-2").state_dict()
    last_weights = type(trainer.model).from_pretrained(tmp_path / "checkpoint-4").state_dict()
    kept = trainer.model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in best_weights.items())
    assert not all(torch.equal(kept[name], value) for name, value in last_weights.items())


def test_a_resumed_run_repeats_its_evaluations(tmp_path: Path) -> None:
    options = SHORT | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    through = tiny_trainer(tmp_path, **options)
    through.train()
    written = (tmp_path / "eval_responses.jsonl").read_bytes()
    resumed = tiny_trainer(tmp_path, student=tiny_model(5), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [entry["step"] for entry in evaluations(resumed)] == [1, 2]
    timed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    ours, theirs = (
        [{key: value for key, value in entry.items() if key not in timed} for entry in evaluations(trainer)]
        for trainer in (resumed, through)
    )
    assert ours == theirs
    assert (tmp_path / "eval_responses.jsonl").read_bytes() == written


class FakeVllm:
    """What TRL's `VLLMGeneration` is to a trainer: the weights of the last `sync_weights`, greedy."""

    def __init__(self, model: Any, processes: int = 1) -> None:
        self.model, self.synced, self.calls = model, 0, []
        self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty = 1.0, 0.9, 5, None, 1.2
        self.max_completion_length, self.generation_kwargs = 20, {"seed": 7}

    def sync_weights(self) -> None:
        self.synced += 1

    def generate(self, prompts: Any, images: Any, num_generations: int, profiler: Any) -> Any:
        self.calls.append({name: value for name, value in vars(self).items() if name not in ("model", "calls")})
        self.calls[-1]["prompts"] = len(prompts)
        torch.rand(3)  # vLLM in this process draws from the random numbers of training
        outputs = [self.model.generate(
            torch.tensor([ids]), max_new_tokens=self.max_completion_length, do_sample=False, eos_token_id=1,
        )[0, len(ids):].tolist() for ids in prompts]  # fmt: skip
        return prompts, outputs, None, None


def test_vllm_answers_with_the_settings_of_the_evaluation_and_gets_its_own_back(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path, **SHORT)
    expected = trainer.evaluate()
    vllm = FakeVllm(trainer.model)
    before = dict(vars(vllm))
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, vllm, 0
    drawn = torch.get_rng_state()
    found = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), drawn)
    names = ("accuracy", "accuracy_low", "accuracy_high", "ended", "mean_length", "repeated")
    assert {name: found[f"eval_{name}"] for name in names} == {name: expected[f"eval_{name}"] for name in names}
    (call,) = vllm.calls
    assert call["prompts"] == 4
    assert (call["temperature"], call["top_k"], call["min_p"], call["repetition_penalty"]) == (0.0, -1, 0.0, 1.0)
    assert (call["max_completion_length"], call["generation_kwargs"]) == (20, {})
    assert vllm.synced == 1  # although the step is that of the last rollouts
    after = dict(vars(vllm))
    assert {name: after[name] for name in before if name != "synced"} == {
        name: before[name] for name in before if name != "synced"
    }


def test_a_student_of_several_teachers_answers_too(tmp_path: Path) -> None:
    dataset = prompts(8).add_column("teacher", ["a", "b"] * 4)
    teachers = {"a": tiny_model(1, 96), "b": tiny_model(2, 32)}
    trainer = tiny_trainer(tmp_path, MOPDTrainer, dataset, teacher=teachers, max_steps=1, **SHORT)
    trainer.train()
    (found,) = evaluations(trainer)
    assert 0 < found["eval_mean_length"] <= 20
    assert "eval_loss" not in found


@pytest.mark.parametrize("processes", [1, 3, 12])
def test_every_process_has_its_share_and_a_server_gets_equally_many_prompts_from_each(processes: int) -> None:
    """Ten problems; what the processes find together is every problem once."""
    problem_set = while_training.load_benchmark("embedded", limit=10)
    args = SimpleNamespace(eval_samples=2, eval_temperature=1.0, max_completion_length=8, chat_template_kwargs=None)
    config = tiny_model(0).config
    found = while_training.HeldOut.of(problem_set, args, TOKENIZER, config)
    for use_vllm in (False, True):
        asked, together = [], []
        for index in range(processes):
            trainer: Any = object.__new__(while_training.HeldOutAccuracy)
            trainer.accelerator = SimpleNamespace(num_processes=processes, process_index=index)
            trainer.use_vllm = use_vllm
            trainer._responses = partial(echo, asked)
            together += trainer._records(found)
        if use_vllm:
            assert len(set(asked)) == 1
        problems = {problem.id for problem in problem_set.problems}
        numbers = sorted(number for number, _ in together)
        assert numbers == [sample * while_training.SAMPLE_STRIDE + place for sample in range(2) for place in range(10)]
        assert {record["problem"] for _, record in together} == problems


def echo(asked: list[int], requests: Any, sampling: Any) -> Any:
    """Responses of an engine that notes how many requests it gets."""
    asked.append(len(requests))
    yield [(request.number, while_training.Response("so the answer is 1", False, 3)) for request in requests]


def test_one_evaluation_has_the_loss_and_the_accuracy_and_is_no_part_of_a_step(tmp_path: Path) -> None:
    class Count(TrainerCallback):
        seen: dict[str, int] = defaultdict(int)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **_: Any) -> None:
            for name in metrics:
                self.seen[name] += 1

    trainer = tiny_trainer(
        tmp_path, max_steps=2, **SHORT, trainer_options={"eval_dataset": prompts(32), "callbacks": [Count()]}
    )
    trainer.train()
    assert Count.seen["eval_accuracy"] == Count.seen["eval_loss"] == len(evaluations(trainer)) == 2
    for entry in trainer.state.log_history:
        stages = sum(value for key, value in entry.items() if key.startswith("seconds/"))
        assert stages <= 1.1 * entry.get("step_time", 0)


def test_what_would_not_be_evaluated_or_says_nothing_is_refused(tmp_path: Path) -> None:
    for options, message in [
        ({"eval_benchmark": "embedded"}, r"eval_strategy is no: nothing would be evaluated.*steps"),
        (EMBEDDED | {"eval_samples": 4}, "all samples of a problem are the same.*set a temperature"),
        (EMBEDDED | {"eval_samples": 0}, "eval_samples must be at least 1"),
        (EMBEDDED | {"eval_benchmark_limit": 0}, "eval_benchmark_limit must be at least 1"),
        (EMBEDDED | {"eval_temperature": -1.0}, "eval_temperature must not be negative"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny_config(tmp_path, **options)
    for options, kind, message in [
        ({"eval_benchmark": "nope.jsonl"}, TOPDError, r"eval_benchmark nope.jsonl: .*no such file"),
        ({"max_completion_length": 250}, ContextError, "max_completion_length 250 .*context of 256"),
        ({"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}, TOPDError,
         "no eval_dataset.*metric_for_best_model to accuracy"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=message):
            tiny_trainer(tmp_path, **EMBEDDED | options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so the answer is 11", False),
        ("wait, let me check. " * 6, True),
        ("an answer, then " + "7" * 100, True),
        ("7" * 99, False),  # too short to tell from a number
        ("wait, let me check. " * 3 + "so it is 4.", False),
        ("wait, let me check. " * 5 + "so it is 4", False),  # it got out
        ("".join(f"{n} squared is {n * n}. " for n in range(40)), False),
        ("x" + "a long passage of some sixty characters, said again and again; " * 4 + "a long pass", True),
    ],
)
def test_a_loop_is_a_passage_that_the_response_ends_in(text: str, expected: bool) -> None:
    assert ends_in_a_loop(text) is expected
