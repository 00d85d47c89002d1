"""Speed of models of a billion parameters and more in bf16 and FP8, compiled and not, and in transformers.

MFU is by the convention of docs/describe.md (forward and backward, causal attention, recomputation not counted),
against the rate of bf16 products measured in the same run.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.on_gpu.compare import obstacle
from benchmarks.on_gpu.measure import Lab, attempt, failed, in_turns, ratio, release
from benchmarks.on_gpu.profile import kind_of, profiled
from benchmarks.on_gpu.shapes import SHAPES, Stepper, eagerly
from benchmarks.on_gpu.theirs import Theirs, agreement, export, implementations, our_kernels

FP8 = {"te_fp8 block": "{name: te_fp8}", "fp8_native": "{name: fp8_native}"}
BESIDE = "1b_mla"
"""The shape that is compared with transformers, which has it too; it is not timed by itself."""


def run(lab: Lab) -> dict[str, Any]:
    """Times each shape in each precision, and one of them together with transformers."""
    found: dict[str, Any] = {}
    for name in SHAPES:
        found[name] = (
            attempt(beside_transformers, lab) if name == BESIDE else attempt(precisions, lab, name)
        )
        lab.keep(found)
        torch.compiler.reset()
    return found


def _rounds(lab: Lab) -> dict[str, int]:
    return {"rounds": 2, "warm": 1} if lab.quick else {"rounds": 10, "warm": 2}


def _bf16(lab: Lab) -> str:
    return "{name: bf16}" if lab.device == "cuda" else "{name: fp32}"


# ---- precisions


def precisions(lab: Lab, name: str) -> dict[str, Any]:
    """Times and peak memory of whole steps in bf16, eager and compiled, and in FP8, in turns with shared weights."""
    recipe = SHAPES[name].compose(_bf16(lab), quick=lab.quick)
    base = Stepper.of(recipe, lab.device, compiled=True)
    versions: dict[str, Callable[[], None]] = {
        "bf16": _eager(base, base.step),
        "bf16 compiled": base.step,
    }
    left_out, steppers = {}, {"bf16": base}
    for label, section in FP8.items() if SHAPES[name].fp8 else ():
        own = SHAPES[name].compose(section, quick=lab.quick)
        if why := obstacle(own.precision, lab.device):
            left_out[label] = why
            continue
        stepper = Stepper.of(own, lab.device, compiled=True, owner=base)
        if isinstance(tried := attempt(stepper.step), dict):
            left_out[label] = tried
            base.optimizer.zero_grad()
            continue
        versions[f"{label} compiled"], steppers[label] = stepper.step, stepper
    memory = {label: _peak(step, lab) for label, step in versions.items()}
    seconds = in_turns(versions, lab.device, **_rounds(lab))
    timed = _timings(seconds, memory, base, lab, "bf16 compiled")
    paths = {label: stepper.model.kernels_used().table() for label, stepper in steppers.items()}
    return _about(name, base, lab) | {"versions": timed, "left_out": left_out, "paths": paths}


def _about(name: str, stepper: Stepper, lab: Lab) -> dict[str, Any]:
    """A description of the model that is timed."""
    return {
        "parameters": sum(p.numel() for p in stepper.model.parameters()),
        "tokens": stepper.tokens,
        "flops": stepper.flops,
        "recipe": SHAPES[name].recipe,
        "overrides": SHAPES[name].changes(quick=lab.quick),
    }


def _eager(stepper: Stepper, function: Callable[[], None]) -> Callable[[], None]:
    def called() -> None:
        with eagerly(stepper.model):
            function()

    return called


def _held(lab: Lab) -> int:
    """The bytes in use on the device."""
    return torch.cuda.memory_allocated() if lab.device == "cuda" else 0


def _peak(step: Callable[[], None], lab: Lab, others: int = 0) -> int | None:
    """The peak of bytes in use during one step, with what is held between steps, and without the bytes of `others`."""
    step()
    release()
    step()
    return torch.cuda.max_memory_allocated() - others if lab.device == "cuda" else None


def _timings(
    seconds: dict[str, Any], memory: dict[str, int | None], stepper: Stepper, lab: Lab, first: str
) -> dict[str, Any]:
    return {
        label: {
            "seconds": spent,
            "tokens_per_second": stepper.tokens / spent["median"],
            "mfu": stepper.flops / spent["median"] / lab.ceilings["bf16"],
            "peak_bytes": memory.get(label),
            f"speed_over_{first.replace(', ', '_').replace(' ', '_')}": ratio(
                seconds[first], spent
            ),
        }
        for label, spent in seconds.items()
    }


# ---- beside transformers

KINDS = ("gradients", "step", "step_with_masters")
"""What is timed: forward and backward; a step, where transformers updates bf16 weights; a step, where it updates fp32
master weights, as our model always does."""

HELPED = "transformers, our attention kernel"


def beside_transformers(lab: Lab) -> dict[str, Any]:
    """Times of forward and backward, and of whole steps, of the same weights here and in transformers, in turns.

    Memory is that of one model alone: what the other one holds at the same time is subtracted.
    """
    recipe = SHAPES[BESIDE].compose(_bf16(lab), quick=lab.quick)
    base = Stepper.of(recipe, lab.device, compiled=True)
    ours = {"gradients": base.gradients, "step": base.step, "step_with_masters": base.step}
    eager = {kind: _eager(base, call) for kind, call in ours.items()}
    memory = {
        kind: {"ours": _peak(eager[kind], lab), "ours compiled": _peak(ours[kind], lab)}
        for kind in KINDS
    }
    found = _about(BESIDE, base, lab)
    with TemporaryDirectory() as scratch:
        export(recipe, base, Path(scratch))
        held = _held(lab)
        tried = {
            name: attempt(_gradients_alone, lab, base, scratch, name) for name in implementations()
        }
        found["experts"] = {name: one for name, one in tried.items() if not failed(one)}
        found["left_out"] = {
            f"experts {name}": failed(one) for name, one in tried.items() if failed(one)
        }
        found["best"] = min(
            found["experts"], key=lambda name: float(found["experts"][name]["median"])
        )
        theirs = Theirs(Path(scratch), found["best"], base, lab.device)
    found["agreement"] = attempt(
        agreement, base, theirs, SHAPES[BESIDE].compose("{name: fp32}", quick=lab.quick)
    )
    found["attention_kernels"] = attempt(_attention_kernels, lab, base, theirs)
    for compiled in (False, True):
        if compiled:
            # Compiled once, with the attention kernel that is faster for it, which compiled code keeps.
            theirs.model.compile()
        for kind in KINDS:
            alone, helped = getattr(theirs, kind), _on_our_kernels(getattr(theirs, kind))
            versions = {"ours": eager[kind], "ours compiled": ours[kind], HELPED: helped}
            versions |= {} if compiled else {"transformers": alone}
            peaks = memory[kind] | {HELPED: _peak(helped, lab, held)}
            seconds = in_turns(versions, lab.device, **_rounds(lab))
            theirs.forget()  # not to be counted with the next kind
            found[f"compiled_{kind}" if compiled else kind] = _timings(
                seconds, peaks, base, lab, HELPED
            )
            lab.keep({BESIDE: found})
    return found


def _on_our_kernels(function: Callable[[], None]) -> Callable[[], None]:
    def called() -> None:
        with our_kernels():
            function()

    return called


def _gradients_alone(lab: Lab, base: Stepper, folder: str, experts: str) -> dict[str, Any]:
    theirs = Theirs(Path(folder), experts, base, lab.device)
    seconds: dict[str, Any] = in_turns(
        {"gradients": theirs.gradients}, lab.device, rounds=3, warm=2
    )["gradients"]
    return seconds


def _attention_kernels(lab: Lab, base: Stepper, theirs: Theirs) -> dict[str, list[str]]:
    """The names of the attention kernels that each of the two models ran."""
    calls = {"ours": base.gradients, "transformers": theirs.gradients}
    calls[HELPED] = _on_our_kernels(theirs.gradients)
    found = {}
    for label, call in calls.items():
        with profiled(lab.device) as kernels:
            call()
        found[label] = sorted(
            {name[:120] for name, _, _ in kernels() if kind_of(name) == "attention"}
        )
    return found


# ---- the table


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table: tokens per second, MFU, memory, and ratios with their range."""
    table_rows: list[tuple[str, str]] = []
    for name, part in found.items():
        if sentence := failed(part):
            table_rows.append((name, f"failed: {sentence}"))
            continue
        kinds = [what + kind for what in ("", "compiled_") for kind in KINDS]
        groups = (
            {"": part["versions"]}
            if "versions" in part
            else {f" {k}": part[k] for k in kinds if k in part}
        )
        for what, versions in groups.items():
            if sentence := failed(versions):
                table_rows.append((f"{name}{what}", f"failed: {sentence}"))
                continue
            table_rows += [
                (f"{name}{what}: {label}", _figure(row)) for label, row in versions.items()
            ]
        table_rows += [
            (f"{name}: {label}", f"left out: {failed(why) or why}")
            for label, why in part.get("left_out", {}).items()
        ]
    return table_rows


def _figure(row: dict[str, Any]) -> str:
    times = next(value for key, value in row.items() if key.startswith("speed_over_"))
    over = (
        next(key for key in row if key.startswith("speed_over_"))
        .removeprefix("speed_over_")
        .replace("_", " ")
    )
    memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.1f} GB"
    return (
        f"{row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.1%}{memory}, "
        f"{times['median']:.2f}x {over} ({times['least']:.2f}-{times['most']:.2f})"
    )
