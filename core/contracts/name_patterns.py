"""Patterns that choose tensors of a model by name: `router`, `heads.mtp`, `blocks.*.ffn.balance.*.bias`.

A pattern is a part of a name between dots, or several that follow each other. `*` stands for any text, dots included,
`?` for one character. So `router` chooses every tensor of every router, and `blocks.1` no tensor of block 10. A dot at
the beginning of a pattern stands for that of the name: `.output` chooses the model's output, and no layer's.
"""

import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches

from core.contracts.errors import ConfigError


def check_patterns(patterns: Iterable[str], key: str) -> None:
    """Raises `ConfigError` for a pattern that is empty or has an empty part."""
    for pattern in patterns:
        if "" in pattern.removeprefix(".").split("."):
            raise ConfigError(key, f"{pattern!r} must be parts of a tensor's name, joined by dots")


def chooses(pattern: str, name: str) -> bool:
    """Whether a pattern chooses the tensor of a name."""
    return _expression(pattern).search(f".{name}.") is not None


def chosen_by(patterns: Iterable[str], names: Iterable[str]) -> set[str]:
    """The names that at least one of some patterns chooses."""
    expressions = [_expression(pattern) for pattern in patterns]
    return {name for name in names if any(e.search(f".{name}.") for e in expressions)}


def check_chosen(patterns: Iterable[str], names: Collection[str], key: str) -> None:
    """Checks that every pattern chooses something.

    Raises:
        ConfigError: one chooses no name; the error has the nearest parts of names.
    """
    for pattern in patterns:
        if not any(chooses(pattern, name) for name in names):
            raise ConfigError(key, f"{pattern!r} chooses no tensor; {_nearest(pattern, names)}")


def folded(names: Iterable[str]) -> list[str]:
    """Names in which numbers are replaced by `*`, each once, with how often it occurs if more than once."""
    counts: dict[str, int] = {}
    for name in names:
        parts = ["*" if part.isdecimal() else part for part in name.split(".")]
        short = ".".join(parts)
        counts[short] = counts.get(short, 0) + 1
    return [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]


def listed(names: Iterable[str], most: int = 8) -> str:
    """The first kinds of some names as one text, with the number of the others."""
    short = folded(names)
    rest = f", and {len(short) - most} more kinds" if len(short) > most else ""
    return f"{', '.join(short[:most])}{rest}"


def _expression(pattern: str) -> re.Pattern[str]:
    begin = "^" if pattern.startswith(".") else ""
    text = re.escape(pattern.removeprefix(".")).replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(rf"{begin}\.{text}\.", re.DOTALL)


def _nearest(pattern: str, names: Iterable[str]) -> str:
    """The parts of names that are most alike to a pattern, or some of all parts."""
    known: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for begin in range(len(parts)):
            for end in range(begin + 1, len(parts) + 1):
                known[".".join(parts[begin:end])] = None
    close = get_close_matches(pattern, known, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    words = dict.fromkeys(p for name in names for p in name.split(".") if not p.isdecimal())
    return f"parts of names: {', '.join(words)}"
