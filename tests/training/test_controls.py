"""Controls of studies: a random share of the tokens, and the reverse KL along the teacher's windows."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import TOKENIZER, tiny_config, tiny_model, tiny_trainer

from topd.training.batch import rollouts_of
from topd.training.method import Method, StepContext, choose_capped, random_tokens


def log_probs(model, prompt, continuation):
    """[token, vocabulary] at each token of the continuation: one forward pass of one sequence without padding."""
    logits = model(torch.cat([prompt, continuation])[None]).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def divergences(student, teacher, prompt, continuation, direction="reverse"):
    """[token] KL(student || teacher), or KL(teacher || student), in nats; with the student's gradient."""
    p = log_probs(student, prompt, continuation)
    with torch.no_grad():
        q = log_probs(teacher, prompt, continuation)
    first, second = (p, q) if direction == "reverse" else (q, p)
    return (first.exp() * (first - second)).sum(-1)


def sequences(rollouts):
    """The prompt and the response of each rollout, without padding."""
    for row in range(len(rollouts)):
        yield (
            rollouts.prompt_ids[row][rollouts.prompt_mask[row].bool()],
            rollouts.response_ids[row][rollouts.response_mask[row].bool()],
        )


def pair():
    """A student and a teacher that end their text often."""
    models = {"student": tiny_model(0), "teacher": tiny_model(1, width=96)}
    with torch.no_grad():
        for model in models.values():
            model.get_input_embeddings().weight[TOKENIZER.eos_token_id] *= 1.5
    return models


def batch_of(trainer):
    """A batch of rollouts of different lengths, as the loss gets it, and the models as they are."""
    trainer.model.train()
    torch.manual_seed(0)
    batch = trainer._prepare_inputs([trainer.train_dataset[index] for index in range(8)])
    return batch, copy.deepcopy(trainer.model), trainer.teacher_model.eval()


def check_gradients(trainer, student):
    for ours, plain in zip(trainer.model.parameters(), student.parameters(), strict=True):
        assert (ours.grad - plain.grad).norm() <= 1e-3 * plain.grad.norm()


# A random share of the tokens


@pytest.mark.parametrize("opd_loss", ["trl", "one_pass"])
def test_the_loss_of_a_random_share_is_the_mean_of_its_token_losses(tmp_path, opd_loss):
    trainer = tiny_trainer(
        tmp_path, method="opd", opd_loss=opd_loss, token_share=0.4, max_completion_length=40, **pair()
    )
    batch, student, teacher = batch_of(trainer)
    rollouts = rollouts_of(batch)
    lengths, kept = rollouts.response_mask.sum(1), rollouts.loss_mask.bool()
    assert len(lengths.unique()) > 1
    assert kept.sum(1).tolist() == [max(1, int(0.4 * length + 0.5)) for length in lengths.tolist()]
    losses = [divergences(student, teacher, *texts) for texts in sequences(rollouts)]
    chosen = torch.cat([loss[keep[: len(loss)]] for loss, keep in zip(losses, kept, strict=True)])
    chosen.mean().backward()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == pytest.approx(chosen.mean().item(), rel=1e-4)
    assert abs(loss.item() - torch.cat(losses).mean().item()) > 1e-3
    check_gradients(trainer, student)


def test_the_share_is_drawn_anew_for_each_batch_of_rollouts_and_not_for_an_evaluation(tmp_path):
    trainer = tiny_trainer(tmp_path, method="opd", token_share=0.4)
    batch, *_ = batch_of(trainer)
    whole = {name: values for name, values in batch.items() if name != "tool_mask"}
    first, again = (trainer._random_share(whole)["tool_mask"] for _ in range(2))
    trainer.state.global_step = 1
    second = trainer._random_share(whole)["tool_mask"]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    trainer.model.eval()
    evaluated = trainer._generate_and_score_completions([trainer.train_dataset[index] for index in range(4)])
    assert "tool_mask" not in evaluated


