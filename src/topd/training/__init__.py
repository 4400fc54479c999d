"""TOPD on TRL: `step` is the method, with its choices in `method` and its losses in `losses`; the rest is training."""

from topd.training.config import TOPDConfig
from topd.training.trainer import TOPDTrainer

__all__ = ["TOPDConfig", "TOPDTrainer"]
