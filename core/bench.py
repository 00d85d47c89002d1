"""python -m core.bench --collectives [RECIPE] [KEY=VALUE ...]: measure the collectives that a recipe would use."""

import argparse
from typing import TYPE_CHECKING, Any

from core.command import print_json, run_command, trust_argument
from core.contracts.errors import UserError

if TYPE_CHECKING:
    from core.recipe.compose import Recipe

DEFAULT = "dsv3_small"
"""The recipe that is measured if none is named, on two ranks."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.bench",
        description="Measure the bandwidth of the collectives that a recipe would use.",
        epilog="On GPUs if there is one for each rank, else on CPUs. Under torchrun the ranks are its own.",
    )
    p.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help=f"a recipe file, or the name of a shipped one (default: {DEFAULT} on 2 ranks)",
    )
    p.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="overrides, e.g. batch.sequences=16"
    )
    p.add_argument("--collectives", action="store_true", help="measure collectives")
    p.add_argument(
        "--ranks", type=int, metavar="N", help="ranks to measure (default: the strategy's)"
    )
    p.add_argument("--json", action="store_true", help="print one JSON list, a row for each size")
    trust_argument(p)
    return p


def main(arguments: argparse.Namespace) -> None:
    """Measures the collectives and prints a table or JSON; under torchrun the first rank prints."""
    if not arguments.collectives:
        raise UserError(
            "--collectives is missing: this version measures the bandwidth of collectives and nothing else"
        )
    if arguments.ranks is not None and arguments.ranks < 2:
        raise UserError(f"--ranks = {arguments.ranks}: must be at least 2")
    from core.recipe.compose import compose

    recipe = compose(arguments.recipe or DEFAULT, arguments.overrides, trust=arguments.trust)
    rows = _rows(recipe, arguments)
    if rows is None:
        return
    if arguments.json:
        print_json(rows)
    else:
        print("\n".join(table(rows)))


def _rows(recipe: "Recipe", arguments: argparse.Namespace) -> list[dict[str, Any]] | None:
    """The measurements; None on a rank that does not print.

    Raises:
        UserError: it is not known how many ranks to measure, or they cannot share the work.
    """
    from core.speed.collectives import collectives_of
    from core.speed.ranks import measure_here, measure_under_torchrun, torchrun_world

    accelerator = str(getattr(recipe.strategy.config, "accelerator", "auto"))
    world = torchrun_world()
    if world is not None:
        if arguments.ranks not in (None, world):
            raise UserError(f"--ranks = {arguments.ranks}: torchrun has started {world} ranks")
        return measure_under_torchrun(collectives_of(recipe, world), accelerator)
    ranks = arguments.ranks or _ranks_of(recipe, arguments)
    return measure_here(collectives_of(recipe, ranks), ranks, accelerator)


def _ranks_of(recipe: "Recipe", arguments: argparse.Namespace) -> int:
    """The ranks of the recipe's strategy."""
    if arguments.recipe is None:
        return 2
    ranks = int(recipe.strategy.component.ranks_of(recipe.strategy.config))
    if ranks < 2:
        raise UserError(
            f"{recipe.source}: strategy.name = {recipe.strategy.name} trains on one rank, which exchanges nothing: "
            "give --ranks N, or a strategy with several"
        )
    return ranks


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of a table; sizes in MB, times in ms, bandwidths in GB/s, as nccl-tests names them."""
    header = f"{'collective':15} {'of':22} {'MB':>10} {'ranks':>5} {'backend':>7}"
    lines = [f"{header} {'ms':>9} {'fastest':>9} {'slowest':>9} {'algbw':>8} {'busbw':>8}"]
    for row in rows:
        fastest, slowest = row["spread"]
        line = f"{row['what']:15} {row['of']:22} {row['bytes'] / 1e6:10,.3f} {row['ranks']:5}"
        line += f" {row['backend']:>7} {row['seconds'] * 1e3:9,.3f}"
        line += f" {fastest * 1e3:9,.3f} {slowest * 1e3:9,.3f}"
        line += f" {row['algorithm_bandwidth'] / 1e9:8,.3f} {row['bus_bandwidth'] / 1e9:8,.3f}"
        lines.append(line)
    lines.append("medians; algbw and busbw in GB/s as nccl-tests defines them")
    cut = [row for row in rows if row["bytes"] < row["bytes_of_recipe"]]
    for row in cut:
        needed = row["bytes_of_recipe"] / 1e6
        lines.append(f"{row['what']} of {row['of']}: the recipe moves {needed:,.0f} MB")
    return lines


if __name__ == "__main__":
    run_command(main, parser())
