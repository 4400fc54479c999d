"""What the page shows of audited rollouts: shaded text, and for each candidate both futures and their alignment."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from topd.report.records import Arm, Candidate, Rollout

LEVELS = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Token losses, in nats, from which the next darker shade begins."""

NAMED_FROM = 3
"""Tokens from this shade on say their loss; neighbours of a lighter shade are one piece."""
TOKEN_BUDGET = 300_000
"""Tokens shown on the whole page (about 15 bytes each), whatever the number of candidates."""
_LONG_ROLLOUT = 400
"""A rollout with more tokens is shown only around its candidates, with so many tokens on either side:"""
_AROUND = 40
_KINDS = {"fork": "Fork", "alarm": "False alarm", "unknown": "No distance"}


@dataclass(frozen=True)
class Piece:
    """A run of text with one shade: one token, or several of a light shade, or a gap of `skipped` tokens."""

    text: str
    level: int = 0
    loss: float | None = None
    card: int | None = None
    skipped: int = 0

    def joins(self, level: int) -> bool:
        """Whether a token of this light shade can be added."""
        return self.level == level and self.loss is None and self.card is None and not self.skipped


@dataclass(frozen=True)
class Alignment:
    """Two windows side by side, and the plan as links; the page draws them when the candidate is opened.

    Attributes:
        links: (student position, teacher position, share of the student token's mass).
        best: for each student position with mass, the teacher position that has most of it.
        faint: whether links were left out for carrying little mass.
    """

    student: list[str]
    teacher: list[str]
    links: list[tuple[int, int, float]]
    best: dict[int, int]
    same: int
    faint: bool

    @property
    def data(self) -> list[object]:
        """For the page's script: tokens, tokens, [i, j, 1 where the link is weak], [i, best j]."""
        links = [[i, j, int(share < 0.5)] for i, j, share in self.links]
        return [self.student, self.teacher, links, [list(pair) for pair in sorted(self.best.items())]]


@dataclass(frozen=True)
class Card:
    """A candidate on the page. `number` counts within its rollout, `id` on the page."""

    id: int
    number: int
    candidate: Candidate
    before: str
    alignment: Alignment | None

    @property
    def kind(self) -> str:
        """The kind in words."""
        return _KINDS[self.candidate.kind]

    @property
    def token(self) -> str:
        """The candidate's own token, made visible."""
        return visible(self.candidate.token)

    @property
    def decision(self) -> str:
        """What the method did at this token."""
        done = {"": "", "none": "not acted on", "capped": f"loss capped, weight {self.candidate.weight:.2g}"}
        return done.get(self.candidate.decision, self.candidate.decision)


@dataclass(frozen=True)
class Shown:
    """A rollout on the page, with the cards of its candidates by id. `left_out` counts those without one."""

    arm: str
    rollout: Rollout
    pieces: list[Piece]
    cards: dict[int, Card]
    left_out: int

    @property
    def prompt(self) -> str:
        """The prompt, its middle left out if it is long."""
        prompt = self.rollout.prompt
        return prompt if len(prompt) <= 1200 else f"{prompt[:800]} […] {prompt[-300:]}"

    @property
    def title(self) -> str:
        """The heading."""
        return self.rollout.title or f"Step {self.rollout.step:,}"


def choose_rollouts(arms: Sequence[Arm], limit: int) -> list[Shown]:
    """The newest rollouts of all arms with up to `limit` candidates; those with measured distances go first."""

    def order(pair: tuple[Arm, Rollout]) -> tuple[bool, int]:
        measured = any(candidate.distance is not None for candidate in pair[1].candidates)
        return not measured, -pair[1].step

    shown: list[Shown] = []
    cards, tokens = 0, 0
    pairs = [(arm, rollout) for arm in arms for rollout in arm.rollouts]
    for arm, rollout in sorted(pairs, key=order):
        if cards >= limit or tokens >= TOKEN_BUDGET:
            break
        chosen: list[Candidate] = []
        for candidate in rollout.candidates[: limit - cards]:
            tokens += len(candidate.student_window) + len(candidate.teacher_window)
            chosen.append(candidate)
            if tokens >= TOKEN_BUDGET:
                break
        shown.append(_show(arm.name, rollout, chosen, cards))
        cards += max(len(chosen), 1)
        tokens += sum(1 for piece in shown[-1].pieces if piece.level)
    return sorted(shown, key=lambda item: -item.rollout.step)


