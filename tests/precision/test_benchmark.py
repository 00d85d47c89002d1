"""benchmarks/precision.py: what it counts is what the definitions say, and it is one command."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import core
from core.contracts.precision import HIGH
from core.numerics.linear import ProductLayer

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("dsv3_small", "model.blocks.moe.count=1", "data.sequence_length=64", "batch.sequences=2")


def run(*arguments: str) -> Any:
    command = [sys.executable, "benchmarks/precision.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def inputs_in_codes(recipe: Any) -> int:
    """One byte for every input of a low layer, 1.5 in E5M6, and 4 for every 128 of a row.

    The multi-token module reads a token less of every sequence, since its last one has no next embedding.
    """
    top_k = recipe.model.blocks["moe"].ffn.config.router.config.top_k
    total = 0
    for path, layer in core.build(recipe, device="meta").named_modules():
        if isinstance(layer, ProductLayer) and layer.role not in HIGH:
            tokens = recipe.batch.sequences * (
                recipe.data.sequence_length - path.startswith("heads.mtp")
            )
            rows = tokens * (top_k if layer.role.startswith("experts.") else 1)
            each = 1.5 if layer.role == "attention.output" else 1
            total += int(rows * (each * layer.inputs + 4 * math.ceil(layer.inputs / 128)))
    return total


def test_saved_bytes_are_those_of_the_definitions_and_ratios_are_paired() -> None:
    precisions = [
        "{name: fp32}",
        "{name: fp8_emulated}",
        "{name: fp8_emulated, weight_gradient: te}",
    ]
    result = run(
        *SMALL, "--rounds", "3", "--json", *(a for p in precisions for a in ("--precision", p))
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)["precisions"]
    fp32, paper, te = (found[text]["saved_bytes"] for text in precisions)
    assert paper["inputs of low layers"] == inputs_in_codes(core.compose(SMALL[0], SMALL[1:]))
    assert (
        te["inputs of low layers"]
        == fp32["inputs of low layers"]
        > 2 * paper["inputs of low layers"]
    )
    assert fp32["everything else"] == paper["everything else"] == te["everything else"]
    assert fp32["weights of low layers"] == 0
    rows = list(found.values())
    assert [(rows[0][key]) for key in ("ratio", "ratio_least", "ratio_most")] == [1, 1, 1]
    for row in rows:
        ratios = sorted(
            own / base for own, base in zip(row["seconds"], rows[0]["seconds"], strict=True)
        )
        assert [row["ratio_least"], row["ratio"], row["ratio_most"]] == ratios


def test_what_cannot_run_here_is_one_sentence() -> None:
    result = run("dsv3_small", "--precision", "{name: fp8_native, scaling: tile}", "--rounds", "1")
    assert result.returncode == 2
    assert result.stderr.startswith(
        "moeloom: precision {name: fp8_native, scaling: tile}: torch's scaled_mm has 1x128"
    )
