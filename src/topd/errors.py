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


class NonFiniteError(TOPDError, RuntimeError):
    """A loss or gradient is NaN or infinite; raised before the optimizer moves."""


class TeacherServerError(TOPDError, RuntimeError):
    """The server that the teacher is on cannot be used, or has gone away."""
