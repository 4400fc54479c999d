"""`run.yaml`: what a run was made of, so that it can be repeated, compared when it is resumed, and reported.

The file holds every option, as `topd train --config run.yaml` takes it, and under `provenance` what no option gives:
command, versions, precision, digests of models and data, and what changed on resuming. Secrets are left out.
"""

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

from topd.loading.options import PROVENANCE
from topd.parsing import read_yaml
from topd.runs.files import write_text
from topd.version import __version__

RUN_FILE = "run.yaml"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "peft", "vllm")
SECRET = re.compile(r"(hub_|auth_|^)token$|password|secret|api_key", re.IGNORECASE)
"""Names of options whose values are never recorded."""
TRAINED_ON = (
    "prompt", "completion", "teacher", "teacher_prompt", "messages", "text", "input_ids", "labels",
    "chat_template_kwargs",
)  # fmt: skip
"""Columns that go into the digest of a dataset; where it has none of them, all of its columns do."""
SAMPLED = 16
"""Values of each parameter that go into its digest."""


# Options


def options_of(*parts: Any) -> dict[str, Any]:
    """Every option of these dataclasses as YAML values, without secrets and how it was started."""
    found = {option.name: getattr(part, option.name) for part in parts for option in fields(part) if option.init}
    found.pop("resume_from_checkpoint", None)
    return {name: plain(value) for name, value in found.items() if not SECRET.search(name)}


def changed_options(options: Mapping[str, Any], *parts: Any) -> list[str]:
    """Names of options that differ from the defaults of these dataclasses."""
    defaults = {option.name: plain(option.default) for part in parts for option in fields(part)}
    empty: tuple[Any, ...] = (None, [], {}, "")  # a default may be filled in with another empty value
    return [
        name
        for name, value in options.items()
        if value != defaults.get(name) and not (value in empty and defaults.get(name) not in (True, False))
    ]


def plain(value: Any) -> Any:
    """A value as text, numbers, lists and mappings, without secrets."""
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
    """Text with user, password and query values removed from its URLs."""
    text = re.sub(r"(\w://)[^/?#\s]*@", r"\1***@", text)
    return re.sub(r"(://[^\s?#]*\?)[^\s#]*", r"\1***", text)


def command_line(words: Iterable[str]) -> str:
    """A command as typed, without secrets."""
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
    """The record of a model.

    Returns:
        `name`, `revision` (commit on the Hub, if any), `architecture`, `adapters`, `parameters`, `trained`, `dtype`,
        and digests of the `shapes`, the `weights` and the `frozen` weights; None if this process does not have all of
        them.
    """
    parameters = dict(model.named_parameters())
    adapters = getattr(model, "peft_config", None) or {}
    return {
        "name": name or model.config._name_or_path or f"a loaded {type(model).__name__}",
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "adapters": "; ".join(_scaled(config) for config in adapters.values()) or None,
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "trained": sum(parameter.numel() for parameter in parameters.values() if parameter.requires_grad),
        "dtype": str(next(iter(parameters.values())).dtype).removeprefix("torch."),
        "shapes": digest(f"{each} {tuple(parameter.shape)}" for each, parameter in sorted(parameters.items())),
        "weights": weights_digest(parameters),
        "frozen": weights_digest({n: p for n, p in parameters.items() if not p.requires_grad}),
    }


def _scaled(adapter: Any) -> str:
    """What an adapter's effect depends on besides its weights."""
    names = ("r", "lora_alpha", "use_rslora", "lora_dropout")
    return ", ".join(f"{name} {getattr(adapter, name)}" for name in names if hasattr(adapter, name))


