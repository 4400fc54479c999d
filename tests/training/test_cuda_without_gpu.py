"""Whole steps on a device that refuses to mix with the CPU, as CUDA does: nothing is left behind, and waits are few."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from one_step import CASES

MOST_WAITS = 215
"""Of the host for the device in a TOPD step that calibrates its forks, sampling apart."""
PER_ROLLOUT = 3
"""By which they may grow with each rollout."""


@pytest.fixture(scope="module")
def steps():
    here = Path(__file__)
    command = [sys.executable, str(here.with_name("steps_on_pretended_device.py")), json.dumps(CASES)]
    paths = os.pathsep.join([str(here.parents[1]), *sys.path])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_the_device_is_the_step_on_the_cpu(steps, case):
    here, there = steps["here"][case], steps["there"][case]
    rel = 0.05 if "bfloat16" in case else 1e-4
    assert there["loss"] == pytest.approx(here["loss"], rel=rel)
    assert there["gradient"] == pytest.approx(here["gradient"], rel=rel)
    if "bfloat16" not in case:  # rounding may choose another candidate
        assert there["metrics"] == pytest.approx(here["metrics"], rel=1e-3, abs=1e-5, nan_ok=True)


def waits(steps, case):
    counted = steps["there"][case]["waits"]
    return counted["whole"] - counted["rollout"]


def test_the_host_waits_a_counted_number_of_times(steps, capsys):
    few, many = waits(steps, "regenerated"), waits(steps, "regenerated, twice the rollouts")
    with capsys.disabled():
        print(f" [waits: {few} with 4 rollouts, {many} with 8; {waits(steps, 'plain')} in plain OPD]", end="")
    assert few <= MOST_WAITS, steps["there"]["regenerated"]["waits"]["by line"]
    assert many - few <= 4 * PER_ROLLOUT, steps["there"]["regenerated, twice the rollouts"]["waits"]["by line"]
