"""Loggers of this package: of several processes the main one logs, and lines name their process only then."""

import logging
from typing import Any

from accelerate import PartialState
from accelerate.logging import MultiProcessAdapter


class _Adapter(MultiProcessAdapter):
    def process(self, msg: Any, kwargs: Any) -> Any:
        state: Any = PartialState()
        if state.num_processes == 1:  # accelerate writes [RANK 0] all the same
            kwargs.setdefault("stacklevel", 2)
            return msg, kwargs
        return super().process(msg, kwargs)


def get_logger(name: str) -> MultiProcessAdapter:
    """As `accelerate.logging.get_logger`, without the rank where there is one process."""
    return _Adapter(logging.getLogger(name), {})
