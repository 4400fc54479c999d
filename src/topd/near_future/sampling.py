"""Sampling rollouts: outside a trainer; and in one, with states that are kept, rows that leave, and an early end."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from topd.algorithm import top_k_overlap
from topd.near_future.continuations import LocalModel
from topd.near_future.distilled_model import DistilledModel
from topd.near_future.fast_decoding import tokens_by_inversion
from topd.near_future.model_parts import backbone_of, cache_of, end_token_ids, left_padded, one_beginning, padding_id
from topd.near_future.windows import Prefill, Rollouts


def sample_rollouts(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
) -> Rollouts:
    """One response to each prompt (text, or token ids), sampled from the full distribution."""
    ids = [
        torch.tensor(one_beginning(tokenizer(prompt)["input_ids"], tokenizer)) if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]
    pad = padding_id(tokenizer)
    source = LocalModel(model, pad, end_token_ids(model.generation_config, tokenizer), temperature)
    responses = source.continue_(ids, max_new_tokens)
    return _rollouts(ids, responses.tokens, responses.mask.long(), pad)


def written_rollouts(
    prompts: Sequence[Tensor], responses: Sequence[Tensor], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Rollouts:
    """Rollouts that are there already, from token ids."""
    pad = padding_id(tokenizer)
    tokens = pad_sequence(list(responses), batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones_like(response) for response in responses], batch_first=True)
    return _rollouts(prompts, tokens.to(device), mask.to(device), pad)


def _rollouts(prompts: Sequence[Tensor], tokens: Tensor, mask: Tensor, pad_token_id: int) -> Rollouts:
    prompt_ids, prompt_mask = (part.to(tokens.device) for part in left_padded(prompts, pad_token_id))
    return Rollouts(prompt_ids, prompt_mask, tokens, mask, mask)


def local_pair(
    student: Any, teacher: Any, tokenizer: PreTrainedTokenizerBase, micro_batch: int = 32
) -> tuple[DistilledModel, DistilledModel]:
    """Both models as the analyses see them: in this process, greedy windows that the student's end tokens end."""
    ends = end_token_ids(student.generation_config, tokenizer)

    def distilled(model: Any) -> DistilledModel:
        source = LocalModel(model, padding_id(tokenizer), ends)
        return DistilledModel(model, source, micro_batch=micro_batch)

    return distilled(student), distilled(teacher)


# ------------------------------------------------------------------------------------------- states kept while sampling


class SamplingStates:
    """The last hidden states, and keys and values, of one call of `generate` (or of several with ever fewer rows).

    They are those of a scoring pass up to rounding, so they choose candidates and start windows; the loss that is
    trained on is computed anew, with gradients.
    """

    def __init__(self) -> None:
        self._states: list[Tensor] = []
        self._fed: list[int] = []
        self._cache: Any = None
        self.rows: Tensor | None = None  # of the batch that are left in it; None: all

    @contextmanager
    def keeping(self, model: Any) -> Iterator[None]:
        """Watch the forward passes of a model that generates in this block."""
        handle = backbone_of(model).register_forward_hook(self._keep)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._fed.append(output.last_hidden_state.shape[1])
        last = output.last_hidden_state[:, -1]
        if self._states and self.rows is not None and len(self.rows) < len(self._states[0]):
            last = torch.zeros_like(self._states[0]).index_copy_(0, self.rows, last)
        self._states.append(last)
        self._cache = cache_of(output)

    def prefill(self, rollouts: Rollouts, keep_prefix: bool) -> Prefill | None:
        """As if the model had read these rollouts, or None if this was not one plain call that sampled them all.

        Whether the states are those of a scoring pass, and whether windows may use the prefix, is for `ways_of` to say.
        """
        prompt, response = rollouts.prompt_ids.shape[1], rollouts.response_ids.shape[1]
        longest = int(rollouts.response_mask.sum(1).max())
        one_call = self._fed[:1] == [prompt] and set(self._fed[1:]) <= {1}
        if not one_call or len(self._states) < longest or len(self._states[0]) != len(rollouts):
            return None
        hidden = torch.stack(self._states[:response], dim=1)
        hidden = nn.functional.pad(hidden, (0, 0, 0, response - hidden.shape[1]))
        layers = getattr(self._cache, "layers", [])
        whole = bool(layers) and all(
            getattr(layer, "keys", None) is not None
            and layer.keys.shape[2] >= prompt + longest - 1
            and len(layer.keys) == len(rollouts)
            for layer in layers
        )
        if not keep_prefix:
            return Prefill({"hidden": hidden})
        if not whole:
            return None
        return Prefill({"hidden": hidden}, [(layer.keys, layer.values) for layer in layers], rollouts.padding)


