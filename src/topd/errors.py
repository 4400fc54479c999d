"""User-fixable errors: what is wrong and what to do. The command line prints them without a traceback."""


class TOPDError(Exception):
    """Base of all user-fixable errors."""


class DataError(TOPDError, ValueError):
    """A data file cannot be used."""


class TokenizerMismatchError(TOPDError, ValueError):
    """Student and teacher do not share a tokenizer."""


class ContextError(TOPDError, ValueError):
    """Prompt, rollout and window do not fit the context of a model."""


class SavingError(TOPDError, RuntimeError):
    """A checkpoint or another file of a run cannot be written: the disk is full or broken."""


class ResumeError(TOPDError, ValueError):
    """A run cannot resume from a checkpoint: there is no whole one, or it would run code when loaded."""


class NonFiniteError(TOPDError, RuntimeError):
    """A loss or gradient is NaN or infinite; raised before the optimizer steps."""


class ServerError(TOPDError, RuntimeError):
    """A model's server cannot be used, or is no longer reachable."""


class RunInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM arrived; a checkpoint is saved. Not a `TOPDError`: nothing is wrong.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


def install(extra: str) -> str:
    """The command that installs what an extra of this package needs, wherever the package itself came from."""
    import importlib.metadata
    import re
    import shlex

    try:
        required = importlib.metadata.requires("topd") or []
    except importlib.metadata.PackageNotFoundError:  # run from its source
        required = []
    of_extra = re.compile(rf"""(.*?)\s*;\s*extra\s*==\s*['"]{re.escape(extra)}['"]""")
    packages = [found[1] for each in required if (found := of_extra.fullmatch(each))]
    return (
        shlex.join(["pip", "install", *packages]) if packages else f"pip install -e '.[{extra}]' in a checkout of topd"
    )
