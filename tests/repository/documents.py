"""Reads the Markdown documents of the repository."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("core/*/README.md"),
        *ROOT.glob("plugins/*/README.md"),
    ]
)


@dataclass(frozen=True)
class Block:
    """A fenced block: the word after the fence, and the lines."""

    language: str
    lines: list[str]

    @property
    def text(self) -> str:
        """The block as a file."""
        return "\n".join(self.lines) + "\n"


def blocks(document: Path, language: str | None = None) -> list[Block]:
    """The fenced blocks of a document, in order; those of one language where it is given."""
    found: list[Block] = []
    inside: Block | None = None
    for line in document.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if inside is None:
                inside = Block(line.removeprefix("```"), [])
            else:
                found.append(inside)
                inside = None
        elif inside is not None:
            inside.lines.append(line)
    assert inside is None, f"{document}: a fence is not closed"
    return [block for block in found if language in (None, block.language)]


def section(document: Path, heading: str) -> str:
    """The text under a heading, up to the next of the same level or above."""
    level = heading.partition(" ")[0]
    _, _, rest = document.read_text(encoding="utf-8").partition(f"{heading}\n")
    assert rest, f"{document} has no heading {heading!r}"
    return re.split(rf"^#{{1,{len(level)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def commands() -> set[str]:
    """The names of the commands, NAME of `python -m core.NAME`."""
    files = (ROOT / "core").glob("*.py")
    return {
        file.stem
        for file in files
        if "run_command(main, parser())" in file.read_text(encoding="utf-8")
    }


def first_cells(text: str) -> set[str]:
    """The words in backticks in the first cell of every table row."""
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return {word for cell in rows for word in re.findall(r"`([^`]+)`", cell)}
