"""python -m core.inspect RUN [--text FILE] [--beside RUN2]: which tokens go to which experts, as a page and as JSON."""

import argparse
import sys
from pathlib import Path

from core.command import print_json, run_command, trust_argument, weights_argument


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.inspect",
        description="Show which tokens go to which experts: one HTML page that opens without a network.",
    )
    p.add_argument("run", metavar="RUN", help="a run folder or a checkpoint, converted ones too")
    weights_argument(p)
    p.add_argument(
        "--text",
        metavar="FILE",
        help="a text file, or token ids in a .npy file (the run's held-out documents)",
    )
    p.add_argument(
        "--beside",
        metavar="RUN2",
        help="another run or checkpoint that reads the same tokens: what has moved from RUN to it",
    )
    p.add_argument(
        "--tokens",
        type=int,
        default=200_000,
        metavar="N",
        help="stop after N tokens, held-out documents at the end of a batch (200000)",
    )
    p.add_argument("--device", metavar="NAME", help="where the model runs, e.g. cuda (cpu)")
    p.add_argument(
        "--out", metavar="FILE", type=Path, help="the page to write (inspect.html in the run)"
    )
    p.add_argument(
        "--json", action="store_true", help="print one JSON document; a page only with --out"
    )
    trust_argument(p)
    return p


def main(arguments: argparse.Namespace) -> None:
    """Reads the text with the model, and writes the page or prints the document."""
    from core.contracts.errors import UserError
    from core.inspection.page import write
    from core.inspection.work import Options, inspect

    if arguments.tokens < 1:
        raise UserError(f"--tokens = {arguments.tokens}: must be at least 1")
    options = Options(
        text=None if arguments.text is None else Path(arguments.text),
        beside=None if arguments.beside is None else Path(arguments.beside),
        tokens=arguments.tokens,
        device=arguments.device or "cpu",
        weights=arguments.weights,
        trust=arguments.trust,
    )
    found = inspect(Path(arguments.run), options, say=_say)
    out = arguments.out
    if out is None and not arguments.json:
        out = found.folder / "inspect.html"
    if out is not None:
        size = write(found.document, out)
        _say(f"{out} ({size / 1e6:.2f} MB)")
    if arguments.json:
        print_json(found.document)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


if __name__ == "__main__":
    run_command(main, parser())
