"""Conversations in files of JSON, Parquet or Arrow, of which the assistant's turns are learned."""

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from core.contracts.corpus import Corpus, CorpusTokenizer, Split, TokenBlock, TokenCorpus
from core.contracts.errors import ConfigError, UserError
from core.contracts.schema import setting
from core.data.conversations import check_messages
from core.data.documents import HELD_OUT, PERIOD
from plugins.text_files.corpus import TextFiles
from plugins.text_files.locate import locate
from plugins.text_files.records import BadRecordError, value_at


class Chat(TokenCorpus):
    """The conversations in some files; each becomes one block of tokens in the words of the chat template.

    Args:
        config: the settings.
        tokenizer: the run's tokenizer with its template; None: not known yet.
    """

    @dataclass(kw_only=True)
    class Config:
        """The files, the key of the messages, and what happens to bad records."""

        paths: list[str] = setting(
            doc="globs, folders and files: .json, .jsonl (also .gz and .zst), .parquet, .arrow"
        )
        messages_key: str = setting(
            "messages", doc="the key of a record that holds its messages; dots lead into objects"
        )
        on_error: Literal["error", "skip"] = setting(
            "error", doc="what a record without messages is: an error, or left out and counted"
        )
        skip_limit: int = setting(
            1000, doc="the most records that `on_error: skip` leaves out; one more is an error"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` if there is no path, no key, or no limit."""
            if not self.paths or not all(path.strip() for path in self.paths):
                raise ConfigError("paths", "must hold at least one path, such as chats/*.jsonl")
            if not self.messages_key:
                raise ConfigError("messages_key", "must be a key")
            if self.skip_limit < 1:
                raise ConfigError("skip_limit", "must be at least 1")

        def keys(self) -> list[str]:
            """The key of the messages, as the readers of files take it."""
            return [self.messages_key]

    needs_tokenizer = True
    example: ClassVar[dict[str, Any]] = {"name": "chat", "paths": ["chats/*.jsonl"]}

    def __init__(self, config: Any, tokenizer: CorpusTokenizer | None = None) -> None:
        super().__init__(config)
        self._tokenizer = tokenizer
        self._files = _Conversations(config)
        self._refused: dict[Split, int] = {}

    def with_tokenizer(self, tokenizer: CorpusTokenizer) -> Corpus:
        """Returns the same conversations, which can be read then; both know what was left out."""
        bound = copy(self)
        bound._tokenizer = tokenizer
        return bound

    def check_source(self) -> None:
        """Raises `UserError` where a path names nothing, or a file that holds no records."""
        for source in locate(self.config.paths).sources:
            if not source.holds_records:
                why = "holds no conversations: .json, .jsonl, .parquet and .arrow files do"
                raise UserError(f"{source.path} {why}")

    @property
    def vocabulary(self) -> int | None:
        """None: the tokenizer's."""
        return None

    def tokenizer_json(self) -> str | None:
        """None: the recipe names it."""
        return None

    def notes(self) -> list[str]:
        """How many records and conversations the last readings of both sides left out."""
        return self._files.notes_with(sum(self._refused.values()))

    def blocks(self, split: Split) -> Iterator[TokenBlock]:
        """Yields a block for each conversation; every twentieth, from the 11th on, is held out.

        Raises:
            UserError: a record has no messages, or the chat template does not take them.
        """
        assert self._tokenizer is not None, "a corpus of conversations is read with a tokenizer"
        self._refused[split] = 0
        for index, content in enumerate(self._files.contents()):
            if (index % PERIOD == HELD_OUT) != (split == "validation"):
                continue
            try:
                yield self._tokenizer.conversation(content.value)
            except UserError as error:
                self._files.bad(f"{content.source} {error}", is_counted=False)
                self._refused[split] += 1
                self._files.check_limit(f"{content.source} {error}", sum(self._refused.values()))


class _Conversations(TextFiles):
    """The messages of every record."""

    def value_of(self, record: Any) -> Any:
        """Returns the messages of a record."""
        key = self.config.messages_key
        found = record if isinstance(record, list) else value_at(record, key)
        if found is None:
            known = ", ".join(map(str, record)) if isinstance(record, dict) else "none"
            why = f"has no messages under the key {key!r} (data.corpus.messages_key)"
            raise BadRecordError(f"{why}; its keys: {known}")
        try:
            return check_messages(found)
        except UserError as error:
            raise BadRecordError(f"({key}): {error}") from error
