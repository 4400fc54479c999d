"""`preset: paper`."""

from __future__ import annotations

from dataclasses import fields

import pytest

from topd.training.config import PAPER_PRESET, TOPDConfig, choices


def config(tmp_path, **options):
    return TOPDConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, **options)


def test_the_preset_is_the_paper_whatever_the_defaults(tmp_path, monkeypatch):
    defaults = {name: another(name, value) for name, value in PAPER_PRESET.items()}
    for option in fields(TOPDConfig):
        if option.name in defaults:
            monkeypatch.setattr(option, "default", defaults[option.name])  # as if it had become our default
    found = config(tmp_path, preset="paper", **defaults)
    assert {name: getattr(found, name) for name in PAPER_PRESET} == PAPER_PRESET


def another(name, value):
    """A value that the option may have too."""
    if name in choices():
        return next(each for each in choices()[name] if each != value)
    return not value if isinstance(value, bool) else value + (1 if isinstance(value, int) else 0.25)


def test_what_the_user_sets_wins(tmp_path):
    found = config(tmp_path, preset="paper", window_length=16, candidate_count=3, guidance_weight=0.5)
    assert (found.window_length, found.candidate_count, found.candidate_share) == (16, 3, None)
    assert (found.guidance_weight, found.ground_cost) == (0.5, "cosine")


def test_an_unknown_preset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="preset must be one of none, paper"):
        config(tmp_path, preset="papers")
