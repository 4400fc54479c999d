"""What one architecture is put through, as a student and as a teacher, against sequences that run alone.

All classes and variants, or those that are named; with --missing those that are not recorded yet; with --states without
training (a fifth of the time):

    python tests/sweep.py docs/architectures.json [--missing] [--states] [subject ...]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny import tiny_trainer
from tiny_architectures import subjects, tiny
from torch import Tensor

from topd.errors import ContextError
from topd.near_future import Branches, DistilledModel, LocalModel, Places, Rollouts
from topd.near_future.model_parts import own_settings_only
from topd.near_future.sampling import SamplingStates
from topd.near_future.ways import ArchitectureError, Ways, ways_of
from topd.training import TOPDTrainer

EOS, LENGTH = 1, 5
METHODS = {
    "opd": {"method": "opd", "opd_loss": "trl"},
    "opd-capped": {"method": "opd-capped", "student_window": "regenerated"},
    "topd": {"method": "topd", "student_window": "regenerated"},
}
PROMPTS = ["2+(3*4)=", "7=", "1+1=", "5*(6+7)*8="]


def row_of(name: str, training: bool = True) -> dict[str, str]:
    """Examine a subject: its row of the table.

    Raises:
        AssertionError: something is wrong.
    """
    row = {"class": name, "examined": "states, training" if training else "states"}
    try:
        student = tiny(name, 0)
    except Exception as error:
        return row | {"way": "not built", "why": in_a_line(error), "examined": ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ways = ways_of(student)
    except ArchitectureError as error:
        return row | {"way": "refused", "why": str(error)}
    try:
        examine_states(student)
    except ContextError as error:
        assert ways.end is not None, "rows are refused without an end"
        return row | {"way": "refused", "why": f"rows longer than {ways.end} tokens: {error}"}
    if training and ways.trains:
        teacher = tiny(name, 1)
        for method in METHODS:
            examine_training(student, teacher, method, PROMPTS)
        examine_training(student, teacher, "topd", PROMPTS[:1] * 4)
    return row | {"way": in_words(ways), "why": why(ways), "trl": ways.trl}


def in_words(ways: Ways) -> str:
    whole = ways.shared_prefix and ways.packed_rows and ways.left_padding
    return "shared" if whole else "plain" if not (ways.shared_prefix or ways.packed_rows) else "partly shared"


def why(ways: Ways) -> str:
    plain = {
        "windows": bool(ways.shared_prefix),
        "guided windows": bool(ways.packed_rows),
        "states from sampling": bool(ways.sampling_states),
        "left padding": ways.left_padding,
        "training (a teacher only)": ways.trains,
    }
    return ", ".join(name for name, exact in plain.items() if not exact)


def examine_states(model: Any) -> None:
    """States, windows, guided windows with gradients, and sampling, with left padding and without."""
    pair = DistilledModel(model, LocalModel(model, 0, [EOS]))
    for prompts, places in (((4, 7, 6), [(0, 0), (0, 6), (2, 9)]), ((5, 5, 5), [(1, 3)])):
        rollouts = rollouts_of(model, prompts)
        logits = pair.head().logits(pair.hidden(rollouts))
        for row in range(3):
            close(logits[row][rollouts.response_mask[row].bool()], predictions(model, rollouts, row), "states")
        examine_windows(pair, rollouts, pair.prefill(rollouts), places)
        examine_guided_windows(pair, rollouts)
        examine_sampling(pair, rollouts)


def examine_windows(pair: DistilledModel, rollouts: Rollouts, reading: Any, places: list[tuple[int, int]]) -> None:
    """Windows equal `generate` on each prefix alone, and that equals forward passes without a cache."""
    rows, positions = torch.tensor(places).unbind(1)
    greedy = pair.head().logits(reading.hidden).argmax(-1)
    windows = pair.continue_(Places(rollouts, rows, positions), LENGTH, replace(reading, greedy=greedy))
    for row, position, tokens, mask in zip(rows, positions, windows.tokens, windows.mask, strict=True):
        prefix = rollouts.prefix(int(row), int(position))
        alone = generated(pair.model, prefix[None], torch.ones_like(prefix)[None])[0]
        assert tokens[mask].tolist() == alone[: int(mask.sum())].tolist(), "windows differ from generate"
        assert tokens[mask].tolist() == greedy_alone(pair.model, prefix, int(mask.sum())), "generate is wrong"


def examine_guided_windows(pair: DistilledModel, rollouts: Rollouts) -> None:
    """States of windows behind their rollout, and gradients, equal those of separate sequences."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, pair.model.config.get_text_config().vocab_size, (3, 2, 4), generator=generator)
    branches = Branches(torch.tensor([[0, 7], [2, 4], [5, 9]]), tokens, torch.ones_like(tokens).bool())
    parameters = [p for p in pair.model.parameters() if p.requires_grad]
    _, states = pair.hidden_and_windows(rollouts, branches)
    logits = pair.head().logits(states)
    alone = [window_logits(pair.model, rollouts, branches, row, slot) for row in range(3) for slot in range(2)]
    expected = torch.stack(alone).unflatten(0, (3, 2))
    close(logits, expected, "guided windows")
    if not pair.ways.trains:
        return
    gradients = [
        torch.autograd.grad(x.log_softmax(-1)[..., 5].sum(), parameters, allow_unused=True) for x in (logits, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        if theirs is not None and float(theirs.norm()) > 1e-3:
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-2, "gradients of guided windows differ"


def examine_sampling(pair: DistilledModel, rollouts: Rollouts) -> None:
    """What is kept from sampling equals a scoring pass, or is not used."""
    states = SamplingStates()
    if not pair.ways.left_padding and not bool(rollouts.prompt_mask.all()):
        return  # such prompts are sampled group by group
    with states.keeping(pair.model):
        response = generated(pair.model, rollouts.prompt_ids, rollouts.prompt_mask, new=12, eos=None)
    ones = torch.ones_like(response)
    sampled = Rollouts(rollouts.prompt_ids, rollouts.prompt_mask, response, ones, ones)
    reading = pair.sampled(sampled, states, keep_prefix=True)
    if reading is not None:
        logits = pair.head().logits(reading.hidden)
        for row in range(3):
            close(logits[row], predictions(pair.model, sampled, row), "states from sampling")
        examine_windows(pair, sampled, reading, [(0, 2), (1, 11)])


def examine_training(student: Any, teacher: Any, method: str, texts: list[str]) -> None:
    """Two steps; the loss of plain OPD is that of the sequences alone."""
    data = Dataset.from_list([{"prompt": text} for text in texts])

    class Examined(TOPDTrainer):
        def _compute_loss(self, unwrapped: Any, inputs: Any, number: Any) -> Any:
            found = super()._compute_loss(unwrapped, inputs, number)
            if method == "opd":
                expected = opd_loss_alone(unwrapped, self.teacher_model, inputs) / number
                assert abs(float(found[0]) - float(expected)) < 1e-3 * float(expected), "loss of OPD"
            return found

    before = [p.detach().clone() for p in student.parameters()]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = tiny_trainer(
            Path(folder), Examined, data, student=student, teacher=teacher, max_steps=2, max_completion_length=12,
            window_length=4, learning_rate=1e-5, **METHODS[method],
        )  # fmt: skip
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2, "two steps"
    assert all(torch.tensor(losses).isfinite()), "losses are finite"
    assert any(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True)), "nothing was trained"
    student.eval()


# What is true: every sequence alone


def predictions(model: Any, rollouts: Rollouts, row: int) -> Tensor:
    """[position, vocabulary] logits that predict a response."""
    length = int(rollouts.response_mask[row].sum())
    ids = rollouts.prefix(row, length)
    return model(input_ids=ids[None], use_cache=False).logits[0, len(ids) - length - 1 : -1]


def window_logits(model: Any, rollouts: Rollouts, branches: Branches, row: int, slot: int) -> Tensor:
    prefix = rollouts.prefix(row, int(branches.position[row, slot]))
    ids = torch.cat([prefix, branches.tokens[row, slot, :-1]])
    return model(input_ids=ids[None], use_cache=False).logits[0, -branches.tokens.shape[-1] :]


@torch.no_grad()
def opd_loss_alone(student: Any, teacher: Any, batch: dict[str, Tensor]) -> Tensor:
    """Sum over response tokens of KL(student || teacher)."""
    rollouts = Rollouts(
        batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"],
        batch["completion_mask"],
    )  # fmt: skip
    loss = torch.zeros(())
    for row in range(len(rollouts)):
        ours, theirs = (predictions(model, rollouts, row).float().log_softmax(-1) for model in (student, teacher))
        loss = loss + (ours.exp() * (ours - theirs)).sum()
    return loss


def generated(model: Any, ids: Tensor, mask: Tensor, new: int = LENGTH, eos: int | None = EOS) -> Tensor:
    with own_settings_only(model):  # some configs force a last token
        output = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=eos, pad_token_id=0
        )
    return output[:, ids.shape[1] :]


