"""The code and the machine of a run: the part of its provenance that no recipe and no package version records."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from core import __version__
from core.contracts.schema import Provenance

CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder of the code; a git checkout, unless it was installed."""
CPU_INFO = Path("/proc/cpuinfo")


def code() -> dict[str, Any]:
    """The commit of the checkout, and whether a tracked file has changed since; None where git does not say."""
    described = _git_describe() if (CHECKOUT / ".git").exists() else None
    if not described:
        return {"commit": None, "dirty": None}
    return {"commit": described.removesuffix("-dirty"), "dirty": described.endswith("-dirty")}


def code_version(origins: Iterable[Provenance]) -> str:
    """The version of moeloom and a hash of its source, such as `0.1.0 (source 1f0c9a27b3de)`.

    Args:
        origins: those of the components, whose versions and files count too.
    """
    hashed = hashlib.sha256()
    for package in ("core", "plugins"):
        for file in sorted((CHECKOUT / package).rglob("*.py")):
            hashed.update(str(file.relative_to(CHECKOUT)).encode())
            hashed.update(file.read_bytes())
    others = {(origin.distribution, origin.version, origin.module): origin for origin in origins}
    for key in sorted(others):
        hashed.update(" ".join(key).encode())
        module = others[key].file
        if module is not None and module.is_file():
            hashed.update(module.read_bytes())
    return f"{__version__} (source {hashed.hexdigest()[:12]})"


def _git_describe() -> str | None:
    """The full commit of the checkout, with `-dirty` if it was changed; None where git cannot answer."""
    describe = ["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    command = ["git", "-C", str(CHECKOUT), *describe]
    # Variables of git may name another checkout. Without optional locks reading does not write the index.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """The processor's name, the number of its cores, and the name of each GPU that torch sees."""
    return {"cpu": _cpu(), "cores": os.cpu_count(), "gpus": _gpus()}


def _cpu() -> str:
    try:
        lines = CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    try:
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except RuntimeError:  # a device that is listed but does not answer; training will report why
        return []
