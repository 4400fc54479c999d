"""The loss on the device where it is computed: TRL's Triton kernels on CUDA, our tiles elsewhere."""

import torch
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from topd.algorithm import DistillationLoss, Head, LikelihoodTerms, distillation_loss
from topd.algorithm.vocabulary import Direction, at_least_float32


def loss_on_device(
    hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    weights: Tensor,
    terms: LikelihoodTerms | None = None,
    direction: Direction = "reverse",
) -> DistillationLoss:
    """`distillation_loss`, in nats; reverse is KL(student || teacher).

    On CUDA the token losses are TRL's wherever it can express both heads (our choice); likelihood terms always ours.

    Raises:
        RuntimeError: the heads' vocabularies differ in size (ours only; TRL's does not look).
    """
    arguments = trl_arguments(head, teacher_head)
    if hidden.is_cuda and at_least_float32(hidden).itemsize == 4 and arguments is not None:
        return trl_loss(hidden, head, teacher_hidden, teacher_head, weights, terms, direction, arguments)
    return distillation_loss(hidden, head, teacher_hidden, teacher_head, weights, terms, direction)


def trl_loss(
    hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher_head: Head, weights: Tensor,
    terms: LikelihoodTerms | None, direction: Direction, arguments: tuple,
) -> DistillationLoss:  # fmt: skip
    """The same with TRL's token losses."""
    ours = hidden[: len(teacher_hidden)]
    token_loss = trl_token_kl(ours, head, teacher_hidden, teacher_head, direction, arguments)
    loss = torch.where(weights == 0, 0.0, weights * token_loss).sum()
    if terms is None:
        return DistillationLoss(loss, token_loss.detach(), token_loss.new_zeros(0))
    likelihood = distillation_loss(hidden, head, teacher_hidden[:0], teacher_head, weights[:0], terms, direction)
    return DistillationLoss(loss + likelihood.loss, token_loss.detach(), likelihood.nll)


def trl_token_kl(
    hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher_head: Head, direction: Direction, arguments: tuple
) -> Tensor:
    """[position] the same through TRL, whose beta is 1 for the reverse KL and 0 for the forward one."""
    student, teacher = (hidden, head.weight, head.bias), (teacher_hidden, teacher_head.weight, teacher_head.bias)
    divergence, _ = ChunkedDivergenceFunction.apply(*student, *teacher, float(direction == "reverse"), *arguments)
    return divergence


def trl_arguments(head: Head, teacher_head: Head) -> tuple | None:
    """TRL's (temperature, student's scale and softcap, teacher's scale and softcap), or None if it has no such heads.

    TRL has one temperature for both. Without a softcap a temperature is a scale; with a softcap it is not. And TRL
    gives NaN where a bias removes tokens from the vocabulary.
    """
    heads = head, teacher_head
    capped = {each.temperature for each in heads if each.softcap is not None}
    if len(capped) > 1 or any(each.bias is not None and not each.bias.isfinite().all() for each in heads):
        return None
    temperature = capped.pop() if capped else 1.0
    shapes = [(each.scale * (temperature / each.temperature), each.softcap) for each in heads]
    return temperature, *shapes[0], *shapes[1]
