"""Top-k teacher: KL from the teacher's top-k log-probabilities, as a server returns them.

The loss compares student and teacher on the known tokens and on one bucket for all other tokens:

    sum over known v of p_S(v) (log p_S(v) - log p_T(v)) + r_S (log r_S - log r_T),    r = 1 - sum over known v of p(v)

This is the KL after merging the other tokens. It is a lower bound: the full KL is larger by r_S times the KL between
student and teacher within the other tokens. The bias grows with the student's probability outside the top k (r_S). The
paper uses the full vocabulary; merging is our choice (and TRL's, for a teacher on a server).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topd.algorithm.distillation_loss import DistillationLoss
from topd.algorithm.head import Head
from topd.algorithm.tiles import Direction, LikelihoodTerms
from topd.algorithm.token_loss import TokenScores, gathered_log_probs, score_tokens

SMALLEST = 1e-9
"""Minimum probability of the bucket, so that its logarithm is finite."""


class KnownTokens(NamedTuple):
    """The teacher's top-k tokens and the sampled token at each position.

    Attributes:
        tokens: [position, known] token ids, the sampled token first; padding is arbitrary.
        log_probs: [position, known] the teacher's log-probabilities (nats); -inf at padding.
    """

    tokens: Int[Tensor, "positions known"]
    log_probs: Float[Tensor, "positions known"]


class KnownKL(NamedTuple):
    """The result of `known_token_kl`.

    Attributes:
        kl: [position] nats.
        outside_top_k: [position] the student's probability of all other tokens, detached.
    """

    kl: Float[Tensor, "positions"]
    outside_top_k: Float[Tensor, "positions"]


def known_token_kl(
    student_log_probs: Float[Tensor, "positions known"], teacher: KnownTokens, direction: Direction = "reverse"
) -> KnownKL:
    """KL between student and teacher on the known tokens and one bucket, in nats.

    Args:
        student_log_probs: of the known tokens, from the full softmax; differentiable.
        teacher: the same tokens' log-probabilities under the teacher; constant.
        direction: reverse, KL(student || teacher): the token loss. forward, KL(teacher || student).
    """
    present = teacher.log_probs > -torch.inf
    ours = _with_rest(student_log_probs, present)
    theirs = _with_rest(teacher.log_probs.to(student_log_probs), present)
    first, second = (ours, theirs) if direction == "reverse" else (theirs, ours)
    counted = torch.nn.functional.pad(present, (0, 1), value=True)
    kl = (first.exp() * (first - second) * counted).sum(-1)
    return KnownKL(kl, ours[:, -1].exp().detach())


def _with_rest(log_probs: Tensor, present: Tensor) -> Tensor:
    """Append the log-probability of the bucket, 1 - sum of the present tokens; replace the others by 0."""
    log_probs = log_probs.masked_fill(~present, 0.0)
    rest = 1 - (log_probs.double().exp() * present).sum(-1, keepdim=True)
    return torch.cat([log_probs, rest.clamp(min=SMALLEST).log().to(log_probs)], -1)


def known_token_loss(
    hidden: Float[Tensor, "positions width"],
    head: Head,
    teacher: KnownTokens,
    weights: Float[Tensor, "teacher_positions"],
    terms: LikelihoodTerms | None = None,
    direction: Direction = "reverse",
) -> DistillationLoss:
    """`distillation_loss` against the teacher's top-k tokens; `direction` as in `known_token_kl`.

    The KL covers the first rows of `hidden`, one per weight; the others have likelihood terms only. Weights and teacher
    are constant.
    """
    log_probs = gathered_log_probs(hidden[: len(weights)], head, teacher.tokens)
    token_loss, outside_top_k = known_token_kl(log_probs, teacher, direction)
    loss, nll = (weights * token_loss).sum(), token_loss.new_zeros(0)
    if terms is not None:
        nll = -gathered_log_probs(hidden[terms.position], head, terms.token[:, None]).squeeze(-1)
        loss = loss + (terms.weight * nll).sum()
    return DistillationLoss(loss, token_loss.detach(), nll.detach(), outside_top_k)


@torch.no_grad()
def score_known_tokens(
    hidden: Float[Tensor, "positions width"],
    head: Head,
    teacher: KnownTokens,
    tokens: Int[Tensor, "positions"],
    direction: Direction = "reverse",
) -> TokenScores:
    """`score_tokens` against the teacher's top-k tokens."""
    ours = score_tokens(hidden, head, hidden, head, tokens)  # for the fields that depend on the student alone
    token_loss, _ = known_token_kl(gathered_log_probs(hidden, head, teacher.tokens), teacher, direction)
    most_likely = teacher.tokens.gather(-1, teacher.log_probs.argmax(-1, keepdim=True)).squeeze(-1)
    teacher_nll = -teacher.log_probs[:, 0].to(token_loss)
    return TokenScores(token_loss, teacher_nll, ours.student_nll, ours.entropy, ours.student_greedy, most_likely)
