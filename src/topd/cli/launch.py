"""`topd train --num_processes N`: start the processes of a run with accelerate's launcher, as `trl` does.

Options of `accelerate launch` (`--num_processes`, `--num_machines`, `--fsdp_version`, ...) may stand between those of
the command or in its YAML file. `--accelerate_config` takes a file or the name of a config that TRL ships (fsdp2,
zero3, ...). Without it, `--num_processes` alone is DDP.
"""

import argparse
import importlib.resources
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any

from topd.cli.names import known_name
from topd.errors import TOPDError

CONFIG = "accelerate_config"
TYPED = "TOPD_TYPED"
"""Environment variable of the started processes: the words of the command as typed, for their record."""
_NOT_OURS = {"h", "help", "m", "module", "env", "quiet", "debug", "cpu", "no_python"}
_KINDS = ("--multi_gpu", "--use_fsdp", "--use_deepspeed", "--use_megatron_lm", "--cpu", "--tpu")


def launch(command: str, argv: Sequence[str], in_file: Mapping[str, Any], known: Collection[str]) -> int | None:
    """Start the processes that the options ask for, wait, and return their exit status; None: run in this one.

    `in_file`: options of the command's YAML file; `known`: names of the command's own. Raises `TOPDError` if accelerate
    does not accept the options; or if it has started this process, and the words ask for more.
    """
    own, words = split(argv, known)
    if TYPED in os.environ or "LOCAL_RANK" in os.environ:
        if words:
            raise TOPDError(f"This process was started by a launcher: give {words[0]} to it, not to topd {command}.")
        return None
    typed = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    for name, value in in_file.items():
        plain = str(name).replace("-", "_")
        if is_launch_option(plain, known) and plain not in typed and value is not False:
            words.insert(0, f"--{plain}" if value is True else f"--{plain}={value}")
    if not words or words in (["--num_processes", "1"], ["--num_processes=1"]):
        return None
    for word in own:
        if word.startswith("--"):
            known_name(word[2:].partition("=")[0], known, f"topd {command}")  # once, not in each process
    arguments = [*_complete(_resolved(words)), "--module", "topd.cli", command, *own]
    return _started(arguments, {TYPED: json.dumps([command, *argv])})


def typed_words(words: Sequence[str]) -> list[str]:
    """The words of the command as the user typed them, also in a process that `launch` has started."""
    return list(json.loads(os.environ[TYPED])) if TYPED in os.environ else list(words)


def split(argv: Sequence[str], known: Collection[str]) -> tuple[list[str], list[str]]:
    """The words of the command, and those of accelerate's launcher. A name that both know is the command's."""
    parts: dict[bool, list[str]] = {False: [], True: []}
    launches = False
    for word in argv:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            plain = name.replace("-", "_")
            launches = is_launch_option(plain, known)
            word = f"--{plain}{equals}{value}" if launches else word
        parts[launches].append(word)
    return parts[False], parts[True]


def is_launch_option(name: str, known: Collection[str]) -> bool:
    """Whether an option (with underscores) belongs to accelerate's launcher."""
    return name not in known and name in _launch_options()


@cache
def _launch_options() -> frozenset[str]:
    names = {option.lstrip("-") for option in _parser()._option_string_actions}
    return frozenset({name.replace("-", "_") for name in names} - _NOT_OURS | {CONFIG})


def _parser() -> argparse.ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    parser: argparse.ArgumentParser = launch_command_parser()

    def refuse(message: str) -> None:
        raise TOPDError(f"accelerate's launcher: {message:.300}. `accelerate launch --help` lists its options.")

    parser.error = refuse  # type: ignore[assignment, method-assign]
    return parser


def _resolved(words: Sequence[str]) -> list[str]:
    """`--accelerate_config NAME` as accelerate's `--config_file FILE`."""
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    parts = [part for word in words for part in (word.split("=", 1) if word.startswith(f"--{CONFIG}=") else [word])]
    try:
        return list(resolve_accelerate_config_argument(parts))
    except ValueError as error:
        shipped = importlib.resources.files("trl.accelerate_configs").iterdir()
        names = sorted(file.name.removesuffix(".yaml") for file in shipped if file.name.endswith(".yaml"))
        raise TOPDError(f"--{CONFIG}: no such file. TRL ships: {', '.join(names)}.") from error


def _complete(words: list[str]) -> list[str]:
    """The words with what accelerate would otherwise ask of its own config file, or warn about."""
    given = {word.partition("=")[0] for word in words}
    defaults = {"--main_process_port": "0"} if not given & {"--num_machines", "--main_process_ip"} else {}
    if "--config_file" not in given:
        defaults |= {"--num_machines": "1", "--mixed_precision": "no", "--dynamo_backend": "no"}
        if not given & set(_KINDS):
            words = ["--multi_gpu", *words]  # processes, also on CPUs
    elif "--num_processes" not in given:
        import torch

        if not torch.accelerator.is_available():
            raise TOPDError("There is no accelerator here: add --num_processes N.")
        defaults["--num_processes"] = str(torch.accelerator.device_count())
    return [*words, *(word for name, value in defaults.items() if name not in given for word in (name, value))]


def _started(arguments: list[str], environment: Mapping[str, str]) -> int:
    """Run accelerate's launcher in this process; the exit status of the first process that failed, or 0."""
    import subprocess

    from accelerate.commands.launch import launch_command
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # the processes say themselves why they end
    options = _parser().parse_args(arguments)
    try:
        with patch_environment(**environment):
            launch_command(options)
            return 0
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        status = error.returncode
    except SignalException as stopped:
        status = -int(stopped.sigval)
    except (ValueError, ConnectionError) as error:
        raise TOPDError(f"accelerate's launcher: {' '.join(str(error).split())[:300]}") from error
    return status if status >= 0 else 128 - status  # as a shell: 128 + the signal that ended it
