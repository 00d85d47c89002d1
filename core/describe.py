"""python -m core.describe RECIPE [KEY=VALUE ...] [--compare RECIPE ...]: what would be built, without building it."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.contracts.errors import UserError
from core.door import print_json, run_door

if TYPE_CHECKING:
    from core.analysis.asked import Asked
    from core.recipe.compose import Recipe

SHOWN = (
    *("params_total", "params_experts", "params_mtp", "params_active"),
    *("flops_per_token", "flops_per_token_main", "flops_per_token_full"),
    *("flops_per_token_megatron", "flops_per_token_megatron_main", "kv_bytes_per_token"),
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
    add = p.add_argument_group("one GPU's memory").add_argument
    add("--layout", metavar="AXIS=N,...", help="data, expert and pipeline: data=128,expert=64,pipeline=16")
    add("--microbatch", type=int, metavar="N", help="sequences a GPU takes at once (default: 1 in a pipeline)")
    add("--schedule", choices=("1f1b", "dualpipe"), help="of the pipeline (default: 1f1b)")
    add = p.add_argument_group("GPU-hours").add_argument
    add("--mfu", type=float, metavar="PART", help="of the peak, by Megatron-LM's count (default: DeepSeek-V3's 0.3894)")
    add("--gpu-peak", type=float, metavar="TFLOPS", help="a GPU's dense peak (default: an H800's 989 in bf16)")
    p.add_argument("--json", action="store_true", help="print one JSON document; a list of them with --compare")
    return p


def main(arguments: argparse.Namespace) -> None:
    """Describe one recipe, or several side by side; the overrides hold for all."""
    from core.recipe.compose import compose

    files, overrides = sorted_out(arguments)
    asked = _asked(arguments)
    recipes = [compose(path, overrides) for path in files]
    if arguments.compare:
        set_beside(recipes, as_json=arguments.json)
    else:
        show(recipes[0], as_json=arguments.json, asked=asked)


def _asked(arguments: argparse.Namespace) -> "Asked":
    """What is asked beside the recipe.

    Raises:
        UserError: an option that cannot be, or that has nothing to say here.
    """
    from core.analysis.asked import Asked
    from core.analysis.layout import parse

    given = {"--layout": arguments.layout, "--microbatch": arguments.microbatch, "--schedule": arguments.schedule}
    costs = {"--mfu": arguments.mfu, "--gpu-peak": arguments.gpu_peak}
    for option, value in (given | costs).items():
        if value is not None and arguments.compare:
            raise UserError(f"{option} describes one recipe: leave out --compare")
        if value is not None and option in given and arguments.layout is None:
            raise UserError(f"{option} belongs to a layout: give --layout data=N,expert=N,pipeline=N")
    return Asked(
        layout=None if arguments.layout is None else parse(arguments.layout),
        sequences=arguments.microbatch,
        schedule=arguments.schedule or "1f1b",
        mfu=arguments.mfu,
        tflops=arguments.gpu_peak,
    )


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


def document_of(recipe: "Recipe", asked: "Asked | None" = None) -> dict[str, Any]:
    """What `--json` prints of a recipe."""
    from core.analysis import describe

    return describe.document_of(recipe, asked)


def show(recipe: "Recipe", *, as_json: bool, asked: "Asked | None" = None) -> None:
    """Print one description."""
    document = document_of(recipe, asked)
    if as_json:
        print_json(document)
        return
    columns = ("part", "kind", "parameters", "active", "experts")
    _table(columns, [[_number(row[c]) for c in columns] for row in document["layers"]])
    kinds = ("component", "parameters", "active", "flops_per_token")
    _table(kinds, [[_number(row[kind]) for kind in kinds] for row in document["components"]])
    _table(["", "value"], [[key, _number(document[key])] for key in SHOWN])
    _table(["memory", "bytes (estimate)"], [[key, _number(value)] for key, value in document["memory_bytes"].items()])
    coefficients = [[k, f"{v['first']:g}", f"{v['last']:g}"] for k, v in document["loss_coefficients"].items()]
    _table(["loss term", "first step", "last step"], coefficients)
    precision = document["precision"].items()
    _table(["role", "kept", "computed", "path"], [[role, v["kept"], v["computed"], v["path"]] for role, v in precision])
    owners = document["plugins"]
    _table(["slot", "name", "from"], [[o["slot"], o["name"], f"{o['distribution']} {o['version']}"] for o in owners])
    if document["layout"] is not None:
        _show_layout(document["layout"])
    print(document["flops_convention"])
    if document["gpu_hours"] is not None:
        cost = document["gpu_hours"]
        hours = f"{cost['hours']:,.0f}" if cost["hours"] >= 1000 else f"{cost['hours']:.4g}"
        rate = f"{cost['mfu']:.2%} of {cost['peak_flops'] / 1e12:g} TFLOPS"
        print(f"{cost['gpu']}-hours: {hours} at {rate} ({cost['source']}); {cost['convention']}")
    for key in document["dropped_keys"]:
        print(f"dropped {key}: the component now named there has no such key")
    for notice in document["notices"]:
        print(f"note: {notice}")
    if document["runnable_here"] is not True:
        print("not runnable here: " + "; ".join(document["runnable_here"]))


def _show_layout(layout: dict[str, Any]) -> None:
    """A line for each pipeline stage, in GB, and what the fullest GPU holds."""
    ways = tuple(layout["largest"])
    parts = (("activations", ways), ("in all", ways))
    print(" " * 53 + "".join(f"{name:^27}" for name, _ in parts).rstrip())
    names = "".join(f"{name:>9}" for name in ("weights", "grads", "optim.", *ways, *ways))
    print(f"{'stage':<6}{'blocks':<13}{'held':>5}{names}".replace("selective", "  select."))
    for row in layout["stages"]:
        states = [row[key] for key in ("weights", "gradients", "optimizer")]
        states += [row[part][way] for part in ("activations", "total") for way in ways]
        print(f"{row['stage']:<6}{_span(row['blocks']):<13}{row['waiting']:>5}{''.join(map(_gigabytes, states))}")
    axes = ", ".join(f"{axis} {size}" for axis, size in layout["axes"].items())
    print(f"{layout['gpus']:,} GPUs ({axes}), {_batches(layout)}; held: micro-batches at once; columns in GB")
    fullest = [f"{layout['largest_bytes'][way] / 1e9:.2f} GB with recompute {way}" for way in ways]
    print(f"the fullest GPU holds {', '.join(fullest)}; {layout['convention']}")


def _batches(layout: dict[str, Any]) -> str:
    count, sequences = layout["microbatches_per_step"], layout["microbatch_sequences"]
    return f"schedule {layout['schedule']}, {count:,} micro-batches of {sequences:,} sequences a step"


def _span(blocks: list[str]) -> str:
    """`3-6`, or `59-60+1` with a block of a head."""
    numbers = [int(name.removeprefix("blocks.")) for name in blocks if name.startswith("blocks.")]
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return told + (f"+{len(blocks) - len(numbers)}" if len(blocks) > len(numbers) else "")


def _gigabytes(value: int) -> str:
    return f"{value / 1e9:>9,.2f}"


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
