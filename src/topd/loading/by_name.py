"""Load something by name; a failure to find it ends in a message."""

from __future__ import annotations

from typing import Any

from topd.errors import TOPDError

SAFE = {"use_safetensors": True}
"""Pickled weights (`.bin`) are not read, unless `model_init_kwargs` or `teacher_model_init_kwargs` say so."""


def load_by_name(what: str, name: str, load: Any, *args: Any, **kwargs: Any) -> Any:
    """Load something by name; a failure to find it ends in a message."""
    first = args or ((name,) if what == "tokenizer" else (name.split(" and ")[0],))
    try:
        return load(*first, **kwargs)
    except TOPDError:
        raise
    except RuntimeError as error:
        if "to be installed" not in str(error):  # of a tracker; transformers' own words say how
            raise
        raise TOPDError(f"{error} Or leave it out of --report_to.") from error
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise TOPDError(
                f"{name} brings code of its own, which was not run. Read it; if you trust it, --trust_remote_code true."
            ) from error
        if what == "models" and isinstance(error, ValueError):  # TRL's own words say what to do
            raise TOPDError(str(error)) from error
        reason = str(error).strip().splitlines()[0]
        raise TOPDError(
            f"Cannot load the {what} of {name}: {reason} Give a folder that holds one, or a Hub name (and be online); "
            "embedded:long-student and embedded:long-teacher are always there."
        ) from error
