"""TOPD in one file: on-policy distillation with near-future guidance (arXiv:2606.00305, sections 2 and 3).

OPD, on-policy distillation, samples rollouts from the student and pulls the student, token by token, towards the
teacher. Its token loss is KL(student || teacher) over the vocabulary, at the student's own prefix. TOPD is OPD, and

1. takes the highest token losses as candidates, and from the prefix before each lets teacher and student both go on;
2. measures by optimal transport over token embeddings how far these two windows are apart;
3. calls the lowest distances false alarms (other words, the same path), the rest forks (the futures really part);
4. adds at forks a loss over the student's whole window, aligned by the transport plan: L = L_OPD + lambda L_traj.

Naive on purpose: a loop wherever there are several of something, distributions over the whole vocabulary, every window
as a sequence of its own behind its prefix. `TOPDTrainer` does the same work at scale and is tested against this file.

    python examples/topd_in_one_file.py --method topd        # the embedded pair, on a CPU, in a minute or two
"""

import argparse
from typing import NamedTuple

import numpy
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch.nn.functional import cosine_similarity, one_hot, pad
from transformers import AutoModelForCausalLM, AutoTokenizer

from topd.demo.pair import pair_folder
from topd.demo.task import is_correct, make_problems

WINDOW_LENGTH = 50  # K, tokens of a window (the paper)
CANDIDATE_SHARE = 0.0225  # of a rollout's positions (the paper has 218 of 9,688; that it is a share is our choice)
FALSE_ALARM_SHARE = 0.30  # of the batch's candidates (the paper, section 5.1)
GUIDANCE_WEIGHT = 0.03  # lambda (the paper does not give it)
RESPONSE_LENGTH = 96  # tokens, more than any solution of the embedded task has


class Rollout(NamedTuple):
    """A prompt and the response that the student sampled for it: token ids, without any padding."""

    prompt: torch.Tensor  # [prompt position]
    response: torch.Tensor  # [position]


class Window(NamedTuple):
    """Two near futures of the prefix x_<t. Both start AT t: they replace the candidate, and what followed it."""

    prefix: torch.Tensor  # [prefix position] the prompt and the response before t
    ours: torch.Tensor  # [student position] what the student continues with: K tokens, or fewer if the text ends
    theirs: torch.Tensor  # [teacher position] what the teacher continues with


def log_probs(model, prefix, tokens):
    """[position, vocabulary] log p(. | the prefix, and the tokens before this one), for each of `tokens`."""
    ids = torch.cat([prefix, tokens])
    return model(input_ids=ids[None]).logits[0, len(prefix) - 1 : -1].log_softmax(-1)


@torch.no_grad()
def continue_(model, prefixes, length, sample=False):
    """Each prefix's continuation by the model, greedy or sampled: `length` tokens, or up to and with end-of-text."""
    longest = max(len(prefix) for prefix in prefixes)
    ids = torch.stack([pad(prefix, (longest - len(prefix), 0)) for prefix in prefixes])
    mask = torch.stack([pad(torch.ones_like(prefix), (longest - len(prefix), 0)) for prefix in prefixes])
    decoding = {"do_sample": True, "top_k": 0} if sample else {"do_sample": False}
    new = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=length, **decoding)[:, longest:]
    ended = (new == model.config.eos_token_id).cumsum(-1) > 0
    return [tokens[: (~over).sum() + 1] for tokens, over in zip(new, ended, strict=True)]


def token_loss(student, teacher, rollout):
    """[position] KL(student || teacher) in nats, both at the student's own prefix; the gradient is the student's."""
    log_s = log_probs(student, rollout.prompt, rollout.response)
    with torch.no_grad():
        log_t = log_probs(teacher, rollout.prompt, rollout.response)
    return (log_s.exp() * (log_s - log_t)).sum(-1)


# ------------------------------------------------------------------------------------------------ divergence detection


def candidates(loss):
    """The positions with the highest token loss: a share of them, and at least one."""
    count = max(1, int(CANDIDATE_SHARE * len(loss) + 0.5))
    return loss.argsort(descending=True, stable=True)[:count].tolist()


def look_ahead(student, teacher, rollouts):
    """The windows of teacher and student at every candidate of every rollout."""
    prefixes = []
    for rollout in rollouts:
        with torch.no_grad():
            loss = token_loss(student, teacher, rollout)
        prefixes += [torch.cat([rollout.prompt, rollout.response[:t]]) for t in sorted(candidates(loss))]
    ours, theirs = (continue_(model, prefixes, WINDOW_LENGTH) for model in (student, teacher))
    return [Window(*window) for window in zip(prefixes, ours, theirs, strict=True)]


def ground_cost(ours, theirs, embeddings):
    """[student position, teacher position] 1 - cosine of the tokens' embeddings; the same token costs exactly 0."""
    cost = 1 - cosine_similarity(embeddings[ours][:, None], embeddings[theirs][None], dim=-1).clamp(max=1)
    return cost.masked_fill(ours[:, None] == theirs[None], 0.0).double()


