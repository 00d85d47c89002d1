"""Measures how dense the code is and whether its words are the field's.

    python tools/readable.py                 figures per 1,000 lines of core, plugins and moeloom, beside their limits
    python tools/readable.py --list          and the place of each docstring, text and word that is over a limit
    python tools/readable.py --root FOLDER   the same for another checkout

The figures: assignments that pack several values (`self.a, self.b = x, y`), comprehensions, conditional expressions,
lines over 105 characters, docstrings of functions and classes that begin with a preposition, other explanations that do
(of modules, values, arguments, keys and options), and retired words in code and documentation. Python alone is needed.
Exit code 0: every figure is within its limit; 1: one is not.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

CODE = ("core", "plugins", "moeloom")
TEXT = (
    "core",
    "plugins",
    "moeloom",
    "docs",
    "tests",
    "benchmarks",
    "examples",
    "tools",
    "recipes",
    "records",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "pyproject.toml",
)
"""Folders and files that are searched for retired words and names; the fields of JSON files stay as they are."""
ENDINGS = {".py", ".md", ".yaml", ".j2", ".js", ".txt", ".toml"}
LONG = 105
LIMITS = {
    "packed assignments": 5,
    "comprehensions": 24,
    "conditional expressions": 12,
    "long lines": 40,
}
"""Per 1,000 lines. Docstrings and texts that begin with a preposition, and retired words, may not occur at all."""

PREPOSITION = re.compile(
    r"(Of|By|In|With|Without|As|For|Off|From|To|At|Under|Over|Beside|Between|Twice"
    r"|Before|After|On|Up to|About|Against|Until|Since)\b"
)
"""The first line of alternatives gives the figures of the base (commit 44f368f^): 76 docstrings of functions and
classes, 120 other explanations. The second line was added later; with both, the base has 86 and 125."""
QUANTITY = re.compile(r"At (least|most)\b|(Up to|About|Over|Under) \d")
"""What begins with a preposition and is a noun phrase nevertheless ("at most 16 characters", "up to 16")."""

EXPLANATIONS = ("doc", "help", "description")
"""Arguments that hold the explanation of a recipe's key, of an option or of a command."""

_SECTION = re.compile(r"^(?:Args|Class attributes):\n((?:    .*\n?)+)", re.MULTILINE)
_ARGUMENT = re.compile(r"^    \*{0,2}\w+(?:, \*{0,2}\w+)*: (.*)", re.MULTILINE)
WORDS = ("door", "doors", "room", "rooms", "told", "house", "spokesman", "spokesmen")
"""Words of this project's former dialect; as a part of an identifier (`is_told`) they count too."""

NAMES = (
    "Wrong",
    "Mistake",
    "NoSlot",
    "Asked",
    "Wish",
    "Pieces",
    "Traits",
    "Watchers",
    "WholeFiles",
    "RoleSpy",
    "Weighted",
    "told_where",
    "run_door",
    "has_place",
    "is_stillborn",
    "check_same",
    "obstacles",
    "share_largest",
    "one_group",
    "full_disk_told",
    "pieces_of",
    "_times_formed",
    "deepseek_routing",
    "lightning_parts",
)
"""Identifiers that have a plain name now; in documentation they count between backticks."""

DEFINITIONS = (
    "Seen",
    "Move",
    "Kind",
    "Piece",
    "Origin",
    "Loaded",
    "Tensors",
    "Paths",
    "Best",
    "Bar",
    "Shared",
    "Formats",
    "denominators",
    "_in_scope",
    "refuses",
)
"""Names that are retired too, but are also words of a sentence: only what defines them counts (`class X`, `def X`)."""

FILES = ("door", "asked", "moves", "capacity")
"""Names of modules that are called something else now."""

ALLOWED: dict[str, tuple[str, ...]] = {
    "tools/readable.py": (*WORDS, *NAMES),
    "docs/migration.md": NAMES,
    "CHANGELOG.md": ("deepseek_routing", "lightning_parts"),
}
"""Files that have to name what was retired, with what they may name."""

_WORD = re.compile(rf"(?<![A-Za-z])({'|'.join(WORDS)})(?![A-Za-z])", re.IGNORECASE)
_NAME = re.compile(rf"\b({'|'.join(NAMES)})\b")
_DEFINITION = re.compile(rf"\b(?:class|def) +(?:{'|'.join(DEFINITIONS)})\b|^ *refuses *[:=]")


@dataclass
class Measure:
    """What was counted in a checkout.

    Args:
        lines: lines of Python in `CODE`.
        counts: how often each thing of `LIMITS` occurs there.
        prepositions: places of docstrings of functions and classes that begin with a preposition.
        texts: places of other explanations that do: docstrings of modules and of values, entries of `Args:` and
            `Class attributes:`, and the texts of recipe keys and of options.
        retired: places of retired words and names in `TEXT`.
    """

    lines: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0))
    prepositions: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)

    def per_thousand(self) -> dict[str, float]:
        """The counts per 1,000 lines."""
        return {name: 1000 * count / max(self.lines, 1) for name, count in self.counts.items()}

    def within_limits(self) -> bool:
        """Whether every figure is within its limit."""
        dense = [name for name, value in self.per_thousand().items() if value > LIMITS[name]]
        return not dense and not self.prepositions and not self.texts and not self.retired