def weights_digest(parameters: Mapping[str, Tensor]) -> str | None:
    """SHA-256 over `SAMPLED` values of each parameter, in float32. None if one is sharded or cannot be sampled.

    It identifies a set of weights; it does not detect a change of single values.
    """
    samples = []
    for _, parameter in sorted(parameters.items()):
        if parameter.is_meta or isinstance(parameter, torch.distributed.tensor.DTensor) or not parameter.numel():
            return None
        try:
            flat = parameter.detach().reshape(-1)
            samples.append(flat[:: max(1, len(flat) // SAMPLED)][:SAMPLED].float().cpu())
        except NotImplementedError:  # a format of quantization
            return None
    return hashlib.sha256(torch.cat(samples).numpy().tobytes()).hexdigest()[:16] if samples else None


def data_record(dataset: Any) -> dict[str, Any]:
    """Number of rows, column names, and a digest of what is trained on; only the names for a stream."""
    names = list(getattr(dataset, "column_names", None) or [])
    if not hasattr(dataset, "__len__"):
        return {"rows": None, "columns": names, "digest": None}
    read = [name for name in TRAINED_ON if name in names] or names
    values = (json.dumps(value, sort_keys=True, default=str) for name in read for value in dataset[name])
    return {"rows": len(dataset), "columns": names, "digest": digest(values)}


def digest(texts: Iterable[str]) -> str:
    """SHA-256 of lines, 16 hexadecimal digits."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()[:16]


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python, this package, and those of the packages that are installed; torch's with its build."""
    found = {"python": platform.python_version(), "topd": __version__}
    for name in packages:
        try:
            found[name] = str(torch.__version__) if name == "torch" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


# The file


def write_run(folder: Path, options: Mapping[str, Any], changed: Iterable[str], provenance: Mapping[str, Any]) -> None:
    """Write `run.yaml`: options that were set, options at their defaults, provenance."""
    given = {name: options[name] for name in options if name in set(changed)}
    rest = {name: options[name] for name in sorted(options) if name not in given}
    parts = (
        "# Written when the run began. To repeat it: topd train --config run.yaml --output_dir OTHER\n",
        _yaml(given),
        "\n# At their defaults\n" if rest else "",
        _yaml(rest),
        "\n# Not options: what the run was made of\n",
        _yaml({PROVENANCE: dict(provenance)}),
    )
    write_text("".join(parts), folder / RUN_FILE)


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=120) if value else ""


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and provenance of an earlier run; empty if there is no file or it cannot be read."""
    try:
        content = read_yaml((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}, {}
    if not isinstance(content, dict):
        return {}, {}
    provenance = content.pop(PROVENANCE, None)
    return content, provenance if isinstance(provenance, dict) else {}


Run = tuple[Mapping[str, Any], Mapping[str, Any]]
"""Options and provenance, as `provenance.read_run` returns them."""

NOT_COMPARED = (
    "output_dir", "logging_dir", "run_name", "disable_tqdm", "preflight", "hub_model_id", "student's weights",
)  # fmt: skip
"""Options that do not affect training; and a fully trained student gets the checkpoint's weights."""
BATCH = ("per_device_train_batch_size:", "gradient_accumulation_steps:", "processes:")
"""Changes of the number of rows per step."""


def compared(before: Run, now: Run) -> tuple[list[str], list[str]]:
    """Every difference as text; and those that show that the checkpoint belongs to another model.

    A student of other shapes, other weights under its adapters, and another tokenizer are refused. Other differences
    may be intended and are reported.
    """
    old, new = _flat(*before), _flat(*now)
    changes = [
        f"{name}: {_shown(old[name])} -> {_shown(value)}"
        for name, value in new.items()
        if name in old and name not in NOT_COMPARED and old[name] != value
    ]
    if any(change.startswith(BATCH) for change in changes):
        changes.append("the batch size changed: steps are counted as before, so some rows of the data are "
                       "seen twice or not at all in this epoch")  # fmt: skip
    return changes, _refused(before[1], now[1])


def _flat(options: Mapping[str, Any], made_of: Mapping[str, Any]) -> dict[str, Any]:
    """Options, and what is known of the rest by names such as "teacher's dtype"."""
    found = {**options, **{name: made_of[name] for name in ("device", "processes") if name in made_of}}
    for part, values in made_of.items():
        if isinstance(values, Mapping):
            found |= {f"{part}'s {name}": value for name, value in values.items() if value is not None}
    return found


def _refused(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    old, new = before.get("student", {}), now["student"]
    refused = []
    if _differ(old, new, "shapes"):
        sizes = " -> ".join(f"{_shown(each.get('parameters'))} parameters" for each in (old, new))
        refused.append(f"the student's weights have other names or shapes ({sizes})")
    elif old.get("dtype") == new.get("dtype") and _differ(old, new, "frozen"):
        refused.append("the student's base, under the adapter, has other weights")
    if _differ(before, now, "tokenizer"):
        refused.append("the tokenizer differs")
    return refused


def _differ(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> bool:
    """Whether both are known and differ."""
    return old.get(name) is not None and new.get(name) is not None and old[name] != new[name]


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value:,}" if type(value) is int else f"{value}"[:100]
