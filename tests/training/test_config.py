"""`preset: paper`."""

from __future__ import annotations

from dataclasses import fields

import pytest

from topd.training.config import PAPER_PRESET, TOPDConfig


def config(tmp_path, **options):
    return TOPDConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, **options)


def test_the_preset_is_the_paper_whatever_the_defaults(tmp_path, monkeypatch):
    found = config(tmp_path, preset="paper")
    assert {name: getattr(found, name) for name in PAPER_PRESET} == PAPER_PRESET
    window = next(option for option in fields(TOPDConfig) if option.name == "student_window")
    monkeypatch.setattr(window, "default", "rollout")  # as if it had become our default
    assert config(tmp_path, preset="paper", student_window="rollout").student_window == "regenerated"


def test_what_the_user_sets_wins(tmp_path):
    found = config(tmp_path, preset="paper", window_length=16, candidate_count=3, guidance_weight=0.5)
    assert (found.window_length, found.candidate_count, found.candidate_share) == (16, 3, None)
    assert (found.guidance_weight, found.ground_cost) == (0.5, "cosine")


def test_an_unknown_preset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="preset must be one of none, paper"):
        config(tmp_path, preset="papers")
