"""Prints a description: tables of sizes, and one sentence for each of the rest."""

import sys
from collections.abc import Iterable
from typing import Any

SHOWN = (
    "params_total",
    "params_experts",
    "params_mtp",
    "params_active",
    "flops_per_token",
    "flops_per_token_main",
    "flops_per_token_full",
    "flops_per_token_megatron",
    "flops_per_token_megatron_main",
    "kv_bytes_per_token",
    "top_k",
    "capacity_factor",
    "drops",
    "causal",
    "batch_dependent",
    "steps",
    "tokens",
)
COLUMNS = {
    "layers": ("part", "kind", "parameters", "active", "experts"),
    "components": ("component", "parameters", "active", "flops_per_token"),
}
WIDTH_WITHOUT_TERMINAL = 100
"""Columns of a table that is not printed on a terminal."""


def print_description(document: dict[str, Any]) -> None:
    """Prints one description."""
    _print_sizes(document)
    _print_settings(document)
    if document["layout"] is not None:
        _print_layout(document["layout"])
    if document["rank_memory"] is not None:
        print(_rank_memory(document["rank_memory"]))
    if document["exchange"] is not None:
        _print_exchange(document["exchange"])
    print(document["flops_convention"])
    if document["gpu_hours"] is not None:
        print(_gpu_hours(document["gpu_hours"]))
    for key in document["dropped_keys"]:
        print(f"dropped {key}: the component now named there has no such key")
    for notice in document["notices"]:
        print(f"note: {notice}")
    if document["runnable_here"] is not True:
        print("not runnable here: " + "; ".join(document["runnable_here"]))


def _print_sizes(document: dict[str, Any]) -> None:
    """Prints what the parts of the model own and cost, and the totals."""
    for part in ("layers", "components"):
        columns = COLUMNS[part]
        print_table(columns, [_cells(row, columns) for row in document[part]])
    print_table(["", "value"], [[key, _number(document[key])] for key in SHOWN])
    memory = document["memory_bytes"].items()
    print_table(["memory", "bytes (estimate)"], [[key, _number(size)] for key, size in memory])


def _print_settings(document: dict[str, Any]) -> None:
    """Prints the loss coefficients, the number formats and the plugins."""
    rows: list[list[str]] = []
    for term, at in document["loss_coefficients"].items():
        rows.append([term, f"{at['first']:g}", f"{at['last']:g}"])
    print_table(["loss term", "first step", "last step"], rows)
    rows = []
    for role, formats in document["precision"].items():
        rows.append([role, formats["kept"], formats["computed"], formats["path"]])
    print_table(["role", "kept", "computed", "path"], rows)
    rows = []
    for plugin in document["plugins"]:
        source = f"{plugin['distribution']} {plugin['version']}"
        rows.append([plugin["slot"], plugin["name"], source])
    print_table(["slot", "name", "from"], rows)


def _gpu_hours(cost: dict[str, Any]) -> str:
    """The GPU-hours of the training in one sentence."""
    hours = f"{cost['hours']:.4g}"
    if cost["hours"] >= 1000:
        hours = f"{cost['hours']:,.0f}"
    rate = f"{cost['mfu']:.2%} of {cost['peak_flops'] / 1e12:g} TFLOPS"
    return f"{cost['gpu']}-hours: {hours} at {rate} ({cost['source']}); {cost['convention']}"


def _rank_memory(memory: dict[str, Any]) -> str:
    """The memory of one rank in one sentence."""
    sizes: list[str] = []
    for part in (
        "weights",
        "gradients",
        "optimizer",
        "averages",
        "whole_weights",
        "whole_gradients",
        "activations",
    ):
        sizes.append(f"{part.replace('_', ' ')} {memory[part] / 1e9:.2f}")
    ranks = f"{memory['ranks']:,} ranks on {memory['nodes']:,} nodes"
    if memory["expert_ranks"] > 1:
        ranks = f"{ranks} ({memory['expert_ranks']:,} expert ranks)"
    batch = f"{memory['micro_batches']:,} micro-batches of {memory['sequences']:,} sequences a rank"
    total = f"one rank holds {memory['total'] / 1e9:.2f} GB ({', '.join(sizes)})"
    if "stage" in memory:
        every = ", ".join(f"{size / 1e9:.2f}" for size in memory["stage_totals"])
        total = f"stage {memory['stage']} is the fullest of {every} GB: {total}"
    return f"{ranks}, {batch} a step: {total}; {memory['convention']}"