def _show(arm: str, rollout: Rollout, candidates: list[Candidate], first_id: int) -> Shown:
    cards = {
        first_id + index: Card(first_id + index, index + 1, candidate, _before(rollout, candidate), align(candidate))
        for index, candidate in enumerate(candidates)
    }
    marks = {card.candidate.position: id_ for id_, card in cards.items()}
    return Shown(arm, rollout, _pieces(rollout, marks), cards, len(rollout.candidates) - len(candidates))


def _pieces(rollout: Rollout, marks: dict[int, int]) -> list[Piece]:
    """The response as text, light tokens joined, long stretches without a candidate skipped."""
    length = len(rollout.tokens)
    kept = list(range(length))
    if length > _LONG_ROLLOUT:
        around = {index for mark in marks or {0: 0} for index in range(mark - _AROUND, mark + _AROUND + 1)}
        kept = sorted(around & set(range(length)))
    pieces: list[Piece] = []
    next_ = 0
    for index in kept:
        if index > next_:
            pieces.append(Piece("", skipped=index - next_))
        next_ = index + 1
        text, level = cut(rollout.tokens[index]), shade(rollout.token_loss[index])
        if index in marks:
            text = text if text.strip() else visible(text)
            pieces.append(Piece(text, level, rollout.token_loss[index], marks[index]))
        elif level >= NAMED_FROM:
            pieces.append(Piece(text, level, rollout.token_loss[index]))
        elif pieces and pieces[-1].joins(level):
            pieces[-1] = Piece(pieces[-1].text + text, level)
        else:
            pieces.append(Piece(text, level))
    if length > next_:
        pieces.append(Piece("", skipped=length - next_))
    return pieces


def _before(rollout: Rollout, candidate: Candidate) -> str:
    """The end of the prefix from which both models go on."""
    start, end = max(0, candidate.position - 90), max(0, candidate.position)
    text = ("" if start else rollout.prompt) + "".join(rollout.tokens[start:end])
    return text if len(text) <= 90 else f"…{text[-90:]}"


def align(candidate: Candidate) -> Alignment | None:
    """Both windows and their links: at each student position up to three that carry a tenth of its mass."""
    student, teacher = candidate.student_window, candidate.teacher_window
    if not student and not teacher:
        return None
    rows: dict[int, list[tuple[float, int]]] = {}
    for i, j, mass in candidate.plan:
        if 0 <= i < len(student) and 0 <= j < len(teacher) and mass > 0:
            rows.setdefault(i, []).append((mass, j))
    links, faint = [], False
    for i, row in sorted(rows.items()):
        total = sum(mass for mass, _ in row)
        strong = [(mass / total, j) for mass, j in sorted(row, reverse=True)[:3] if mass >= 0.1 * total]
        faint |= len(strong) < len(row)
        links += [(i, j, share) for share, j in strong]
    best = {i: max(row)[1] for i, row in rows.items()}
    same = sum(student[i] == teacher[j] for i, j in best.items())
    return Alignment([visible(t) for t in student], [visible(t) for t in teacher], links, best, same, faint)


def shade(loss: float | None) -> int:
    """0 (not shaded) to 6, by `LEVELS`."""
    return 0 if loss is None else bisect_right(LEVELS, loss)


def cut(text: str) -> str:
    """A token's text, cut if it is absurdly long."""
    return text if len(text) <= 200 else f"{text[:200]}…"


def visible(text: str) -> str:
    """A single token, so that spaces and line ends can be seen."""
    text = cut(text).replace("\n", "↵").replace("\t", "⇥")
    return text if text.strip(" ") else "␣" * len(text) or "∅"
