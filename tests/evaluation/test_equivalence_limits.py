"""The child that checks answers limits its memory where the system can."""

import sys

import pytest

from topd.evaluation import equivalence


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_no_memory_limit_is_asked_for_where_there_is_none(monkeypatch, system):
    """macOS refuses RLIMIT_AS; Windows has no module `resource` at all."""
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it raises ImportError
    equivalence._limit_memory()


def test_on_linux_it_is(monkeypatch):
    resource, asked = pytest.importorskip("resource"), []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: asked.append(limit))
    equivalence._limit_memory()
    assert asked == [(resource.RLIMIT_AS, (equivalence.MEMORY_BYTES, equivalence.MEMORY_BYTES))]
