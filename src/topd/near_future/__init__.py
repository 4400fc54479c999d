"""Where windows come from, and how they are run through a model.

Read first: `windows`, the data, and `protocol`, what a step asks of student and teacher; a step needs no more of this
package. Both models in this process: `distilled_model`; how they continue prefixes: `continuations`. Below them, how a
transformers model is run: `model_parts`, `branches`, `tree_attention`, `attention_interface`, `recurrent_states`. Which
of these ways are exact for a model: `ways`, `self_check`, `plain_way`. Rollouts are sampled in `sampling`.
"""

from topd.near_future.branches import hidden_with_branches
from topd.near_future.continuations import LocalModel
from topd.near_future.distilled_model import ContinuesPrefixes, DistilledModel
from topd.near_future.ways import ArchitectureError, Ways, ways_of
from topd.near_future.windows import Branches, Places, Prefill, Rollouts, Windows, rollout_windows

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
    "rollout_windows",
    "ways_of",
]
