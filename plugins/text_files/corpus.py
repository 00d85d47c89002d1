"""Text files on disk: a .txt file is a document, and so is each line of a .jsonl file."""

import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from core.contracts.corpus import Corpus, Document
from core.contracts.errors import ConfigError, UserError
from core.contracts.schema import setting


class TextFiles(Corpus):
    """The documents in the files that some globs match; a file that two globs match counts once."""

    @dataclass(kw_only=True)
    class Config:
        """The files, and the key of the text in .jsonl files."""

        paths: list[str] = setting(
            doc="globs of .txt and .jsonl files (`**` descends into folders, `~` is home)"
        )
        text_key: str = setting("text", doc="the key that holds a document's text in .jsonl files")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` if there is no glob."""
            if not self.paths:
                raise ConfigError("paths", "must hold at least one glob, such as texts/*.txt")

    example: ClassVar[dict[str, Any]] = {
        "name": "files",
        "paths": ["texts/*.txt"],
        "text_key": "text",
    }

    def check_source(self) -> None:
        """Raises `UserError` where a glob matches nothing, or a file of another kind."""
        self._files()

    def _files(self) -> set[Path]:
        """The files that the globs match."""
        matched: set[Path] = set()
        for pattern in self.config.paths:
            matched.update(_matches(pattern))
        return matched

    def documents(self) -> Iterator[Document]:
        """The documents, named by their path below the folder that all files share (and their line).

        A moved folder therefore keeps its names, its split and its fingerprint.

        Raises:
            UserError: a glob matches nothing, a file is of another kind or cannot be read, or a line of a .jsonl
                file is not JSON with the text under `text_key`.
        """
        paths = sorted(self._files())
        root = Path(os.path.commonpath([path.parent for path in paths]))
        for path in paths:
            name = path.relative_to(root).as_posix()
            try:
                if path.suffix.lower() == ".txt":
                    yield Document(name=name, data=path.read_bytes(), source=str(path))
                else:
                    yield from self._lines(path, name)
            except OSError as cause:
                raise UserError(f"{path} cannot be read: {cause.strerror}") from cause

    def _lines(self, path: Path, name: str) -> Iterator[Document]:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    source = f"{path}, line {number}"
                    data = self._text(line, source)
                    yield Document(name=f"{name}:{number:09d}", data=data, source=source)

    def _text(self, line: bytes, source: str) -> bytes:
        key = self.config.text_key
        try:
            record = json.loads(line.decode("utf-8"))
        except RecursionError as cause:
            raise UserError(f"{source} is nested too deep") from cause
        except ValueError as cause:
            raise UserError(f"{source} is not JSON: {cause}") from cause
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            raise UserError(f"{source} has no text under the key {key!r} (data.corpus.text_key)")
        try:
            return str(record[key]).encode("utf-8")
        except UnicodeEncodeError as cause:
            raise UserError(
                f"{source} holds half a surrogate pair, which is not text: {cause.reason}"
            ) from cause


def _matches(pattern: str) -> list[Path]:
    """The files that a glob matches; raises `UserError` for none, or for one of another kind."""
    expanded = os.path.expanduser(pattern)
    found = glob.glob(expanded, recursive=True) or glob.glob(_literal(expanded), recursive=True)
    paths = [Path(os.path.abspath(name)) for name in found]
    files = [path for path in paths if path.is_file()]
    if not files:
        raise UserError(
            f"the glob {pattern!r} (data.corpus.paths) matches no file in {os.getcwd()}"
        )
    for path in files:
        if path.suffix.lower() not in (".txt", ".jsonl"):
            raise UserError(
                f"{path} is matched by {pattern!r} (data.corpus.paths), but only .txt and .jsonl can be read"
            )
    return files


def _literal(pattern: str) -> str:
    """The pattern with the characters of globs escaped in its longest part that is a folder, such as `[web] crawl`."""
    folder, separator, rest = pattern.rpartition("/")
    if not separator:
        return pattern
    if os.path.isdir(folder):
        return f"{glob.escape(folder)}/{rest}"
    return f"{_literal(folder)}/{rest}"
