"""python benchmarks/gpu.py [PART ...]: tests and benchmarks on one GPU, or on two.

Parts: tests (those that need a GPU), correctness (results of the CPU and of the GPU), fp8 (its products and its loss
curves), speed (a model of a billion parameters, compared with transformers), decode (generation with it, compared too),
layer (a mixture-of-experts layer of DeepSeek-V3's shape), profile (the time of a step by kind of kernel), small
(whole runs of a small model).
On two GPUs, and only if they are named: large (16 billion parameters in training), scaling (throughput of two over that
of one). Each part writes its numbers into OUT/gpu.json as soon as it has them, and keeps those of other parts; a short
table is printed last. `--quick` takes toy sizes: a dry run of every step, on any machine.
"""

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from core.command import run_command
from core.contracts.errors import UserError

PARTS = ("tests", "correctness", "fp8", "speed", "decode", "layer", "profile", "small")
ON_TWO = ("large", "scaling")
"""Parts that need two GPUs and a folder of tokens (benchmarks/token_file.py)."""

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "transformer-engine",
    "lightning",
    "nvidia-cublas",
    "nvidia-cudnn-cu13",
)


def parser() -> argparse.ArgumentParser:
    """The command-line arguments."""
    p = argparse.ArgumentParser(
        prog="python benchmarks/gpu.py", description="One GPU or two, measured."
    )
    p.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"of {', '.join(PARTS)} (default: these), {', '.join(ON_TWO)}",
    )
    p.add_argument(
        "--out", type=Path, default=Path("records/gpu"), metavar="DIR", help="default: records/gpu"
    )
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    p.add_argument(
        "--quick",
        action="store_true",
        help="toy sizes: shows that every step runs, and nothing else",
    )
    p.add_argument(
        "--tokens",
        type=Path,
        default=Path("build/tokens"),
        metavar="DIR",
        help="large, scaling: folder that benchmarks/token_file.py wrote (default: build/tokens)",
    )
    p.add_argument(
        "--seconds",
        type=float,
        default=480.0,
        metavar="S",
        help="large, scaling: the part's runs are interrupted after so many (default: 480)",
    )
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="large, scaling: a further override of the recipe; may be given several times",
    )
    return p


def main(arguments: argparse.Namespace) -> None:
    """Runs the parts one after the other, then prints the table.

    Raises:
        UserError: a part is unknown, there is no GPU, or a step failed; everything else is measured and written.
    """
    import torch

    from benchmarks.on_gpu.measure import ceilings

    for part in arguments.parts:
        if part not in (*PARTS, *ON_TWO):
            raise UserError(f"{part}: is not a part; allowed: {', '.join((*PARTS, *ON_TWO))}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: there is no GPU that torch can use; --device cpu --quick is a dry run"
        )
    if arguments.device == "cpu" and not arguments.quick:
        raise UserError("--device cpu: only with --quick, a dry run: these sizes are a GPU's")
    parts, rates = arguments.parts or PARTS, ceilings(arguments.device, quick=arguments.quick)
    arguments.out.mkdir(parents=True, exist_ok=True)
    target = arguments.out / ("gpu-quick.json" if arguments.quick else "gpu.json")
    document = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    rows: list[tuple[str, str, str]] = []
    for part in parts:
        rows += [(part, *row) for row in measured(part, arguments, document, target, rates)]
        rates = document[part]["ceilings_after"]
    print("| part | what | figure |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    if errors := [message for part in parts for message in _errors(document[part]["found"])]:
        raise UserError(f"{target}: {len(errors)} steps failed; the first: {errors[0]}")


def measured(
    part: str,
    arguments: argparse.Namespace,
    document: dict[str, Any],
    target: Path,
    rates: dict[str, Any],
) -> list[tuple[str, str]]:
    """Runs one part and writes its numbers into the document; the device's rates are measured again after it.

    Returns:
        The rows of the part in the table.
    """
    from benchmarks.on_gpu.measure import Lab, attempt, ceilings, failed, moved

    module, began = import_module(f"benchmarks.on_gpu.{part}"), time.perf_counter()
    print(f"{part} ...", file=sys.stderr, flush=True)
    kept: dict[str, Any] = {}

    def keep(found: dict[str, Any]) -> None:
        kept.update(found)
        about = provenance(arguments) | {"seconds": round(time.perf_counter() - began, 1)}
        document[part] = {"about": about, "ceilings": rates, "found": kept}
        _write(target, document)

    lab = Lab(
        arguments.device,
        arguments.quick,
        arguments.out,
        rates,
        keep,
        tokens=arguments.tokens,
        seconds=arguments.seconds,
        overrides=arguments.set,
    )
    found = attempt(module.run, lab)
    keep(found)  # of a part that failed, what was kept before stays
    outcome = attempt(module.rows, found)
    rows = [("failed", failed(found) or failed(outcome))] if failed(outcome) else outcome
    document[part]["ceilings_after"] = after = ceilings(arguments.device, quick=arguments.quick)
    _write(target, document)
    if changed := moved(rates, after):
        shown = ", ".join(f"{name} {change:+.0%}" for name, change in changed.items())
        rows = [*rows, ("the device's own rates changed meanwhile", shown)]
    return rows


def provenance(arguments: argparse.Namespace) -> dict[str, Any]:
    """The date, the command, the machine and the versions."""
    from core.training.machine import code, machine

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    options = ["--quick", "--device", arguments.device] if arguments.quick else []
    for override in arguments.set:
        options += ["--set", override]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/gpu.py", *arguments.parts, *options]),
        "machine": machine(),
        "code": code(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "packages": versions,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def _write(target: Path, document: dict[str, Any]) -> None:
    part = target.with_suffix(".part")
    part.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    part.replace(target)


def _errors(found: Any) -> list[str]:
    """The error messages of all steps and tests that failed, at any depth."""
    if isinstance(found, dict):
        own = [str(found["error"])] if "error" in found else []
        own += [f"{name}: {why}" for name, why in found.get("broken", {}).items()]
        return own + [message for value in found.values() for message in _errors(value)]
    return (
        [message for value in found for message in _errors(value)]
        if isinstance(found, list)
        else []
    )


if __name__ == "__main__":
    run_command(main, parser())
