"""The trainer against `examples/topd_in_one_file.py`, an independent and naive writing of the method.

One optimizer step of the real trainer is recorded: its rollouts, its windows, its losses, and the gradient of every
parameter as the optimizer gets it. On the same rollouts and windows the one file must find the same.
"""

import ast
import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, Qwen3RotaryEmbedding

import topd.near_future.distilled_model
import topd.training.trainer
from topd.demo.build import new_model
from topd.embedded.task import make_problems
from topd.embedded.tokenizer import build_tokenizer
from topd.training import TOPDConfig, TOPDTrainer

ONE_FILE = Path(__file__).parents[2] / "examples" / "topd_in_one_file.py"
ROLLOUTS, WINDOW_LENGTH, CANDIDATE_SHARE = 8, 5, 0.12
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # norms and rotary angles are float32
SEED = 5
CASES = [
    pytest.param((torch.float32, "regenerated", 1), id="float32-regenerated"),
    pytest.param((torch.float32, "rollout", 2), id="float32-rollout-accumulated"),
    pytest.param((torch.float64, "regenerated", 2), id="float64-regenerated-accumulated"),
    pytest.param((torch.float64, "rollout", 1), id="float64-rollout"),
    pytest.param((torch.float32, "candidate", 1), id="float32-candidate"),
]


class Step(NamedTuple):
    """What the trainer did in one optimizer step, over all of its gradient accumulation."""

    student_window: str

    student: Any  # as it was before the step
    teacher: Any
    rollouts: Any  # the whole batch
    future: Any  # its `NearFuture`
    loss: float  # L, nats
    guidance: float  # L_traj, nats, without lambda
    gradients: dict[str, torch.Tensor]  # of every parameter, as the optimizer gets them


def one_file(*replacement: str) -> Any:
    """The one file as a module, with the trainer's constants; optionally with one piece of its text replaced."""
    source = ONE_FILE.read_text()
    if replacement:
        assert source.count(replacement[0]) == 1
        source = source.replace(*replacement)
    module = ModuleType("topd_in_one_file")
    exec(compile(source, str(ONE_FILE), "exec"), module.__dict__)
    module.WINDOW_LENGTH, module.CANDIDATE_SHARE = WINDOW_LENGTH, CANDIDATE_SHARE  # type: ignore[attr-defined]
    return module


# -------------------------------------------------------------------------------------------- the trainer, for one step


def norm_as_it_came(self: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Qwen3's norm in the dtype of its input (transformers rounds to float32, which would hide errors below 1e-7)."""
    return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)


def angles_as_they_came(self: Any, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Qwen3's rotary angles in the dtype of x, for the same reason: left padding moves positions."""
    angles = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
    return torch.cat([angles.cos()] * 2, dim=-1), torch.cat([angles.sin()] * 2, dim=-1)


def cost_as_it_came(*args: Any, plain: Any = topd.near_future.distilled_model.token_cost) -> torch.Tensor:
    """The trainer's ground cost, and thus its plan and targets, in the models' dtype."""
    cost: torch.Tensor = plain(*args)
    return cost.to(args[2].dtype)


@pytest.fixture(scope="module", autouse=True)
def _float64_where_the_models_are() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Qwen3RMSNorm, "forward", norm_as_it_came)
        patch.setattr(Qwen3RotaryEmbedding, "forward", angles_as_they_came)
        patch.setattr(topd.near_future.distilled_model, "token_cost", cost_as_it_came)
        yield


