"""Keep the notices and bars of libraries off the screen of commands that speak for themselves."""

from __future__ import annotations

import logging
import warnings


def quieten() -> None:
    """Errors still come through."""
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
