"""The published results: no placeholder is left, and each figure is that of a run under `records/`."""

import json
import re

from .documents import ROOT

RECORD = ROOT / "records" / "dsv3_small"


def test_no_placeholder_is_left() -> None:
    for file in [ROOT / "README.md", *(ROOT / "recipes").rglob("*.yaml")]:
        text = file.read_text(encoding="utf-8")
        assert not re.search(r"@[A-Z_]+@", text), file
        assert not re.search(r"\|\s*<!--[^>]*-->\s*\|", text), file


def test_the_readmes_figures_are_those_of_the_record() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    runs = [
        json.loads(file.read_text(encoding="utf-8")) for file in sorted(RECORD.glob("run-*.json"))
    ]
    assert len(runs) == 3
    assert {run["val_bits_per_byte"] for run in runs} == {runs[0]["val_bits_per_byte"]}, (
        "one seed, one result"
    )
    seconds = sorted(run["wall_seconds"] for run in runs)[1]
    balanced, unbalanced = (
        json.loads((RECORD / f"{name}.json").read_text()) for name in ("h100", "h100-no-balance")
    )
    for shown in (
        f"**{runs[0]['val_bits_per_byte']:.3f}**",
        f"{runs[0]['max_vio_global']:.2f}",
        f"{unbalanced['max_vio_global']:.2f} without, {balanced['max_vio_global']:.2f} with",
        f"{100 * runs[0]['mtp_acceptance']:.0f}%",
        f"{seconds:.0f} s",
    ):
        assert shown in readme, shown


def test_the_run_keeps_what_the_recipe_promises() -> None:
    """At most 1.7 million tokens, 2 GB and 1.50 bits per byte, and a MaxVio below 0.5 that balancing earns."""
    run = json.loads((RECORD / "run-1.json").read_text(encoding="utf-8"))
    unbalanced = json.loads((RECORD / "h100-no-balance.json").read_text(encoding="utf-8"))
    assert run["tokens"] <= 1.7e6
    assert run["peak_memory_bytes"] <= 2e9
    assert run["val_bits_per_byte"] <= 1.50
    assert run["max_vio_global"] < 0.5 < unbalanced["max_vio_global"]
