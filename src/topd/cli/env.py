"""`topd env`: what an issue needs to be reproduced."""

import argparse
import platform
from typing import Any


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command has no options."""


def run(options: argparse.Namespace) -> None:
    """Print versions, devices and CPU features as a Markdown list."""
    from topd.runs.provenance import PACKAGES, versions

    found = versions()
    shown = {
        "topd": found["topd"],
        **{name: found.get(name, "not installed") for name in PACKAGES},
        "Python": found["python"],
        "platform": platform.platform(),
        "devices": devices(),
        "CPU": cpu(),
    }
    print("\n".join(f"- {name}: {value}" for name, value in shown.items()))


def devices() -> str:
    """The accelerators, with their compute capability where they have one."""
    import torch

    if torch.cuda.is_available():
        every = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        shown = [f"{each.name} ({each.total_memory / 2**30:.0f} GiB, {each.major}.{each.minor})" for each in every]
        bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
        return f"{', '.join(shown)}; CUDA {torch.version.cuda}, {bf16}"
    if torch.accelerator.is_available():
        return f"{torch.accelerator.device_count()} x {torch.accelerator.current_accelerator()}"
    return "none but the CPU"


def cpu() -> str:
    """Name, cores, vector instructions, and whether it computes in bfloat16 itself."""
    import torch

    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.11 lacks it
    name = known.get("cpu_name") or platform.processor() or platform.machine()
    bf16 = [feature for feature, there in known.items() if "bf16" in feature and there]
    computes = f"bf16 by {', '.join(bf16)}" if bf16 else "bf16 emulated (slow)" if known else "bf16 not known"
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {computes}"
