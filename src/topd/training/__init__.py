"""TOPD on TRL."""

from topd.training.config import TOPDConfig
from topd.training.trainer import TOPDTrainer

__all__ = ["TOPDConfig", "TOPDTrainer"]
