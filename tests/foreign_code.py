"""A module that leaves a file when it is imported, and the folder of a sweep that somebody else made; without torch."""

from pathlib import Path

EVIL = """\
from pathlib import Path
from core.extension.hookspec import hookimpl

CONTRACTS = "2.0"
Path({marker!r}).touch()


@hookimpl
def register(registry):
    pass
"""


def write_module(folder: Path, marker: Path) -> None:
    """Writes the module `loom_evil`, which makes the file `marker` when it is imported."""
    (folder / "loom_evil.py").write_text(EVIL.format(marker=str(marker)))


def sentence(file: Path, key: str = "plugins") -> str:
    """The error message about a file that names the module."""
    return (
        f"{file}: {key}: the module 'loom_evil' would run, which no installed distribution registers, "
        "and this run was not made here; --trust allows it"
    )


def downloaded_sweep(folder: Path) -> Path:
    """Makes a folder that counts as a sweep's which was made elsewhere."""
    (folder / "recipes").mkdir(parents=True)
    (folder / "sweep.json").write_text("{}")
    return folder