def transport(ours, theirs, embeddings):
    """The cheapest plan gamma [student position, teacher position] to move `ours` onto `theirs`, and its cost, D_OT."""
    cost = ground_cost(ours, theirs, embeddings).numpy()
    n, m = cost.shape
    moved = (numpy.arange(n)[:, None] ** 0.5 - numpy.arange(m) ** 0.5) ** 2 / max(n, m)
    settled = cost + 1e-8 * numpy.ptp(cost) * moved  # of equally cheap plans, the one that moves tokens least far
    if n == m:  # then some best plan is a permutation
        plan = numpy.zeros((n, m))
        plan[linear_sum_assignment(settled)] = 1 / n
    else:  # the linear programme itself: every token weighs the same, so rows sum to 1/n and columns to 1/m
        marginals = numpy.vstack([numpy.kron(numpy.eye(n), numpy.ones(m)), numpy.kron(numpy.ones(n), numpy.eye(m))])
        best = linprog(1e6 * settled.ravel(), A_eq=marginals, b_eq=[1 / n] * n + [1 / m] * m)  # beyond its tolerance
        plan = best.x.reshape(n, m)
    return torch.tensor(plan), round(float((plan * cost).sum()), 6)  # rounded, so that equal distances stay equal


def forks(distances):
    """Which windows really part: those further apart than the lowest share of them, the false alarms."""
    false_alarms = sorted(distances)[: int(FALSE_ALARM_SHARE * len(distances) + 0.5)]
    return [distance > max(false_alarms, default=0.0) for distance in distances]


# ------------------------------------------------------------------------- trajectory-level teacher signal injection


def trajectory_loss(student, window, plan):
    """[student position] KL(y_i || p_S(. | c_i)) in nats; c_i is the student's own context, y_i what gamma aligns."""
    log_s = log_probs(student, window.prefix, window.ours)
    share = plan / plan.sum(1, keepdim=True)  # the rows of a plan sum to 1/n; those of a target, to 1
    target = share.to(log_s.dtype) @ one_hot(window.theirs, log_s.shape[-1]).to(log_s.dtype)
    return (torch.xlogy(target, target) - target * log_s).sum(-1)


def topd_loss(student, teacher, rollouts, windows, guidance_weight=GUIDANCE_WEIGHT):
    """L_OPD + lambda L_traj: means over the response tokens, and over the window tokens at forks. No windows: OPD."""
    opd = torch.cat([token_loss(student, teacher, rollout) for rollout in rollouts]).mean()
    embeddings = student.get_input_embeddings().weight.detach()
    plans, distances = [], []
    for window in windows:
        plan, distance = transport(window.ours, window.theirs, embeddings)
        plans, distances = [*plans, plan], [*distances, distance]
    found = zip(windows, plans, forks(distances), strict=True)
    guided = [trajectory_loss(student, window, plan) for window, plan, fork in found if fork]
    return opd + guidance_weight * torch.cat(guided).mean() if guided else opd


# ------------------------------------------------------------------------------------------------------------ a run


def accuracy(model, tokenizer, problems):
    """Share of problems that the model answers right, greedily."""
    prompts = [tokenizer(problem.prompt, return_tensors="pt").input_ids[0] for problem in problems]
    texts = tokenizer.batch_decode(continue_(model, prompts, RESPONSE_LENGTH), skip_special_tokens=True)
    return sum(is_correct(text, problem.answer) for text, problem in zip(texts, problems, strict=True)) / len(problems)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["opd", "topd"], default="topd")
    parser.add_argument("--student", default="student-standard", help="or student-easy, student-hard")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(pair_folder("teacher"))
    teacher = AutoModelForCausalLM.from_pretrained(pair_folder("teacher")).eval()
    student = AutoModelForCausalLM.from_pretrained(pair_folder(args.student)).eval()  # the models have no dropout
    held_out = make_problems(200, args.seed, held_out=True)
    print(f"teacher {accuracy(teacher, tokenizer, held_out):.3f}")
    print(f"student {accuracy(student, tokenizer, held_out):.3f} before")

    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    problems = make_problems(args.steps * args.batch, args.seed, held_out=False)
    for step in range(args.steps):
        batch = problems[step * args.batch : (step + 1) * args.batch]
        prompts = [tokenizer(problem.prompt, return_tensors="pt").input_ids[0] for problem in batch]
        responses = continue_(student, prompts, RESPONSE_LENGTH, sample=True)
        rollouts = [Rollout(*pair) for pair in zip(prompts, responses, strict=True)]
        windows = look_ahead(student, teacher, rollouts) if args.method == "topd" else []
        loss = topd_loss(student, teacher, rollouts, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{args.steps}  loss {loss.item():.4f}", flush=True)
    print(f"student {accuracy(student, tokenizer, held_out):.3f} after")


if __name__ == "__main__":
    main()
