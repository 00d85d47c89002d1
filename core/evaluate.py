"""python -m core.evaluate RUN: validation loss and bits per byte of a trained model."""

import argparse
import sys

from core.door import print_json, run_door


def parser() -> argparse.ArgumentParser:
    """The door's arguments."""
    p = argparse.ArgumentParser(prog="python -m core.evaluate", description="Validate a trained model.")
    p.add_argument("run", metavar="RUN", help="a run folder or a checkpoint file")
    p.add_argument("--xz", action="store_true", help="beside it, what xz -9e needs (two seconds for each MB of text)")
    p.add_argument("--json", action="store_true", help="print one JSON document")
    return p


def main(arguments: argparse.Namespace) -> None:
    """Read the whole validation split of the run's recipe once."""
    from pathlib import Path

    from core.run import evaluate
    from core.training.resume import newest_checkpoint

    def say(sentence: str) -> None:
        print(sentence, file=sys.stderr)

    values = evaluate(newest_checkpoint(Path(arguments.run)), xz=arguments.xz, say=say)
    if arguments.json:
        print_json(values)
        return
    for name, value in values.items():
        if name == "notices":
            continue  # they were told on stderr
        print(f"{name:24} {value:.6g}" if isinstance(value, float) else f"{name:24} {value}")


if __name__ == "__main__":
    run_door(main, parser())
