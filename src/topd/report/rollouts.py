"""Rollouts and their candidates, and what the page shows of them: shaded text, both futures and their alignment."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from topd.report.reading import clean, number, strings

if TYPE_CHECKING:
    from topd.report.records import Arm

LEVELS = (0.05, 0.2, 0.5, 1.0, 2.0, 4.0)
"""Token losses, in nats, from which the next darker shade begins."""

NAMED_FROM = 3
"""Tokens from this shade on carry their loss; neighbours of a lighter shade are one piece."""
TOKEN_BUDGET = 300_000
"""Tokens shown on the whole page (about 15 bytes each), whatever the number of candidates."""
_LONG_ROLLOUT = 400
"""A rollout with more tokens is shown only around its candidates, with so many tokens on either side:"""
_AROUND = 40
_KINDS = {"fork": "Fork", "alarm": "False alarm", "unknown": "No distance"}


@dataclass(frozen=True)
class Candidate:
    """A high-loss position, and what became of it. `distance` (D_OT) is None where it was not measured."""

    position: int
    token: str
    token_loss: float | None
    distance: float | None
    fork: bool
    decision: str = "none"
    weight: float = 1.0
    student_window: tuple[str, ...] = ()
    teacher_window: tuple[str, ...] = ()
    plan: tuple[tuple[int, int, float], ...] = ()  # student position, teacher position, mass
    teacher_nll: float | None = None  # -log p_T of the token, nats; a probe records it

    @property
    def kind(self) -> str:
        """fork, alarm (a false alarm), or unknown if there is no distance."""
        if self.distance is None:
            return "unknown"
        return "fork" if self.fork else "alarm"


@dataclass(frozen=True)
class Rollout:
    """One audited response: text and token loss (nats, None where not finite) of each token, and its candidates."""

    step: int
    method: str
    prompt: str
    tokens: tuple[str, ...]
    token_loss: tuple[float | None, ...]
    candidates: tuple[Candidate, ...]
    title: str = ""  # heading on the page; empty: the step

    @property
    def heading(self) -> str:
        return self.title or f"Step {self.step:,}"


def candidate_of(record: Mapping[str, Any], decision: str = "none") -> Candidate:
    """A candidate from its record; `decision`: where none is recorded."""
    weight = number(record.get("weight"))
    return Candidate(
        position=int(record["position"]),
        token=clean(record.get("token") or ""),
        token_loss=number(record.get("token_loss")),
        distance=number(record.get("distance")),
        fork=bool(record.get("fork")),
        decision=clean(record.get("decision") or decision),
        weight=1.0 if weight is None else weight,
        student_window=strings(record.get("student_window")),
        teacher_window=strings(record.get("teacher_window")),
        plan=tuple((int(i), int(j), mass) for i, j, value in record.get("plan") or () if (mass := number(value))),
        teacher_nll=number(record.get("teacher_nll")),
    )


def point_of(candidate: Candidate) -> Candidate:
    """A candidate without its windows, which take most of the memory."""
    return replace(candidate, student_window=(), teacher_window=(), plan=())


def rollout_of(
    record: Mapping[str, Any], response: Mapping[str, Any], candidates: Sequence[Candidate], title: str = ""
) -> Rollout:
    """A rollout from its record and the part of it that holds tokens and losses."""
    tokens = strings(response.get("tokens"))
    losses = [number(loss) for loss in response.get("token_loss") or ()][: len(tokens)]
    return Rollout(
        step=int(record.get("step") or 0),
        method=clean(record.get("method") or ""),
        prompt=clean(record.get("prompt") or ""),
        tokens=tokens,
        token_loss=(*losses, *[None] * (len(tokens) - len(losses))),
        candidates=tuple(candidates),
        title=title,
    )


@dataclass(frozen=True)
class Piece:
    """A run of text with one shade: one token, or several of a light shade, or a gap of `skipped` tokens."""

    text: str
    level: int = 0
    loss: float | None = None
    card: int | None = None
    skipped: int = 0


@dataclass(frozen=True)
class Alignment:
    """Two windows side by side, and the plan as links; the page draws them when the candidate is opened."""

    student: list[str]
    teacher: list[str]
    links: list[tuple[int, int, float]]  # student position, teacher position, share of the student token's mass
    best: dict[int, int]  # by student position with mass, the teacher position that has most of it
    same: int
    faint: bool  # whether links were left out for carrying little mass

    @property
    def data(self) -> list[object]:
        """For the page's script: tokens, tokens, [i, j, 1 where the link is weak], [i, best j]."""
        links = [[i, j, int(share < 0.5)] for i, j, share in self.links]
        return [self.student, self.teacher, links, [list(pair) for pair in sorted(self.best.items())]]


