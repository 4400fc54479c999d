"""The paper's algorithm as pure functions on tensors. Imports torch and a solver only.

In the paper's order: `token_loss`, `forks` (candidates, forks and capping), `transport`, `guidance`. The loss of a
training step is `distillation_loss`; it and the token loss work on the tiles of `vocabulary`.
"""

from topd.algorithm.distillation_loss import DistillationLoss, distillation_loss, known_token_loss, prefix_weights
from topd.algorithm.forks import (
    cap_weights,
    false_alarm_threshold,
    highest_loss,
    is_fork,
    low_loss_threshold,
    select_for_capping,
)
from topd.algorithm.guidance import (
    Targets,
    likelihood_terms,
    make_targets,
    negative_entropy,
    own_token_share,
    position_weights,
    rescale_rows,
    trajectory_loss,
)
from topd.algorithm.token_loss import (
    KnownTokens,
    TokenScores,
    gathered_log_probs,
    known_token_kl,
    score_known_tokens,
    score_tokens,
    token_kl,
    top_k_overlap,
)
from topd.algorithm.transport import Transport, entropic_transport, exact_transport, ground_cost, token_cost
from topd.algorithm.vocabulary import Head, LikelihoodTerms

__all__ = [
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
    "prefix_weights",
    "rescale_rows",
    "score_known_tokens",
    "score_tokens",
    "select_for_capping",
    "token_cost",
    "token_kl",
    "top_k_overlap",
    "trajectory_loss",
]
