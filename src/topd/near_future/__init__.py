"""Where windows come from, and how they are run through a model."""

from topd.near_future.branches import Branches, hidden_with_branches
from topd.near_future.continuations import LocalModel, Prefill
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
