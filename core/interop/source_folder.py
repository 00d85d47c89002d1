"""The files of a Hugging Face folder, none of which may be a link to somewhere else.

A link in a downloaded folder may name any file of the user, which a conversion would then copy. The exception is the
cache of Hugging Face's own downloads: its folders `snapshots/REVISION` consist of links to the folder `blobs` beside
`snapshots`.
"""

import os
from collections.abc import Callable
from pathlib import Path

from core.contracts.errors import UserError
from core.storage.files import is_plain_name, leads_out_of

LARGEST_COMPANION = 128 * 2**20
"""Size in bytes of the largest file beside the weights that is copied."""

WEIGHT_SUFFIXES = frozenset(
    [".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".onnx"]
)


def check_inside(file: Path) -> Path:
    """Returns a file of a Hugging Face folder, after checking that it is not a link to a place outside.

    Raises:
        UserError: it is one.
    """
    if _leads_away(file):
        why = f"is a symbolic link that leads out of its folder, to {os.path.realpath(file)}"
        raise UserError(f"{file}: {why}; put a copy of the file in its place")
    return file


def small_files(folder: Path, say: Callable[[str], None]) -> list[Path]:
    """Returns the files of a folder that are neither weights, nor an index, nor hidden, nor large, sorted by name.

    Args:
        folder: a Hugging Face folder.
        say: called with a note on each link that leads out of the folder; such links are left out.
    """
    found: list[Path] = []
    for file in sorted(folder.iterdir()):
        if file.name.startswith("."):
            continue
        if file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json"):
            continue
        if not is_plain_name(file.name):
            say(f"note: {str(file)!r} is left out: its name cannot be printed or is not UTF-8")
        elif _leads_away(file):
            say(f"note: {file} is left out: it is a symbolic link that leads out of its folder")
        elif file.is_file() and file.stat().st_size <= LARGEST_COMPANION:
            found.append(file)
    return found


def _leads_away(file: Path) -> bool:
    """Whether a file is a link out of its folder, and not one to the blobs of Hugging Face's cache."""
    if not file.is_symlink() or not leads_out_of(file, file.parent):
        return False
    snapshots = Path(os.path.realpath(file.parent)).parent
    blobs = snapshots.parent / "blobs"
    return snapshots.name != "snapshots" or blobs.is_symlink() or leads_out_of(file, blobs)
