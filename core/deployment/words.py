"""The sentences about a plan that the command prints and the page begins with."""

from typing import Any


def summary_lines(document: dict[str, Any]) -> list[str]:
    """What a plan changes, a line for each fact.

    Args:
        document: the document of `core.placement`.
    """
    prefill = document["prefill"]
    balance = prefill["balancedness"]
    lines = [_sizes(document)]
    words = [f"balancedness (mean over max): {balance['before']:.3f} in order"]
    if "without_replicas" in balance:
        words.append(f"{balance['without_replicas']:.3f} placed without replicas")
    words.append(f"{balance['after']:.3f} with this plan")
    lines.append(", ".join(words))
    for name, key in (("without replicas", "gain_without_replicas"), ("with this plan", "gain")):
        gain = prefill[key]
        if gain is None:
            continue
        line = f"predicted {name}: experts {gain['experts']:+.1%}"
        if gain["step"] is not None:
            share = prefill["experts_share"]
            line += f", a prefill step {gain['step']:+.1%} (experts take {share:.0%} of it)"
        lines.append(line)
    lines.append(_lasting(document["lags"]))
    return lines


def _sizes(document: dict[str, Any]) -> str:
    """What was placed where."""
    sizes = set()
    for experts, placed in zip(document["experts"], document["phy2log"], strict=True):
        sizes.add(f"{experts} experts as {len(placed)} physical ones")
    layers = len(document["layers"])
    gpus = "1 GPU" if document["gpus"] == 1 else f"{document['gpus']} GPUs"
    nodes = "1 node" if document["nodes"] == 1 else f"{document['nodes']} nodes"
    counted = "1 layer" if layers == 1 else f"{layers} layers"
    return f"{counted} of {', '.join(sorted(sizes))} on {gpus} of {nodes}"


def _lasting(lags: dict[str, Any]) -> str:
    """How long a plan stays good."""
    rows = lags["by_lag"]
    if len(rows) < 2:
        return "how long the plan stays good: not known, the loads are one stretch"
    unit = f"{lags['unit']}s"
    span = f"stretches of {lags['span']:.4g} {unit}"
    values = ", ".join(f"{row['balancedness']:.3f}" for row in rows)
    line = f"planned on one stretch, measured 0 to {len(rows) - 1} later ({span}): {values}"
    return f"{line}; {kept_words(lags)}"


def kept_words(lags: dict[str, Any]) -> str:
    """Says for how long plans keep half of their gain, of loads of several stretches."""
    last = lags["good_for"]
    if last is None:
        return "a plan gains nothing even on its own stretch"
    if last == 0:
        return "the next stretch already loses more than half of the gain"
    stretches = "1 stretch" if last == 1 else f"{last} stretches"
    units = f"{lags['good_for_units']:.4g} {lags['unit']}s"
    if last == len(lags["by_lag"]) - 1:
        return (
            f"half of the gain is kept for {stretches} ({units}) or longer: all that was measured"
        )
    return f"half of the gain is kept for {stretches} ({units})"
