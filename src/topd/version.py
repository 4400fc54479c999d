"""Versions: of the package, and of the records that one part writes and another reads."""

__version__ = "0.1.0"

STUDY_VERSION = 2
"""Of `study.json`. The report reads older ones too, `topd study --show` this one alone."""
