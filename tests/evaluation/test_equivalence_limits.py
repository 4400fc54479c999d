"""The child that checks answers limits its memory where the system can, and its processor time."""

import itertools
import signal
import sys
import time

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


def test_on_a_busy_machine_an_answer_has_the_same_time(monkeypatch):
    """A limit by the clock, as math-verify's, would count a right answer as unparsed when the machine is busy."""
    monkeypatch.setattr(signal, "alarm", None)
    assert equivalence._compare(r"\frac{1}{2}", r"\frac{2}{4}") is True
    with equivalence._processor_time(0.1, TimeoutError):
        time.sleep(0.2)
    with pytest.raises(TimeoutError), equivalence._processor_time(0.1, TimeoutError):
        any(number < 0 for number in itertools.count())
