"""The memory estimate beside a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("case", ["topd false true 8 256", "opd false false 2 192"])
def test_the_estimate_is_near_the_peak_of_a_run(case):
    command = [sys.executable, str(Path(__file__).with_name("peak_memory.py")), *case.split()]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 0.7 < float(re.search(r"ratio (\S+)", said)[1]) < 1.4
