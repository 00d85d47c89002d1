"""Prints predictions: one with its parts, memory and assumptions, or the best of a search."""

from typing import Any

from core.analysis.description_text import print_lines, print_table
from core.cluster.drawing import PARTS


def print_prediction(document: dict[str, Any]) -> None:
    """Prints one prediction."""
    rows = [
        [PARTS[key], f"{value:.3f}", f"{value / document['step_seconds']:.1%}"]
        for key, value in document["parts"].items()
    ]
    rows.append(["a step", f"{document['step_seconds']:.3f}", "100%"])
    print_table(["part of a step, mean over ranks", "seconds", "share"], rows)
    columns = ("weights", "gradients", "optimizer", "activations", "total")
    rows = []
    for row in document["memory"]:
        cells = [f"{row[column] / 1e9:.2f}" for column in columns]
        rows.append([str(row["rank"]), str(row["in_flight"]), *cells])
    print_table(["rank", "in flight", *(f"{column}, GB" for column in columns)], rows)
    print_lines([_summary(document), *(f"assumed: {line}" for line in document["assumptions"])])
    print_lines([_efficiencies(document["efficiencies"])])


def print_search(document: dict[str, Any]) -> None:
    """Prints the best layouts of a search."""
    rows = []
    for row in document["best"]:
        rows.append(
            [
                row["pipeline"],
                row["schedule"],
                str(row["chunks"]),
                str(row["data"]),
                str(row["expert"]),
                str(row["micro_batch"]),
                row["recompute"],
                f"{row['step_seconds']:.3f}",
                f"{row['tokens_per_second_per_gpu']:,.0f}",
                f"{row['bubble_share']:.1%}",
                f"{row['largest_bytes'] / 1e9:.1f}",
            ]
        )
    # one micro-batch is so many sequences; v are the chunks of a rank
    head = [
        "ranks",
        "schedule",
        "v",
        "data",
        "expert",
        "seq.",
        "recompute",
        "step, s",
        "tokens/s",
        "bubble",
        "GB",
    ]
    print_table(head, [list(map(str, row)) for row in rows])
    print_lines([document["about"], *(f"assumed: {line}" for line in document["assumptions"])])


def _summary(document: dict[str, Any]) -> str:
    """The step in one sentence."""
    fullest = document["largest_bytes"]
    fits = "fits" if fullest <= document["device_memory"] else "does not fit"
    speed = (
        f"{document['tokens_per_second_per_gpu']:,.0f} tokens/s and {document['tflops_per_gpu']:.1f} "
        f"TFLOP/s for each GPU (MFU {document['mfu']:.1%} of bf16)"
    )
    return (
        f"{document['gpus']:,} GPUs, {document['micro_batches']:,} micro-batches: "
        f"{document['step_seconds']:.3f} s a step, {speed}, "
        f"{document['tokens_per_day'] / 1e9:,.1f} billion tokens a day; the fullest GPU holds "
        f"{fullest / 1e9:.1f} GB, which {fits} in {document['device_memory'] / 1e9:.0f}"
    )


def _efficiencies(values: dict[str, float]) -> str:
    return "efficiencies: " + ", ".join(f"{key} {value:g}" for key, value in values.items())
