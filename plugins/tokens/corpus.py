"""Token ids that another program has written; no tokenizer is needed."""

import glob
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from core.contracts.corpus import Split, TokenBlock, TokenCorpus
from core.contracts.errors import ConfigError, UserError
from core.contracts.schema import setting
from core.data.documents import HELD_OUT, PERIOD
from plugins.tokens.formats import documents_in

READABLE = (".bin", ".npy")


class Tokens(TokenCorpus):
    """The ids in some files, in the order of their paths."""

    @dataclass(kw_only=True)
    class Config:
        """The files and their format."""

        paths: list[str] = setting(
            doc="globs, folders and files: .bin (nanoGPT, llm.c; Megatron's with an .idx beside it), .npy"
        )
        dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] | None = setting(
            None, doc="the format of the ids in .bin files without a header or index; null: uint16"
        )
        end: int | None = setting(
            None,
            doc="the id that ends a document, where no index says so; null: a file is one document",
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` if there is no path, or an id that is none."""
            if not self.paths or not all(path.strip() for path in self.paths):
                raise ConfigError("paths", "must hold at least one path, such as train.bin")
            if self.end is not None and self.end < 0:
                raise ConfigError("end", "must be the id of a token, at least 0, or null")

    example: ClassVar[dict[str, Any]] = {"name": "tokens", "paths": ["train.bin"]}

    def check_source(self) -> None:
        """Raises `UserError` where a path names no file, or one of another kind."""
        self._files()

    @property
    def vocabulary(self) -> int | None:
        """None: the recipe's number, which every id must be below."""
        return None

    def tokenizer_json(self) -> str | None:
        """None: the files hold no tokenizer."""
        return None

    def blocks(self, split: Split) -> Iterator[TokenBlock]:
        """Yields a block for each document; every twentieth, from the 11th on, is held out.

        Raises:
            UserError: a file cannot be read.
        """
        index = 0
        for path in self._files():
            for ids in self._documents(path):
                if (index % PERIOD == HELD_OUT) == (split == "validation"):
                    yield TokenBlock(ids)
                index += 1

    def _documents(self, path: Path) -> Iterator[Any]:
        try:
            for ids in documents_in(path, self.config.dtype, self.config.end):
                yield np.asarray(ids)
        except OSError as cause:
            raise UserError(f"{path} cannot be read: {cause.strerror or cause}") from cause

    def _files(self) -> list[Path]:
        """The files of the paths, each once, sorted."""
        found: set[Path] = set()
        for pattern in self.config.paths:
            found.update(_matches(pattern))
        return sorted(found)


def _matches(pattern: str) -> list[Path]:
    """The files that a path names; of a folder, those that can be read."""
    expanded = os.path.expanduser(pattern)
    if os.path.isdir(expanded):
        expanded = os.path.join(glob.escape(expanded), "*")
        files = [path for path in _files_of(expanded) if path.suffix.lower() in READABLE]
    elif os.path.isfile(expanded):
        files = [Path(os.path.abspath(expanded))]
    else:
        files = [path for path in _files_of(expanded) if path.suffix.lower() != ".idx"]
    if not files:
        raise UserError(
            f"{pattern!r} (data.corpus.paths) names no .bin or .npy file in {os.getcwd()}"
        )
    for path in files:
        if path.suffix.lower() not in READABLE:
            raise UserError(
                f"{path} is named by {pattern!r} (data.corpus.paths), but only .bin and .npy hold token ids"
            )
    return files


def _files_of(pattern: str) -> list[Path]:
    names = glob.glob(pattern, recursive=True)
    return [Path(os.path.abspath(name)) for name in names if os.path.isfile(name)]
