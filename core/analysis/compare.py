"""Recipes side by side: what each costs and promises, how far it is from the first, and what is not held equal.

A comparison of routing strategies means something only where everything but the feed-forward layer is the same.
Nothing here asks for a name: costs and promises come from the described models, the rest from the recipes.
"""

from pathlib import Path
from typing import Any

from core.recipe.compose import Recipe
from core.recipe.resolve import to_dict

HEADER = (
    *(("", "recipe"), ("total", "params"), ("expert", "params"), ("", "±%"), ("active", "params"), ("", "±%")),
    *(("FLOPs", "/token"), ("", "±%"), ("KV", "bytes"), ("top", "k"), ("capa-", "city"), ("", "drops")),
    *(("", "causal"), ("batch", "dep.")),
)
"""Two lines of each column's heading."""

LEGEND = (
    "params: of the main model, expert: in its routed and shared experts, active: used by one token, embedding "
    "excluded, output included. FLOPs: training, causal attention, all loss heads; dropped assignments count as done. "
    "±%: against the first recipe. KV: bytes of cache per token, 2 an element. top k: assignments per token. "
    "capacity: what an expert or a device takes in training at most, over its even share. "
    "drops: assignments may be left undone in training. causal: no output depends on what a later token is. "
    "batch dep.: an output may depend on other sequences of its micro-batch."
)
"""What the columns mean."""


def table(recipes: list[Recipe], documents: list[dict[str, Any]]) -> list[str]:
    """The lines of a table with a row for each recipe, never cut: every column is as wide as its widest cell.

    Args:
        recipes: in order; the others are measured against the first.
        documents: their descriptions.
    """
    cells = [list(line) for line in zip(*HEADER, strict=True)] + rows(recipes, documents)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    lines = [" ".join([row[0].ljust(widths[0]), *rest]) for row, (_, *rest) in zip(cells, padded, strict=True)]
    return [*lines[:2], "-" * len(lines[0]), *lines[2:]]


def rows(recipes: list[Recipe], documents: list[dict[str, Any]]) -> list[list[str]]:
    """A row of `HEADER`'s columns for each recipe."""
    first = documents[0]
    return [_row(name, document, first) for name, document in zip(names(recipes), documents, strict=True)]


def _row(name: str, document: dict[str, Any], first: dict[str, Any]) -> list[str]:
    capacity = document["capacity_factor"]
    cells = [name, short(document["params_total"], "KMBT")]
    for key, units in (("params_experts", "KMBT"), ("params_active", "KMBT"), ("flops_per_token", "KMGT")):
        cells += [short(document[key], units), "" if document is first else against(document[key], first[key])]
    cells += [str(document["kv_bytes_per_token"]), str(document["top_k"] or "-")]
    cells += ["none" if capacity is None else f"{capacity:g}"]
    return cells + ["yes" if document[key] else "no" for key in ("drops", "causal", "batch_dependent")]


def against(value: float, base: float) -> str:
    """How far a value is from another: in percent, as a factor from twice on, "-" where one of them is 0."""
    if not value or not base:
        return "-"
    return f"x{short(value / base, 'KMB')}" if value >= 2 * base else f"{100 * (value / base - 1):+.1f}"


def short(value: float, units: str) -> str:
    """Four digits and a unit: 5.105M.

    Args:
        units: the letters for thousands, millions and so on.
    """
    scaled, letter = float(value), ""
    for unit in units:
        if abs(scaled) < 999.95:
            break
        scaled, letter = scaled / 1000, unit
    digits = max(0, 4 - len(str(int(abs(scaled))))) if letter else 0
    return f"{scaled:.{digits}f}{letter}"


def names(recipes: list[Recipe]) -> list[str]:
    """The recipes' names; with their folders where two would be the same."""
    plain = [recipe.name for recipe in recipes]
    if len(set(plain)) == len(plain):
        return plain
    return [f"{Path(recipe.source).resolve().parent.name}/{recipe.name}" for recipe in recipes]


def unequal(recipes: list[Recipe], documents: list[dict[str, Any]]) -> list[str]:
    """A line for each thing that a comparison should hold equal and this one does not: `width: 192; 1,024 in big`."""
    first, *others = [_held(recipe, document) for recipe, document in zip(recipes, documents, strict=True)]
    lines = []
    for key, value in first.items():
        different = [(name, o[key]) for name, o in zip(names(recipes)[1:], others, strict=True) if o[key] != value]
        if different:
            lines.append(f"{key}: {_told(value, different)}")
    return lines


def held(recipes: list[Recipe], documents: list[dict[str, Any]]) -> dict[str, list[str]]:
    """For each thing that a comparison should hold equal, the names of the recipes that differ from the first in it."""
    first, *others = [_held(recipe, document) for recipe, document in zip(recipes, documents, strict=True)]
    told = list(zip(names(recipes)[1:], others, strict=True))
    return {key: [name for name, other in told if other[key] != value] for key, value in first.items()}


def _told(value: Any, different: list[tuple[str, Any]]) -> str:
    """Numbers and names are printed; of whole sections it is told where they differ."""
    by_text: dict[str, list[str]] = {}
    for name, other in different:
        by_text.setdefault(_text(other), []).append(name)
    if _text(value) in by_text:
        return f"another in {', '.join(name for name, _ in different)}"
    return "; ".join([_text(value), *(f"{text} in {', '.join(where)}" for text, where in by_text.items())])


def _text(value: Any) -> str:
    """A number, or the names of components; "" for a section without one."""
    if isinstance(value, dict):
        return str(value.get("name", ""))
    return " and ".join(map(_text, value)) if isinstance(value, list) else f"{value:,}"


def _held(recipe: Recipe, document: dict[str, Any]) -> dict[str, Any]:
    """What should be the same in all recipes of a comparison, by what people call it."""
    blocks = [block for block in recipe.model.blocks.values() if block.count]
    attention = [to_dict(block.attention or recipe.model.attention) for block in blocks]
    return {
        "width": recipe.model.dim,
        "depth": sum(block.count for block in blocks),
        "attention": [section for index, section in enumerate(attention) if section not in attention[:index]],
        "sequence length": recipe.data.sequence_length,
        "vocabulary": recipe.data.tokenizer.vocab,
        "corpus": to_dict(recipe.data.corpus),
        "document masking": recipe.data.mask_documents,
        "training tokens": document["tokens"],
        "steps": document["steps"],
        "optimizer and its schedule": {**to_dict(recipe.optimizer), "gradient_clip": recipe.gradient_clip},
        "loss heads": {"settings": to_dict(recipe.model.heads)},
        "initial weights": {"settings": to_dict(recipe.model.init), "from": recipe.initial_weights},
        "precision": to_dict(recipe.precision),
        "seed": recipe.seed,
    }
