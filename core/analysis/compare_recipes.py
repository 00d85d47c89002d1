"""Recipes side by side: what each costs and promises, how far it is from the first, and what is not held equal.

A comparison of routing strategies means something only where everything but the feed-forward layer is the same.
No component's name matters here: costs and promises come from the described models, the rest from the recipes.
"""

from pathlib import Path
from typing import Any

from core.recipe.compose import Recipe
from core.recipe.key_paths import to_dict

HEADER = (
    *(("", "recipe"), ("total", "params")),
    *(("expert", "params"), ("", "±%"), ("active", "params"), ("", "±%")),
    *(("FLOPs", "/token"), ("", "±%"), ("KV", "bytes"), ("top", "k")),
    *(("capa-", "city"), ("", "drops"), ("", "causal"), ("batch", "dep.")),
)
"""Two lines of each column's heading."""

COMPARED = {"params_experts": "KMBT", "params_active": "KMBT", "flops_per_token": "KMGT"}
"""Numbers that are measured against the first recipe's, each with the letters of its units."""

PROMISES = ("drops", "causal", "batch_dependent")
"""Properties of a description that are true or false."""

LEGEND = (
    "params: of the main model, expert: in its routed and shared experts, active: used by one token, embedding "
    "excluded, output included. FLOPs: training, causal attention, all loss heads; dropped assignments count as done. "
    "±%: against the first recipe. KV: bytes of cache per token, 2 an element. top k: assignments per token. "
    "capacity: what an expert or a device takes in training at most, over its even share. "
    "drops: assignments may be dropped in training. causal: no output depends on what a later token is. "
    "batch dep.: an output may depend on other sequences of its micro-batch."
)
"""What the columns mean."""


def table(recipes: list[Recipe], documents: list[dict[str, Any]]) -> list[str]:
    """The lines of a table with a row for each recipe, never cut: every column is as wide as its widest cell.

    Args:
        recipes: the recipes in their order; the others are measured against the first.
        documents: their descriptions.
    """
    headings = [list(line) for line in zip(*HEADER, strict=True)]
    cells = headings + comparison_rows(recipes, documents)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [_line(row, widths) for row in cells]
    return [*lines[:2], "-" * len(lines[0]), *lines[2:]]


def _line(row: list[str], widths: list[int]) -> str:
    """A row of the table: the name to the left, the numbers to the right."""
    name, *numbers = row
    padded = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
    return " ".join([name.ljust(widths[0]), *padded])


def comparison_rows(recipes: list[Recipe], documents: list[dict[str, Any]]) -> list[list[str]]:
    """A row of `HEADER`'s columns for each recipe."""
    first = documents[0]
    named = zip(names(recipes), documents, strict=True)
    return [_row(name, document, first) for name, document in named]


def _row(name: str, document: dict[str, Any], first: dict[str, Any]) -> list[str]:
    cells = [name, short(document["params_total"], "KMBT")]
    for key, units in COMPARED.items():
        cells.append(short(document[key], units))
        if document is first:
            cells.append("")
        else:
            cells.append(against(document[key], first[key]))
    cells.append(str(document["kv_bytes_per_token"]))
    cells.append(str(document["top_k"] or "-"))
    capacity = "none"
    if document["capacity_factor"] is not None:
        capacity = f"{document['capacity_factor']:g}"
    cells.append(capacity)
    for promise in PROMISES:
        answer = "yes" if document[promise] else "no"
        cells.append(answer)
    return cells


def against(value: float, base: float) -> str:
    """The distance of a value from another: in percent, as a factor from twice on, "-" if one of them is 0."""
    if not value or not base:
        return "-"
    if value >= 2 * base:
        return f"x{short(value / base, 'KMB')}"
    return f"{100 * (value / base - 1):+.1f}"


