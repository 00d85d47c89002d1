"""A data set of the library `datasets`: a folder that `save_to_disk` wrote, or one of the Hugging Face hub."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from core.contracts.corpus import Corpus, Document
from core.contracts.errors import ConfigError, UserError
from core.contracts.schema import setting

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
"""Files of which a folder of `save_to_disk` has at least one."""


class HfDataset(Corpus):
    """One document for each row of one split."""

    @dataclass(kw_only=True)
    class Config:
        """Which data set, and which of its columns."""

        path: str = setting(
            doc="a folder that `save_to_disk` wrote, or the name of a data set on the hub"
        )
        config: str | None = setting(None, doc="the configuration of a data set on the hub")
        split: str = setting("train", doc="the split that is read")
        revision: str | None = setting(
            None, doc="the commit of a data set on the hub; null: the newest, which may change"
        )
        text_key: str = setting("text", doc="the column of the text; dots lead into structures")
        streaming: bool = setting(
            False, doc="read a data set of the hub as it is downloaded, without keeping it"
        )
        rows: int | None = setting(None, doc="how many rows are read; null: all")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for an empty name, or no row."""
            for key in ("path", "split", "text_key"):
                if not getattr(self, key).strip():
                    raise ConfigError(key, "must not be empty")
            if self.rows is not None and self.rows < 1:
                raise ConfigError("rows", "must be at least 1, or null")

    example: ClassVar[dict[str, Any]] = {"name": "hf_dataset", "path": "saved/stories"}

    def check_source(self) -> None:
        """Raises `UserError` where the library is missing, or the path is neither a saved data set nor a name."""
        if find_spec("datasets") is None:
            raise UserError(
                "corpus hf_dataset needs the package datasets, which is not installed: "
                "pip install 'moeloom[data]'"
            )
        self._folder()

    def documents(self) -> Iterator[Document]:
        """Yields the rows, named by their number, so that they keep their order.

        Raises:
            UserError: the data set cannot be read, or a row has no text.
        """
        self.check_source()
        where = f"{self.config.path}, split {self.config.split}"
        with self._reading():
            for number, row in enumerate(islice(self._rows(), self.config.rows)):
                text = self._text(row)
                source = f"{where}, row {number}"
                if not isinstance(text, str):
                    known = ", ".join(map(str, row))
                    raise UserError(
                        f"{source} has no text under the key {self.config.text_key!r} "
                        f"(data.corpus.text_key); its keys: {known}"
                    )
                data = text.encode("utf-8", "surrogatepass")
                yield Document(name=f"{number:012d}", data=data, source=source)

    def _folder(self) -> Path | None:
        """The folder of a saved data set; None for a name on the hub."""
        path = Path(os.path.expanduser(self.config.path))
        if path.is_dir():
            if not any((path / name).is_file() for name in SAVED):
                raise UserError(
                    f"{path} (data.corpus.path) is no folder of `save_to_disk`; for files in it use "
                    "{name: files, paths: [...]}"
                )
            return path
        if not HUB_NAME.fullmatch(self.config.path):
            raise UserError(
                f"{path} (data.corpus.path) is no folder, and no name on the hub, such as roneneldan/TinyStories"
            )
        return None

    def _rows(self) -> Iterator[dict[str, Any]]:
        import datasets

        settings = self.config
        folder = self._folder()
        if folder is not None:
            found = datasets.load_from_disk(str(folder))
            if isinstance(found, datasets.DatasetDict):
                if settings.split not in found:
                    known = ", ".join(found)
                    raise UserError(
                        f"{folder} has no split {settings.split!r} (data.corpus.split); known: {known}"
                    )
                found = found[settings.split]
        else:
            found = datasets.load_dataset(
                settings.path,
                settings.config,
                split=settings.split,
                revision=settings.revision,
                streaming=settings.streaming,
            )
        column = settings.text_key.partition(".")[0]
        if found.column_names and settings.text_key in found.column_names:
            column = settings.text_key
        if found.column_names and column in found.column_names:
            found = found.select_columns([column])
        yield from found

    def _text(self, row: dict[str, Any]) -> Any:
        """The value under the key of the text."""
        if self.config.text_key in row:
            return row[self.config.text_key]
        value: Any = row
        for key in self.config.text_key.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A context in which whatever the library raises is one sentence; it has no common class of errors."""
        try:
            yield
        except (UserError, GeneratorExit):
            raise
        except Exception as cause:
            why = " ".join(f"{type(cause).__name__}: {cause}".split())
            raise UserError(
                f"{self.config.path} (data.corpus.path) cannot be read: {why[:300]}"
            ) from cause