def _print_layout(layout: dict[str, Any]) -> None:
    """Prints the memory of each pipeline stage's GPUs in GB, one stage a line, and that of the fullest GPU."""
    modes = tuple(layout["largest"])  # of recomputation
    groups = "".join(f"{group:^27}" for group in ("activations", "in all"))
    print(" " * 53 + groups.rstrip())
    names = "".join(f"{name:>9}" for name in ("weights", "grads", "optim.", *modes, *modes))
    print(f"{'stage':<6}{'blocks':<13}{'held':>5}{names}".replace("selective", "  select."))
    for row in layout["stages"]:
        sizes = [row["weights"], row["gradients"], row["optimizer"]]
        sizes += [row["activations"][mode] for mode in modes]
        sizes += [row["total"][mode] for mode in modes]
        cells = "".join(map(_gigabytes, sizes))
        print(f"{row['stage']:<6}{_block_ranges(row['blocks']):<13}{row['waiting']:>5}{cells}")
    axes = ", ".join(f"{axis} {size}" for axis, size in layout["axes"].items())
    gpus = f"{layout['gpus']:,} GPUs ({axes})"
    print(f"{gpus}, {_batches(layout)}; held: micro-batches at once; columns in GB")
    fullest: list[str] = []
    for mode in modes:
        gigabytes = layout["largest_bytes"][mode] / 1e9
        fullest.append(f"{gigabytes:.2f} GB with recompute {mode}")
    print(f"the fullest GPU holds {', '.join(fullest)}; {layout['convention']}")


def _print_exchange(exchange: dict[str, Any]) -> None:
    """Prints how many nodes a token reaches in each layer with experts, and the bytes that it moves."""
    layers_of: dict[tuple[Any, ...], int] = {}
    for layer in exchange["layers"].values():
        key = (layer["nodes_unlimited"], layer["nodes"], layer["most_nodes"], layer["ranks"])
        layers_of[key] = layers_of.get(key, 0) + 1
    nodes = f"{exchange['nodes']} nodes of {exchange['ranks_per_node']}"
    print(f"exchange of tokens between {exchange['expert_ranks']} expert ranks, {nodes}:")
    for (unlimited, reached, most, ranks), count in layers_of.items():
        limit = f"{reached:.2f} of {exchange['nodes']} nodes (at most {most})"
        free = f"{unlimited:.2f} without a limit of groups"
        print(f"  in {count} layers a token reaches {limit}, {free}, and {ranks:.2f} ranks")
    copy = exchange["copy_bytes"]
    print(f"  a copy is {copy['out']:,} bytes out and {copy['back']:,} back")
    token = exchange["bytes_per_token"]
    between, inside = token["between_nodes"], token["inside_nodes"]
    print(f"  a token, forwards: {between:,.0f} bytes between nodes, {inside:,.0f} inside")
    step = exchange["bytes_per_step"]
    between, inside = step["between_nodes"] / 1e9, step["inside_nodes"] / 1e9
    print(f"  a step, all ranks: {between:,.1f} GB between nodes, {inside:,.1f} GB inside")
    print(f"  {exchange['convention']}")


def _batches(layout: dict[str, Any]) -> str:
    count = layout["microbatches_per_step"]
    sequences = layout["microbatch_sequences"]
    batches = f"{count:,} micro-batches of {sequences:,} sequences a step"
    return f"schedule {layout['schedule']}, {batches}"


def _block_ranges(blocks: list[str]) -> str:
    """The numbers of a stage's blocks: `3-6`, or `59-60+1` with one block of a loss head."""
    numbers = [int(name.removeprefix("blocks.")) for name in blocks if name.startswith("blocks.")]
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1].append(number)
        else:
            ranges.append([number])
    texts: list[str] = []
    for first, *rest in ranges:
        text = f"{first}-{rest[-1]}" if rest else str(first)
        texts.append(text)
    shown = ",".join(texts)
    of_heads = len(blocks) - len(numbers)
    if of_heads > 0:
        shown = f"{shown}+{of_heads}"
    return shown


def _gigabytes(value: int) -> str:
    return f"{value / 1e9:>9,.2f}"


def _cells(row: dict[str, Any], columns: Iterable[str]) -> list[str]:
    return [_number(row[column]) for column in columns]


def _number(value: Any) -> str:
    """A value as a table shows it: yes or no, none, a number with thousands separated, or a text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value.is_integer() and value > 1000:
            return f"{value:,.0f}"
        return f"{value:g}"
    if value is None:
        return "none"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def print_table(header: Iterable[str], rows: list[list[str]]) -> None:
    """Prints a table whose columns from the third on are numbers."""
    from rich.table import Table

    table = Table(*map(str, header))
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    _console().print(table)


def print_lines(lines: list[str]) -> None:
    """Prints lines, which are broken at the width of the terminal."""
    console = _console()
    for line in lines:
        console.print(line, markup=False, highlight=False, emoji=False)


def _console() -> Any:
    from rich.console import Console

    width = None if sys.stdout.isatty() else WIDTH_WITHOUT_TERMINAL
    return Console(width=width)
