"""python -m core.long_context RUN [--lengths A,B] [--needles N]: how a run reads texts of several lengths."""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from core.command import print_json, run_command, trust_argument, weights_argument


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.long_context",
        description="Show the loss by the length of the context, and whether a needle is found.",
    )
    p.add_argument("run", metavar="RUN", help="a run folder or a checkpoint")
    p.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="other rotary positions than in training, e.g. model.rope.max_length=4096",
    )
    weights_argument(p)
    p.add_argument(
        "--lengths",
        metavar="A,B",
        help="tokens of a sequence, one measurement each (the sequence length of the run's recipe)",
    )
    p.add_argument(
        "--needles",
        type=int,
        default=0,
        metavar="N",
        help="also ask N times for a key that stands at each of five depths (0)",
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the needles")
    p.add_argument("--device", metavar="NAME", help="where the model runs, e.g. cuda (cpu)")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    trust_argument(p)
    return p


def main(arguments: argparse.Namespace) -> None:
    """Measures the run, and prints tables or one document."""
    from core.context.work import Options, measure
    from core.contracts.errors import UserError

    if arguments.needles == 1 or arguments.needles < 0:
        raise UserError(f"--needles = {arguments.needles}: must be 0, or at least 2")
    options = Options(
        lengths=_lengths(arguments.lengths),
        overrides=tuple(arguments.overrides),
        needles=arguments.needles,
        seed=arguments.seed,
        device=arguments.device or "cpu",
        weights=arguments.weights,
        trust=arguments.trust,
    )
    found = measure(Path(arguments.run), options, say=_say)
    if arguments.json:
        print_json(found)
    else:
        _print(found)


def _lengths(text: str | None) -> tuple[int, ...]:
    """The numbers of `--lengths`; raises `UserError` for what is none."""
    from core.contracts.errors import UserError

    if text is None:
        return ()
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*0*[1-9][0-9]{0,8}\s*", part) for part in parts):
        raise UserError(
            f"--lengths {text}: must be whole numbers from 1 to 999999999 with commas between them"
        )
    return tuple(map(int, parts))


def _print(found: dict[str, Any]) -> None:
    """Prints one table of losses, and one of needles."""
    longest = max(found["lengths"], key=lambda one: one["length"])["positions"]
    ranges = [(one["first"], one["last"]) for one in longest]
    print("loss in nats per token, by the tokens of the same document before it in the sequence")
    header = [f"{first}-{last}" for first, last in ranges]
    print("length", "all", *header, sep="\t")
    for one in found["lengths"]:
        losses = {part["first"]: f"{part['loss']:.3f}" for part in one["positions"]}
        cells = [losses.get(first, "") for first, _ in ranges]
        print(one["length"], f"{one['loss']:.3f}", *cells, sep="\t")
    if not found["lengths"][0]["needles"]:
        return
    print()
    print(
        "needle: nats that the key gains by standing in the text (95% interval), and keys named exactly"
    )
    print("length", "depth", "gain", "interval", "exact", "without", sep="\t")
    for one in found["lengths"]:
        for part in one["needles"]:
            span = f"{part['gain_low']:+.2f} to {part['gain_high']:+.2f}"
            exact = f"{part['exact']}/{part['tries']}"
            without = f"{part['control_exact']}/{part['tries']}"
            print(
                one["length"], part["depth"], f"{part['gain']:+.2f}", span, exact, without, sep="\t"
            )


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


if __name__ == "__main__":
    run_command(main, parser())