@dataclass(frozen=True)
class Card:
    """A candidate on the page. `rank`: from 1, by distance, largest first; `place`: of its rollout on the page."""

    rank: int
    place: int
    arm: str
    rollout: Rollout
    candidate: Candidate
    alignment: Alignment | None

    @property
    def kind(self) -> str:
        """The kind in words."""
        return _KINDS[self.candidate.kind]

    @property
    def token(self) -> str:
        return visible(self.candidate.token)

    @property
    def decision(self) -> str:
        """What the method did at this token."""
        done = {"": "", "none": "not used", "capped": f"loss capped, weight {self.candidate.weight:.2g}"}
        return done.get(self.candidate.decision, self.candidate.decision)

    @property
    def before(self) -> str:
        """The end of the prefix from which both models continue."""
        start, end = max(0, self.candidate.position - 90), max(0, self.candidate.position)
        text = ("" if start else self.rollout.prompt) + "".join(self.rollout.tokens[start:end])
        return text if len(text) <= 90 else f"…{text[-90:]}"


@dataclass(frozen=True)
class Shown:
    """A rollout on the page, with the cards of its candidates by rank. `left_out` counts those without one."""

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


def choose_rollouts(arms: Sequence[Arm], limit: int) -> list[Shown]:
    """The newest rollouts of all arms with up to `limit` candidates; those with measured distances go first."""

    def order(pair: tuple[Arm, Rollout]) -> tuple[bool, int]:
        measured = any(candidate.distance is not None for candidate in pair[1].candidates)
        return not measured, -pair[1].step

    chosen: list[tuple[Arm, Rollout, list[Candidate]]] = []
    count, tokens = 0, 0
    pairs = [(arm, rollout) for arm in arms for rollout in arm.rollouts]
    for arm, rollout in sorted(pairs, key=order):
        if count >= limit or tokens >= TOKEN_BUDGET:
            break
        candidates: list[Candidate] = []
        for candidate in rollout.candidates[: limit - count]:
            tokens += len(candidate.student_window) + len(candidate.teacher_window)
            candidates.append(candidate)
            if tokens >= TOKEN_BUDGET:
                break
        chosen.append((arm, rollout, candidates))
        count += max(len(candidates), 1)
        tokens += sum(1 for loss in rollout.token_loss[:_LONG_ROLLOUT] if shade(loss))
    return _ranked(sorted(chosen, key=lambda item: -item[1].step))


def _ranked(chosen: Sequence[tuple[Arm, Rollout, list[Candidate]]]) -> list[Shown]:
    """Rank all candidates by distance, largest first, those without one last; then show their rollouts."""
    places = [(place, candidate) for place, (_, _, candidates) in enumerate(chosen) for candidate in candidates]
    places.sort(key=lambda pair: (pair[1].distance is None, -(pair[1].distance or 0.0)))
    cards: list[dict[int, Card]] = [{} for _ in chosen]
    for rank, (place, candidate) in enumerate(places, 1):
        arm, rollout, _ = chosen[place]
        cards[place][rank] = Card(rank, place, arm.name, rollout, candidate, align(candidate))
    shown = []
    for (arm, rollout, candidates), own in zip(chosen, cards, strict=True):
        marks = {card.candidate.position: rank for rank, card in own.items()}
        left_out = len(rollout.candidates) - len(candidates)
        shown.append(Shown(arm.name, rollout, _pieces(rollout, marks), own, left_out))
    return shown


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
        elif pieces and pieces[-1] == Piece(pieces[-1].text, level):  # neither named nor a gap
            pieces[-1] = Piece(pieces[-1].text + text, level)
        else:
            pieces.append(Piece(text, level))
    if length > next_:
        pieces.append(Piece("", skipped=length - next_))
    return pieces


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
