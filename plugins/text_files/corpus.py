"""Text files on disk: a file of text is a document, and so is each record of a file of JSON, Parquet or Arrow."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from core.contracts.corpus import Corpus, Document, Split, TokenBlock, TokenCorpus
from core.contracts.errors import ConfigError, UserError
from core.contracts.schema import setting
from core.data.documents import HELD_OUT, PERIOD
from plugins.text_files.locate import Located, Source, locate
from plugins.text_files.records import BadRecordError, content_of, records
from plugins.text_files.streams import UnreadableError, whole

SHOWN = 10
"""Bad records that are printed; the others are counted."""

HOW_TO_SKIP = "; data.corpus.on_error: skip leaves such records out and counts them"


@dataclass(frozen=True)
class Content:
    """What one document holds.

    Args:
        name: its name; see `Document`.
        source: the file, and the place in it, for error messages.
        value: text in UTF-8, or token ids; messages for conversations.
    """

    name: str
    source: str
    value: Any


class TextFiles(Corpus):
    """The documents in the files that some globs match; a file that two globs match counts once."""

    @dataclass(kw_only=True)
    class Config:
        """The files, the key of the text in records, and what happens to bad records."""

        paths: list[str] = setting(
            doc="globs, folders and files: .txt, .md, .json, .jsonl (also .gz and .zst), .parquet, "
            ".arrow; `**` descends into folders, `~` is home"
        )
        text_key: Any = setting(
            "text",
            doc="the key of a record that holds its text or token ids; dots lead into objects; "
            "a list of keys: their texts, joined by an empty line",
        )
        on_error: Literal["error", "skip"] = setting(
            "error", doc="what a record without readable text is: an error, or left out and counted"
        )
        skip_limit: int = setting(
            1000, doc="the most records that `on_error: skip` leaves out; one more is an error"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` if there is no glob, a key that names nothing, or no limit."""
            if not self.paths:
                raise ConfigError("paths", "must hold at least one glob, such as texts/*.txt")
            if not all(path.strip() for path in self.paths):
                raise ConfigError("paths", "must not hold an empty path")
            keys = self.keys()
            if not keys or not all(isinstance(key, str) and key for key in keys):
                raise ConfigError("text_key", "must be a key, or a list of at least one key")
            if len(set(keys)) < len(keys):
                raise ConfigError("text_key", "must not hold a key twice")
            if self.skip_limit < 1:
                raise ConfigError("skip_limit", "must be at least 1")

        def keys(self) -> list[str]:
            """The keys of the text."""
            return list(self.text_key) if isinstance(self.text_key, list) else [self.text_key]

    example: ClassVar[dict[str, Any]] = {
        "name": "files",
        "paths": ["texts/*.txt"],
        "text_key": "text",
    }

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._skipped = 0
        self._is_shown = False
        self._left_out: dict[str, int] = {}

    def check_source(self) -> None:
        """Raises `UserError` where a path names nothing, a file of another kind, or one that needs a library."""
        locate(self.config.paths)

    def documents(self) -> Iterator[Document]:
        """The documents, named by their path below the folder that all files share (and their place in the file).

        A moved folder therefore keeps its names, its split and its fingerprint.

        Raises:
            UserError: a path names nothing, a file is of another kind or cannot be read, a record has no text, or
                more records than `skip_limit` are bad.
        """
        for content in self.contents():
            if not isinstance(content.value, bytes):
                why = "holds token ids, and the first document of this corpus holds text"
                raise UserError(f"{content.source} {why}")
            yield Document(name=content.name, data=content.value, source=content.source)

    def as_tokens(self) -> TokenCorpus | None:
        """A corpus of tokens where the first record holds token ids."""
        located = locate(self.config.paths)
        if not located.sources[0].holds_records:
            return None
        shown = self._is_shown
        self._is_shown = True  # this reading is only a look at the beginning
        first = next(self.contents(), None)
        self._is_shown = shown
        if first is None or isinstance(first.value, bytes):
            return None
        return FileIds(self)

    def notes(self) -> list[str]:
        """How many records and files the last reading left out."""
        return self.notes_with(0)

    def notes_with(self, others: int) -> list[str]:
        """The same with further records, which were left out elsewhere."""
        found = []
        skipped = self._skipped + others
        if skipped:
            counted = "1 record" if skipped == 1 else f"{skipped} records"
            found.append(f"{counted} without readable text left out of the corpus")
        if self._left_out:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self._left_out.items()))
            found.append(f"files of other kinds in the corpus's folders are not read: {kinds}")
        return found

    def contents(self) -> Iterator[Content]:
        """Yields the content of every document, in the order of their names."""
        located = locate(self.config.paths)
        self._left_out = dict(located.left_out)
        self._skipped = 0
        for source in located.sources:
            try:
                if source.holds_records:
                    yield from self._records(located, source)
                else:
                    yield from self._text(located, source)
            except UnreadableError as error:
                self.bad(str(error))
        self._is_shown = True

    def _text(self, located: Located, source: Source) -> Iterator[Content]:
        """Yields the one document of a file of text."""
        data = whole(source)
        if self.config.on_error == "skip":
            try:
                data.decode("utf-8")
            except UnicodeDecodeError as cause:
                byte = f"byte 0x{data[cause.start]:02x} at offset {cause.start}"
                self.bad(f"{source.path} is not UTF-8: {byte} ({cause.reason})")
                return
        yield Content(located.name_of(source), str(source.path), data)

    def _records(self, located: Located, source: Source) -> Iterator[Content]:
        keys = self.config.keys()
        name = located.name_of(source)
        for record in records(source, keys):
            where = f"{source.path}, {record.place}"
            try:
                if record.error:
                    raise BadRecordError(record.error)
                value = self.value_of(record.value)
            except UnicodeEncodeError as cause:
                self.bad(f"{where} holds half a surrogate pair, which is not text: {cause.reason}")
            except BadRecordError as error:
                self.bad(f"{where} {error}")
            else:
                yield Content(f"{name}:{record.number:09d}", where, value)

    def value_of(self, record: Any) -> Any:
        """Returns what a record holds; raises `BadRecordError` or `UnicodeEncodeError` if it cannot be read."""
        found = content_of(record, self.config.keys())
        return found.encode("utf-8") if isinstance(found, str) else found

    def bad(self, sentence: str, *, is_counted: bool = True) -> None:
        """Counts and shows a record that is left out; raises `UserError` where that is not allowed."""
        if self.config.on_error == "error":
            raise UserError(f"{sentence}{HOW_TO_SKIP}")
        self._skipped += is_counted
        self.check_limit(sentence)
        if not self._is_shown and self._skipped <= SHOWN:
            print(f"note: left out: {sentence}", file=sys.stderr)

    def check_limit(self, sentence: str, others: int = 0) -> None:
        """Raises `UserError` if more records are left out than may be, with `others` that are counted elsewhere."""
        if self._skipped + others > self.config.skip_limit:
            most = f"data.corpus.skip_limit = {self.config.skip_limit}"
            raise UserError(f"{sentence}; more records are bad than {most} allows")


class FileIds(TokenCorpus):
    """The token ids in the records of files; which tokenizer has made them is not known.

    Args:
        files: the files.
    """

    def __init__(self, files: TextFiles) -> None:
        super().__init__(files.config)
        self._files = files

    @property
    def vocabulary(self) -> int | None:
        """None: the recipe's number, which every id must be below."""
        return None

    def tokenizer_json(self) -> str | None:
        """None: the files hold no tokenizer."""
        return None

    def notes(self) -> list[str]:
        """The notes of the files."""
        return self._files.notes()

    def blocks(self, split: Split) -> Iterator[TokenBlock]:
        """Yields a block for each record; every twentieth, from the 11th on, is held out."""
        for index, content in enumerate(self._files.contents()):
            if isinstance(content.value, bytes):
                why = "holds text, and the first record of this corpus holds token ids"
                raise UserError(f"{content.source} {why}")
            if (index % PERIOD == HELD_OUT) == (split == "validation"):
                yield TokenBlock(content.value)
