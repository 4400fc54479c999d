"""A student or teacher in this process: hidden states, output head, token losses, and continuations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from topd.algorithm import (
    DistillationLoss,
    Head,
    LikelihoodTerms,
    TokenScores,
    distillation_loss,
    ground_cost,
    score_tokens,
    token_cost,
)
from topd.algorithm.transport import GroundCost
from topd.algorithm.vocabulary import Direction, at_least_float32
from topd.near_future.branches import ends_of, hidden_with_branches, joined, prefill, rollout_hidden
from topd.near_future.continuations import ContinuesPrefixes, LocalModel
from topd.near_future.model_parts import backbone_of, evaluating, output_head, whole
from topd.near_future.ways import Ways, ways_of
from topd.near_future.windows import Branches, Places, Prefill, Rollouts, Windows

if TYPE_CHECKING:
    from topd.near_future.sampling import SamplingStates

Forward = Callable[..., Any]
"""Runs `function(*args)` inside the wrapped model's forward, so that DDP, FSDP or DeepSpeed see it."""


# ------------------------------------------------------------------------------------- losses over the whole vocabulary


class FullVocabulary:
    """The part of a `Teacher` whose hidden states are here: it meets the student over the whole vocabulary."""

    def head(self) -> Head:
        """The output head of its hidden states."""
        raise NotImplementedError

    def scores(
        self, hidden: Tensor, head: Head, states: Mapping[str, Tensor], tokens: Tensor, direction: Direction = "reverse"
    ) -> TokenScores:
        """Token losses and what else is read off both models' logits. See `Teacher.scores`."""
        return score_tokens(hidden, head, states["hidden"], self.head(), tokens, direction)

    def loss(
        self, hidden: Tensor, head: Head, states: Mapping[str, Tensor], weights: Tensor,
        terms: LikelihoodTerms | None = None, direction: Direction = "reverse",
    ) -> DistillationLoss:  # fmt: skip
        """The loss of a step. See `Teacher.loss`."""
        return loss_on_device(hidden, head, states["hidden"], self.head(), weights, terms, direction)


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


# ------------------------------------------------------------------------------------------------------------ the model


