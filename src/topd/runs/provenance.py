"""`run.yaml`: what a run was made of, so that it can be made again, compared when it is resumed, and shown.

The file holds every option, as `topd train --config run.yaml` takes it, and under `provenance` what no option gives:
command, versions, precision, digests of models and data, and what changed on resuming. Secrets are left out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from topd.runs.files import write_text
from topd.parsing import read_yaml
from topd.loading.options import PROVENANCE
from topd.version import __version__

RUN_FILE = "run.yaml"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "peft", "vllm")
SECRET = re.compile(r"(hub_|auth_|^)token$|password|secret|api_key", re.IGNORECASE)
"""Names of options whose values are not written down."""
NOT_OPTIONS = ("resume_from_checkpoint",)
"""Options that say how a run is started, not what it is."""
SAMPLED = 16
"""Numbers of each parameter that its digest reads."""


# Options


def options_of(*parts: Any) -> dict[str, Any]:
    """Every option of these dataclasses, as YAML takes it: secrets and `NOT_OPTIONS` are left out."""
    found = {option.name: getattr(part, option.name) for part in parts for option in fields(part) if option.init}
    kept = {name: value for name, value in found.items() if not SECRET.search(name) and name not in NOT_OPTIONS}
    return {name: plain(value) for name, value in kept.items()}


def changed_options(options: Mapping[str, Any], *parts: Any) -> list[str]:
    """Names of options that differ from the defaults of these dataclasses."""
    defaults = {option.name: plain(option.default) for part in parts for option in fields(part)}
    empty: tuple[Any, ...] = (None, [], {}, "")  # some defaults are filled in with another kind of nothing
    return [
        name
        for name, value in options.items()
        if value != defaults.get(name) and not (value in empty and defaults.get(name) not in (True, False))
    ]


def plain(value: Any) -> Any:
    """A value of text, numbers, lists and mappings only, without secrets."""
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, str):
        return without_secrets(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {option.name: plain(getattr(value, option.name)) for option in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items() if not SECRET.search(str(name))}
    if isinstance(value, list | tuple | set):
        return [plain(each) for each in value]
    return str(value)


def without_secrets(text: str) -> str:
    """Text whose addresses have neither user, password nor values of their query."""
    text = re.sub(r"(\w://)[^/?#\s]*@", r"\1***@", text)
    return re.sub(r"(://[^\s?#]*\?)[^\s#]*", r"\1***", text)


def command_line(words: Iterable[str]) -> str:
    """A command as it was typed, without secrets."""
    shown: list[str] = []
    for word in words:
        name, equals, _ = word.lstrip("-").replace("-", "_").partition("=")
        if word.startswith("--") and equals and SECRET.search(name):
            word = f"{word.partition('=')[0]}=***"
        follows = shown and shown[-1].startswith("--") and SECRET.search(shown[-1][2:].replace("-", "_"))
        shown.append("***" if follows else without_secrets(word))
    return shlex.join(shown)


# Models and data


def model_record(model: Any, name: str | None) -> dict[str, Any]:
    """What a model is.

    Returns:
        `name`, `revision` (commit on the Hub, if any), `architecture`, `parameters`, `trained`, `dtype`, and digests:
        of the `shapes`, of the `weights`, and of the `frozen` weights; None where this process has not all of them.
    """
    parameters = dict(model.named_parameters())
    return {
        "name": name or model.config._name_or_path or f"a loaded {type(model).__name__}",
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "trained": sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad),
        "dtype": str(next(iter(parameters.values())).dtype).removeprefix("torch."),
        "shapes": _digest(f"{each} {tuple(parameter.shape)}" for each, parameter in sorted(parameters.items())),
        "weights": weights_digest(parameters),
        "frozen": weights_digest({n: p for n, p in parameters.items() if not p.requires_grad}),
    }


def weights_digest(parameters: Mapping[str, Tensor]) -> str | None:
    """SHA-256 over `SAMPLED` numbers of each parameter, in float32. None where one is sharded or has no storage.

    It tells other weights from these, not a change of single numbers.
    """
    samples = []
    for _, parameter in sorted(parameters.items()):
        if parameter.is_meta or isinstance(parameter, torch.distributed.tensor.DTensor) or not parameter.numel():
            return None
        flat = parameter.detach().reshape(-1)
        samples.append(flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].float().cpu())
    return hashlib.sha256(torch.cat(samples).numpy().tobytes()).hexdigest()[:16] if samples else None


def data_record(dataset: Any, columns: Iterable[str] = ("prompt", "completion", "teacher")) -> dict[str, Any]:
    """Number of rows, columns, and a digest of the texts in those `columns`; of a stream the columns alone."""
    names = list(getattr(dataset, "column_names", None) or [])
    if not hasattr(dataset, "__len__"):
        return {"rows": None, "columns": names, "digest": None}
    values = (
        json.dumps(value, sort_keys=True, default=str) for name in columns if name in names for value in dataset[name]
    )
    return {"rows": len(dataset), "columns": names, "digest": _digest(values)}


def tokenizer_digest(tokenizer: Any) -> str:
    """Of every token and its id."""
    return _digest(f"{i} {token}" for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Of Python, this package and those that a run depends on."""
    found = {"python": platform.python_version(), "topd": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# The file


def write_run(folder: Path, options: Mapping[str, Any], changed: Iterable[str], provenance: Mapping[str, Any]) -> None:
    """Write `run.yaml`: options that were set, those at their defaults, provenance."""
    given = {name: options[name] for name in options if name in set(changed)}
    rest = {name: options[name] for name in sorted(options) if name not in given}
    parts = (
        "# Written as the run began. The same again: topd train --config run.yaml --output_dir OTHER\n",
        _yaml(given),
        "\n# At their defaults\n" if rest else "",
        _yaml(rest),
        "\n# No options: what the run was made of\n",
        _yaml({PROVENANCE: dict(provenance)}),
    )
    write_text("".join(parts), folder / RUN_FILE)


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=120) if value else ""


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and provenance of an earlier run; empty where there are none, or the file cannot be read."""
    try:
        content = read_yaml((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}, {}
    if not isinstance(content, dict):
        return {}, {}
    provenance = content.pop(PROVENANCE, None)
    return content, provenance if isinstance(provenance, dict) else {}
