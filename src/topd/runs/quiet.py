"""Keep the notices and bars of libraries off the screen of commands that speak for themselves."""

from __future__ import annotations

import logging
import warnings


def quieten() -> None:
    """Errors still come through, and the bars of downloads."""
    import transformers

    quieten_bars()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def quieten_bars() -> None:
    """Warnings still come through (not those of what will change in libraries), and the bars of downloads."""
    import transformers
    from huggingface_hub.utils import enable_progress_bars

    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    enable_progress_bars()
