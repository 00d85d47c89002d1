"""A corpus of token ids that `benchmarks/token_file.py` wrote, so that a machine without text or network can train."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from core.contracts.corpus import Split, TokenBlock, TokenCorpus
from core.contracts.errors import ConfigError, UserError
from core.contracts.schema import setting

IDS = "tokens.npz"
TOKENIZER = "tokenizer.json"


class TokenFile(TokenCorpus):
    """The documents of a folder's `tokens.npz`, whose arrays `train` and `validation` hold ids with 0 before each."""

    @dataclass(kw_only=True)
    class Config:
        """The folder, and a smaller vocabulary where a model has one."""

        folder: str = setting(doc="folder with tokens.npz and tokenizer.json")
        vocabulary: int | None = setting(
            None, doc="ids from this number on are divided by it, and the remainder is read"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for a vocabulary without an id."""
            if self.vocabulary is not None and self.vocabulary < 2:
                raise ConfigError("vocabulary", "must be at least 2")

    example: ClassVar[dict[str, Any]] = {"name": "token_file", "folder": "build/tokens"}

    def check_source(self) -> None:
        """Raises `UserError` where one of the two files is missing."""
        for name in (IDS, TOKENIZER):
            file = Path(self.config.folder) / name
            if not file.is_file():
                raise UserError(f"{file}: is missing; benchmarks/token_file.py writes it")

    @property
    def vocabulary(self) -> int:
        """The number of entries: the setting, or the tokenizer's entries."""
        if self.config.vocabulary is not None:
            return int(self.config.vocabulary)
        content = json.loads(self.tokenizer_json())
        ids = [token["id"] for token in content["added_tokens"]]
        return max([*content["model"]["vocab"].values(), *ids]) + 1

    def tokenizer_json(self) -> str:
        """The contents of `tokenizer.json`."""
        self.check_source()
        return (Path(self.config.folder) / TOKENIZER).read_text(encoding="utf-8")

    def blocks(self, split: Split) -> Iterator[TokenBlock]:
        """The documents of one side of the split, in order."""
        self.check_source()
        with np.load(Path(self.config.folder) / IDS, allow_pickle=False) as arrays:
            ids = arrays[split]
        if self.config.vocabulary is not None:
            is_marker = ids == 0
            ids = ids % self.config.vocabulary
            ids[(ids == 0) & ~is_marker] = 1
            starts = np.flatnonzero(is_marker)
        else:
            starts = np.flatnonzero(ids == 0)
        for first, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield TokenBlock(ids[first:end])