class KeepsGradients(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


class KeepsLosses(TOPDTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def random_pair(tokenizer: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Student and teacher of different widths, far apart, which end their text often."""
    torch.manual_seed(SEED)
    pair = new_model(tokenizer, 64, 2), new_model(tokenizer, 96, 2)
    with torch.no_grad():
        for model in pair:
            for parameter in model.parameters():
                parameter.mul_(3)
            model.get_input_embeddings().weight[tokenizer.eos_token_id] *= 1.5
    return pair[0].to(dtype), pair[1].to(dtype)


@pytest.fixture(scope="module", params=CASES)
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Step:
    dtype, student_window, accumulation = request.param
    tokenizer = build_tokenizer()
    student, teacher = random_pair(tokenizer, dtype)
    before, keeper, seen = copy.deepcopy(student), KeepsGradients(), []
    plain = topd.training.trainer.look_ahead

    def look_ahead(rollouts: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((rollouts, plain(rollouts, *args, **kwargs)))
        return seen[-1][1]

    args = TOPDConfig(
        str(tmp_path_factory.mktemp("run")), save_strategy="no", report_to=[], logging_steps=1, disable_tqdm=True,
        use_cpu=True, bf16=False, gradient_checkpointing=False, seed=SEED, max_steps=1, max_grad_norm=0,
        per_device_train_batch_size=ROLLOUTS // accumulation, gradient_accumulation_steps=accumulation,
        max_completion_length=24, window_length=WINDOW_LENGTH, candidate_share=CANDIDATE_SHARE,
        student_window=student_window,
    )  # fmt: skip
    problems = Dataset.from_list([{"prompt": p.prompt} for p in make_problems(ROLLOUTS, SEED, held_out=False)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topd.training.trainer, "look_ahead", look_ahead)
        options: dict[str, Any] = {"train_dataset": problems, "processing_class": tokenizer, "callbacks": [keeper]}
        trainer = KeepsLosses(student, teacher, args, **options)
        trainer.train()
    guidance = trainer.state.log_history[0]["guidance/loss"]
    return Step(student_window, before, teacher, *seen[0], sum(trainer.losses), guidance, keeper.gradients)


# -------------------------------------------------------------------------------- the one file, on what the trainer saw


def as_one_file_has_them(oracle: Any, step: Step) -> tuple[list[Any], list[Any], list[Any]]:
    """The trainer's rollouts and windows without padding, and the one file's windows at low-loss positions."""
    batch, found = step.rollouts, step.future.candidates
    places = found.places
    prompts = [ids[mask == 1] for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    responses = [ids[mask == 1] for ids, mask in zip(batch.response_ids, batch.loss_mask, strict=True)]
    rollouts = [oracle.Rollout(*pair) for pair in zip(prompts, responses, strict=True)]
    windows = []
    for index, (row, position) in enumerate(zip(places.rows.tolist(), places.positions.tolist(), strict=True)):
        prefix = torch.cat([rollouts[row].prompt, rollouts[row].response[:position]])
        ours, theirs = (side.tokens[index][side.mask[index]] for side in (found.ours, found.theirs))
        windows.append(oracle.Window(prefix, ours, theirs))
    with torch.no_grad():
        low_loss = oracle.look_ahead(step.student, step.teacher, rollouts)[1]
    return rollouts, windows, low_loss


def disagreement(oracle: Any, step: Step) -> dict[str, float]:
    """Relative error of the two losses, and of each parameter's gradient (of its largest entry)."""
    oracle.STUDENT_WINDOW = step.student_window
    rollouts, windows, low_loss = as_one_file_has_them(oracle, step)
    student = copy.deepcopy(step.student)
    loss = oracle.topd_loss(student, step.teacher, rollouts, windows, low_loss)
    loss.backward()
    opd = oracle.topd_loss(student, step.teacher, rollouts, windows, low_loss, guidance_weight=0.0)
    guidance = (loss - opd).item() / oracle.GUIDANCE_WEIGHT
    errors = {"loss": abs(loss.item() / step.loss - 1), "guidance": abs(guidance / step.guidance - 1)}
    for name, parameter in student.named_parameters():
        reference = step.gradients[name]
        errors[name] = ((parameter.grad - reference).abs().max() / reference.abs().max()).item()
    return errors


def test_losses_and_gradients_equal_the_trainers(step: Step) -> None:
    errors = disagreement(one_file(), step)
    worst = max(errors, key=errors.__getitem__)
    print(f"largest relative error: {errors[worst]:.1e} ({worst})")
    assert set(step.gradients) < set(errors)
    assert errors[worst] <= TOLERANCE[step.student.dtype], worst


def test_the_batch_has_what_can_go_wrong(step: Step) -> None:
    rollouts, windows, _ = as_one_file_has_them(one_file(), step)
    fork = step.future.fork.tolist()
    forks = [window for window, parts in zip(windows, fork, strict=True) if parts]
    forks_of = torch.bincount(step.future.candidates.places.rows[step.future.fork], minlength=ROLLOUTS)
    eos = step.student.config.eos_token_id
    assert len(rollouts) >= 5
    assert len({len(rollout.prompt) for rollout in rollouts}) > 1  # left padding
    assert len({len(rollout.response) for rollout in rollouts}) > 1  # right padding
    assert any(len(w.ours) != len(w.theirs) for w in forks)
    assert any(len(w.ours) == len(w.theirs) > 1 for w in forks)
    assert any(w.ours[-1] == eos and len(w.ours) < WINDOW_LENGTH for w in windows)
    assert any(w.theirs[-1] == eos and len(w.theirs) < WINDOW_LENGTH for w in forks)
    assert forks_of.max() > 1
    assert forks_of.min() == 0
    assert step.future.look.token_loss[step.rollouts.loss_mask == 1].mean() > 1  # nats: the models are far apart


def test_candidates_windows_and_forks_equal_the_trainers(step: Step) -> None:
    oracle = one_file()
    oracle.STUDENT_WINDOW = step.student_window
    rollouts, windows, _ = as_one_file_has_them(oracle, step)
    found, low_loss = oracle.look_ahead(step.student, step.teacher, rollouts)
    assert [w.prefix.tolist() for w in found] == [w.prefix.tolist() for w in windows]
    assert [w.theirs.tolist() for w in found] == [w.theirs.tolist() for w in windows]
    if step.student_window != "rollout":  # the trainer's is cut where the rollout is
        assert [w.ours.tolist() for w in found] == [w.ours.tolist() for w in windows]
    embeddings = step.student.get_input_embeddings().weight.detach()
    eos = step.student.config.eos_token_id

    def distances_of(windows: list[Any]) -> list[float]:
        return [oracle.transport(*oracle.at_equal_length(w, eos), embeddings)[1] for w in windows]

    distances = distances_of(windows)
    torch.testing.assert_close(torch.tensor(distances), step.future.candidates.distance.float(), atol=2e-6, rtol=0)
    assert oracle.forks(distances, distances_of(low_loss)) == step.future.fork.tolist()


# ------------------------------------------------------------------------------------------------- the test can fail


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param("(log_s.exp() * (log_s - log_t))", "(log_t.exp() * (log_t - log_s))", id="forward KL"),
        pytest.param(
            "plan = plan[: len(window.ours), : len(window.theirs)]",
            "plan = plan.flip(0)[: len(window.ours), : len(window.theirs)]",
            id="plan reversed",
        ),
        pytest.param("plan = plan[:", "plan = torch.eye(len(plan), dtype=plan.dtype)[:", id="same index"),
        pytest.param("plan[guided].sum(1, keepdim=True)", "1", id="rows not rescaled"),
        pytest.param("len(prefix) - 1 : -1]", "len(prefix) :]", id="contexts one too late"),
        pytest.param("distance > typical", "distance <= typical", id="false alarms for forks"),
        pytest.param("at_low_loss, 0.75", "at_low_loss, 0.0", id="another quantile"),
        pytest.param("[loss.mean() for", "[loss.sum() for", id="sum over windows"),
        pytest.param(
            "torch.stack([loss.mean() for loss in guided]).mean()", "torch.cat(guided).mean()", id="by length"
        ),
        pytest.param("value=eos) if w[-1] == eos else w", "value=eos) if False else w", id="no padding with EOS"),
        pytest.param("cost = 1 - cos", "cost = 1 + cos", id="similarity for distance"),
        pytest.param("log_t = log_probs(teacher", "log_t = log_probs(student", id="no teacher"),
    ],
)
@pytest.mark.parametrize("step", CASES[:1], indirect=True)
def test_a_wrong_letter_is_noticed(old: str, new: str, step: Step) -> None:
    errors = disagreement(one_file(old, new), step)
    assert max(errors.values()) > 100 * TOLERANCE[torch.float32]


# --------------------------------------------------------------------------------------------------- the file itself


def test_the_file_is_short_and_stands_alone() -> None:
    source = ONE_FILE.read_text()
    assert len(source.splitlines()) <= 220
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module or "")
    ours = {name for name in imported if name.split(".")[0] == "topd"}
    assert all(name.startswith("topd.embedded") for name in ours)
    others = {name.split(".")[0] for name in imported - ours}
    assert others - sys.stdlib_module_names <= {"torch", "transformers", "scipy", "numpy"}


@pytest.mark.parametrize("method", ["opd", "topd"])
def test_it_runs(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = build_tokenizer("long")
    for role, width in (("long-teacher", 64), ("long-student", 32)):
        new_model(tokenizer, width, 1).save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
    oracle = one_file()
    oracle.pair_folder = lambda role: tmp_path / role
    oracle.RESPONSE_LENGTH = 12
    monkeypatch.setattr(sys, "argv", ["topd_in_one_file.py", "--method", method, "--steps", "2", "--batch", "3"])
    oracle.main()
    first_words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert first_words == ["teacher", "student", "step", "step", "student"]
