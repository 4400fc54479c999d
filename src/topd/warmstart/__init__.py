"""Stage 1 of the paper: teacher solutions, and the student's warm start on them."""

from topd.warmstart.config import WarmStartConfig
from topd.warmstart.trainer import WarmStartTrainer

__all__ = ["WarmStartConfig", "WarmStartTrainer"]
