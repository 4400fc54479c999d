"""The paper's algorithm as pure functions on tensors, one idea per file. Imports torch and a solver only."""

from topd.algorithm.candidates import highest_loss
from topd.algorithm.distillation_loss import DistillationLoss, distillation_loss
from topd.algorithm.downweighting import cap_weights, select_for_capping
from topd.algorithm.forks import false_alarm_threshold, is_fork, low_loss_threshold
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
from topd.algorithm.head import Head
from topd.algorithm.known_tokens import KnownTokens, known_token_kl, known_token_loss, score_known_tokens
from topd.algorithm.overlap import top_k_overlap
from topd.algorithm.stale_prefixes import prefix_weights
from topd.algorithm.tiles import LikelihoodTerms
from topd.algorithm.token_loss import TokenScores, gathered_log_probs, score_tokens, token_kl
from topd.algorithm.transport import Transport, entropic_transport, exact_transport, ground_cost, token_cost

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
