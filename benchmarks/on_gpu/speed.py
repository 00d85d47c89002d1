"""A billion parameters and more in bf16 and FP8, compiled and not, and the same weights in transformers.

MFU is by the convention of docs/describe.md (forward and backward, causal attention, recomputation not counted),
against the rate of bf16 products measured in the same run.
"""

import shutil
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.on_gpu.measure import Lab, attempt, failed, in_turns, ratio, release
from benchmarks.on_gpu.shapes import SHAPES, Stepper, eagerly
from benchmarks.on_gpu.theirs import Theirs, apart, export, our_kernels
from core.contracts.component import Environment
from core.recipe.compose import Recipe

FP8 = {"te_fp8 block": "{name: te_fp8}", "fp8_native": "{name: fp8_native}"}
BESIDE = "1b_mla"
"""The shape that transformers has too; it is timed beside it, and not again by itself."""


def run(lab: Lab) -> dict[str, Any]:
    """Each shape in each precision; one of them beside transformers."""
    found: dict[str, Any] = {}
    for name in SHAPES:
        found[name] = attempt(beside_transformers, lab) if name == BESIDE else attempt(precisions, lab, name)
        lab.keep(found)
        torch.compiler.reset()
    return found


def _rounds(lab: Lab) -> dict[str, int]:
    return {"rounds": 2, "warm": 1} if lab.quick else {"rounds": 10, "warm": 2}


def _bf16(lab: Lab) -> str:
    return "{name: bf16}" if lab.device == "cuda" else "{name: fp32}"


# ---- precisions


def precisions(lab: Lab, name: str) -> dict[str, Any]:
    """Whole steps in bf16, eager and compiled, and in FP8, in turns, all on one set of weights; peak memory of each."""
    recipe = SHAPES[name].compose(_bf16(lab), quick=lab.quick)
    base = Stepper.of(recipe, lab.device, compiled=True)
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in base.model.parameters()), "tokens": base.tokens}
    found |= {"flops": base.flops, "recipe": SHAPES[name].recipe, "overrides": SHAPES[name].overrides}

    def eager() -> None:
        with eagerly(base.model):
            base.step()

    versions: dict[str, Callable[[], None]] = {"bf16": eager, "bf16 compiled": base.step}
    left_out = {}
    for label, section in FP8.items() if SHAPES[name].fp8 else ():
        own = SHAPES[name].compose(section, quick=lab.quick)
        if obstacle := _obstacle(own, lab):
            left_out[label] = obstacle
            continue
        stepper = Stepper.of(own, lab.device, compiled=True, owner=base)
        if isinstance(tried := attempt(stepper.step), dict):
            left_out[label] = tried
            base.optimizer.zero_grad()
            continue
        versions[f"{label} compiled"] = stepper.step
    memory = {label: _peak(step, lab) for label, step in versions.items()}
    seconds = in_turns(versions, lab.device, **_rounds(lab))
    return found | {"versions": _told(seconds, memory, base, lab), "left_out": left_out}


def _obstacle(recipe: Recipe, lab: Lab) -> str | None:
    """Why a precision cannot run here."""
    if lab.device == "cpu":
        return "needs a GPU"
    environment = Environment("cuda", torch.cuda.get_device_capability(), torch.version.cuda)
    told: str | None = recipe.precision.component.requires(recipe.precision.config, environment)
    return told


def _peak(step: Callable[[], None], lab: Lab) -> int | None:
    """Bytes in use at most during one step, everything that is held between steps included."""
    step()
    release()
    step()
    return torch.cuda.max_memory_allocated() if lab.device == "cuda" else None


def _told(
    seconds: dict[str, Any], memory: dict[str, int | None], stepper: Stepper, lab: Lab, first: str = "bf16 compiled"
) -> dict[str, Any]:
    return {
        label: {
            "seconds": spent,
            "tokens_per_second": stepper.tokens / spent["median"],
            "mfu": stepper.flops / spent["median"] / lab.ceilings["bf16"],
            "peak_bytes": memory[label],
            f"speed_over_{first.replace(' ', '_')}": ratio(seconds[first], spent),
        }
        for label, spent in seconds.items()
    }


# ---- beside transformers


