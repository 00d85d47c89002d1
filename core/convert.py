"""python -m core.convert from-hf DIR RUN, to-hf RUN DIR: convert Hugging Face checkpoints, both ways."""

import argparse
import sys
import time
from pathlib import Path

from core.command import run_command, trust_argument, weights_argument

FORMATS = ("fp32", "bf16", "fp16", "fp64")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.convert",
        description="Convert Hugging Face checkpoints to run folders and back; a conversion that was stopped goes on.",
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    read = commands.add_parser("from-hf", help="a Hugging Face folder to a run folder")
    read.add_argument(
        "dir", type=Path, metavar="DIR", help="config.json, safetensors files, tokenizer files"
    )
    read.add_argument("run", type=Path, metavar="RUN", help="the new run folder")
    read.add_argument(
        "--dtype",
        choices=FORMATS,
        help="keep weights in this format (default: as they come, FP8 blocks included)",
    )
    _add_allow_non_finite(read)
    write = commands.add_parser("to-hf", help="a run to a Hugging Face folder")
    write.add_argument("run", type=Path, metavar="RUN", help="a run folder, or a checkpoint")
    write.add_argument("dir", type=Path, metavar="DIR", help="the new folder")
    write.add_argument(
        "--dtype",
        choices=FORMATS,
        help="write weights in this format (default: as they came; bf16 for a trained run)",
    )
    fp8 = write.add_mutually_exclusive_group()
    fp8.add_argument(
        "--fp8", action="store_true", help="quantise matrices to FP8 in blocks of 128 x 128"
    )
    fp8.add_argument(
        "--keep-fp8",
        action="store_true",
        help="write the FP8 blocks that the run was converted from",
    )
    write.add_argument(
        "--main-only",
        action="store_true",
        help="leave the modules of multi-token prediction out: the main model alone",
    )
    weights_argument(write)
    trust_argument(write)
    _add_allow_non_finite(write)
    return p


def _add_allow_non_finite(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that both directions share."""
    parser.add_argument(
        "--allow-non-finite",
        action="store_true",
        help="convert weights that are NaN, infinite or too large for their format: a note instead of an error",
    )


def main(arguments: argparse.Namespace) -> None:
    """Converts, and prints what was written."""
    from core.interop.from_hf import from_hf
    from core.interop.to_hf import ExportOptions, to_hf
    from core.run.loading import run_of
    from core.training.resume import newest_checkpoint

    started = time.perf_counter()
    if arguments.command == "from-hf":
        target = arguments.run
        made = from_hf(
            arguments.dir,
            target,
            dtype=arguments.dtype,
            allow_non_finite=arguments.allow_non_finite,
            say=_say,
        )
    else:
        target = arguments.dir
        checkpoint = newest_checkpoint(arguments.run)
        options = ExportOptions(
            arguments.dtype,
            fp8=arguments.fp8,
            keep_fp8=arguments.keep_fp8,
            main_only=arguments.main_only,
            allow_non_finite=arguments.allow_non_finite,
            weights=arguments.weights,
        )
        run = run_of(checkpoint).path
        made = to_hf(run, checkpoint, target, options, trust=arguments.trust, say=_say)
    seconds = time.perf_counter() - started
    size = f"{made['tensors']} tensors, {made['bytes'] / 1e9:.3g} GB"
    print(f"{target}: {made['format']}, {size}, {seconds:.1f} s")


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


if __name__ == "__main__":
    run_command(main, parser())
