"""Where windows come from, and how they are run through a model."""

from topd.near_future.branches import Branches, hidden_with_branches
from topd.near_future.distilled_model import ContinuesPrefixes, DistilledModel
from topd.near_future.local_model import LocalModel
from topd.near_future.matching import near_future_transport
from topd.near_future.shared_prefix import Prefill
from topd.near_future.ways import ArchitectureError, Ways, ways_of
from topd.near_future.windows import Places, Rollouts, Windows, rollout_windows

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
