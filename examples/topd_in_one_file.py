"""TOPD in one file: on-policy distillation with near-future guidance (arXiv:2606.00305, sections 2 and 3).

OPD, on-policy distillation, samples rollouts from the student and pulls the student, token by token, towards the
teacher. Its token loss is KL(student || teacher) over the vocabulary, at the student's own prefix. TOPD is OPD, and

1. takes the highest token losses as candidates and compares how teacher and student continue the prefix before each;
2. measures by optimal transport over token embeddings how far these two windows are apart;
3. calls distances as low as those at low-loss tokens false alarms (other words, the same path), the rest forks;
4. adds at forks a loss over the student's whole window, aligned by the transport plan: L = L_OPD + lambda L_traj.

Naive on purpose: a loop wherever there are several of something, distributions over the whole vocabulary, every window
as a sequence of its own behind its prefix. `TOPDTrainer` does the same work at scale and is tested against this file.

    python examples/topd_in_one_file.py --method topd        # the embedded pair, on a CPU, in a few minutes
"""

import argparse
from typing import NamedTuple

import numpy
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import cosine_similarity, one_hot, pad
from transformers import AutoModelForCausalLM, AutoTokenizer

from topd.embedded.pair import pair_folder
from topd.embedded.task import is_correct, make_problems

WINDOW_LENGTH = 50  # K, tokens of a window (the paper)
STUDENT_WINDOW = "rollout"  # its own next tokens, or "candidate", or "regenerated": the paper's text fits all three
CANDIDATE_SHARE = 0.0225  # of a rollout's positions (the paper has 218 of 9,688; that it is a share is our choice)
GUIDANCE_WEIGHT = 0.03  # lambda (the paper does not give it)
RESPONSE_LENGTH = 224  # tokens, more than any solution of the embedded task has


class Rollout(NamedTuple):
    """A prompt and the response that the student sampled for it: token ids, without any padding."""

    prompt: torch.Tensor  # [prompt position]
    response: torch.Tensor  # [position]


class Window(NamedTuple):
    """Two near futures of the prefix x_<t. Both start AT t, the place of the candidate."""

    prefix: torch.Tensor  # [prefix position] the prompt and the response before t
    ours: torch.Tensor  # [student position] the student's: K tokens, or fewer if the text ends
    theirs: torch.Tensor  # [teacher position] the teacher's


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
    """How many positions of a rollout are candidates: a share, and at least one."""
    return max(1, int(CANDIDATE_SHARE * len(loss) + 0.5))


def look_ahead(student, teacher, rollouts):
    """The windows of teacher and student at the candidates, and at as many positions of lowest loss."""
    high, low = [], []
    for rollout in rollouts:
        with torch.no_grad():
            loss = token_loss(student, teacher, rollout)
        count = candidates(loss)
        high += [(rollout, t) for t in sorted(loss.argsort(descending=True, stable=True)[:count].tolist())]
        low += [(rollout, t) for t in sorted(loss.argsort(stable=True)[:count].tolist())]
    return windows_at(student, teacher, high), windows_at(student, teacher, low)


def windows_at(student, teacher, places):
    """Both near futures at each (rollout, position)."""
    prefixes = [torch.cat([rollout.prompt, rollout.response[:t]]) for rollout, t in places]
    theirs = continue_(teacher, prefixes, WINDOW_LENGTH)
    if STUDENT_WINDOW == "rollout":
        ours = [rollout.response[t : t + WINDOW_LENGTH] for rollout, t in places]
    elif STUDENT_WINDOW == "regenerated":
        ours = continue_(student, prefixes, WINDOW_LENGTH)
    else:
        firsts = [rollout.response[t : t + 1] for rollout, t in places]
        after = continue_(student, [torch.cat(pair) for pair in zip(prefixes, firsts, strict=True)], WINDOW_LENGTH - 1)
        eos = student.config.eos_token_id
        ours = [first if first == eos else torch.cat([first, rest]) for first, rest in zip(firsts, after, strict=True)]
    return [Window(*window) for window in zip(prefixes, ours, theirs, strict=True)]


def at_equal_length(window, eos):
    """Both windows as they are compared: if the text ended, end-of-text is repeated up to K; else the longer is cut."""
    both = [pad(w, (0, WINDOW_LENGTH - len(w)), value=eos) if w[-1] == eos else w for w in (window.ours, window.theirs)]
    length = min(map(len, both))
    return [tokens[:length] for tokens in both]


def ground_cost(ours, theirs, embeddings):
    """[student position, teacher position] 1 - cosine of the tokens' embeddings; the same token costs exactly 0."""
    cost = 1 - cosine_similarity(embeddings[ours][:, None], embeddings[theirs][None], dim=-1).clamp(max=1)
    return cost.masked_fill(ours[:, None] == theirs[None], 0.0).double()


