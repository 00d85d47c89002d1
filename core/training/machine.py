"""Which code ran, and on what: the part of a run's provenance that no recipe and no package version tells."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
"""Where the code lies; a git checkout, unless it was installed."""
CPU_INFO = Path("/proc/cpuinfo")


def code() -> dict[str, Any]:
    """The commit of the checkout, and whether a file that git knows has changed since; nulls where git cannot tell."""
    told = _described() if (CHECKOUT / ".git").exists() else None
    if not told:
        return {"commit": None, "dirty": None}
    return {"commit": told.removesuffix("-dirty"), "dirty": told.endswith("-dirty")}


def _described() -> str | None:
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # of another checkout
    try:
        done = subprocess.run(
            command,
            env=inherited | {"GIT_OPTIONAL_LOCKS": "0"},  # who reads leaves the index alone
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """The processor's name, how many of its cores there are, and the name of each GPU that torch sees."""
    return {"cpu": _cpu(), "cores": os.cpu_count(), "gpus": _gpus()}


def _cpu() -> str:
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [value.strip() for key, _, value in (line.partition(":") for line in lines) if key.strip() == "model name"]
    return next(filter(None, names), "") or platform.processor() or platform.machine()


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    try:
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except RuntimeError:  # a device that is listed and cannot be asked; the training will say why
        return []
