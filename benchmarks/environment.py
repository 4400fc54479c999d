"""Where the numbers were taken: hardware, versions, threads, command, commit."""

from __future__ import annotations

import importlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from topd.runs.provenance import versions

PACKAGES = (
    "torch", "transformers", "trl", "accelerate", "numpy", "scipy", "POT", "lapx", "liger_kernel", "geomloss",
)  # fmt: skip


def environment(arguments: list[str]) -> dict[str, Any]:
    """What holds for the whole run."""
    return {
        "hardware": _hardware(),
        "versions": versions(PACKAGES),
        "threads": {"torch": torch.get_num_threads(), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "command": " ".join(["python -m benchmarks", *arguments]),
        "commit": _commit(),
    }


def load_average() -> list[float]:
    """Over 1, 5 and 15 minutes."""
    return [round(load, 2) for load in os.getloadavg()]


def _hardware() -> dict[str, Any]:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def _commit() -> str | None:
    """The commit measured, with "+" where the tree differs from it."""
    here = Path(__file__).parent
    try:
        commit = subprocess.check_output(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, text=True, stderr=subprocess.DEVNULL
        )
        changed = subprocess.check_output(
            ["git", "status", "--porcelain", "-uno"], cwd=here, text=True, stderr=subprocess.DEVNULL
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if changed else "")


def installed(module: str) -> bool:
    """Whether an optional peer can be imported."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def plain(error: BaseException) -> str:
    """One line for a row."""
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").removesuffix(": ")


def say(text: str) -> None:
    """Progress, apart from the table."""
    print(text, file=sys.stderr, flush=True)
