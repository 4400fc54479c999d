"""The one thing asked of a model or a server: continue these prefixes by K tokens."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from topd.near_future.windows import Windows


class ContinuesPrefixes(Protocol):
    """A source of windows: a model in this process, or one behind a server.

    Attributes:
        eos_token_ids: ids that end a window.
    """

    eos_token_ids: list[int]

    def continue_(self, prefixes: list[Tensor], length: int) -> Windows:
        """Continue each prefix (token ids, 1-D) by at most `length` tokens, fewer only where EOS comes first."""
        ...
