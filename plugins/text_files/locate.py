"""Which files a list of globs, folders and paths names, and of which kind each is."""

import glob
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from core.contracts.errors import UserError

PLAIN = (".txt", ".md")
"""Endings of files that are one document each."""

LINES = (".jsonl", ".json")
"""Endings of files of JSON records; a .json file may also be one list or one object."""

TABLES = (".parquet", ".arrow")
"""Endings of files of rows, which pyarrow reads."""

COMPRESSED = (".gz", ".zst")
"""Endings that may follow those of text and JSON."""

READABLE = ".txt, .md, .json, .jsonl (these also with .gz or .zst), .parquet and .arrow"


@dataclass(frozen=True)
class Source:
    """One file of a corpus.

    Args:
        path: its absolute path.
        kind: the ending that says how it is read, in lower case.
        compression: `.gz`, `.zst` or empty.
    """

    path: Path
    kind: str
    compression: str = ""

    @property
    def holds_records(self) -> bool:
        """Whether the file holds many documents, which are numbered."""
        return self.kind not in PLAIN

    @property
    def library(self) -> str:
        """The package that reads the file; empty where Python alone does."""
        if self.kind in TABLES:
            return "pyarrow"
        return "zstandard" if self.compression == ".zst" else ""


@dataclass(frozen=True)
class Located:
    """The files of a corpus.

    Args:
        sources: the files in the order in which their documents' names sort.
        root: the folder that all of them share.
        left_out: how many files of other kinds the named folders hold, by their ending.
    """

    sources: list[Source]
    root: Path
    left_out: Counter[str]

    def name_of(self, source: Source) -> str:
        """The path of a file below the folder that all share."""
        return source.path.relative_to(self.root).as_posix()


def source_of(path: Path) -> Source | None:
    """How a file is read, from its ending; None for a kind that cannot be read."""
    name = path.name.lower()
    compression = ""
    for ending in COMPRESSED:
        if name.endswith(ending):
            compression = ending
            name = name.removesuffix(ending)
    kind = os.path.splitext(name)[1]
    if kind in TABLES and not compression:
        return Source(path, kind)
    if kind in PLAIN or kind in LINES:
        return Source(path, kind, compression)
    return None


def locate(patterns: Iterable[str], key: str = "data.corpus.paths") -> Located:
    """Finds the files of a corpus; one that two patterns name counts once.

    Args:
        patterns: globs, folders and files.
        key: the key of the recipe that holds them, which error messages name.

    Raises:
        UserError: a pattern names no file, a glob matches a file of another kind, or a library is missing.
    """
    found: dict[Path, Source] = {}
    left_out: Counter[str] = Counter()
    for pattern in patterns:
        folder = Path(os.path.abspath(os.path.expanduser(pattern)))
        if folder.is_dir():
            sources = _below(folder, pattern, key, left_out)
        else:
            sources = _matches(pattern, key)
        for source in sources:
            found[source.path] = source
    for source in found.values():
        _check_library(source)
    root = Path(os.path.commonpath([path.parent for path in found]))
    located = Located(list(found.values()), root, left_out)

    def order(source: Source) -> str:
        return located.name_of(source) + ":" * source.holds_records

    located.sources.sort(key=order)
    return located


def _below(folder: Path, pattern: str, key: str, left_out: Counter[str]) -> list[Source]:
    """The files that can be read below a folder; hidden ones are left out."""
    sources = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent, name)
            if name.startswith(".") or not path.is_file():
                continue
            source = source_of(path)
            if source is None:
                left_out[path.suffix.lower() or "no ending"] += 1
            else:
                sources.append(source)
    if not sources:
        raise UserError(
            f"the folder {pattern!r} ({key}) holds no file that can be read: {READABLE}"
        )
    return sources


def _matches(pattern: str, key: str) -> list[Source]:
    """The files that a glob matches; raises `UserError` for none, or for one of another kind."""
    expanded = os.path.expanduser(pattern)
    found = glob.glob(expanded, recursive=True) or glob.glob(_literal(expanded), recursive=True)
    paths = [Path(os.path.abspath(name)) for name in found]
    files = [path for path in paths if path.is_file()]
    if not files:
        raise UserError(f"the glob {pattern!r} ({key}) matches no file in {os.getcwd()}")
    sources = []
    for path in files:
        source = source_of(path)
        if source is None:
            why = f"but only {READABLE} can be read"
            raise UserError(f"{path} is matched by {pattern!r} ({key}), {why}")
        sources.append(source)
    return sources


def _check_library(source: Source) -> None:
    """Raises `UserError` where the package that reads a file is not installed."""
    if source.library and find_spec(source.library) is None:
        raise UserError(
            f"{source.path} needs the package {source.library}, which is not installed: "
            "pip install 'moeloom[data]'"
        )


def _literal(pattern: str) -> str:
    """The pattern with the characters of globs escaped in its longest part that is a folder, such as `[web] crawl`.

    A name that holds such characters and is a file stands for itself too.
    """
    if os.path.isfile(pattern):
        return glob.escape(pattern)
    folder, separator, rest = pattern.rpartition("/")
    if not separator:
        return pattern
    if os.path.isdir(folder):
        return f"{glob.escape(folder)}/{rest}"
    return f"{_literal(folder)}/{rest}"
