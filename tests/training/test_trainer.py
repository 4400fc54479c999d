"""TOPDTrainer works as users of TRL expect."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from check.bad_pairs import swap_two_tokens
from datasets import Dataset
from peft import LoraConfig
from tiny import TOKENIZER, prompts, tiny_model, tiny_trainer
from transformers import TrainerCallback

from topd.embedded.pair import pair_folder
from topd.errors import ContextError, NonFiniteError, TokenizerMismatchError, TOPDError
from topd.runs.console import STAGES
from topd.training import TOPDConfig, TOPDTrainer
from topd.training.batch import rollouts_of
from topd.training.budget import ROUNDS
from topd.training.config import choices

VARIANTS = [
    {"method": "opd-capped"},
    {"method": "opd-capped", "cap_selection": "high"},
    {"method": "opd-capped", "cap_selection": "random", "student_window": "regenerated"},
    {"method": "opd", "opd_loss": "trl"},
    {"method": "opd", "opd_loss": "one_pass"},
    {"method": "opd", "token_share": 0.4, "opd_loss": "trl"},
    {"method": "topd", "guidance_reduction": "sum", "candidate_share": 0.1, "fork_threshold": 0.5},
    {"student_window": "candidate", "fork_rule": "batch_quantile", "guidance_target": "own"},
    {"guidance_context": "teacher", "guidance_at": "false_alarms"},
    {"guidance_context": "teacher", "student_window": "regenerated", "embedding": "student_hidden"},
    {
        "guidance_target": "same_index",
        "candidate_ranking": "log_ratio",
        "fork_rule": "threshold",
        "fork_threshold": 0.3,
    },
    {"guidance_at": "random", "cap_false_alarms": True, "embedding": "teacher_hidden", "ground_cost": "sqeuclidean"},
    {"embedding": "teacher", "transport_solver": "entropic", "candidate_ranking": "teacher_nll"},
    {"beta": 0.0, "window_length": 1, "guidance_reduction": "per_token"},
]


def values_in(variants):
    return {(name, value) for variant in variants for name, value in variant.items()}


def test_every_value_of_every_choice_is_tried_here():
    defaults = {name: allowed[0] for name, allowed in choices().items()} | {"method": "opd"}
    wanted = {(name, value) for name, allowed in choices().items() for value in allowed if value != defaults[name]}
    assert wanted <= values_in(VARIANTS)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_every_choice_trains_and_moves_the_student(tmp_path, options):
    trainer = tiny_trainer(tmp_path, max_steps=2, **options)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(torch.isfinite(torch.tensor(losses)))
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_topd_brings_the_token_loss_down(tmp_path):
    trainer = tiny_trainer(
        tmp_path, max_steps=6, learning_rate=1e-3, per_device_train_batch_size=16, max_completion_length=48,
        guidance_weight=0.03,
        student=str(pair_folder("student-standard")), teacher=str(pair_folder("teacher")),
    )  # fmt: skip
    trainer.train()
    losses = [entry["token_loss/mean"] for entry in trainer.state.log_history if "token_loss/mean" in entry]
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2])


def test_every_documented_metric_is_logged_and_every_logged_one_documented(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=len(ROUNDS) + 1, max_overhead=10.0)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}  # some not at every step
    text = Path("docs/metrics.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([\w/]+)` \|", text.partition("At each evaluation")[0], re.MULTILINE))
    prefixes = {name.split("/")[0] for name in documented}
    ours = {name for name in logged if name.split("/")[0] in prefixes}
    assert ours == documented - {"token_loss/outside_top_k"}  # of a teacher without weights here
    assert {f"seconds/{stage}" for stage in STAGES} <= ours


def test_a_budget_measures_first_and_then_limits_the_candidates(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, max_steps=len(ROUNDS) + 2, max_overhead=1e-6, candidate_share=0.3)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    candidates = [entry.get("candidates/per_rollout") for entry in steps]
    assert [value is None for value in candidates[: len(ROUNDS)]] == [kind == "plain" for kind in ROUNDS]
    assert candidates[2] > candidates[3] > 1  # all, half
    assert candidates[3] <= 3
    assert candidates[len(ROUNDS) :] == [1.0, 1.0]  # the tightest budget leaves one
    assert steps[-1]["budget/predicted_overhead"] > 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("topd: max_overhead")]
    assert len(told) == 1
    assert "cannot be met: one candidate per rollout is predicted to cost" in told[0]


def test_a_second_training_measures_its_own_budget_and_fork_threshold(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=len(ROUNDS), max_overhead=0.5, candidate_share=0.3)
    trainer.train()
    first = trainer._budget, trainer._quartile
    assert first[0].model is not None
    trainer.args.output_dir = str(tmp_path / "second")
    trainer.args.max_steps = 1
    trainer.train()
    assert [kind for kind, *_ in trainer._budget._measured] == ["warm-up"]
    assert trainer._quartile is not first[1]


def test_metrics_say_what_the_audit_records_say(tmp_path, monkeypatch):
    monkeypatch.setattr("topd.training.step_log.AUDIT_ROLLOUTS", 99)
    trainer = tiny_trainer(tmp_path, max_steps=1, audit_steps=1)
    trainer.train()
    logged = trainer.state.log_history[0]
    records = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert len(records) == 4
    candidates = [candidate for record in records for candidate in record["candidates"]]
    assert logged["candidates/per_rollout"] == len(candidates) / 4
    assert logged["forks/per_rollout"] == sum(c["fork"] for c in candidates) / 4
    assert logged["distance/q50"] == pytest.approx(
        torch.tensor([c["distance"] for c in candidates]).quantile(0.5).item(), abs=1e-5
    )
    generated = sum(len(c["teacher_window"]) for c in candidates)  # the student's windows are the rollouts' own tokens
    assert logged["windows/tokens"] == generated
    for candidate in candidates:
        assert 0 < sum(mass for _, _, mass in candidate["plan"]) <= 1.001  # what is matched to EOS padding is left out
        assert candidate["threshold"] == pytest.approx(logged["forks/threshold"], abs=1e-5)
        assert candidate["decision"] == ("guided" if candidate["fork"] else "none")
    for record in records:
        losses = record["rollout"]["token_loss"]
        assert len(losses) == len(record["rollout"]["tokens"])
        worst = max(range(len(losses)), key=losses.__getitem__)
        assert worst in [c["position"] for c in record["candidates"]]


@pytest.mark.parametrize(("opd_loss", "expected"), [("auto", False), ("one_pass", True)])
def test_images_keep_the_loss_of_trl_unless_ours_is_asked_for(tmp_path, opd_loss, expected):
    trainer = tiny_trainer(tmp_path, method="opd", opd_loss=opd_loss)
    assert trainer._in_one_pass()
    trainer._is_vlm = True
    assert trainer._in_one_pass() is expected


def test_gradient_accumulation_equals_one_large_batch(tmp_path):
    """The same eight rollouts, as 1 x 8 and as 4 x 2: the same gradients."""
    whole = tiny_trainer(tmp_path / "a", per_device_train_batch_size=8)
    batch = whole._generate_and_score_completions([whole.train_dataset[i] for i in range(8)])
    whole.compute_loss(whole.model, dict(batch)).backward()
    expected = [p.grad.clone() for p in whole.model.parameters()]
    whole.model.zero_grad()
    for start in range(0, 8, 2):
        part = {k: v[start : start + 2] if isinstance(v, list) or v.ndim else v for k, v in batch.items()}
        whole.compute_loss(whole.model, part).backward()
    for parameter, gradient in zip(whole.model.parameters(), expected, strict=True):
        assert (
            parameter.grad - gradient
        ).norm() <= 1e-4 * gradient.norm()  # entries near 0 differ by more on some CPUs


@pytest.mark.parametrize("options", [{"method": "opd"}, {}, {"student_window": "regenerated"}], ids=str)
def test_micro_batches_hold_rows_of_similar_length_and_no_padding_that_all_of_them_have(tmp_path, options):
    trainer = tiny_trainer(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, window_length=3, max_steps=1, **options
    )
    read, lengths = [], []
    loss = trainer._compute_loss

    def watched(student, inputs, *rest):
        lengths.extend(rollouts_of(inputs).lengths.tolist())
        with student.base_model.register_forward_pre_hook(
            lambda _, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        ):
            return loss(student, inputs, *rest)

    trainer._compute_loss = watched
    trainer.train()
    assert len(set(lengths)) > 4
    assert lengths == sorted(lengths)
    if "student_window" not in options:
        assert read == lengths[1::2]  # behind the others there are windows


@pytest.mark.parametrize("method", [{}, {"method": "opd", "token_share": 0.4}], ids=str)
def test_saved_and_resumed_equals_uninterrupted(tmp_path, method):
    options = method | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    through = tiny_trainer(tmp_path / "through", **options)
    through.train()
    resumed = tiny_trainer(tmp_path / "resumed", student=tiny_model(5), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for a, b in zip(through.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_models_by_name_conversational_prompts_and_evaluation(tmp_path):
    for role, seed, width in (("student", 0, 64), ("teacher", 1, 96)):
        tiny_model(seed, width).save_pretrained(tmp_path / role)
        TOKENIZER.save_pretrained(tmp_path / role)
    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts(16)]
    dataset = Dataset.from_list(rows)
    trainer = tiny_trainer(
        tmp_path / "run", dataset=dataset, student=str(tmp_path / "student"), teacher=str(tmp_path / "teacher"),
        tokenizer=None, max_steps=1, trainer_options={"eval_dataset": dataset},
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_lora_trains_its_adapters_only(tmp_path):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = tiny_trainer(tmp_path, max_steps=2, trainer_options={"peft_config": config}, gradient_checkpointing=True)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("dropout", "method", "warns"), [(0.05, "topd", True), (0.0, "topd", False), (0.05, "opd", False)]
)
def test_dropout_in_a_student_that_looks_ahead_is_a_warning(dropout, method, warns, tmp_path, caplog):
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=dropout, task_type="CAUSAL_LM")
    tiny_trainer(tmp_path, method=method, trainer_options={"peft_config": config})
    assert ("Set lora_dropout: 0.0" in caplog.text) == warns


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    gradients = []
    for checkpointing in (False, True):
        trainer = tiny_trainer(tmp_path, gradient_checkpointing=checkpointing)
        if checkpointing:
            trainer.model.gradient_checkpointing_enable()
        trainer.model.train()
        batch = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(4)])
        trainer.compute_loss(trainer.model, batch).backward()
        gradients.append([p.grad for p in trainer.model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_bf16_trains(tmp_path):
    trainer = tiny_trainer(tmp_path, bf16=True, max_steps=2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(torch.isfinite(torch.tensor(losses)))


def test_callbacks_see_every_step_and_the_card_cites_the_paper(tmp_path):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            self.steps += 1

    count = Count()
    trainer = tiny_trainer(tmp_path, trainer_options={"callbacks": [count]})
    trainer.train()
    assert count.steps == 3
    trainer.create_model_card(model_name="mine")
    card = (tmp_path / "README.md").read_text()
    assert "2606.00305" in card
    assert "Jiang" in card


class Poison(TrainerCallback):
    """Spoils a weight (or a gradient) at step 2."""

    def __init__(self, what):
        self.what = what

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            parameter = model.lm_head.weight
            if self.what == "weight":
                parameter.data[:, 0] = torch.nan
            else:
                parameter.register_hook(lambda gradient: gradient * torch.inf)


@pytest.mark.parametrize(("method", "what"), [("topd", "weight"), ("topd", "gradient"), ("opd", "weight")])
def test_a_nan_stops_the_run_before_the_optimizer_moves_and_keeps_the_checkpoint(tmp_path, method, what):
    trainer = tiny_trainer(
        tmp_path, method=method, max_steps=4, save_strategy="steps", save_steps=1,
        trainer_options={"callbacks": [Poison(what)]},
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match=r"step 3.*optimizer has not moved"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert not (tmp_path / "checkpoint-3").exists()
    healthy = tiny_trainer(tmp_path, method=method, max_steps=3)
    healthy.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert healthy.state.global_step == 3
    if what == "gradient":
        named = json.loads((tmp_path / "non_finite.json").read_text())[0]
        assert named["step"] == 3
        assert named["prompt"].startswith("what is")


def test_a_teacher_with_another_tokenizer_is_refused_by_name(tmp_path):
    tiny_model(1).save_pretrained(tmp_path / "teacher")
    other = TOKENIZER.__class__.from_pretrained(save_other_tokenizer(tmp_path / "teacher"))
    assert other.get_vocab() != TOKENIZER.get_vocab()
    with pytest.raises(TokenizerMismatchError, match=r"different ids.*'7'"):
        tiny_trainer(tmp_path / "run", teacher=str(tmp_path / "teacher"))


def save_other_tokenizer(folder):
    TOKENIZER.save_pretrained(folder)
    return swap_two_tokens(folder)


def test_a_prompt_that_does_not_fit_the_context_is_named(tmp_path):
    dataset = Dataset.from_list([{"prompt": "what is " + "+".join(["7"] * 130) + "?"}] * 8)
    trainer = tiny_trainer(tmp_path, dataset=dataset)
    with pytest.raises(ContextError, match=r"262 tokens .* context of 256.*what is 7\+7"):
        trainer.train()


def test_wrong_options_are_refused_with_the_allowed_values(tmp_path):
    for options, message in [
        ({"method": "topdd"}, "opd, opd-capped, topd"),
        ({"window_length": 0}, "window_length must be at least 1"),
        ({"guidance_weight": -1.0}, "must not be negative"),
        ({"beta": 0.5}, "beta"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny_trainer(tmp_path, **options)


def test_what_no_student_can_be_trained_with_is_refused(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from trl import DistillationConfig, SFTConfig

    from topd.warmstart import WarmStartTrainer

    get_peft_model(tiny_model(0), LoraConfig(r=4, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(tiny_model(0), tmp_path / "adapter")
    with pytest.raises(TOPDError, match="all weights of the student are frozen"):
        tiny_trainer(tmp_path, student=frozen).train()
    endless = copy.deepcopy(TOKENIZER)
    endless.eos_token = None
    with pytest.raises(TOPDError, match="no EOS token"):
        tiny_trainer(tmp_path, tokenizer=endless)
    for trainer, args in ((TOPDTrainer, DistillationConfig), (WarmStartTrainer, SFTConfig)):
        with pytest.raises(TOPDError, match=r"pass a (TOPD|WarmStart)Config"):
            trainer(tiny_model(0), tiny_model(1), args(str(tmp_path), bf16=False, use_cpu=True))


def test_a_run_without_epochs_is_refused(tmp_path):
    """Nothing would be trained, and the student saved as it was."""
    with pytest.raises(TOPDError, match="num_train_epochs is 0"):
        tiny_trainer(tmp_path, max_steps=-1, num_train_epochs=0).train()


def test_gradient_checkpointing_keeps_its_options_and_adds_no_hooks(tmp_path):
    trainer = tiny_trainer(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}, max_steps=4,
        trainer_options={"peft_config": LoraConfig(r=2, task_type="CAUSAL_LM")},
    )  # fmt: skip
    found = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            layer = next(m for m in model.modules() if getattr(m, "gradient_checkpointing", False))
            hooks = len(model.get_input_embeddings()._forward_hooks)
            found.append((hooks, layer._gradient_checkpointing_func.keywords))

    trainer.add_callback(Watch())
    trainer.train()
    assert len(found) == 4
    assert found[-1] == found[0]
    assert found[0][1] == {"use_reentrant": True}


def test_one_process_with_several_gpus_is_refused(tmp_path):
    args = TOPDConfig(str(tmp_path), use_cpu=True)
    assert args.n_gpu == 0
    args._n_gpu = 2
    with pytest.raises(TOPDError, match=r"sees 2 GPUs.*--num_processes 2.*CUDA_VISIBLE_DEVICES=0"):
        TOPDTrainer(tiny_model(0), tiny_model(1), args)


def test_steps_of_plain_opd_do_not_hold_the_cache_of_sampling(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, method="topd", max_overhead=0.5, max_steps=4)
    usual, plain = trainer.compute_loss, []

    def watched(*args, **kwargs):
        plain.append(trainer._budget.max_candidates() == 0)
        assert trainer._sampling is None
        return usual(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    trainer.train()
    assert any(plain)
