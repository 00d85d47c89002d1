"""Records of what this user's machine has made, such as the recipe of each run, in files that only the user can read.

A record is one line of an append-only text file in the state folder. Losing them costs questions and time, no results:
a recipe that is not recorded asks before it runs code, and data that are not recorded are prepared again to be checked.
"""

import os
import sys
from pathlib import Path

_FOLDER_MODE = 0o700
_FILE_MODE = 0o600

_warned: set[Path] = set()


def state_folder() -> Path:
    """The folder of the records: `MOELOOM_STATE`, or `moeloom` in the user's folder for state.

    Raises:
        RuntimeError: there is no home folder.
    """
    chosen = os.environ.get("MOELOOM_STATE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_STATE_HOME")
    user_state = Path(base) if base else Path.home() / ".local" / "state"
    return user_state / "moeloom"


def add(kind: str, value: str) -> None:
    """Records a value, unless it is recorded already; a folder that cannot be written costs one note.

    Args:
        kind: the name of the file, without its ending.
        value: one line of text.
    """
    assert len(value.splitlines()) == 1, "a record is one line"
    if contains(kind, value):
        return
    try:
        file = _file(kind)
        file.parent.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(file, flags, _FILE_MODE)
        try:
            line = f"{value}\n"
            if _ends_within_a_line(file):
                line = f"\n{line}"
            os.write(descriptor, line.encode())  # one write, so that lines never mix
        finally:
            os.close(descriptor)
    except (OSError, RuntimeError) as cause:
        _note_once(cause)


def _ends_within_a_line(file: Path) -> bool:
    """Whether the last write to a file was cut."""
    text = file.read_bytes()
    return bool(text) and not text.endswith(b"\n")


def contains(kind: str, value: str) -> bool:
    """Whether a value is recorded; without a readable file nothing is."""
    try:
        text = _file(kind).read_text(encoding="utf-8", errors="replace")
    except (OSError, RuntimeError):
        return False
    return value in text.splitlines()


def _file(kind: str) -> Path:
    return state_folder() / f"{kind}.txt"


def _note_once(cause: Exception) -> None:
    """Says once for each folder that nothing can be recorded in it."""
    try:
        folder = state_folder()
    except RuntimeError:
        folder = Path("~/.local/state/moeloom")
    if folder in _warned:
        return
    _warned.add(folder)
    why = getattr(cause, "strerror", None) or cause
    print(
        f"note: nothing can be recorded in {folder} ({why}): own runs may ask for --trust, and cached data are "
        "prepared again at each start; MOELOOM_STATE names another folder",
        file=sys.stderr,
    )
