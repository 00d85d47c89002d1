"""Reads files whose content may be anything: bounded in size and depth, and with every error in one sentence.

A file that is replaced by a pipe or a device is an error at once: it is opened without waiting, and only what is a
regular file is read.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from core.contracts.errors import UserError

LARGEST = 256 * 2**20
"""Bytes of the largest document that is read."""

DEEPEST = 100
"""Levels of the deepest document that is read; what works through one recurses at each level."""


LARGEST_YAML = 16 * 2**20
"""Bytes of the largest recipe or sweep file."""

MOST_NODES = 1_000_000
"""Most values of a YAML file."""

_HALF = re.compile(r"\\(?:u|U0000)[dD][89a-fA-F][0-9a-fA-F]{2}")
"""An escape for half a surrogate pair, which libyaml rejects and PyYAML's own reader takes."""

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class DocumentError(UserError):
    """A file that cannot be read as what it should be.

    Args:
        file: the file.
        why: the end of the sentence.
    """

    def __init__(self, file: Path, why: str) -> None:
        super().__init__(f"{file}: {why}")
        self.file = file
        self.why = why


def read_bytes(file: Path, largest: int = LARGEST) -> bytes:
    """Reads a whole file.

    Raises:
        DocumentError: it is missing, not a regular file, or larger than `largest` bytes, or the system cannot read it.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as cause:
        raise DocumentError(file, "there is no such file") from cause
    except OSError as cause:
        raise DocumentError(file, f"cannot be read: {cause.strerror}") from cause
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise DocumentError(file, f"is {_kind_of(found.st_mode)}, not a file")
        if found.st_size > largest:
            raise DocumentError(file, f"has {found.st_size} bytes; at most {largest} are read")
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            return stream.read(largest)
    except OSError as cause:
        raise DocumentError(file, f"cannot be read: {cause.strerror}") from cause
    finally:
        os.close(descriptor)


def _kind_of(mode: int) -> str:
    """What a path is that is not a regular file."""
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a device"


def check_regular(file: Path) -> None:
    """Raises `DocumentError` for a path that is not a regular file: opening a pipe would wait for its other end."""
    try:
        mode = file.stat().st_mode
    except FileNotFoundError as cause:
        raise DocumentError(file, "there is no such file") from cause
    except OSError as cause:
        raise DocumentError(file, f"cannot be read: {cause.strerror}") from cause
    if not stat.S_ISREG(mode):
        raise DocumentError(file, f"is {_kind_of(mode)}, not a file")


def read_text(file: Path, largest: int = LARGEST) -> str:
    """Reads a whole file of UTF-8 text.

    Raises:
        DocumentError: it cannot be read (see `read_bytes`), or is not UTF-8.
    """
    content = read_bytes(file, largest)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as cause:
        why = f"byte 0x{content[cause.start]:02x} at offset {cause.start}"
        raise DocumentError(file, f"cannot be read: it is not UTF-8 text ({why})") from cause


def read_object(file: Path, largest: int = LARGEST) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        DocumentError: it cannot be read, is not JSON, is nested too deep, or holds something else than an object.
    """
    return parse_object(read_bytes(file, largest), file)


def parse_object(content: bytes, file: Path, what: str = "") -> dict[str, Any]:
    """Parses one JSON object.

    Args:
        content: the text.
        file: names the text in error messages.
        what: the part of the file that the text is, if it is not the whole: "its header".

    Raises:
        DocumentError: it is not JSON, is nested too deep, or is something else than an object.
    """
    begin = f"{what}: " if what else ""
    if not content.strip():
        raise DocumentError(file, f"{begin}is empty, and must hold a JSON object")
    try:
        value = json.loads(content)
    except RecursionError as cause:
        raise DocumentError(file, f"{begin}{TOO_DEEP}") from cause
    except ValueError as cause:
        raise DocumentError(file, f"{begin}cannot be read as JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise DocumentError(file, f"{begin}must hold a JSON object")
    if is_too_deep(value):
        raise DocumentError(file, f"{begin}{TOO_DEEP}")
    return value


def is_too_deep(value: Any) -> bool:
    """Whether containers are nested more than `DEEPEST` levels deep."""
    level = [value]
    for _ in range(DEEPEST + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return False
        level = below
    return True


TOO_DEEP = f"is nested more than {DEEPEST} levels deep"


def read_yaml(file: Path, keys: Iterable[str] = ()) -> str:
    """Reads the text of a YAML file that holds a section of keys, or nothing, and is small enough to be worked through.

    A text with a mistake of syntax is returned too, for its reader to name the line.

    Args:
        file: the file.
        keys: the keys that the section may have, for the error message about something else than a section.

    Raises:
        DocumentError: it cannot be read, is nested too deep, grows too large where its aliases are filled in, or is
            something else than a section; what it says is not repeated.
    """
    text = read_text(file, LARGEST_YAML)
    check_yaml(text, file, keys)
    return text


def check_yaml(text: str, file: Path, keys: Iterable[str] = ()) -> None:
    """Checks the text of a YAML file as `read_yaml` does; a mistake of syntax is left to its reader."""
    try:
        top = yaml.compose(text, Loader=_LOADER)
    except RecursionError as cause:
        raise DocumentError(file, TOO_DEEP) from cause
    except (yaml.YAMLError, ValueError) as cause:
        if _HALF.search(text):
            raise DocumentError(file, "holds half a surrogate pair, which is not text") from cause
        return
    if top is None:
        return
    if not isinstance(top, yaml.MappingNode):
        known = ", ".join(keys)
        raise DocumentError(file, f"must be a section of keys{': ' if known else ''}{known}")
    _check_nodes(top, file)


def _check_nodes(top: yaml.Node, file: Path) -> None:
    """Raises `DocumentError` for nodes that are nested too deep, or of which aliases make too many."""
    count = 0
    level = [top]
    for _ in range(DEEPEST + 1):
        below: list[yaml.Node] = []
        for node in level:
            if isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    below += [key, value]
            elif isinstance(node, yaml.SequenceNode):
                below += node.value
            elif not is_text(str(node.value)):
                where = f"line {node.start_mark.line + 1}"
                raise DocumentError(
                    file, f"{where}: holds half a surrogate pair, which is not text"
                )
            count += 1
            if count + len(below) > MOST_NODES:
                why = f"holds more than {MOST_NODES} values, aliases filled in"
                raise DocumentError(file, why)
        if not below:
            return
        level = below
    raise DocumentError(file, TOO_DEEP)


def finite_number(value: Any) -> float | None:
    """A number of a document as a float; None for anything else, and for one that is NaN, infinite or too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def is_text(value: str) -> bool:
    """Whether a string can be written as UTF-8, which half a surrogate pair cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