def measure(root: Path) -> Measure:
    """Counts everything in a checkout."""
    found = Measure()
    for file in _files(root, CODE, {".py"}):
        source = file.read_text(encoding="utf-8")
        found.lines += source.count("\n")
        found.counts["long lines"] += sum(len(line) > LONG for line in source.splitlines())
        tree = ast.parse(source)
        for number, text in _texts(tree):
            if _lacks_its_subject(text):
                found.texts.append(f"{file.relative_to(root)}:{number} {text.splitlines()[0]}")
        for node in ast.walk(tree):
            kind = _kind(node)
            if kind is not None:
                found.counts[kind] += 1
            if _begins_with_preposition(node):
                found.prepositions.append(f"{file.relative_to(root)}:{node.lineno} {node.name}")
        if file.stem in FILES:
            found.retired.append(f"{file.relative_to(root)} (the name of the file)")
    for file in _files(root, TEXT, ENDINGS):
        found.retired += retired_in(file.relative_to(root).as_posix(), file.read_text("utf-8"))
    return found


def retired_in(name: str, text: str) -> list[str]:
    """The places of retired words and names in a file.

    Args:
        name: the file's path in the checkout.
        text: its content.
    """
    allowed = {word.lower() for word in ALLOWED.get(name, ())}
    places = []
    for number, line in enumerate(text.splitlines(), 1):
        words = _WORD.findall(line)
        code = line
        if not name.endswith(".py"):
            code = " ".join(re.findall("`([^`]*)`", line))
        words += _NAME.findall(code) + _DEFINITION.findall(line)
        places += [f"{name}:{number} {word}" for word in words if word.lower() not in allowed]
    return places


def _files(root: Path, places: tuple[str, ...], endings: set[str]) -> Iterator[Path]:
    for place in places:
        path = root / place
        if path.is_file():
            yield path
        for file in sorted(path.rglob("*")):
            if file.suffix in endings and "__pycache__" not in file.parts:
                yield file


def _kind(node: ast.AST) -> str | None:
    """The figure that a piece of syntax counts for."""
    if isinstance(node, ast.Assign):
        packed = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        return "packed assignments" if packed else None
    if isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return "comprehensions"
    if isinstance(node, ast.IfExp):
        return "conditional expressions"
    return None


def _begins_with_preposition(node: ast.AST) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False
    return PREPOSITION.match(ast.get_docstring(node) or "") is not None


def _texts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every explanation but the docstrings of functions and classes, with its line."""
    yield 1, ast.get_docstring(tree) or ""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _arguments(node)
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in EXPLANATIONS and _is_text(keyword.value):
                    yield keyword.value.lineno, ast.literal_eval(keyword.value)
        body = getattr(node, "body", None)
        if isinstance(body, list):
            yield from _values(body)


def _values(body: list[ast.stmt]) -> Iterator[tuple[int, str]]:
    """The explanations below the assignments of a module or class."""
    for statement, after in pairwise(body):
        if not isinstance(statement, ast.Assign | ast.AnnAssign):
            continue
        if isinstance(after, ast.Expr) and _is_text(after.value):
            yield after.lineno, ast.literal_eval(after.value).strip()


def _arguments(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef,
) -> Iterator[tuple[int, str]]:
    """What the sections `Args:` and `Class attributes:` of a docstring explain of each name."""
    for section in _SECTION.findall(ast.get_docstring(node) or ""):
        for text in _ARGUMENT.findall(section):
            yield node.lineno, text


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _lacks_its_subject(text: str) -> bool:
    """Whether a text begins with a bare preposition; those of arguments and keys begin with a small letter."""
    begin = text[:1].upper() + text[1:]
    return PREPOSITION.match(begin) is not None and QUANTITY.match(begin) is None


def main() -> int:
    """Prints the figures; the exit code says whether they are within their limits."""
    parser = argparse.ArgumentParser(
        description="how dense the code is, and whether its words are the field's"
    )
    parser.add_argument(
        "--root", type=Path, default=Path(__file__).resolve().parents[1], help="a checkout"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the place of each docstring, text and word"
    )
    arguments = parser.parse_args()
    found = measure(arguments.root)
    print(f"{found.lines} lines of Python in {', '.join(CODE)}; per 1,000 lines:")
    for name, value in found.per_thousand().items():
        print(f"  {name:<24} {value:6.1f}   at most {LIMITS[name]}")
    for name, places in (
        ("docstrings of functions and classes that begin with a preposition", found.prepositions),
        ("other explanations that begin with a preposition", found.texts),
        ("retired words and names", found.retired),
    ):
        print(f"{name}: {len(places)}")
        for place in places if arguments.list else ():
            print(f"  {place}")
    return 0 if found.within_limits() else 1


if __name__ == "__main__":
    sys.exit(main())
