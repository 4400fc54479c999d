"""Where windows come from, and how they are run through a model.

Read first: `windows`, the data and the transport between windows; `distilled_model`, a student or teacher;
`continuations`, how it continues prefixes. Below them, how a transformers model is run: `model_parts`, `branches`,
`tree_attention`, `attention_interface`, `recurrent_states`. Which of these ways are exact for a model: `ways`,
`self_check`, `plain_way`. Rollouts are sampled in `sampling`.
"""

from topd.near_future.branches import Branches, Prefill, hidden_with_branches
from topd.near_future.continuations import LocalModel
from topd.near_future.distilled_model import ContinuesPrefixes, DistilledModel
from topd.near_future.ways import ArchitectureError, Ways, ways_of
from topd.near_future.windows import Places, Rollouts, Windows, near_future_transport, rollout_windows

__all__ = [
    "ArchitectureError",
    "Branches",
    "ContinuesPrefixes",
    "DistilledModel",
    "LocalModel",
    "Places",
    "Prefill",
    "Rollouts",
    "Ways",
    "Windows",
    "hidden_with_branches",
    "near_future_transport",
    "rollout_windows",
    "ways_of",
]
