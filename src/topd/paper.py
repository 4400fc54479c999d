"""What the paper reports for its own pair (Qwen3-30B-A3B to Qwen3-4B): shown beside a run's figures, never a target."""

GROUPS = {"high": "high-loss", "random": "random", "low": "low-loss"}
"""Groups of positions in section 2.1, in words."""
PROBE = {
    "high": 0.566,
    "random": 0.361,
    "low": 0.315,
    "false_alarm_share": 0.2923,
    "pearson": 0.126,
    "spearman": 0.143,
}
"""Median D_OT at high-loss, random and low-loss tokens; share of high-loss tokens that are false alarms; correlations
of token loss and D_OT (sections 2.1 and A)."""

CORRELATIONS = {
    "pearson": "Pearson, token loss and D_OT",
    "spearman": "Spearman, token loss and D_OT",
    "pearson_nll": "Pearson, teacher's NLL and D_OT",
    "spearman_nll": "Spearman, teacher's NLL and D_OT",
}
"""Over high-loss positions. Section 2.1 says "token loss"; Fig. 6 has "teacher token loss" on its x axis, which we read
as the teacher's NLL of the sampled token."""

NEAR_ZERO = 0.02
"""D_OT below this is in the first bin of Fig. 2a (40 bins up to 0.82)."""
NEAR_ZERO_SHARES = {"high": 0.002, "random": 0.08, "low": 0.11}
"""Share of each group in that bin, read off the figure."""

MEAN = "mean"
"""The column of the mean over benchmarks."""
TABLE_1 = {
    "Qwen3-4B, warm start": {"aime24": 46.7, "aime25": 40.0, "hmmt25": 30.0, MEAN: 38.9},
    "+ OPD": {"aime24": 60.0, "aime25": 46.7, "hmmt25": 36.7, MEAN: 47.8},
    "+ TOPD": {"aime24": 63.3, "aime25": 53.3, "hmmt25": 40.0, MEAN: 52.2},
}
"""Table 1: points, 30 problems each, pass@1 averaged over five runs, no intervals given."""

LOCAL_CORRECTION = {"before": 0.538} | dict.fromkeys(("opd", "opd on teacher"), 0.350) | dict.fromkeys(
    ("topd", "topd on teacher"), 0.204
)  # fmt: skip
"""Mean D_OT at 1,000 forks, before and after 5 steps (section 5.2): on the student's window, or on the teacher's
continuation, since the text can be read in both ways."""
