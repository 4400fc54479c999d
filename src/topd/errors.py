"""Errors that end in a message: what is wrong and what to do. The command line prints them without a traceback."""

from __future__ import annotations


class TOPDError(Exception):
    """Base of all errors that a user can mend."""


class DataError(TOPDError, ValueError):
    """A data file cannot be used."""


class TokenizerMismatchError(TOPDError, ValueError):
    """Student and teacher do not share a tokenizer."""


class ContextError(TOPDError, ValueError):
    """Prompt, rollout and window do not fit the context of a model."""


class SavingError(TOPDError, RuntimeError):
    """A checkpoint or another file of a run cannot be written: the disk is full or broken."""


class ResumeError(TOPDError, ValueError):
    """A run cannot go on from a checkpoint: there is no whole one, or it would run code when loaded."""


class NonFiniteError(TOPDError, RuntimeError):
    """A loss or gradient is NaN or infinite; raised before the optimizer moves."""


class ServerError(TOPDError, RuntimeError):
    """The server that a model is on cannot be used, or has gone away."""


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came; a checkpoint is saved. Not a `TOPDError`: nothing is wrong.

    Attributes:
        signal: its number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