def test_which_tokens_are_kept_depends_on_neither_padding_nor_the_split_into_processes():
    mask = torch.arange(30) < torch.tensor([30, 21, 1, 8])[:, None]
    before = torch.get_rng_state()
    whole = random_tokens(mask, 0.4, (7, 3), 0)
    assert torch.equal(torch.get_rng_state(), before)  # of the next rollouts
    padded = torch.cat([mask, torch.zeros(4, 5, dtype=torch.bool)], 1)
    assert torch.equal(random_tokens(padded, 0.4, (7, 3), 0)[:, :30], whole)
    halves = random_tokens(mask[:2], 0.4, (7, 3), 0), random_tokens(mask[2:, :10], 0.4, (7, 3), 2)
    assert torch.equal(halves[0], whole[:2])
    assert torch.equal(halves[1], whole[2:, :10])
    assert whole.sum(1).tolist() == [12, 8, 1, 3]
    assert not torch.equal(random_tokens(mask, 0.4, (8, 3), 0), whole)
    many = random_tokens(torch.ones(2000, 10, dtype=torch.bool), 0.4, (0, 0), 0)
    assert many.float().mean(0).tolist() == pytest.approx([0.4] * 10, abs=0.04)


# Reverse KL along the teacher's windows

WAYS = [
    {"student_window": "rollout"},
    {"student_window": "regenerated", "guidance_reduction": "sum", "beta": 0.0},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_guidance_in_the_teacher_s_contexts_is_the_reverse_kl_along_each_of_its_windows(tmp_path, options):
    weight = 0.7
    trainer = tiny_trainer(
        tmp_path, guidance_context="teacher", guidance_weight=weight, fork_threshold=0.5, candidate_share=0.3,
        **pair(), **options,
    )  # fmt: skip
    batch, student, teacher = batch_of(trainer)
    rollouts, texts = rollouts_of(batch), [*sequences(rollouts_of(batch))]
    positions, windows, masks = batch["guided_position"], batch["guided_window"], batch["guided_mask"].bool()
    guided = batch["guided_weight"].sum((-1, -2)) > 0
    of_windows = []
    for row, slot in guided.nonzero().tolist():
        prompt, response = texts[row]
        prefix = torch.cat([prompt, response[: positions[row, slot]]])
        window = windows[row, slot][masks[row, slot]]
        alone = teacher.generate(
            prefix[None], attention_mask=torch.ones_like(prefix)[None], max_new_tokens=5, do_sample=False
        )
        assert window.tolist() == alone[0, len(prefix) :].tolist()
        of_windows.append(divergences(student, teacher, prefix, window))
    assert len(of_windows) >= 4
    assert len({len(window) for window in of_windows}) > 1  # some end before K tokens
    mean = torch.stack([each.sum() if "beta" in options else each.mean() for each in of_windows]).mean()
    direction = "forward" if "beta" in options else "reverse"
    opd = torch.cat([divergences(student, teacher, *pair, direction) for pair in texts]).mean()
    (opd + weight * mean).backward()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert rollouts.loss_mask.sum() == sum(len(response) for _, response in texts)
    assert loss.item() == pytest.approx((opd + weight * mean).item(), rel=1e-4)
    assert trainer._guidance_loss == pytest.approx(mean.item(), rel=1e-4)
    check_gradients(trainer, student)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_share": 0.4}, "token_share is a control of method=opd; leave it out with method=topd"),
        ({"method": "opd-capped", "token_share": 0.4}, "leave it out with method=opd-capped"),
        ({"method": "opd", "token_share": 0.0}, r"token_share must be in \(0, 1\]; got 0.0"),
        ({"method": "opd", "token_share": 1.1}, r"token_share must be in \(0, 1\]"),
        ({"method": "opd", "token_share": 0.4, "num_iterations": 2, "prefix_weight_max": 4.0}, "token_share out"),
        ({"guidance_context": "teacher", "guidance_target": "own"}, "guidance_target=own does nothing with"),
        ({"method": "opd", "guidance_context": "teacher"}, "guidance_context is a control of method=topd"),
    ],
)
def test_controls_are_refused_where_they_mean_nothing(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, **options)


def test_two_processes_cap_equally_many_at_random_and_no_place_twice():
    method = Method(guides=False, caps="random", fork_rule="share")
    distance, owner = torch.rand(40), torch.tensor([0.0] * 25 + [1.0] * 15)
    chosen = []
    for process, here in enumerate((distance[:25], distance[25:])):
        torch.manual_seed(process)  # as in a run, where processes sample by different random numbers
        context = StepContext(
            gather=lambda values, here=here: distance if torch.equal(values, here) else owner, process=process, step=3
        )
        chosen.append(choose_capped(here > 1, SimpleNamespace(distance=here), method, context))
    assert int(torch.cat(chosen).sum()) == 12
