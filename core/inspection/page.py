"""Writes an inspection as one HTML page, which holds its data, style and script and loads nothing else."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from core.contracts.errors import UserError
from core.inspection.document import Sizes
from core.storage.files import write_text

LARGEST = 3_000_000
"""Bytes of a page; of models with very many experts it shows fewer tokens and contexts of each."""

SIZES = (
    Sizes(),
    Sizes(tokens=8, contexts=1, partners=2, text=1500),
    Sizes(tokens=3, contexts=0, partners=1, text=500),
    Sizes(tokens=1, contexts=0, partners=0, text=200),
)
"""What a page shows at most; the first that fits is taken."""


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
    for size in SIZES:
        small = _cut(document, size)
        if "beside" in document:
            small["beside"] = _cut(document["beside"], size)
            small["moved"] = list(map(_most_moved, document["moved"]))
        text = page.replace("/*DATA*/", _embedded(small))
        text = text.encode("utf-8", "replace").decode("utf-8")
        if len(text.encode("utf-8")) <= LARGEST:
            break
    return text


def _cut(document: dict[str, Any], size: Sizes) -> dict[str, Any]:
    """A document in the form that the page's script reads: shorter lists, and no names in them."""
    layers = []
    for layer in document["layers"]:
        layers.append({**layer, "experts": [_expert(one, size) for one in layer["experts"]]})
    reading = document["reading"]
    first = {path: experts[: size.text] for path, experts in reading["first"].items()}
    read = {"tokens": reading["tokens"][: size.text], "first": first}
    return {**document, "layers": layers, "reading": read}


def _expert(expert: dict[str, Any], size: Sizes) -> list[Any]:
    """An expert as `unpacked` of the page's script reads it."""
    tokens = []
    for token in expert["tokens"][: size.tokens]:
        share = round(token["share_of_token"], 3)
        tokens.append([token["text"], round(token["z"], 1), token["count"], share])
    together = expert["together"]
    if len(together) > 2 * size.partners:
        together = together[: size.partners] + together[len(together) - size.partners :]
    return [
        expert["load"],
        expert["by_source"],
        [round(expert[f"{name}_bits"], 2) for name in ("entropy", "divergence", "chance")],
        tokens,
        [[one["expert"], one["count"], round(one["expected"], 1)] for one in together],
        [
            [one["before"], one["token"], one["after"]]
            for one in expert["contexts"][: size.contexts]
        ],
    ]


def _most_moved(layer: dict[str, Any], most: int = 3) -> dict[str, Any]:
    """A layer's share of tokens that stayed, and the experts that most tokens left."""
    left = []
    for index, expert in enumerate(layer["experts"]):
        if expert["went_to"]:
            left.append([index, expert["first"] - expert["stayed"], expert["went_to"][0][0]])
    left.sort(key=lambda one: -one[1])
    return {
        "path": layer["path"],
        "stayed": layer["stayed"],
        "first": layer["first"],
        "left": left[:most],
    }


def _embedded(document: dict[str, Any]) -> str:
    """JSON that no text in it can end as a script."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _own(name: str) -> str:
    """The text of a file of this package."""
    return resources.files("core.inspection").joinpath(name).read_text(encoding="utf-8")
