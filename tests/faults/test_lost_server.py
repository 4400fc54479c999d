"""The teacher's server is lost, or the run is stopped while it waits for it: resumed, it equals the undisturbed run."""

import os
import signal
import threading
import time

import pytest
from doomed_runs import STEPS, equal
from doomed_runs import result_of as result_with_evaluations
from teachers.fake_server import serving
from tiny import TOKENIZER, prompts, tiny_config, tiny_model
from transformers import TrainerCallback

from topd.errors import RunInterrupted, ServerError
from topd.runs.checkpoints import damage
from topd.teachers import openai_server
from topd.training import TOPDTrainer

OPTIONS = {
    "max_steps": STEPS, "save_strategy": "steps", "save_steps": 2, "audit_steps": 1, "eval_strategy": "steps",
    "eval_steps": 2, "max_completion_length": 12, "teacher_server_kwargs": {"patience": 0.3},
}  # fmt: skip


def result_of(out):
    """Without the clocks of evaluations."""
    found = result_with_evaluations(out)
    clocks = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    return found | {"log": [{k: v for k, v in entry.items() if k not in clocks} for entry in found["log"]]}


class Requests(TrainerCallback):
    """How many the server had answered when each step ended, and when it was evaluated."""

    def __init__(self, fake):
        self.fake, self.steps, self.evaluations = fake, [], {}

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(len(self.fake.requests))

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluations[state.global_step] = len(self.fake.requests)


def trainer_of(out, fake, *callbacks):
    return TOPDTrainer(
        tiny_model(0), args=tiny_config(out, teacher_model_server_url=fake.url, **OPTIONS), train_dataset=prompts(12),
        eval_dataset=prompts(4), processing_class=TOKENIZER, callbacks=list(callbacks),
    )  # fmt: skip


@pytest.fixture(scope="module")
def fake():
    with serving(tiny_model(1, width=96), TOKENIZER) as server:
        yield server


@pytest.fixture(scope="module")
def undisturbed(fake, tmp_path_factory):
    """Its results, and the requests up to each step from the first of the training."""
    out = tmp_path_factory.mktemp("undisturbed")
    trainer = trainer_of(out, fake, counted := Requests(fake))
    first = len(fake.requests)
    trainer.train()
    ends = {step: count - first for step, count in enumerate(counted.steps, start=1)}
    return result_of(out), ends, {step: count - first for step, count in counted.evaluations.items()}


@pytest.fixture(autouse=True)
def fast(fake, monkeypatch):
    monkeypatch.setattr(openai_server, "FIRST_WAIT", 0.01)
    yield
    fake.dead_after = fake.silent_after = float("inf")


def differing(out, fake, expected):
    """What a run that is resumed, and goes on to its end, does not share with the undisturbed one."""
    trainer_of(out, fake).train(resume_from_checkpoint=True)
    found = result_of(out)
    return [name for name in expected if not equal(expected[name], found[name])]


MOMENTS = {
    "in the second step, which has no checkpoint": lambda ends, evaluations: (ends[1] + 1, 1),
    "in the evaluation after the second step": lambda ends, evaluations: (ends[2] + 1, 2),
    "in the third step, right after a checkpoint": lambda ends, evaluations: (evaluations[2] + 1, 2),
    "at the end of the fourth step": lambda ends, evaluations: (ends[4] - 1, 3),
}


FAST = "in the evaluation after the second step"


@pytest.mark.parametrize(
    "moment", [pytest.param(moment, marks=[pytest.mark.slow] * (moment != FAST)) for moment in MOMENTS]
)
def test_a_run_that_lost_its_server_goes_on_as_if_it_had_not(tmp_path, fake, undisturbed, moment, fault):
    expected, *counts = undisturbed
    after, done = MOMENTS[moment](*counts)
    trainer = trainer_of(tmp_path, fake)
    fake.dead_after = len(fake.requests) + after
    with pytest.raises(ServerError, match=r"has not answered for 0.3 s .*resume_from_checkpoint true"):
        trainer.train()
    saved = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert saved[-1] == f"checkpoint-{done}"
    assert damage(tmp_path / saved[-1]) is None
    fake.dead_after = float("inf")
    assert differing(tmp_path, fake, expected) == []
    fault(f"teacher's server lost {moment}", f"saved {saved[-1]}; equal when resumed, bit for bit")


def test_a_good_checkpoint_is_not_written_again(tmp_path, fake, undisturbed):
    _, _, evaluations = undisturbed
    trainer = trainer_of(tmp_path, fake)
    fake.dead_after = len(fake.requests) + evaluations[2] + 1
    written = []
    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *args: (written.append(trainer.state.global_step), save(*args))
    with pytest.raises(ServerError):
        trainer.train()
    assert written == [2]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=lambda number: number.name,
)
def test_a_signal_ends_the_wait_for_a_silent_server_at_once(tmp_path, fake, undisturbed, number, fault):
    expected, ends, _ = undisturbed
    trainer = trainer_of(tmp_path, fake)
    fake.silent_after = len(fake.requests) + ends[3] + 1
    asked = []

    def when_silent():
        while len(fake.requests) < fake.silent_after:
            time.sleep(0.05)
        time.sleep(0.5)
        asked.append(time.monotonic())
        os.kill(os.getpid(), number)

    watch = threading.Thread(target=when_silent)
    watch.start()
    with pytest.raises(RunInterrupted, match=r"after step 3 of 5.*checkpoint-3.*--resume_from_checkpoint true") as stop:
        trainer.train()
    watch.join()
    assert time.monotonic() - asked[0] < 20  # saving included; the limits are 300 s and 600 s
    assert stop.value.signal == number
    assert damage(tmp_path / "checkpoint-3") is None
    fake.silent_after = float("inf")
    assert differing(tmp_path, fake, expected) == []
    fault(f"{number.name} while the teacher's server is silent", "saved checkpoint-3 at once; equal when resumed")


def test_a_signal_in_the_first_step_ends_the_wait_too(tmp_path, fake):
    trainer = trainer_of(tmp_path, fake)
    fake.silent_after = len(fake.requests)
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(RunInterrupted, match="nothing to save yet"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("spoilt", ["log-probabilities", pytest.param("shape", marks=pytest.mark.slow)])
def test_an_answer_that_cannot_be_used_ends_with_a_checkpoint(tmp_path, fake, undisturbed, spoilt, fault):
    expected, ends, _ = undisturbed
    trainer = trainer_of(tmp_path, fake)
    first = len(fake.requests) + ends[1]

    def spoil(answer):
        if len(fake.requests) <= first:
            return answer
        if spoilt == "shape":
            return {"choices": None}
        for choice in answer["choices"]:
            for entries in choice.get("prompt_logprobs", [])[1:]:
                entries |= {token: {"logprob": float("nan")} for token in entries}
        return answer

    fake.spoil = spoil
    try:
        with pytest.raises(ServerError, match=f"The teacher's server at {fake.url[:-3]} (gives nan|answers)"):
            trainer.train()
    finally:
        fake.spoil = lambda answer: answer
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert differing(tmp_path, fake, expected) == []
    fault(f"server's answer: wrong {spoilt}", "a message that names the server, checkpoint-1; equal when resumed")