class DistilledModel(FullVocabulary):
    """A `Student` or a `Teacher`.

    Args:
        model: the unwrapped causal language model of transformers (a PEFT model is fine).
        source: continues prefixes; the model itself, or a server.
        forward: see `Forward`.
        temperature: of the token loss, as in TRL.
        micro_batch: rollouts that are scored together.
        share_prefix: decode all windows of a rollout over one copy of it, where the model can.
    """

    def __init__(
        self,
        model: Any,
        source: ContinuesPrefixes,
        forward: Forward = lambda function, *args: function(*args),
        temperature: float = 1.0,
        micro_batch: int = 8,
        share_prefix: bool = True,
    ) -> None:
        self.model = model
        self.temperature = temperature
        self.share_prefix = share_prefix
        self._source, self._forward, self._micro_batch = source, forward, micro_batch

    @property
    def backbone(self) -> nn.Module:
        """The decoder without its output head."""
        return backbone_of(self.model)

    @property
    def ways(self) -> Ways:
        """What is exact for the model, see `ways_of`."""
        return ways_of(self.model)

    def shares_prefix(self, rollouts: Rollouts, window_length: int = 0) -> bool:
        """Whether windows may be decoded over one copy of each rollout."""
        return self.share_prefix and rollouts.input_ids.shape[1] + window_length <= self.ways.shared_prefix

    @property
    def cache_bytes_per_token(self) -> float:
        """Bytes that a kept prefix takes; 0 where none is kept."""
        return self.ways.cache_bytes if self.share_prefix else 0.0

    @property
    def eos_token_ids(self) -> list[int]:
        """Token ids that end a window."""
        return self._source.eos_token_ids

    def head(self) -> Head:
        """The output head, whole also where FSDP2 has sharded it."""
        return output_head(self.model, self.temperature)

    def embeddings(self) -> Tensor:
        """[vocabulary, width] static input embeddings."""
        return whole(self.model.get_input_embeddings().weight).detach()

    @torch.no_grad()
    def hidden(self, rollouts: Rollouts) -> Tensor:
        """[rollout, position, width]: the states that predict each response token, in evaluation mode, no gradient."""
        with evaluating(self.model):
            groups = rollouts.by_length(self._micro_batch)
            parts = [self._forward(rollout_hidden, self.backbone, rollouts[rows], self.ways) for rows in groups]
        return torch.cat(parts)[torch.cat(groups).argsort()]

    @torch.no_grad()
    def prefill(self, rollouts: Rollouts, keep_prefix: bool = True) -> Prefill:
        """Read rollouts in evaluation mode; by default, keep keys and values for windows."""
        if not (keep_prefix and self.shares_prefix(rollouts)):
            return Prefill({"hidden": self.hidden(rollouts)})
        with evaluating(self.model):
            groups = rollouts.by_length(self._micro_batch)
            parts = [self._forward(prefill, self.backbone, rollouts[rows]) for rows in groups]
        return joined(parts, groups)

    def sampled(self, rollouts: Rollouts, states: SamplingStates | None, keep_prefix: bool) -> Prefill | None:
        """What sampling these rollouts computed, where that equals reading them; else None."""
        if states is None or rollouts.input_ids.shape[1] > self.ways.sampling_states:
            return None
        keep_prefix = keep_prefix and self.shares_prefix(rollouts)
        if keep_prefix and not self.ways.cached_prefix:
            return None
        return states.prefill(rollouts, keep_prefix)

    def hidden_and_windows(self, rollouts: Rollouts, branches: Branches | None) -> tuple[Tensor, Tensor]:
        """States that predict the response tokens, and those that predict the windows' tokens, with gradients.

        Without branches the second is empty.
        """
        if branches is None:
            return rollout_hidden(self.backbone, rollouts, self.ways), torch.empty(0)
        return hidden_with_branches(self.model, self.backbone, rollouts, branches, self.ways)

    @torch.no_grad()
    def hidden_in_windows(self, rollouts: Rollouts, branches: Branches) -> Tensor:
        """[rollout, branch, window_position, width]: the states that predict the windows' tokens, no gradient."""
        model = self.model, self.backbone
        with evaluating(self.model):
            parts = [
                self._forward(hidden_with_branches, *model, rollouts[rows], branches[rows], self.ways)[1]
                for rows in self._micro_batches(len(rollouts))
            ]
        return torch.cat(parts)

    def _micro_batches(self, size: int) -> list[slice]:
        return [slice(start, start + self._micro_batch) for start in range(0, size, self._micro_batch)]

    @torch.no_grad()
    def window_costs(
        self, ours: Windows, theirs: Windows, places: Places, hidden: bool = False, cost: GroundCost = "cosine"
    ) -> Tensor:
        """See `EitherModel.window_costs`."""
        if not hidden:
            return token_cost(ours.tokens, theirs.tokens, self.embeddings(), cost)
        prefixes = places.prefixes()
        return ground_cost(self._states_of(prefixes, ours), self._states_of(prefixes, theirs), cost)

    def _states_of(self, prefixes: Sequence[Tensor], windows: Windows) -> Tensor:
        """[window, window_position, width] last hidden states at the window tokens; past its end, those at its end."""
        if len(windows) == 0:
            return self.embeddings().new_zeros(*windows.tokens.shape, self.embeddings().shape[1])
        ids = [torch.cat([prefix, tokens]) for prefix, tokens in zip(prefixes, windows.tokens, strict=True)]
        length = windows.tokens.shape[1]
        with evaluating(self.model):
            parts = [
                self._forward(ends_of, self.backbone, ids[rows], length, self.ways)
                for rows in self._micro_batches(len(ids))
            ]
        states = torch.cat(parts).float()
        last = (windows.mask.sum(1) - 1).clamp(min=0)
        index = torch.minimum(torch.arange(length, device=states.device), last[:, None])
        return states.gather(1, index[:, :, None].expand_as(states))

    @torch.no_grad()
    def continue_(
        self, places: Places, length: int, prefill: Prefill | None = None, from_candidate: bool = False
    ) -> Windows:
        """The model's own near future from each place, at most `length` tokens, in evaluation mode.

        Windows are decoded over the prefix of a `prefill` where the model can. `from_candidate`: they begin with the
        rollout's own token, and the model's greedy continuation follows.
        """
        source = self._source
        with evaluating(self.model):
            over_prefix = prefill is not None and prefill.prefix is not None and prefill.greedy is not None
            over_prefix = over_prefix and self.shares_prefix(places.rollouts, length)
            if over_prefix and prefill is not None and isinstance(source, LocalModel):
                return source.continue_over_prefix(places, length, prefill, from_candidate)
            if not from_candidate:
                return source.continue_(places.prefixes(), length)
            candidate = places.tokens[:, None]
            present = torch.ones_like(candidate, dtype=torch.bool)
            if length == 1:
                return Windows(candidate, present)
            after = source.continue_(places.moved(1).prefixes(), length - 1)
            ended = torch.isin(candidate, torch.tensor(source.eos_token_ids, device=candidate.device))
            mask = torch.cat([present, after.mask & ~ended], 1)
            return Windows(torch.cat([candidate, after.tokens], 1) * mask, mask)
