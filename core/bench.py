"""python -m core.bench [RECIPE] [KEY=VALUE ...]: measure speed and memory beside transformers, or collectives."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.command import print_json, run_command, trust_argument
from core.contracts.errors import UserError

if TYPE_CHECKING:
    from core.recipe.compose import Recipe
    from core.speed.bench import BenchOptions

DEFAULT = "dsv3_small"
"""The recipe whose collectives are measured if none is named, on two ranks."""

WHAT = ("train", "prefill", "decode")
"""What is measured beside the peer, unless `--what` names less."""


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.bench",
        description="Measure training and decoding beside transformers, in turns: speed, memory, start-up, and the "
        "limit that the matrix products set. Or measure the collectives that a recipe would use.",
        epilog="Collectives run on GPUs if there is one for each rank, else on CPUs; under torchrun on its ranks.",
    )
    p.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="a recipe file, or the name of a shipped one (default: four models of 7 to 240 million parameters; "
        f"for collectives {DEFAULT} on 2 ranks)",
    )
    p.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="overrides, e.g. batch.sequences=16"
    )
    p.add_argument(
        "--what",
        choices=WHAT,
        action="append",
        help="measure only this; may be given several times (default: all)",
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    p.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="time for the turns of one row, about (60); they end sooner once the interval is narrow",
    )
    p.add_argument(
        "--rows",
        type=_numbers,
        default=(1,),
        metavar="N,N",
        help="sequences that are decoded together, e.g. 1,16 for two measurements (1)",
    )
    p.add_argument(
        "--context",
        type=_number,
        metavar="N",
        help="tokens of each prompt (1000, or what the model reads)",
    )
    p.add_argument(
        "--new-tokens", type=_number, default=64, metavar="N", help="tokens to write after it (64)"
    )
    p.add_argument("--quick", action="store_true", help="a tiny model, few turns, nothing compiled")
    p.add_argument("--no-peer", action="store_true", help="only ours, and the limit")
    p.add_argument(
        "--no-compile", action="store_true", help="leave out the peer's variants that compile"
    )
    p.add_argument(
        "--profile",
        metavar="DIR",
        help="write a trace of our side of each measurement there, and list the top operators",
    )
    p.add_argument("--collectives", action="store_true", help="measure collectives instead")
    p.add_argument(
        "--ranks", type=int, metavar="N", help="ranks for collectives (default: the strategy's)"
    )
    p.add_argument("--json", action="store_true", help="print one JSON list of rows")
    trust_argument(p)
    return p


def _number(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError as cause:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from cause
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    """Whole numbers of at least 1, with commas between them."""
    return tuple(_number(part) for part in text.split(","))


def main(arguments: argparse.Namespace) -> None:
    """Measures, and prints a table or JSON; under torchrun the first rank prints."""
    if arguments.collectives:
        _collectives(arguments)
        return
    if arguments.ranks is not None:
        raise UserError("--ranks: works with --collectives only; training is measured on one rank")
    if arguments.seconds is not None and not 0 < arguments.seconds < float("inf"):
        raise UserError(f"--seconds = {arguments.seconds}: must be more than 0 and finite")
    from core.speed.bench import measured_rows
    from core.speed.table import table as speed_table

    rows = list(measured_rows(_options(arguments), _say))
    if arguments.json:
        print_json(rows)
    else:
        print("\n".join(speed_table(rows)))


def _options(arguments: argparse.Namespace) -> "BenchOptions":
    """The command-line arguments of everything but collectives."""
    from core.speed.bench import BenchOptions

    return BenchOptions(
        recipe=arguments.recipe,
        overrides=tuple(arguments.overrides),
        what=tuple(arguments.what or WHAT),
        device=arguments.device,
        seconds=arguments.seconds,
        quick=arguments.quick,
        with_peer=not arguments.no_peer,
        compiles=not arguments.no_compile,
        profile=Path(arguments.profile) if arguments.profile else None,
        trust=arguments.trust,
        rows=arguments.rows,
        context=arguments.context,
        new_tokens=arguments.new_tokens,
    )


def _say(sentence: str) -> None:
    """Prints what is being measured on stderr."""
    print(sentence, file=sys.stderr, flush=True)


def _collectives(arguments: argparse.Namespace) -> None:
    """Measures the collectives of a recipe."""
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
