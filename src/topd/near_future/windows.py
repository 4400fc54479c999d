"""The data of the near future: rollouts, what models computed when they read them, places in them, and windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollouts:
    """A batch of prompts and the responses sampled for them.

    Attributes:
        prompt_ids: [rollout, prompt_position], padded on the left.
        prompt_mask: [rollout, prompt_position], 1 at tokens of the prompt.
        response_ids: [rollout, position], padded on the right.
        response_mask: [rollout, position], 1 at tokens of the response (those the model reads).
        loss_mask: [rollout, position], 1 at tokens that are trained on; a subset of `response_mask`.
        teacher: [rollout] which of several teachers each has; None where there is one.
        teacher_prompt_ids: [rollout, prompt_position] what the teacher reads in place of the prompt, padded on the
            left; None: the prompt.
        teacher_prompt_mask: [rollout, prompt_position], 1 at its tokens.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    loss_mask: Tensor
    teacher: Tensor | None = None
    teacher_prompt_ids: Tensor | None = None
    teacher_prompt_mask: Tensor | None = None

    @property
    def as_teacher_reads(self) -> Rollouts:
        """The same responses behind the teacher's own prompts; these rollouts where it has none."""
        if self.teacher_prompt_ids is None or self.teacher_prompt_mask is None:
            return self
        prompt = {"prompt_ids": self.teacher_prompt_ids, "prompt_mask": self.teacher_prompt_mask}
        return replace(self, **prompt, teacher_prompt_ids=None, teacher_prompt_mask=None)

    @property
    def width(self) -> int:
        """Tokens, with padding, of the longest row that student or teacher reads."""
        return max(self.input_ids.shape[1], self.as_teacher_reads.input_ids.shape[1])

    @property
    def input_ids(self) -> Tensor:
        """[rollout, prompt_position + position]"""
        return torch.cat([self.prompt_ids, self.response_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """[rollout, prompt_position + position], 1 at tokens that are there."""
        return torch.cat([self.prompt_mask, self.response_mask], dim=1)

    @property
    def padding(self) -> Tensor:
        """[rollout] tokens of padding before each prompt."""
        return (self.prompt_mask == 0).sum(1)

    def prefix(self, row: int, position: int) -> Tensor:
        """The student's prefix x_<t: the prompt and the response tokens before `position`, without padding."""
        prompt = self.prompt_ids[row][self.prompt_mask[row].bool()]
        return torch.cat([prompt, self.response_ids[row, :position]])

    @property
    def lengths(self) -> Tensor:
        """[rollout] tokens of each prompt and its response."""
        return self.attention_mask.sum(1)

    def left_aligned(self) -> tuple[Tensor, Tensor]:
        """The rows without padding on the left, as wide as the longest: a causal model needs no mask to read them.

        Returns:
            [rollout, index] token ids, and [rollout, position] the index of the token that predicts each response
            token. What is behind the end of a row means nothing.
        """
        start, longest = self.padding[:, None], int(self.lengths.max())
        ids, index = self.input_ids, torch.arange(longest, device=start.device)
        position = torch.arange(self.response_ids.shape[1], device=start.device)
        first = self.prompt_ids.shape[1] - start - 1
        return ids.gather(1, (start + index).clamp(max=ids.shape[1] - 1)), (first + position).clamp(max=longest - 1)

    def by_length(self, size: int) -> list[Tensor]:
        """Numbers of the rollouts in groups of at most `size`, by length if there are several: little padding."""
        if len(self) <= size:
            return [torch.arange(len(self), device=self.response_ids.device)]
        return list(self.lengths.argsort(stable=True).split(size))

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Rollouts:
        return replace(self, **{name: part[rows] for name, part in vars(self).items() if part is not None})

    @classmethod
    def cat(cls, parts: Sequence[Rollouts]) -> Rollouts:
        """Batches of equal widths, one after the other."""
        names = [field.name for field in fields(cls) if getattr(parts[0], field.name) is not None]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


@dataclass(frozen=True)
class Prefill:
    """What a model, or a teacher behind a server, computed when it read rollouts.

    Attributes:
        states: by name, [rollout, position, ...] what its token loss is computed from: `hidden`, the hidden states that
            predict each response token; of a server's teacher, `tokens` and `log_probs` (`KnownTokens`).
        prefix: of each attention call, keys and values [rollout, head, row_position, width], over which windows are
            decoded; None: windows start from fresh prefixes.
        begin: [rollout] where in the rows of `prefix` each rollout begins; what is before that is padding.
        greedy: [rollout, position] its most likely token at each position; known after scoring.
        parts: with several teachers, what each computed for its own rollouts.
    """

    states: dict[str, Tensor]
    prefix: list[tuple[Tensor, Tensor]] | None = None
    begin: Tensor | None = None
    greedy: Tensor | None = None
    parts: tuple[Prefill, ...] = ()

    @property
    def hidden(self) -> Tensor:
        """[rollout, position, width] the hidden states that predict each response token."""
        return self.states["hidden"]

    def __getitem__(self, rows: slice | Tensor) -> Prefill:
        assert not self.parts, "what several teachers computed is by their own rows, so it is not sliced"
        states = {name: values[rows] for name, values in self.states.items()}
        prefix = None if self.prefix is None else [(keys[rows], values[rows]) for keys, values in self.prefix]
        begin, greedy = (None if values is None else values[rows] for values in (self.begin, self.greedy))
        return Prefill(states, prefix, begin, greedy)

    def is_like(self, other: Prefill) -> bool:
        """Whether both prefixes have keys and values of the same shapes."""
        if self.prefix is None or other.prefix is None or len(self.prefix) != len(other.prefix):
            return False
        return all(
            a.shape[:2] == b.shape[:2] and a.shape[3:] == b.shape[3:]
            for pairs in zip(self.prefix, other.prefix, strict=True)
            for a, b in zip(*pairs, strict=True)
        )


@dataclass(frozen=True)
class Places:
    """Response positions of a batch of rollouts at which windows start.

    Attributes:
        rollouts: the batch.
        rows: [place] the rollout of each place.
        positions: [place] its position in the response.
    """

    rollouts: Rollouts
    rows: Tensor
    positions: Tensor

    @classmethod
    def marked(cls, rollouts: Rollouts, marks: Tensor) -> Places:
        """Where `marks` [rollout, position] is True, by rollout and then left to right."""
        return cls(rollouts, *marks.nonzero(as_tuple=True))

    @classmethod
    def cat(cls, parts: Sequence[Places]) -> Places:
        """The places of several batches as places of one batch. Batches may differ in size."""
        if len(parts) == 1:
            return parts[0]
        sizes = [len(part.rollouts) for part in parts]
        first_rows = [sum(sizes[:number]) for number in range(len(parts))]
        return cls(
            Rollouts.cat([part.rollouts for part in parts]),
            torch.cat([part.rows + first for part, first in zip(parts, first_rows, strict=True)]),
            torch.cat([part.positions for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: slice | Tensor) -> Places:
        return Places(self.rollouts, self.rows[which], self.positions[which])

    @property
    def as_teacher_reads(self) -> Places:
        """The same response positions, behind the teacher's own prompts."""
        return Places(self.rollouts.as_teacher_reads, self.rows, self.positions)

    def at(self, values: Tensor) -> Tensor:
        """[place, ...] of values [rollout, position, ...]."""
        return values[self.rows, self.positions]

    def marks(self, which: Tensor) -> Tensor:
        """[rollout, position] True at the places where `which` [place] is True."""
        nowhere = torch.zeros(self.rollouts.response_ids.shape, dtype=torch.bool, device=which.device)
        return nowhere.index_put((self.rows, self.positions), which)

    @property
    def tokens(self) -> Tensor:
        """[place] the rollout's own token at each place: the candidate."""
        return self.at(self.rollouts.response_ids)

    def moved(self, by: int) -> Places:
        """The places `by` positions further on."""
        return Places(self.rollouts, self.rows, self.positions + by)

    def of_rollouts(self, rows: Tensor) -> tuple[Places, Tensor]:
        """The places in these rollouts (ascending row numbers), as places of that part, and which they are here."""
        which = torch.isin(self.rows, rows).nonzero().squeeze(-1)
        part = torch.searchsorted(rows, self.rows[which])
        return Places(self.rollouts[rows], part, self.positions[which]), which

    def prefixes(self) -> list[Tensor]:
        """The student's prefix before each place, without padding."""
        places = zip(self.rows.tolist(), self.positions.tolist(), strict=True)
        return [self.rollouts.prefix(row, position) for row, position in places]


@dataclass(frozen=True)
class Windows:
    """Near futures, one per place: the tokens with which a model continues a prefix.

    Attributes:
        tokens: [window, window_position], padded on the right.
        mask: [window, window_position], True at tokens that are there. EOS is part of its window and ends it.
    """

    tokens: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @classmethod
    def cat(cls, parts: list[Windows]) -> Windows:
        """Windows of equal width, one after the other."""
        return cls(torch.cat([part.tokens for part in parts]), torch.cat([part.mask for part in parts]))

    def first(self, length: int) -> Windows:
        """The first tokens of each."""
        return Windows(self.tokens[:, :length], self.mask[:, :length])

    def __getitem__(self, which: Tensor) -> Windows:
        return Windows(self.tokens[which], self.mask[which])


@dataclass(frozen=True)
class Branches:
    """Windows of a batch of rollouts, the same number of slots in each.

    Attributes:
        position: [rollout, branch] response position at which each window starts.
        tokens: [rollout, branch, window_position].
        mask: [rollout, branch, window_position], False throughout in an empty slot.
    """

    position: Tensor
    tokens: Tensor
    mask: Tensor

    def __getitem__(self, rows: slice | Tensor) -> Branches:
        return Branches(self.position[rows], self.tokens[rows], self.mask[rows])


def comparable(ours: Windows, theirs: Windows, eos_token_ids: Sequence[int]) -> tuple[Windows, Windows]:
    """Two windows of equal length at each place, as transport compares them: in the paper a window always has K tokens.

    A window that EOS ended is padded with its EOS to the full length. One that stops for another reason (a rollout
    ended by its length limit) is compared over as many tokens as it has. Our choice.
    """
    ours, theirs = padded_with_eos(ours, eos_token_ids), padded_with_eos(theirs, eos_token_ids)
    both = ours.mask & theirs.mask
    return Windows(ours.tokens, both), Windows(theirs.tokens, both)


def padded_with_eos(windows: Windows, eos_token_ids: Sequence[int]) -> Windows:
    """Repeat the EOS that ended a window up to the full length; other windows stay as they are."""
    if windows.tokens.numel() == 0:
        return windows
    last = windows.tokens.gather(1, (windows.mask.sum(1, keepdim=True) - 1).clamp(min=0))
    eos = torch.tensor(list(eos_token_ids), dtype=torch.long, device=last.device)
    ended = torch.isin(last, eos) & windows.mask.any(1, keepdim=True)
    return Windows(torch.where(ended & ~windows.mask, last, windows.tokens), windows.mask | ended)


def rollout_windows(places: Places, length: int) -> Windows:
    """The rollout's own next `length` tokens from each place; nothing is generated."""
    rollouts, rows = places.rollouts, places.rows[:, None]
    last = rollouts.response_ids.shape[1] - 1
    index = places.positions[:, None] + torch.arange(length, device=rows.device)
    inside = index.clamp(max=last)
    mask = (index <= last) & rollouts.response_mask[rows, inside].bool()
    return Windows(rollouts.response_ids[rows, inside] * mask, mask)


def slots(rollout: Tensor) -> Tensor:
    """[branch] how many of the branches before it are of the same rollout; `rollout`: [branch] ascending."""
    return torch.arange(len(rollout), device=rollout.device) - torch.searchsorted(rollout, rollout)
