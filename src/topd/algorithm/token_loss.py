"""The token loss: the divergence between student and teacher at each position, in nats.

On-policy distillation uses the full-vocabulary reverse KL at the student's own prefix (section 3):

    KL(student || teacher) = sum_v p_S(v) (log p_S(v) - log p_T(v))

`token_kl` is the definition, from logits. `score_tokens` (values) and `distillation_loss` (values and gradients) do the
same from hidden states and output heads, tile by tile, so that tokens x vocabulary never exists at once. The functions
of `KnownTokens` are for a teacher whose top-k log-probabilities are all that is known, as from a server.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from topd.algorithm.vocabulary import (
    Direction,
    Head,
    LikelihoodTerms,
    Tiles,
    add_likelihood_,
    at_least_float32,
    check_choice,
    check_rows,
    check_vocabularies,
    converted,
    divergence_,
    in_dtypes,
    log_softmax_,
    may_mask,
)

SMALLEST = 1e-9
"""Minimum probability of the bucket, so that its logarithm is finite."""

# ----------------------------------------------------------------------------------------------------- whole vocabulary


def token_kl(
    student_logits: Float[Tensor, "*positions vocabulary"],
    teacher_logits: Float[Tensor, "*positions vocabulary"],
    direction: Direction = "reverse",
) -> Float[Tensor, "*positions"]:
    """Full-vocabulary KL at each position, in nats, differentiable in the student's logits.

    Tokens with probability 0 under the first distribution contribute 0.

    Args:
        student_logits: before the softmax; -inf for tokens that are masked out.
        teacher_logits: over the same vocabulary, in the same context. 16-bit logits are converted to float32.
        direction: reverse, KL(student || teacher): the token loss (section 3). forward, KL(teacher || student).

    Raises:
        ValueError: the vocabularies differ in size, or the direction is unknown.
    """
    check_choice("direction", direction, Direction)
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        sizes = f"{student_logits.shape[-1]} and {teacher_logits.shape[-1]} tokens"
        raise ValueError(f"student and teacher must share a vocabulary, but their logits have {sizes}")
    student = torch.log_softmax(student_logits, dim=-1, dtype=at_least_float32(student_logits))
    teacher = torch.log_softmax(teacher_logits, dim=-1, dtype=at_least_float32(teacher_logits))
    first, second = (student, teacher) if direction == "reverse" else (teacher, student)
    gap = torch.where(first == -torch.inf, 0.0, first - second)
    return (first.exp() * gap).sum(dim=-1)


class TokenScores(NamedTuple):
    """Losses and likelihoods of each sampled token, in nats; no gradients.

    Attributes:
        kl: [position] the token loss (reverse KL by default).
        teacher_nll: [position] negative log-likelihood of the sampled token under the teacher: the x axis of Fig. 6.
        student_nll: [position] the same under the student; teacher_nll - student_nll is k1, log p_S - log p_T.
        entropy: [position] of the student's distribution.
        student_greedy: [position] the student's most likely token; the first one in a tie.
        teacher_greedy: [position] the teacher's most likely token.
    """

    kl: Float[Tensor, "positions"]
    teacher_nll: Float[Tensor, "positions"]
    student_nll: Float[Tensor, "positions"]
    entropy: Float[Tensor, "positions"]
    student_greedy: Int[Tensor, "positions"]
    teacher_greedy: Int[Tensor, "positions"]


@torch.no_grad()
def score_tokens(
    student_hidden: Float[Tensor, "positions student_width"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "positions teacher_width"],
    teacher_head: Head,
    tokens: Int[Tensor, "positions"],
    direction: Direction = "reverse",
    tile_elements: int | None = None,
) -> TokenScores:
    """Score sampled tokens tile by tile; computes each model's logits once. No gradients.

    The hidden states of both models are those from which the `tokens` are predicted; the heads have the same
    vocabulary. `direction`: of `TokenScores.kl`, as in `token_kl`. `tile_elements`: maximum number of logits per model
    in memory at once (at least one row); None: automatic.

    Raises:
        RuntimeError: the heads' vocabularies differ in size.
        ValueError: not one row of each model per token, or the direction is unknown.
    """
    check_choice("direction", direction, Direction)
    check_rows(student_hidden=student_hidden, teacher_hidden=teacher_hidden, tokens=tokens.flatten())
    check_vocabularies(student_head, teacher_head)
    tiles = Tiles(student_hidden, student_head, tile_elements)
    student_head, teacher_head = tiles.head, converted(teacher_head, teacher_hidden)
    kl, teacher_nll, student_nll, entropy = student_hidden.new_zeros(4, len(tokens), dtype=tiles.student.dtype)
    student_greedy, teacher_greedy = tokens.new_zeros(2, len(tokens), dtype=torch.long)
    masked = may_mask(student_head, teacher_head)
    for rows in tiles.split(len(tokens)):
        student, teacher = tiles.student[: len(rows)], tiles.other[: len(rows)]
        student_greedy[rows] = student_head.write_logits(student_hidden[rows], student).argmax(-1)
        teacher_greedy[rows] = teacher_head.write_logits(teacher_hidden[rows], teacher).argmax(-1)
        log_softmax_(student)
        log_softmax_(teacher)
        teacher_nll[rows] = -teacher.gather(-1, tokens[rows, None]).squeeze(-1)
        student_nll[rows] = -student.gather(-1, tokens[rows, None]).squeeze(-1)
        kl[rows] = divergence_(student, teacher, direction, masked)
        entropy[rows] = torch.special.entr(student, out=teacher).sum(-1)
    return TokenScores(kl, teacher_nll, student_nll, entropy, student_greedy, teacher_greedy)


@torch.no_grad()
def top_k_overlap(
    student_hidden: Float[Tensor, "positions student_width"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "positions teacher_width"],
    teacher_head: Head,
    k: int,
    tile_elements: int | None = None,
) -> Float[Tensor, "positions"]:
    """Share (0..1) of the student's `k` most likely tokens that are among the teacher's `k`, tile by tile.

    The states stand in the same contexts, the heads over the same vocabulary. `tile_elements`: as in `score_tokens`.

    Raises:
        RuntimeError: the heads' vocabularies differ in size.
    """
    check_vocabularies(student_head, teacher_head)
    tiles = Tiles(student_hidden, student_head, tile_elements)
    student_head, teacher_head = tiles.head, converted(teacher_head, teacher_hidden)
    overlap = tiles.student.new_empty(len(student_hidden))
    k = min(k, student_head.weight.shape[0])
    for rows in tiles.split(len(student_hidden)):
        ours = student_head.write_logits(student_hidden[rows], tiles.student[: len(rows)]).topk(k).indices
        theirs = teacher_head.write_logits(teacher_hidden[rows], tiles.other[: len(rows)]).topk(k).indices
        overlap[rows] = (ours[:, :, None] == theirs[:, None, :]).any(-1).to(overlap.dtype).mean(-1)
    return overlap


def gathered_log_probs(
    hidden: Float[Tensor, "positions width"],
    head: Head,
    tokens: Int[Tensor, "positions wanted"],
    tile_elements: int | None = None,
) -> Float[Tensor, "positions wanted"]:
    """log p(token | position) of a few tokens at each position, in nats, differentiable, tile by tile.

    Only the result is kept; the backward pass recomputes each tile's logits.
    """
    values: Tensor = _TiledLogProbs.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, tokens, tile_elements
    )
    return values


class _TiledLogProbs(torch.autograd.Function):
    """Values in forward; gradients in backward, which recomputes each tile's logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        tokens: Tensor,
        tile_elements: int | None,
    ) -> Tensor:
        ctx.head, ctx.tile_elements = head, tile_elements
        ctx.save_for_backward(hidden, tokens, weight, bias)
        tiles = Tiles(hidden, head, tile_elements, two=False)
        values = hidden.new_empty(tokens.shape, dtype=at_least_float32(hidden))
        for rows in tiles.split(len(hidden)):
            values[rows] = tiles.log_probs(rows).gather(-1, tokens[rows])
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, tokens, weight, bias = ctx.saved_tensors
        head = replace(ctx.head, weight=weight, bias=bias)
        tiles = Tiles(hidden, head, ctx.tile_elements, ctx.needs_input_grad[:3])
        for rows in tiles.split(len(hidden)):
            probs, grad = tiles.log_probs(rows).exp_(), tiles.gradient(rows).zero_()
            position = torch.arange(len(rows), device=rows.device).repeat_interleave(tokens.shape[1])
            add_likelihood_(grad, probs, LikelihoodTerms(position, tokens[rows].flatten(), -grads[0][rows].flatten()))
            tiles.collect(rows)
        return (*in_dtypes(tiles.grads, tiles.dtypes), None, None, None)


# -------------------------------------------------------------------------------------------------------- top-k teacher


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
    """KL between student and teacher on the known tokens and one bucket for all others, in nats:

        sum over known v of p_S(v) (log p_S(v) - log p_T(v)) + r_S (log r_S - log r_T), r = 1 - sum over known v of p(v)

    This is the KL after merging the other tokens. It is a lower bound: the full KL is larger by r_S times the KL
    between student and teacher within the other tokens. The bias grows with the student's probability outside the top
    k (r_S). The paper uses the full vocabulary; merging is our choice (and TRL's, for a teacher on a server).

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
    gap = torch.where(first == -torch.inf, 0.0, first - second)
    kl = (first.exp() * gap * counted).sum(-1)
    return KnownKL(kl, ours[:, -1].exp().detach())


def _with_rest(log_probs: Tensor, present: Tensor) -> Tensor:
    """Append the log-probability of the bucket, 1 - sum of the present tokens; replace the others by 0."""
    log_probs = log_probs.masked_fill(~present, 0.0)
    rest = 1 - (log_probs.double().exp() * present).sum(-1, keepdim=True)
    return torch.cat([log_probs, rest.clamp(min=SMALLEST).log().to(log_probs)], -1)


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
