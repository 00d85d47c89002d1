"""python -m core.describe RECIPE [KEY=VALUE ...] [--compare RECIPE ...]: what would be built, without building it."""

import argparse
from typing import TYPE_CHECKING, Any

from core.door import print_json, recipe_arguments, run_door

if TYPE_CHECKING:
    from core.recipe.compose import Recipe

COMPARED = (
    *("params_total", "params_mtp", "params_active"),
    *("flops_per_token", "flops_per_token_main", "kv_bytes_per_token"),
)


def parser() -> argparse.ArgumentParser:
    """The door's arguments."""
    p = argparse.ArgumentParser(prog="python -m core.describe", description="What a recipe would build.")
    recipe_arguments(p)
    p.add_argument("--compare", nargs="+", default=[], metavar="RECIPE", help="recipes to set beside it in one table")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    return p


def main(arguments: argparse.Namespace) -> None:
    """Describe one recipe, or several side by side; the overrides hold for all."""
    from core.recipe.compose import compose

    recipes = [compose(path, arguments.overrides) for path in [arguments.recipe, *arguments.compare]]
    if len(recipes) == 1:
        show(recipes[0], as_json=arguments.json)
        return
    documents = [document_of(recipe) for recipe in recipes]
    if arguments.json:
        print_json(documents)
        return
    rows = [[key, *(_number(document[key]) for document in documents)] for key in COMPARED]
    _table(["", *(recipe.name for recipe in recipes)], rows)
    print(documents[0]["flops_convention"])


def document_of(recipe: "Recipe") -> dict[str, Any]:
    """Build the recipe on the meta device, with a precision that remembers its roles, and describe it."""
    from core.analysis.describe import RoleSpy, describe
    from core.assemble import build, make, plan_of

    spy = RoleSpy(make(recipe.precision))
    model = build(recipe, device="meta", precision=spy)
    return describe(recipe, model, plan_of(recipe, model), spy)


def show(recipe: "Recipe", *, as_json: bool) -> None:
    """Print one description."""
    document = document_of(recipe)
    if as_json:
        print_json(document)
        return
    columns = ("part", "kind", "parameters", "active", "experts")
    _table(columns, [[_number(row[c]) for c in columns] for row in document["layers"]])
    _table(["", "value"], [[key, _number(document[key])] for key in (*COMPARED, "steps", "tokens")])
    _table(["memory", "bytes (estimate)"], [[key, _number(value)] for key, value in document["memory_bytes"].items()])
    coefficients = [[k, f"{v['first']:g}", f"{v['last']:g}"] for k, v in document["loss_coefficients"].items()]
    _table(["loss term", "first step", "last step"], coefficients)
    precision = document["precision"].items()
    _table(["role", "kept", "computed"], [[role, v["kept"], v["computed"]] for role, v in precision])
    owners = document["plugins"]
    _table(["slot", "name", "from"], [[o["slot"], o["name"], f"{o['distribution']} {o['version']}"] for o in owners])
    print(document["flops_convention"])
    for key in document["dropped_keys"]:
        print(f"dropped {key}: the component now named there has no such key")
    if document["runnable_here"] is not True:
        print("not runnable here: " + "; ".join(document["runnable_here"]))


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(header: Any, rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*map(str, header))
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    run_door(main, parser())
