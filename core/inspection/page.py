"""Writes an inspection as one HTML page, which holds its data, style and script and loads nothing else."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from core.contracts.errors import UserError
from core.storage.files import write_text

LARGEST = 3_000_000
"""Bytes of a page; of models with very many experts it shows fewer tokens and contexts of each."""


def write(document: dict[str, Any], file: Path) -> int:
    """Writes the page of a document and returns its size in bytes.

    Raises:
        UserError: the file cannot be written.
    """
    text = render(document)
    try:
        write_text(file, text)
    except OSError as cause:
        raise UserError(f"--out {file}: cannot be written: {cause.strerror}") from cause
    return file.stat().st_size


def render(document: dict[str, Any]) -> str:
    """The page of a document as text, of at most `LARGEST` bytes."""
    page = _own("page.html")
    page = page.replace("/*STYLE*/", _own("page.css")).replace("/*SCRIPT*/", _own("page.js"))
    for tokens, contexts, partners, reading in ((16, 4, 8, 3000), (8, 1, 4, 1500), (3, 0, 2, 500)):
        small = _cut(document, tokens, contexts, partners, reading)
        if "beside" in document:
            small["beside"] = _cut(document["beside"], tokens, contexts, partners, reading)
        text = page.replace("/*DATA*/", _embedded(small))
        text = text.encode("utf-8", "replace").decode("utf-8")
        if len(text.encode("utf-8")) <= LARGEST:
            break
    return text


def _cut(
    document: dict[str, Any], tokens: int, contexts: int, partners: int, reading: int
) -> dict[str, Any]:
    """A document with shorter lists."""
    layers = []
    for layer in document["layers"]:
        experts = []
        for expert in layer["experts"]:
            short = dict(expert)
            short["tokens"] = [_short(token) for token in expert["tokens"][:tokens]]
            short["contexts"] = expert["contexts"][:contexts]
            together = expert["together"]
            half = partners // 2
            if len(together) > partners:
                together = together[:half] + together[len(together) - half :]
            short["together"] = [_short(pair) for pair in together]
            experts.append(_short(short))
        layers.append({**layer, "experts": experts})
    first = {path: ids[:reading] for path, ids in document["reading"]["first"].items()}
    read = {"tokens": document["reading"]["tokens"][:reading], "first": first}
    return {**document, "layers": layers, "reading": read}


def _short(values: dict[str, Any]) -> dict[str, Any]:
    """The values with four decimals, without what the page does not show."""
    found = {}
    for key, value in values.items():
        found[key] = round(value, 4) if isinstance(value, float) else value
    return found


def _embedded(document: dict[str, Any]) -> str:
    """JSON that no text in it can end as a script."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _own(name: str) -> str:
    """The text of a file of this package."""
    return resources.files("core.inspection").joinpath(name).read_text(encoding="utf-8")
