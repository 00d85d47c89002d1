"""python -m core.placement RUN|LOADS: redundant experts and their places on GPUs, from recorded loads."""

import argparse
import sys
from pathlib import Path

from core.command import print_json, run_command, trust_argument, weights_argument


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python -m core.placement",
        description="Plan which experts get replicas and which GPU holds them, from recorded loads.",
    )
    p.add_argument(
        "source",
        metavar="RUN|LOADS",
        help="a run folder, or loads: a .safetensors file of a run, the JSON document of core.inspect, or an array "
        "of layers x experts or entries x layers x experts in a .npy file",
    )
    p.add_argument(
        "--gpus", type=int, default=8, metavar="N", help="GPUs that share a layer's experts (8)"
    )
    p.add_argument(
        "--nodes", type=int, default=1, metavar="M", help="machines, with equally many GPUs (1)"
    )
    p.add_argument(
        "--replicas",
        type=int,
        metavar="R",
        help="physical experts of a layer, the originals included, as num_replicas of EPLB (one more on each GPU than "
        "are needed)",
    )
    p.add_argument(
        "--groups",
        type=int,
        metavar="G",
        help="groups of experts that go to nodes as a whole (those of the run's router, else 1)",
    )
    p.add_argument(
        "--stretches",
        type=int,
        default=8,
        metavar="K",
        help="how long a plan stays good is measured over K stretches of the loads (8)",
    )
    p.add_argument(
        "--experts-share",
        type=float,
        metavar="S",
        help="part of a balanced prefill step that routed experts take, 0 to 1 (the run's share of FLOPs)",
    )
    text = p.add_argument_group(
        "loads of a text that the model reads, instead of those of the run's training"
    )
    text.add_argument(
        "--text",
        metavar="FILE",
        help="a text file, or token ids in a .npy file, that the model reads",
    )
    text.add_argument(
        "--held-out",
        action="store_true",
        help="the model reads the run's held-out documents, in the batches in which core.evaluate reads them",
    )
    text.add_argument(
        "--tokens", type=int, default=200_000, metavar="N", help="stop after N tokens (200000)"
    )
    text.add_argument("--device", metavar="NAME", help="where the model runs, e.g. cuda (cpu)")
    weights_argument(p)
    p.add_argument(
        "--out",
        metavar="FILE",
        type=Path,
        help="the page to write (placement.html in the run's folder, or beside the loads)",
    )
    p.add_argument(
        "--json", action="store_true", help="print one JSON document; a page only with --out"
    )
    trust_argument(p)
    return p


def main(arguments: argparse.Namespace) -> None:
    """Plans, and writes the page or prints the document."""
    from core.deployment.page import write
    from core.deployment.words import summary_lines
    from core.deployment.work import PlacementOptions, report

    options = PlacementOptions(
        gpus=arguments.gpus,
        nodes=arguments.nodes,
        replicas=arguments.replicas,
        groups=arguments.groups,
        text=None if arguments.text is None else Path(arguments.text),
        held_out=arguments.held_out,
        tokens=arguments.tokens,
        stretches=arguments.stretches,
        experts_share=arguments.experts_share,
        device=arguments.device or "cpu",
        weights=arguments.weights,
        trust=arguments.trust,
    )
    found = report(Path(arguments.source), options, say=_say)
    for notice in found.document["notices"]:
        _say(f"note: {notice}")
    out = arguments.out
    if out is None and not arguments.json:
        out = found.folder / "placement.html"
    if out is not None:
        size = write(found.document, out)
        _say(f"{out} ({size / 1e6:.2f} MB)")
    if arguments.json:
        print_json(found.document)
        return
    for line in summary_lines(found.document):
        print(line)


def _say(sentence: str) -> None:
    print(sentence, file=sys.stderr)


if __name__ == "__main__":
    run_command(main, parser())