@torch.no_grad()
def greedy_alone(model: Any, ids: Tensor, new: int) -> list[int]:
    """The most likely next tokens, each from a forward pass over everything before."""
    for _ in range(new):
        following = model(input_ids=ids[None], use_cache=False).logits[0, -1:].argmax(-1)
        ids = torch.cat([ids, following])
    return ids[-new:].tolist()


def rollouts_of(model: Any, prompts: tuple[int, ...]) -> Rollouts:
    """Random prompts and responses; one response is shorter."""
    generator = torch.Generator().manual_seed(1)
    vocabulary, longest = model.config.get_text_config().vocab_size, max(prompts)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in prompts])
    response_mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3, [1] * 12])
    ids = torch.randint(3, vocabulary, (3, longest), generator=generator) * mask
    response = torch.randint(3, vocabulary, (3, 12), generator=generator) * response_mask
    return Rollouts(ids, mask, response, response_mask, response_mask)


def close(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal up to rounding, as a share of how far the logits of different tokens lie apart."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1).mean()
    difference = float((found - expected).norm(dim=-1).max() / spread)
    assert difference < 2e-3, f"{what} differ by {difference:.2g}"


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def main() -> None:
    """Write the record after each subject; what is there of others is kept."""
    parser = argparse.ArgumentParser()
    parser.add_argument("record", type=Path)
    parser.add_argument("subjects", nargs="*", default=None)
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--states", action="store_true")
    asked = parser.parse_args()
    record: Path = asked.record
    rows = {row["class"]: row for row in json.loads(record.read_text())} if record.exists() else {}
    chosen = [name for name in asked.subjects or subjects() if not (asked.missing and name in rows)]
    for name in chosen:
        try:
            rows[name] = row_of(name, training=not asked.states)
        except Exception as error:
            rows[name] = {"class": name, "examined": "", "way": "wrong", "why": in_a_line(error)}
        print(name, rows[name]["way"], rows[name]["why"][:200], flush=True)
        record.write_text(json.dumps([rows[name] for name in sorted(rows)], indent=1) + "\n")


if __name__ == "__main__":
    main()
