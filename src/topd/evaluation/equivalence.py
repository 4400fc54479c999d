"""Whether two answers are mathematically equal: the package math-verify, in a child process that can be killed.

math-verify limits its time with a signal, which works only in the main thread and cannot stop a loop inside C (the
power in `9^{9^{9}}`). A child process can be stopped from any thread, and its memory can be limited.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from topd.errors import TOPDError, install

SOFT_SECONDS = 10.0
"""Limit of processor time for one answer. math-verify's own limit is by the clock, so that on a busy machine right
answers would count as not comparable."""
HARD_SECONDS = 60.0
"""After this, by the clock, the process is killed and the answer counts as not comparable."""
START_SECONDS = 120.0
MEMORY_BYTES = 4 << 30


def same_answer(wanted: str, given: str) -> bool | None:
    """Whether `given` equals `wanted`, both LaTeX without a box; None if the comparison ran out of time.

    A set, interval or equation may be written in any equivalent way. Raises `TOPDError` if math-verify is missing, or
    its process does not start.
    """
    return _process(os.getpid()).ask(wanted, given)


def check_installed() -> None:
    """Raise `TOPDError` without math-verify. Called before sampling starts."""
    if importlib.util.find_spec("math_verify") is None:
        raise TOPDError(f"Checking mathematical answers needs math-verify: {install('eval')}.")


@lru_cache(maxsize=1)
def _process(owner: int) -> _Process:
    """One per process: a fork must not share its parent's pipes."""
    check_installed()
    process = _Process()
    atexit.register(process.stop)
    return process


class _Process:
    """Asks a child process, one question at a time; a child that takes too long is killed and replaced."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def ask(self, wanted: str, given: str) -> bool | None:
        with self._lock:
            child = self._child or self._start()
            assert child.stdin is not None
            child.stdin.write(json.dumps([wanted, given]).encode() + b"\n")
            answer = _line(child, HARD_SECONDS)
            if answer is None:
                self.stop()
            return None if answer is None else json.loads(answer)

    def _start(self) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(
            [sys.executable, "-m", __name__], bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._child = child
        if _line(child, START_SECONDS) is None:
            self.stop()
            raise TOPDError(
                "The process that checks answers does not start. Run `python -c 'import math_verify, topd'` to see why."
            )
        return child

    def stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()


def _line(child: subprocess.Popen[bytes], seconds: float) -> bytes | None:
    """The next line that the child writes, or None if there is none within this time or the child has ended."""
    assert child.stdout is not None
    if not select.select([child.stdout], [], [], seconds)[0]:
        return None
    return child.stdout.readline() or None


def _compare(wanted: str, given: str) -> bool | None:
    """In the child: math-verify's verdict, None where the given answer does not parse or time runs out."""
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.errors import TimeoutException

    boxed = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    try:
        with _processor_time(SOFT_SECONDS, TimeoutException):
            expected, found = (
                parse(rf"\boxed{{{_readable(text)}}}", boxed, parsing_timeout=0, raise_on_error=True)
                for text in (wanted, given.rstrip(". "))  # the sentence's end
            )
            if not found:
                return None
            same = verify(
                expected, found, timeout_seconds=0, raise_on_error=True,
                allow_set_relation_comp=True,  # an interval may be written as an inequality
            )  # fmt: skip
            return bool(same)
    except (TimeoutException, MemoryError):
        return None
    except Exception:  # sympy may raise anything for values that cannot be compared: they differ
        return False


@contextmanager
def _processor_time(seconds: float, error: type[BaseException]) -> Iterator[None]:
    """Raise `error` after this much processor time. Windows has no such timer: there only `HARD_SECONDS` holds."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise error

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def _readable(text: str) -> str:
    """What math-verify misreads or cannot read: a number such as 1e-5, spaces between thousands, the degree sign."""
    text = re.sub(r"(?<=\d)(?:\\[,;: ])+(?=\d{3}(?!\d))", "", text.replace("°", r"^\circ"))
    number = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+))[eE]([+-]?\d+)", text.strip())
    return rf"{number[1]}\times 10^{{{number[2]}}}" if number else text


def _compare_numbers_exactly() -> None:
    """In the child: make math-verify compare fractions exactly, and other numbers below 0.001 by their ratio.

    It compares by the difference, to six or fifteen decimal places, so that 1/2004! would equal 1/2006!.
    """
    from math_verify import grader

    equal = grader.sympy_numeric_eq

    def exactly(a: Any, b: Any, *settings: Any) -> bool:
        return bool(equal(a, b, *settings)) and not _apart(a, b)

    grader.sympy_numeric_eq = exactly  # type: ignore[assignment]


def _apart(a: Any, b: Any) -> bool:
    """Whether both are fractions that differ, or numbers below 0.001 that differ by more than a millionth of the larger
    one."""
    try:
        numbers = [number.doit() for number in (a, b)]
        if all(number.is_Rational for number in numbers) and not (_has_percent(a) or _has_percent(b)):
            return bool(numbers[0] != numbers[1])
        values = [number.evalf(15) for number in numbers]
        if not all(value.is_comparable or value.is_zero for value in values):  # not a number, or not recognized as 0
            return False
        largest = max(map(abs, values))
        return bool(largest < 1e-3 and abs(values[0] - values[1]) > 1e-6 * largest)
    except (AttributeError, TypeError, ValueError):  # a matrix, a set
        return False


def _has_percent(number: Any) -> bool:
    """Whether a number is a percentage, which math-verify also takes for the number before the sign."""
    from sympy import UnevaluatedExpr

    return bool(number.has(UnevaluatedExpr))


def _limit_memory() -> None:
    """Linux only: macOS rejects this limit and Windows has no `resource`. `HARD_SECONDS` applies everywhere."""
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))


if __name__ == "__main__":  # the child: answers each line with a line, until the parent closes the pipe or ends
    _compare_numbers_exactly()  # imports math_verify, before memory is limited
    _limit_memory()
    answers, sys.stdout = sys.stdout, sys.stderr
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_compare(*json.loads(line))), file=answers, flush=True)
