"""Where windows come from, and how they are run through a model."""

from topd.near_future.branches import Branches, hidden_with_branches, supports_branches
from topd.near_future.local_model import LocalModel
from topd.near_future.sources import ContinuesPrefixes
from topd.near_future.windows import Rollouts, Windows, rollout_windows

__all__ = [
    "Branches",
    "ContinuesPrefixes",
    "LocalModel",
    "Rollouts",
    "Windows",
    "hidden_with_branches",
    "rollout_windows",
    "supports_branches",
]
