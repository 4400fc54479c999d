"""TOPD: trajectory-aware on-policy distillation (arXiv:2606.00305). This module is the public surface.

`TOPDConfig` and `TOPDTrainer` run it on TRL; the functions of `topd.algorithm` are the method itself. Everything is
imported on first use, so that `import topd` costs nothing.
"""

from importlib import import_module
from typing import Any

from topd.version import __version__

_TRAINING = ("TOPDConfig", "TOPDTrainer")
_ALGORITHM = (
    "DistillationLoss",
    "Head",
    "KnownTokens",
    "LikelihoodTerms",
    "Targets",
    "TokenScores",
    "Transport",
    "cap_weights",
    "distillation_loss",
    "entropic_transport",
    "exact_transport",
    "false_alarm_threshold",
    "gathered_log_probs",
    "ground_cost",
    "highest_loss",
    "is_fork",
    "known_token_kl",
    "known_token_loss",
    "likelihood_terms",
    "low_loss_threshold",
    "make_targets",
    "negative_entropy",
    "own_token_share",
    "position_weights",
    "rescale_rows",
    "score_known_tokens",
    "score_tokens",
    "select_for_capping",
    "token_cost",
    "token_kl",
    "token_kl_from_hidden",
    "token_nll",
    "trajectory_loss",
)
_HOME = dict.fromkeys(_TRAINING, "topd.training") | dict.fromkeys(_ALGORITHM, "topd.algorithm")

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'topd' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
