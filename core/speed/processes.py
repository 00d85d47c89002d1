"""Runs one measurement in a process of its own, which has ended when the measurement is there, or when it failed.

A fresh process is measured where its start or its memory matters, and where a measurement may need more memory than
there is: it is then this process that fails.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

from core.command import OUR_FOLDER

PATIENCE = 300.0
"""Seconds after which a process is ended."""


@dataclass(frozen=True)
class Probed:
    """What a process printed.

    Args:
        rows: one for each line.
        why: why it did not come to its end; None if it did.
    """

    rows: list[dict[str, Any]]
    why: str | None = None


def probe(module: str, request: dict[str, Any], *, patience: float = PATIENCE) -> Probed:
    """Runs `python -m MODULE` with a request on its standard input; it prints a JSON object on each line.

    Args:
        module: a module of `core`.
        request: what to measure, as JSON; `began`, the time of the start, is added to it.
        patience: seconds after which the process is ended.
    """
    with (
        tempfile.TemporaryFile("w+") as errors,
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache,
    ):
        # so that compiling takes as long as the first time
        own = {**environment(), "TORCHINDUCTOR_CACHE_DIR": cache}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=own,
        )
        try:
            text = json.dumps({**request, "began": time.time()})
            printed, _ = process.communicate(text, timeout=patience)
        except subprocess.TimeoutExpired:
            process.kill()
            printed, _ = process.communicate()
            return Probed(_rows(printed), f"it took more than {patience:.0f} s")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode == 0:
            return Probed(_rows(printed))
        errors.seek(0)
        return Probed(_rows(printed), reason(process.returncode, errors.read()))


def environment() -> dict[str, str]:
    """The environment of a process: our folder is searched first, so that nothing else is imported in its place."""
    given = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(part for part in (str(OUR_FOLDER), given) if part)
    return {**os.environ, "PYTHONPATH": path}


def _rows(printed: str) -> list[dict[str, Any]]:
    """The lines that are complete."""
    whole = printed.splitlines(keepends=True)
    return [json.loads(line) for line in whole if line.endswith("\n") and line.startswith("{")]


def reason(code: int, errors: str) -> str:
    """Why a process failed: the signal that ended it, or the last line that it wrote."""
    if code < 0:
        return f"signal {-code} ended it, which the system sends where memory is too small"
    lines = errors.strip().splitlines()
    return lines[-1][:200] if lines else f"it ended with code {code}"