def transport(ours, theirs, embeddings):
    """The cheapest plan gamma [student position, teacher position] to move `ours` onto `theirs`, and its cost, D_OT."""
    cost = ground_cost(ours, theirs, embeddings).numpy()
    n = len(cost)  # every token weighs 1/n, so some best plan is a permutation
    moved = (numpy.arange(n)[:, None] ** 0.5 - numpy.arange(n) ** 0.5) ** 2 / n
    settled = cost + 1e-8 * numpy.ptp(cost) * moved  # of equally cheap plans, the one that moves tokens least far
    plan = numpy.zeros((n, n))
    plan[linear_sum_assignment(settled)] = 1 / n
    return torch.tensor(plan), round(float((plan * cost).sum()), 6)  # rounded, so that equal distances stay equal


def forks(distances, at_low_loss):
    """Which windows really part: those further apart than three quarters of the low-loss ones (section 2.1)."""
    typical = numpy.quantile(at_low_loss, 0.75)
    return [distance > typical for distance in distances]


# ------------------------------------------------------------------------- trajectory-level teacher signal injection


def trajectory_loss(student, window, plan):
    """[student position] KL(y_i || p_S(. | c_i)) in nats; c_i is the student's own context, y_i what gamma aligns.

    Positions that gamma matches to the padding behind the teacher's end-of-text have no target and are left out.
    """
    log_s = log_probs(student, window.prefix, window.ours)
    plan = plan[: len(window.ours), : len(window.theirs)]
    guided = plan.sum(1) > 0
    share = plan[guided] / plan[guided].sum(1, keepdim=True)  # the rows of a plan sum to 1/n; those of a target, to 1
    target = share.to(log_s.dtype) @ one_hot(window.theirs[: plan.shape[1]], log_s.shape[-1]).to(log_s.dtype)
    return (torch.xlogy(target, target) - target * log_s[: len(plan)][guided]).sum(-1)


def topd_loss(student, teacher, rollouts, windows, low_loss, guidance_weight=GUIDANCE_WEIGHT):
    """L_OPD + lambda L_traj: means over the response tokens, and over each fork's window and forks. No windows: OPD."""
    opd = torch.cat([token_loss(student, teacher, rollout) for rollout in rollouts]).mean()
    embeddings, eos = student.get_input_embeddings().weight.detach(), student.config.eos_token_id
    found = [transport(*at_equal_length(window, eos), embeddings) for window in windows]
    at_low_loss = [transport(*at_equal_length(window, eos), embeddings)[1] for window in low_loss]
    is_fork = forks([distance for _, distance in found], at_low_loss) if windows else []
    at_forks = [(window, plan) for window, (plan, _), fork in zip(windows, found, is_fork, strict=True) if fork]
    guided = [loss for window, plan in at_forks if len(loss := trajectory_loss(student, window, plan))]
    return opd + guidance_weight * torch.stack([loss.mean() for loss in guided]).mean() if guided else opd


# ------------------------------------------------------------------------------------------------------------ a run


def accuracy(model, tokenizer, problems):
    """Share of problems that the model answers right, greedily."""
    prompts = [tokenizer(problem.prompt, return_tensors="pt").input_ids[0] for problem in problems]
    texts = tokenizer.batch_decode(continue_(model, prompts, RESPONSE_LENGTH), skip_special_tokens=True)
    return sum(is_correct(text, problem.answer) for text, problem in zip(texts, problems, strict=True)) / len(problems)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=["opd", "topd"], default="topd")
    parser.add_argument("--student", default="long-student", help="an embedded student")
    parser.add_argument("--teacher", default="long-teacher", help="the embedded teacher of its level")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    level = "long" if args.student.startswith("long") else "short"
    tokenizer = AutoTokenizer.from_pretrained(pair_folder(args.teacher))
    teacher = AutoModelForCausalLM.from_pretrained(pair_folder(args.teacher)).eval()
    student = AutoModelForCausalLM.from_pretrained(pair_folder(args.student)).eval()  # the models have no dropout
    held_out = make_problems(200, args.seed, held_out=True, level=level)
    print(f"teacher {accuracy(teacher, tokenizer, held_out):.3f}")
    print(f"student {accuracy(student, tokenizer, held_out):.3f} before")

    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0)
    problems = make_problems(args.steps * args.batch, args.seed, held_out=False, level=level)
    for step in range(args.steps):
        batch = problems[step * args.batch : (step + 1) * args.batch]
        prompts = [tokenizer(problem.prompt, return_tensors="pt").input_ids[0] for problem in batch]
        responses = continue_(student, prompts, RESPONSE_LENGTH, sample=True)
        rollouts = [Rollout(*pair) for pair in zip(prompts, responses, strict=True)]
        windows = look_ahead(student, teacher, rollouts) if args.method == "topd" else ([], [])
        loss = topd_loss(student, teacher, rollouts, *windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}/{args.steps}  loss {loss.item():.4f}", flush=True)
    print(f"student {accuracy(student, tokenizer, held_out):.3f} after")


if __name__ == "__main__":
    main()
