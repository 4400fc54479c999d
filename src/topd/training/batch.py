"""How rollouts, the teacher's states and the guided windows travel with TRL's batch from sampling to the loss."""

from typing import Any

from torch import Tensor

from topd.near_future import Branches, Rollouts
from topd.training.losses import Guided

TEACHER = "teacher_number"
"""Entry [rollout] of the batch that says which of several teachers each rollout has."""
TEACHER_PROMPT_ENTRIES = ("teacher_prompt_ids", "teacher_prompt_mask")
"""Entries [rollout, prompt_position] of the batch that hold the teacher's own prompts, as in `Rollouts`."""
_STATES = {name: f"teacher_{name}" for name in ("hidden", "tokens", "log_probs")}
"""Entries of the batch that hold the teacher's `Prefill.states`."""
_GUIDED = "guided_"
"""Prefix of the entries that hold a `Guided`."""


def rollouts_of(batch: dict[str, Any]) -> Rollouts:
    """The rollouts of TRL's batch."""
    mask = batch["completion_mask"]
    loss_mask = mask * batch["tool_mask"] if "tool_mask" in batch else mask
    ids = batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"]
    return Rollouts(*ids, mask, loss_mask, batch.get(TEACHER), *map(batch.get, TEACHER_PROMPT_ENTRIES))


def pack(guided: Guided) -> dict[str, Tensor]:
    """As entries of the batch, all [rollout, ...], so that TRL can shuffle and split them."""
    entries = {
        "position": guided.branches.position,
        "window": guided.branches.tokens,
        "mask": guided.branches.mask,
        "weight": guided.weight,
        "tokens": guided.tokens,
        "teacher_hidden": guided.teacher_hidden,
    }
    return {_GUIDED + name: value for name, value in entries.items() if value is not None}


def unpack(batch: dict[str, Any]) -> Guided | None:
    """From the entries of the batch; None if it has none."""
    entry = {name.removeprefix(_GUIDED): value for name, value in batch.items() if name.startswith(_GUIDED)}
    if not entry:
        return None
    branches = Branches(entry["position"], entry["window"], entry["mask"])
    return Guided(branches, entry["weight"], entry["tokens"], entry.get("teacher_hidden"))


def pack_states(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """The teacher's `Prefill.states` as entries of the batch."""
    return {_STATES[name]: values for name, values in states.items()}


def unpack_states(batch: dict[str, Any]) -> dict[str, Tensor]:
    """The teacher's `Prefill.states` from the batch."""
    return {name: batch[entry] for name, entry in _STATES.items() if entry in batch}


def in_order(batch: dict[str, Any], order: Tensor) -> dict[str, Any]:
    """The rows of a batch in another order: of its tensors and lists [rollout, ...]; scalars stay."""

    def moved(values: Any) -> Any:
        if values is None or (isinstance(values, Tensor) and values.ndim == 0):
            return values
        return values[order] if isinstance(values, Tensor) else [values[index] for index in order.tolist()]

    return {name: moved(values) for name, values in batch.items()}