def has_dropout(model: nn.Module) -> bool:
    """Whether the model has dropout in training mode, so that states from sampling are not those of a scoring pass."""
    attention = getattr(getattr(model, "config", None), "attention_dropout", 0.0) or 0.0
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return layers or attention > 0


# ------------------------------------------------------------------------------------------------- rows that have ended


class HalfHaveEnded(StoppingCriteria):
    """Stops all rows once at most half of them are without an end token behind `start`."""

    def __init__(self, start: int, ends: Tensor) -> None:
        self.start, self.ends = start, ends

    def ended(self, input_ids: Tensor) -> Tensor:
        return torch.isin(input_ids[:, self.start :], self.ends).any(-1)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        left = len(input_ids) - int(self.ended(input_ids).sum())
        return torch.full_like(input_ids[:, 0], left <= len(input_ids) // 2, dtype=torch.bool)


@contextmanager
def compact_sampling(model: Any, states: SamplingStates | None = None) -> Iterator[None]:
    """In this block `model.generate` drops rows that have ended, and draws each token with one random number.

    `states`, if any, keeps its hidden states.
    """
    followers = [] if states is None else [states]
    with patch.object(model, "generate", partial(generate_compactly, model.generate, followers)), tokens_by_inversion():
        yield


def generate_compactly(
    generate: Any, followers: Sequence[Any], *, input_ids: Tensor, attention_mask: Tensor,
    generation_config: GenerationConfig, **kwargs: Any,
) -> Tensor:  # fmt: skip
    """The sequences that `generate` returns: [row, token], padded on the right.

    `generate` decodes every row until the last one ends. Where lengths differ by a factor of two or three, as in worked
    solutions, half of its work is padding. Here it stops whenever half of its rows have ended, and continues the others
    over their part of the cache. Each row's distribution is the same; the random numbers are not those of one call.

    Args:
        followers: objects whose attribute `rows` is set to the rows that are left.
    """
    start, longest = input_ids.shape[1], generation_config.max_new_tokens
    ends = torch.as_tensor(generation_config.eos_token_id, device=input_ids.device).flatten()
    rows = torch.arange(len(input_ids), device=input_ids.device)
    sequences = input_ids.new_full((len(rows), start + longest), generation_config.pad_token_id)
    inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
    while len(rows):
        stop = HalfHaveEnded(start, ends)
        config = copy.copy(generation_config)
        grown = inputs["input_ids"].shape[1] - start
        config.max_new_tokens = longest - grown
        if config.min_new_tokens is not None:
            config.min_new_tokens = max(0, config.min_new_tokens - grown)
        config.return_dict_in_generate = True
        for follower in followers:
            follower.rows = rows
        found = generate(**inputs, generation_config=config, stopping_criteria=StoppingCriteriaList([stop]), **kwargs)
        width = found.sequences.shape[1]
        sequences[rows, :width] = found.sequences
        kept = (~stop.ended(found.sequences)).nonzero().squeeze(-1)
        if width == start + longest or len(kept) == 0:
            break
        inputs, rows = remaining(found, inputs["attention_mask"], kept), rows[kept]
    return sequences[:, :width]


def remaining(found: Any, attention_mask: Tensor, kept: Tensor) -> dict[str, Any]:
    """Inputs with which `generate` continues some rows of its output over their part of the cache."""
    cache, argument = cache_of(found), "cache" if "cache" in found else "past_key_values"
    cache.batch_select_indices(kept)
    grown = attention_mask.new_ones(len(kept), found.sequences.shape[1] - attention_mask.shape[1])
    return {
        "input_ids": found.sequences[kept],
        "attention_mask": torch.cat([attention_mask[kept], grown], dim=1),
        argument: cache,
    }


def after_the_others_left(model: Any, input_ids: Tensor, attention_mask: Tensor, pad: int) -> Tensor:
    """[token] how the last row continues greedily, where the other rows leave the batch after three tokens.

    Recurrent states cannot leave row by row, and some models keep more of a batch than its cache.
    """

    def generated(new: int, **inputs: Any) -> Any:
        config = GenerationConfig(
            max_new_tokens=new, do_sample=False, pad_token_id=pad, bos_token_id=None, eos_token_id=None,
            return_dict_in_generate=True, disable_compile=True,
        )  # fmt: skip
        return model.generate(**inputs, generation_config=config)

    found = generated(3, input_ids=input_ids, attention_mask=attention_mask)
    last = torch.tensor([len(input_ids) - 1]).to(input_ids.device)
    tokens: Tensor = generated(5, **remaining(found, attention_mask, last)).sequences[0, input_ids.shape[1] :]
    return tokens


# ------------------------------------------------------------------ rollouts that end with enough informative positions


TOP_K = 16
"""Most likely tokens that are compared (our choice)."""
OVERLAP = 0.7
"""A position is informative where the models share fewer of them."""
GROWTH = 1.5
"""How much longer rollouts are at each check, at least: all checks together read each token some three times."""


class InformativeEnd(StoppingCriteria):  # type: ignore[misc]
    """Ends rollouts with enough informative positions (Flash-OPD, 2610.06105): the rest teaches little for its cost.

    Stops `generate` once every rollout has `most` informative positions or has ended; then says where each is cut.

    Both models read the rollouts so far at a few lengths while they are sampled, and at the end. The cut does not
    depend on when they are read: it is behind the `most`-th informative position. Both models are in this process and
    share the tokenizer; `prompt_ids` are in the order of the rollouts.
    """

    def __init__(
        self, student: DistilledModel, teacher: DistilledModel, prompt_ids: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], most: int,
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.tokenizer, self.most = student, teacher, tokenizer, most
        self.prompts = [torch.tensor(ids) for ids in prompt_ids]
        self.end_ids = torch.tensor(end_ids)
        self._prompt_width = 0
        self._next_check = most
        self._found: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._prompt_width = self._prompt_width or input_ids.shape[1] - 1
        responses = input_ids[:, self._prompt_width :]
        length = responses.shape[1]
        open_rows = torch.ones(len(responses), dtype=torch.bool, device=input_ids.device)
        if length < self._next_check:
            return ~open_rows
        ended = torch.isin(responses, self.end_ids.to(responses.device))
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, length).tolist()
        so_far = [row[:n].tolist() for row, n in zip(responses, lengths, strict=True)]
        found = self._informative(so_far)
        missing = int((self.most - found.sum(1)).clamp(min=0).masked_fill(ended.any(1), 0).max())
        if missing == 0:
            self._found = found
            return open_rows
        self._next_check = max(length + missing, math.ceil(GROWTH * length))
        return ~open_rows

    def cut(self, responses: Sequence[list[int]]) -> list[list[int]]:
        """Each response up to its `most`-th informative position; whole where it has fewer."""
        found = self._informative(responses) if self._found is None else self._found  # of the check that stopped them
        reached = found.cumsum(1) >= self.most
        ends = torch.where(reached.any(1), reached.int().argmax(1) + 1, reached.shape[1]).tolist()
        return [response[:end] for response, end in zip(responses, ends, strict=True)]

    def _informative(self, responses: Sequence[list[int]]) -> Tensor:
        """[rollout, position] where the models share too few of their most likely tokens."""
        device = self.student.model.device
        rollouts = written_rollouts(self.prompts, [torch.tensor(ids) for ids in responses], self.tokenizer, device)
        mask = rollouts.response_mask.bool()
        ours, theirs = (model.hidden(rollouts)[mask] for model in (self.student, self.teacher))
        overlap = top_k_overlap(ours, self.student.head(), theirs, self.teacher.head(), TOP_K)
        return torch.zeros_like(mask).masked_scatter(mask, overlap < OVERLAP)


def stopping_by(model: Any, criterion: StoppingCriteria) -> AbstractContextManager[Any]:
    """Within it, `model.generate` also stops by this criterion; TRL's trainer passes none."""
    return patch.object(model, "generate", partial(model.generate, stopping_criteria=[criterion]))
