"""Load something by name; a failure ends in a message that says what to do."""

from __future__ import annotations

from typing import Any

from topd.errors import TOPDError

SAFE = {"use_safetensors": True}
"""Pickled weights (`.bin`) are not read, unless `model_init_kwargs` or `teacher_model_init_kwargs` allow it."""


def load_by_name(what: str, name: str, load: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `load`, with `args` or else the name, and explain its errors.

    `what`: "models", "tokenizer" or "config". `name`: what the user named; of a pair, "STUDENT and TEACHER".
    """
    first = args or ((name,) if what == "tokenizer" else (name.split(" and ")[0],))
    try:
        return load(*first, **kwargs)
    except TOPDError:
        raise
    except RuntimeError as error:
        if "to be installed" not in str(error):  # of a tracker; transformers' message says how
            raise
        raise TOPDError(f"{error} Or leave it out of --report_to.") from error
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise TOPDError(
                f"{name} contains its own code, which was not run. Read it; if you trust it: --trust_remote_code true."
            ) from error
        if what == "models" and isinstance(error, ValueError):  # TRL's message says what to do
            raise TOPDError(str(error)) from error
        reason = str(error).strip().splitlines()[0]
        raise TOPDError(
            f"Cannot load the {what} of {name}: {reason} Give a folder that holds one, or a Hub name (and be online); "
            "embedded:long-student and embedded:long-teacher are always available."
        ) from error
