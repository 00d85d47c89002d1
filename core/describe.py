"""python -m core.describe RECIPE [KEY=VALUE ...] [--compare RECIPE ...]: what would be built, without building it."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.contracts.errors import UserError
from core.door import print_json, run_door

if TYPE_CHECKING:
    from core.recipe.compose import Recipe

SHOWN = (
    *("params_total", "params_experts", "params_mtp", "params_active"),
    *("flops_per_token", "flops_per_token_main", "flops_per_token_full", "kv_bytes_per_token"),
    *("top_k", "capacity_factor", "drops", "causal", "batch_dependent", "steps", "tokens"),
)
PIPED = 100
"""Columns of a table that goes to no terminal."""


def parser() -> argparse.ArgumentParser:
    """The door's arguments."""
    p = argparse.ArgumentParser(prog="python -m core.describe", description="What a recipe would build.")
    p.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe file, or the name of a shipped one")
    p.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides, which hold for every recipe")
    compare = "a table of these recipes, measured against the first of all"
    p.add_argument("--compare", nargs="+", default=[], metavar="RECIPE", help=compare)
    p.add_argument("--json", action="store_true", help="print one JSON document; a list of them with --compare")
    return p


def main(arguments: argparse.Namespace) -> None:
    """Describe one recipe, or several side by side; the overrides hold for all."""
    from core.recipe.compose import compose

    files, overrides = sorted_out(arguments)
    recipes = [compose(path, overrides) for path in files]
    if arguments.compare:
        set_beside(recipes, as_json=arguments.json)
    else:
        show(recipes[0], as_json=arguments.json)


def sorted_out(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Recipes and overrides, which may stand among the recipes after --compare.

    Raises:
        UserError: no recipe.
    """
    among = arguments.compare
    if arguments.recipe and arguments.compare:
        among = [arguments.recipe, *among]
    elif arguments.recipe:
        return [arguments.recipe], arguments.overrides
    files = [text for text in among if not _overrides(text)]
    if not files:
        raise UserError("RECIPE is missing: give a recipe file, or the name of a shipped one")
    return files, [*arguments.overrides, *(text for text in among if _overrides(text))]


def _overrides(text: str) -> bool:
    key, equals, _ = text.partition("=")
    return bool(equals) and "/" not in key and not Path(text).is_file()


def set_beside(recipes: list["Recipe"], *, as_json: bool) -> None:
    """Print several descriptions: one list of documents, or one table with its legend."""
    from core.analysis.compare import LEGEND, names, table, unequal

    documents = [document_of(recipe) for recipe in recipes]
    if as_json:
        print_json(documents)
        return
    print("\n".join(table(recipes, documents)), end="\n\n")
    lines = [LEGEND, documents[0]["flops_convention"]]
    lines += [f"not equal: {line}" for line in unequal(recipes, documents)]
    told: dict[str, list[str]] = {}
    for name, document in zip(names(recipes), documents, strict=True):
        for notice in document["notices"]:
            told.setdefault(notice, []).append(name)
    _say(lines + [f"note on {', '.join(owners)}: {notice}" for notice, owners in told.items()])


def document_of(recipe: "Recipe") -> dict[str, Any]:
    """What `--json` prints of a recipe."""
    from core import assemble

    return assemble.document_of(recipe)


def show(recipe: "Recipe", *, as_json: bool) -> None:
    """Print one description."""
    document = document_of(recipe)
    if as_json:
        print_json(document)
        return
    columns = ("part", "kind", "parameters", "active", "experts")
    _table(columns, [[_number(row[c]) for c in columns] for row in document["layers"]])
    _table(["", "value"], [[key, _number(document[key])] for key in SHOWN])
    _table(["memory", "bytes (estimate)"], [[key, _number(value)] for key, value in document["memory_bytes"].items()])
    coefficients = [[k, f"{v['first']:g}", f"{v['last']:g}"] for k, v in document["loss_coefficients"].items()]
    _table(["loss term", "first step", "last step"], coefficients)
    precision = document["precision"].items()
    _table(["role", "kept", "computed", "path"], [[role, v["kept"], v["computed"], v["path"]] for role, v in precision])
    owners = document["plugins"]
    _table(["slot", "name", "from"], [[o["slot"], o["name"], f"{o['distribution']} {o['version']}"] for o in owners])
    print(document["flops_convention"])
    for key in document["dropped_keys"]:
        print(f"dropped {key}: the component now named there has no such key")
    for notice in document["notices"]:
        print(f"note: {notice}")
    if document["runnable_here"] is not True:
        print("not runnable here: " + "; ".join(document["runnable_here"]))


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and value > 1000 else f"{value:g}"
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _table(header: Any, rows: list[list[str]]) -> None:
    from rich.table import Table

    table = Table(*map(str, header))
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def _say(lines: list[str]) -> None:
    console = _console()
    for line in lines:
        console.print(line, markup=False, highlight=False, emoji=False)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPED)


if __name__ == "__main__":
    run_door(main, parser())
