"""An abandoned step: the checkpoint holds the state at its beginning, so that the step can be repeated.

A step is abandoned when the teacher's server is lost, or when Ctrl-C or SIGTERM arrives while the step waits for the
server. By then the step has drawn random numbers and counted tokens. Weights and optimizer have not changed: the server
is called between optimizer steps.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch

from topd.errors import ServerError
from topd.runs.interrupts import run_interrupted
from topd.runs.resumable_trainer import ResumableTrainer
from topd.teachers.openai_server import WaitingStopped
from topd.teachers.server_windows import ServerWindows

CONTINUES, STOPPED, LOST = range(3)
"""How the use of a server ended in a process. Of several processes, the highest value counts."""


class RollbackTrainer(ResumableTrainer):
    """See the module. A trainer that uses a server calls `_use_server`.

    `train` raises `ServerError` and `RunInterrupted` in all processes, after a checkpoint of the steps so far.
    """

    _server: ServerWindows | None = None
    _put_back: Callable[[], None] | None = None
    _evaluation_due = False
    _saved_at = 0

    def _use_server(self, server: ServerWindows) -> None:
        server.server.stopped = lambda: self._interrupt.received is not None
        server.together = self._all_or_none
        self._server = server

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """All processes abandon the step if one does. A collective: every process calls the server equally often."""
        failure: Exception | None = None
        try:
            yield
        except (ServerError, WaitingStopped) as error:
            failure = error
        outcome = CONTINUES if failure is None else LOST if isinstance(failure, ServerError) else STOPPED
        if self.accelerator.num_processes > 1:
            outcomes = self.accelerator.gather(torch.tensor([outcome], device=self.accelerator.device))
            outcome = int(outcomes.max())
        if failure is not None:
            raise failure
        if outcome == LOST:
            raise ServerError("Another process lost the teacher's server: see its message.")
        if outcome == STOPPED:
            raise WaitingStopped

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `ResumableTrainer`, with a checkpoint before an abandoned step."""
        try:
            return super().train(*args, **kwargs)
        except ServerError:
            self._save_beginning()
            raise
        except WaitingStopped:
            self._save_beginning()
            raise run_interrupted(self.state, self._folder, self._interrupt.received) from None

    def _save_beginning(self) -> None:
        step = self.state.global_step
        if step == 0 or step == self._saved_at:
            return
        if self._put_back is not None:
            self._put_back()
        self._save_checkpoint(self.model, None)

    def _begin_step(self) -> None:
        if self._server is None:
            return
        put_back, own = random_states(self.accelerator.device), self._own_state()
        tokens = self.state.num_input_tokens_seen

        def back() -> None:
            put_back()
            self._restore_own_state(own | {"evaluation_due": self._evaluation_due})
            self.state.num_input_tokens_seen = tokens  # TRL counts tokens when it samples them

        self._put_back = back

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self._begin_step()  # an evaluation calls the server too
        self._evaluation_due = self._server is not None and bool(self.control.should_evaluate)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._begin_step()

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        metrics = super()._evaluate(*args, **kwargs)
        self._evaluation_due = False
        return metrics

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._saved_at = self.state.global_step

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        if Path(checkpoint).resolve().parent == self._folder.resolve():
            self._saved_at = self.state.global_step
        self._begin_step()
        if self._evaluation_due:  # the server was lost during the evaluation
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            self._begin_step()

    def _own_state(self) -> dict[str, Any]:
        return super()._own_state() | ({"evaluation_due": True} if self._evaluation_due else {})

    def _restore_own_state(self, state: dict[str, Any]) -> None:
        super()._restore_own_state(state)
        self._evaluation_due = bool(state.get("evaluation_due"))


def random_states(device: torch.device) -> Callable[[], None]:
    """A function that restores the random states of now: Python, NumPy, PyTorch on the CPU and on `device`."""
    python, numbers, cpu = random.getstate(), numpy.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    own: Any = None if device.type == "cpu" else torch.get_device_module(device)
    on_device = None if own is None else own.get_rng_state()

    def put_back() -> None:
        random.setstate(python)
        numpy.random.set_state(numbers)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if own is not None:
            own.set_rng_state(on_device)

    return put_back
