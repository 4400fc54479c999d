"""kill -9 at any moment: the run that goes on equals the one that was never killed, bit for bit."""

import random
import signal
import time

import pytest
from doomed_runs import STEPS, equal, exit_status, result_of, start

from topd.runs.checkpoints import newest_whole

MOMENTS = [
    "rollouts sampled",
    "gradients there",
    "weights moved",
    "a record half written",
    "checkpoint: weights written",
    "checkpoint: a file half written",
    "checkpoint: before the rename",
    "checkpoint: after the rename",
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def through(tmp_path_factory):
    """The run that was never killed."""
    out = tmp_path_factory.mktemp("through")
    assert exit_status(out) == 0
    return result_of(out)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed_equals_uninterrupted(tmp_path, through, moment, fault):
    assert exit_status(tmp_path, moment) == -signal.SIGKILL
    assert not (tmp_path / f"checkpoint-{STEPS}").exists()
    newest, passed_over = newest_whole(tmp_path)
    assert passed_over == []  # whatever is called checkpoint-N is whole
    assert exit_status(tmp_path) == 0
    resumed = result_of(tmp_path)
    assert [name for name in through if not equal(through[name], resumed[name])] == []
    assert not (tmp_path / "unfinished").exists()
    fault(f"kill -9, {moment}", f"resumed from {newest.name}; equal to the uninterrupted run, bit for bit")


def test_killed_again_and_again_at_random(tmp_path, through, fault):
    """From outside, at moments that nobody chose, once training has begun."""
    random_, kills = random.Random(1), 0
    began = tmp_path / "topd_config.json"  # written as `train` begins
    for _ in range(6):
        began.unlink(missing_ok=True)
        process = start(tmp_path)
        while not began.exists() and process.exitcode is None:
            time.sleep(0.01)
        process.join(random_.uniform(0, 0.6))
        kills += process.exitcode is None
        process.kill()
        process.join()
    assert kills > 1
    assert exit_status(tmp_path) == 0  # all may have been done before: then nothing is trained
    assert not (tmp_path / f"checkpoint-{STEPS + 1}").exists()
    resumed = result_of(tmp_path)
    assert [name for name in through if not equal(through[name], resumed[name])] == []
    fault(f"kill -9 from outside, {kills} times at random", "equal to the uninterrupted run, bit for bit")
