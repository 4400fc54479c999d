"""Several optimizer updates per batch of rollouts: `num_iterations`, `steps_per_generation`, `prefix_weight_max`."""

import json
from collections import defaultdict

import oracles
import pytest
import torch
import yaml
from datasets import Dataset
from tiny import prompts, tiny_model, tiny_trainer
from transformers import TrainerCallback

from topd.embedded.pair import pair_folder
from topd.runs.reused_rollouts import logger
from topd.training import TOPDTrainer
from topd.training.batch import rollouts_of
from topd.training.method import Method
from topd.training.step import score


class Watching(TOPDTrainer):
    """Counts generations and teacher's readings; remembers the rollouts of each micro-batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self.used = defaultdict(int), []

    def _generate_single_turn(self, *args, **kwargs):
        self.calls["sampled"] += 1
        return super()._generate_single_turn(*args, **kwargs)

    def _teacher(self):
        teacher = super()._teacher()
        prefill = teacher.prefill

        def counted(*args, **kwargs):
            self.calls["read"] += 1
            return prefill(*args, **kwargs)

        teacher.prefill = counted
        return teacher

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.used.append(inputs["completion_ids"].tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("method", ["opd", "topd"])
def test_rollouts_are_sampled_and_read_once_for_all_of_their_updates(tmp_path, method):
    trainer = tiny_trainer(
        tmp_path, Watching, method=method, max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        steps_per_generation=4, num_iterations=2,
    )  # fmt: skip
    trainer.train()
    assert trainer.calls == {"sampled": 2, "read": 2}
    first, second = trainer.used[:8], trainer.used[8:]
    assert len({str(part) for part in trainer.used}) == 8  # four parts of each of two batches
    assert first[:4] == first[4:]
    assert second[:4] == second[4:]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["seconds/rollout"] > 0 for entry in logged] == 2 * [True, False, False, False]
    assert ["rollouts_per_second" in entry for entry in logged] == 2 * [False, False, False, True]
    seconds = sum(value for entry in logged[:4] for name, value in entry.items() if name.startswith("seconds/"))
    assert logged[3]["rollouts_per_second"] == pytest.approx(8 / seconds)
    assert len({entry["loss"] for entry in logged}) == 8


class ScoreNow(TrainerCallback):
    """Before each step: the loss that the rollouts in the buffer have for the student as it is now."""

    def __init__(self, trainer):
        self.trainer, self.losses, self.weights = trainer, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        trainer, buffer = self.trainer, self.trainer._buffered_inputs
        if buffer is None or trainer._step % trainer._micro_batches == 0:
            return
        (batch,) = buffer[state.global_step % args.generation_steps :][:1]
        rollouts = rollouts_of(batch)
        scores, _ = score(rollouts, trainer._student(), trainer._teacher(), Method.of(args))
        mask = rollouts.loss_mask.bool()
        weights = batch.get("weights", mask.float())
        if args.prefix_weight_max is not None:
            found = oracles.prefix_weights(-scores.student_nll, batch["old_log_probs"], mask, args.prefix_weight_max)
            self.weights += [value for row, keep in zip(found, mask, strict=True) for value in row[: int(keep.sum())]]
            weights = weights * torch.tensor(found)
        self.losses.append(float((weights * scores.kl)[mask].sum() / batch["num_items_in_batch"]))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "opd", "num_iterations": 3},
        {"method": "opd", "num_iterations": 3, "token_share": 0.4},
        {"method": "opd", "num_iterations": 3, "prefix_weight_max": 1.05},
        {"method": "opd-capped", "num_iterations": 3, "prefix_weight_max": 4},
        {"method": "opd-capped", "steps_per_generation": 3, "prefix_weight_max": 4.0},
    ],
    ids=str,
)
def test_later_updates_have_the_exact_loss_of_the_student_as_it_is(tmp_path, options):
    trainer = tiny_trainer(tmp_path, max_steps=3, **options)
    now = ScoreNow(trainer)
    trainer.add_callback(now)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1:] == pytest.approx(now.losses, rel=2e-3)
    if "prefix_weight_max" in options:
        assert min(now.weights) < 0.99
        assert 1.01 < max(now.weights) <= options["prefix_weight_max"] + 1e-6


def test_the_updates_of_one_pass_weigh_every_token_alike(tmp_path):
    """With a learning rate of 0 the losses of the two halves of a batch average to that of the whole."""
    options = {"method": "opd", "learning_rate": 0.0, "generation_kwargs": {"do_sample": False}}
    halves = tiny_trainer(
        tmp_path / "a", steps_per_generation=2, per_device_train_batch_size=4, max_steps=2, **options
    )  # fmt: skip
    whole = tiny_trainer(tmp_path / "b", per_device_train_batch_size=8, max_steps=1, **options)
    halves.train()
    whole.train()
    first, second, all_of_it = (
        entry["loss"] for run in (halves, whole) for entry in run.state.log_history if "loss" in entry
    )
    assert (first + second) / 2 == pytest.approx(all_of_it, rel=1e-4)
    assert first != pytest.approx(second, rel=1e-4)


OPTIONS = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2, "prefix_weight_max": 4.0,
    "audit_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    """Six steps, four for each batch of rollouts, with a checkpoint after each."""
    out = tmp_path_factory.mktemp("through")
    trainer = tiny_trainer(out, dataset=prompts(20), **OPTIONS)
    trainer.train()
    return trainer, out


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_resumed_between_two_updates_equals_uninterrupted(through, tmp_path, step):
    uninterrupted, out = through
    resumed = tiny_trainer(tmp_path, dataset=prompts(20), student=tiny_model(5), **OPTIONS)
    resumed.train(resume_from_checkpoint=str(out / f"checkpoint-{step}"))
    assert (out / f"checkpoint-{step}" / "rollouts.pt").exists() is (step != 4)
    clocks = ("seconds/", "step_time", "rollouts", "train")
    logs = [
        {name: value for name, value in entry.items() if not name.startswith(clocks)}
        for run in (uninterrupted, resumed)
        for entry in run.state.log_history
    ]  # fmt: skip
    assert logs[: len(logs) // 2] == logs[len(logs) // 2 :]
    for a, b in zip(uninterrupted.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    sampled = {json.loads(line)["step"] for line in (out / "audit.jsonl").read_text().splitlines()}
    assert sampled == {1, 5}
    assert yaml.safe_load((out / "run.yaml").read_text())["num_iterations"] == 2


def test_resumed_with_other_sizes_samples_anew(through, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logger.logger, "propagate", True)
    _, out = through
    resumed = tiny_trainer(tmp_path, Watching, dataset=prompts(20), **OPTIONS | {"num_iterations": 3})
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-3"))
    assert "so new rollouts are sampled" in caplog.text
    assert resumed.calls["sampled"] == 1  # steps 4 to 6 end the first batch's six updates
    assert resumed.state.global_step == 6


def test_audit_budget_and_recalibration_count_generations(tmp_path):
    trainer = tiny_trainer(tmp_path, num_iterations=2, max_steps=6, audit_steps=2, max_overhead=10.0)
    trainer.train()
    assert [kind for kind, *_ in trainer._budget._measured] == ["warm-up", "plain", "all"]
    assert trainer._quartile._steps == 2  # the second generation does not look ahead
    steps = {json.loads(line)["step"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()}
    assert steps == {1, 5}


@pytest.mark.parametrize("options", [{"method": "opd"}, {"student_window": "regenerated"}], ids=str)
def test_the_embedded_pair_learns_from_the_same_rollouts_once_more(tmp_path, options):
    trainer = tiny_trainer(
        tmp_path, max_steps=4, learning_rate=3e-4, per_device_train_batch_size=8, max_completion_length=48,
        student=str(pair_folder("student-standard")), teacher=str(pair_folder("teacher")), num_iterations=2,
        prefix_weight_max=4.0, **options,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[1] < losses[0]
    assert losses[3] < losses[2]


def test_conversations_in_a_stream_train_with_several_updates(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts(16)]
    trainer = tiny_trainer(
        tmp_path, Watching, dataset=Dataset.from_list(rows).to_iterable_dataset(), num_iterations=2, max_steps=4,
        prefix_weight_max=4.0,
    )  # fmt: skip
    trainer.train()
    assert trainer.used[0] == trainer.used[1] != trainer.used[2] == trainer.used[3]


def test_pixels_of_images_stay_with_their_rows(tmp_path, monkeypatch):
    """Plain OPD on images, as in TRL: pixels are [patch, feature], with as many patches per row as its images have."""
    trainer = tiny_trainer(tmp_path, method="opd", per_device_train_batch_size=1, gradient_accumulation_steps=3)
    grids = torch.tensor([[1, 1, 1], [1, 2, 2], [1, 1, 3]])
    row = torch.arange(3).repeat_interleave(grids.prod(-1))
    batch = {
        "row": torch.arange(3), "pixel_values": row[:, None].float(), "image_grid_thw": grids, "num_images": [1, 1, 1]
    }  # fmt: skip
    monkeypatch.setattr(trainer, "_generate_and_score_completions", lambda _: batch)
    trainer.model.train()
    trainer._prepare_inputs([])
    for part in trainer._buffered_inputs:
        expected = [float(part["row"])] * int(part["image_grid_thw"].prod())
        assert part["pixel_values"].flatten().tolist() == expected


def test_a_second_training_samples_its_own_rollouts(tmp_path):
    trainer = tiny_trainer(tmp_path, Watching, method="opd", max_steps=3, steps_per_generation=2)
    trainer.train()  # ends between two updates of a batch
    last = trainer.used[2]
    trainer.train()
    assert trainer.calls["sampled"] == 4
    assert last not in trainer.used[3:]