def short(value: float, units: str) -> str:
    """A number as four digits and a unit: 5.105M.

    Args:
        value: the number.
        units: the letters for thousands, millions and so on.
    """
    scaled = float(value)
    letter = ""
    for unit in units:
        if abs(scaled) < 999.95:
            break
        scaled = scaled / 1000
        letter = unit
    digits = 0
    if letter:
        digits = max(0, 4 - len(str(int(abs(scaled)))))
    return f"{scaled:.{digits}f}{letter}"


def names(recipes: list[Recipe]) -> list[str]:
    """The recipes' names; with their folders where two would be the same."""
    plain = [recipe.name for recipe in recipes]
    if len(set(plain)) == len(plain):
        return plain
    return [f"{Path(recipe.source).resolve().parent.name}/{recipe.name}" for recipe in recipes]


def unequal(recipes: list[Recipe], documents: list[dict[str, Any]]) -> list[str]:
    """A line for each thing that a comparison should hold equal and this one does not: `width: 192; 1,024 in big`."""
    first = _comparable(recipes[0], documents[0])
    return [
        f"{thing}: {_difference(first[thing], others)}"
        for thing, others in _different_values(recipes, documents).items()
        if others
    ]


def different_recipes(
    recipes: list[Recipe], documents: list[dict[str, Any]]
) -> dict[str, list[str]]:
    """The names of the recipes that differ from the first, for each thing that a comparison should hold equal."""
    different = _different_values(recipes, documents)
    return {thing: [name for name, _ in others] for thing, others in different.items()}


def _different_values(
    recipes: list[Recipe], documents: list[dict[str, Any]]
) -> dict[str, list[tuple[str, Any]]]:
    """Things that should be equal, each with the names and values of the recipes that differ from the first in it."""
    first = _comparable(recipes[0], documents[0])
    different: dict[str, list[tuple[str, Any]]] = {thing: [] for thing in first}
    others = zip(names(recipes)[1:], recipes[1:], documents[1:], strict=True)
    for name, recipe, document in others:
        for thing, value in _comparable(recipe, document).items():
            if value != first[thing]:
                different[thing].append((name, value))
    return different


def _difference(value: Any, others: list[tuple[str, Any]]) -> str:
    """The first recipe's value and the others' values; of sections with the same names, only where they differ."""
    by_text: dict[str, list[str]] = {}
    for name, other in others:
        by_text.setdefault(_text(other), []).append(name)
    text = _text(value)
    if text in by_text:
        return f"another in {', '.join(name for name, _ in others)}"
    elsewhere = [f"{other} in {', '.join(where)}" for other, where in by_text.items()]
    return "; ".join([text, *elsewhere])


def _text(value: Any) -> str:
    """A number, or the names of components; "" for a section without one."""
    if isinstance(value, dict):
        return str(value.get("name", ""))
    if isinstance(value, list):
        return " and ".join(map(_text, value))
    return f"{value:,}"


def _comparable(recipe: Recipe, document: dict[str, Any]) -> dict[str, Any]:
    """The values that should be the same in all recipes of a comparison, by their common names."""
    attention: list[Any] = []
    depth = 0
    for block in recipe.model.blocks.values():
        depth += block.count
        section = to_dict(block.attention or recipe.model.attention)
        if block.count and section not in attention:
            attention.append(section)
    optimizer = {**to_dict(recipe.optimizer), "gradient_clip": recipe.gradient_clip}
    initial = {"settings": to_dict(recipe.model.init), "from": to_dict(recipe.initial_weights)}
    return {
        "width": recipe.model.dim,
        "depth": depth,
        "attention": attention,
        "residual": to_dict(recipe.model.residual),
        "sequence length": recipe.data.sequence_length,
        "vocabulary": recipe.data.tokenizer.vocab,
        "corpus": to_dict(recipe.data.corpus),
        "document masking": recipe.data.mask_documents,
        "training tokens": document["tokens"],
        "steps": document["steps"],
        "optimizer and its schedule": optimizer,
        "loss heads": {"settings": to_dict(recipe.model.heads)},
        "initial weights": initial,
        "precision": to_dict(recipe.precision),
        "seed": recipe.seed,
    }