def beside_transformers(lab: Lab) -> dict[str, Any]:
    """Forward and backward, and whole steps, of the same weights here and there, in turns."""
    recipe = SHAPES[BESIDE].compose(_bf16(lab), quick=lab.quick)
    base = Stepper.of(recipe, lab.device, compiled=True)
    folder = lab.folder / "speed"
    export(recipe, base, folder)
    try:
        tried = {name: attempt(_gradients_alone, lab, base, folder, name) for name in ("grouped_mm", "eager")}
        fitting = {name: one["median"] for name, one in tried.items() if not failed(one)}
        best = min(fitting, key=lambda name: fitting[name])
        theirs = Theirs(folder, best, base, lab.device)
    finally:
        shutil.rmtree(folder)
    with torch.no_grad():
        losses = {"ours": float(base.loss()), "theirs": float(theirs.loss())}

    def on_our_kernels(function: Callable[[], None]) -> Callable[[], None]:
        def called() -> None:
            with our_kernels():
                function()

        return called

    def eager(function: Callable[[], None]) -> Callable[[], None]:
        def called() -> None:
            with eagerly(base.model):
                function()

        return called

    found: dict[str, Any] = {"experts": tried, "best": best, "losses": losses, "tokens": base.tokens}
    found["logits_calc_diff"] = apart(base, theirs)
    for what in ("gradients", "step"):
        ours, other = getattr(base, what), getattr(theirs, what)
        versions = {"ours": eager(ours), "ours compiled": ours, "transformers": other}
        versions["transformers, our attention kernel"] = on_our_kernels(other)
        if what == "step":
            versions["transformers, fp32 masters"] = theirs.step_with_masters
        memory = {label: _peak(call, lab) for label, call in versions.items()}
        seconds = in_turns(versions, lab.device, **_rounds(lab))
        found[what] = _told(seconds, memory, base, lab, "transformers")
    found["compiled"] = attempt(_compiled_too, lab, base, theirs)
    return found


def _gradients_alone(lab: Lab, base: Stepper, folder: Any, experts: str) -> dict[str, Any]:
    theirs = Theirs(folder, experts, base, lab.device)
    seconds: dict[str, Any] = in_turns({"gradients": theirs.gradients}, lab.device, rounds=3, warm=2)["gradients"]
    return seconds


def _compiled_too(lab: Lab, base: Stepper, theirs: Theirs) -> dict[str, Any]:
    """Whole steps with transformers' model compiled as well, with the attention kernel that ours has."""
    theirs.model.compile()

    def step() -> None:
        with our_kernels():
            theirs.step()

    versions: dict[str, Callable[[], None]] = {"ours compiled": base.step, "transformers": step}
    memory = {label: _peak(call, lab) for label, call in versions.items()}
    return _told(in_turns(versions, lab.device, **_rounds(lab)), memory, base, lab, "transformers")


# ---- the table


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Tokens per second, MFU, memory, and ratios with their range."""
    told: list[tuple[str, str]] = []
    for name, part in found.items():
        if sentence := failed(part):
            told.append((name, f"failed: {sentence}"))
            continue
        groups = (
            {"": part["versions"]}
            if "versions" in part
            else {f" {what}": part[what] for what in ("gradients", "step", "compiled")}
        )
        for what, versions in groups.items():
            if sentence := failed(versions):
                told.append((f"{name}{what}", f"failed: {sentence}"))
                continue
            told += [(f"{name}{what}: {label}", _figure(row)) for label, row in versions.items()]
        told += [
            (f"{name}: {label}", f"left out: {failed(why) or why}") for label, why in part.get("left_out", {}).items()
        ]
    return told


def _figure(row: dict[str, Any]) -> str:
    times = next(value for key, value in row.items() if key.startswith("speed_over_"))
    over = next(key for key in row if key.startswith("speed_over_")).removeprefix("speed_over_").replace("_", " ")
    memory = "" if row["peak_bytes"] is None else f", {row['peak_bytes'] / 1e9:.1f} GB"
    return (
        f"{row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.1%}{memory}, "
        f"{times['median']:.2f}x {over} ({times['least']:.2f}-{times['most']:.2f})"
    )
