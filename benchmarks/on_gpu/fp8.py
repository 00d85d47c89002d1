"""FP8 kernels (Transformer Engine, torch's `scaled_mm`) compared with the emulation, in products and in training."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.on_gpu.compare import (
    PRODUCTS,
    calc_diff,
    drawn,
    layer_of,
    obstacle,
    precision_of,
    section_of,
    short,
    three_products,
)
from benchmarks.on_gpu.measure import Lab, attempt, failed
from benchmarks.on_gpu.runs import Fits, prepare_data, toy_text
from core.study.training_losses import LOSS, against, losses_by_step


def run(lab: Lab) -> dict[str, Any]:
    """Measures first the runs, which then share the GPU only among themselves, and after them the products."""
    found: dict[str, Any] = {"training": {}}
    found["training"] |= attempt(training, lab, found)
    lab.keep(found)
    return found | {"products": attempt(products, lab)}


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the short table."""
    if sentence := failed(found):
        return [("fp8", sentence)]
    table_rows: list[tuple[str, str]] = []
    for name, rows_of in (("products", _product_rows), ("training", _training_rows)):
        part = found.get(name, {"error": "was not reached"})
        sentence = failed(part)
        table_rows += [(f"fp8 {name}", sentence)] if sentence else rows_of(part)
    return table_rows


# ---- products


@dataclass(frozen=True)
class Case:
    """One layer; with 0 groups it is not a grouped layer."""

    role: str
    inputs: int
    outputs: int
    groups: int = 0


CASES = {
    "whole tiles": Case("ffn.down", 1024, 384),
    "less than a tile": Case("attention.kv_up", 96, 256),
    "ragged tiles": Case("attention.output", 336, 208),
    "experts in": Case("experts.gate_up", 384, 512, groups=4),
    "experts out": Case("experts.down", 256, 384, groups=4),
}
"""Layers whose widths are multiples of 16, as the kernels require. The second expert has no rows."""
ENDS = (0.11, 0.11, 0.388, 0.9)
"""Where the rows of each expert end, as a fraction of all rows; those after the last belong to no expert."""

TE = "weight_gradient: te"
PAIRS = {
    "name: te_fp8, scaling: block, scales: ue8m0": f"scales: ue8m0, {TE}",
    "name: te_fp8, scaling: block, scales: fp32": TE,
    "name: te_fp8, scaling: current": f"scaling: tensor, {TE}",
    "name: fp8_native": "e5m6: []",
    f"name: fp8_native, {TE}": TE,
    f"name: fp8_native, scales: ue8m0, {TE}": f"scales: ue8m0, {TE}",
    "name: fp8_native, scaling: tensor": "scaling: tensor, e5m6: []",
}
"""Precisions, and the keys with which `fp8_emulated` rounds the same operands in the same way. Transformer Engine
always computes the weight gradient from the original activation and has no key for it."""
STREAMS = ("fp32", "bf16")
"""The type of a product's result: in fp32 nothing but sums and scales can differ; runs have bf16."""


def products(lab: Lab) -> dict[str, Any]:
    """The calc_diff of every product of every case to the emulation, and of both to fp64 products."""
    height = 300 if lab.quick else 1000
    beside: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for text, keys in PAIRS.items():
        for stream in STREAMS:
            name = f"{{{text}, stream: {stream}}}"
            if why := obstacle(section_of(name), lab.device):
                missing[name] = why
            else:
                beside[name] = attempt(
                    _cases, name, f"{{name: fp8_emulated, {keys}}}", height, lab.device
                )
    plain = attempt(_cases, "{name: bf16}", "{name: bf16_emulated}", height, lab.device)
    cases = {label: vars(case) for label, case in CASES.items()}
    return {"rows": height, "cases": cases, "missing": missing, "beside": beside, "bf16": plain}


def _cases(name: str, emulated: str, height: int, device: str) -> dict[str, Any]:
    cases = {
        label: attempt(_case, case, name, emulated, height, device) for label, case in CASES.items()
    }
    return {"emulated": emulated, "cases": cases}


def _case(case: Case, name: str, emulated: str, height: int, device: str) -> dict[str, Any]:
    """The calc_diff of Y, dX and dW to the emulation and to fp64, that of the emulation to fp64, and the kernels."""
    x, dy = (
        drawn(height, width, seed=seed).bfloat16()
        for seed, width in ((2, case.inputs), (3, case.outputs))
    )
    made = {text: precision_of(text) for text in (name, emulated, "{name: fp64}")}
    found: list[dict[str, Tensor]] = []
    for precision in made.values():
        stream = precision.compute_dtype("embedding")
        layer = layer_of(precision, case.role, case.inputs, case.outputs, case.groups, device)
        ends_E = torch.tensor([int(end * height) for end in ENDS], dtype=torch.int32, device=device)
        more = (ends_E,) if case.groups else ()
        found.append(three_products(layer, x.to(device, stream), dy.to(device, stream), *more))
    own, like, exact = found
    return {
        "to_emulated": {p: short(calc_diff(own[p], like[p])) for p in PRODUCTS},
        "to_exact": {p: short(calc_diff(own[p], exact[p])) for p in PRODUCTS},
        "emulated_to_exact": {p: short(calc_diff(like[p], exact[p])) for p in PRODUCTS},
        "path": made[name].kernels_used.table().get(case.role),
    }


def _product_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    table_rows = []
    for name, one in {**found["beside"], "bf16 to bf16_emulated": found["bf16"]}.items():
        cases = {} if failed(one) else one["cases"]
        good = [case for case in cases.values() if not failed(case)]
        figure = failed(one) or next((failed(case) for case in cases.values() if failed(case)), "")
        if good:
            worst = (f"{p} {max(case['to_emulated'][p] for case in good):.1e}" for p in PRODUCTS)
            exact = max(case["to_exact"][p] for case in good for p in PRODUCTS)
            shown = f"calc_diff to the emulation {', '.join(worst)}; to fp64 {exact:.1e}"
            figure = f"{shown}; {figure}" if figure else shown
        table_rows.append((f"products, {name}", figure or ""))
    return table_rows + _absent("products", found["missing"])


def _absent(what: str, missing: dict[str, str]) -> list[tuple[str, str]]:
    """A row for each reason why precisions cannot run."""
    table_rows = []
    for why in dict.fromkeys(missing.values()):
        names = [
            name.partition(",")[0].strip("{").removeprefix("name: ")
            for name in missing
            if missing[name] == why
        ]
        table_rows.append(
            (f"{what}, {' and '.join(dict.fromkeys(names))}", f"cannot run here: {why}")
        )
    return table_rows


# ---- training

RECIPE = "dsv3_small"
BASE = "bf16"
WIDE = [
    "model.dim=256",
    "model.attention={name: mla, heads: 4, q_rank: 128, kv_rank: 128, nope_dim: 96, rope_dim: 32, value_dim: 128}",
    "model.blocks.dense.ffn.hidden=512",
    "model.blocks.moe.ffn.expert_hidden=128",
]
"""Overrides that make every width of dsv3_small a multiple of 128, except the rows of the shared rotated key."""
SCHEDULE = (
    "optimizer.lr={start: 0.0, segments: "
    "[{shape: linear, to: 0.001, until: 0.25}, {shape: cosine, to: 0.0001, until: 1.0}]}"
)
"""The schedule of recipes/sweeps/precision.yaml; under the recipe's own, rounding alone makes runs diverge."""
TOY = ["model.blocks.moe.count=1", "model.dim=128", "model.blocks.moe.ffn.experts=8"]
RUNS = {
    BASE: "{name: bf16}",
    "fp32": "{name: fp32}",
    "te_fp8 block": "{name: te_fp8, scaling: block}",
    "te_fp8 current": "{name: te_fp8, scaling: current}",
    "fp8_native": "{name: fp8_native}",
}
SEEDS = (0, 1, 2)
SECONDS = 150.0
"""Seconds that the runs of one seed may take."""


def training(lab: Lab, part: dict[str, Any]) -> dict[str, Any]:
    """The same steps in each precision that can run here, and the distance of their losses from those of bf16.

    The runs of a seed go on at the same time, one seed after the other; the results so far are kept after each seed in
    `part["training"]`.
    """
    steps, seeds = (3, SEEDS[:1]) if lab.quick else (300, SEEDS)
    cannot = {name: obstacle(section_of(text), lab.device) for name, text in RUNS.items()}
    able = [name for name in RUNS if not cannot[name]]
    found: dict[str, Any] = part["training"]
    found |= {"recipe": RECIPE, "steps": steps, "loss": LOSS, "seconds_allowed": SECONDS}
    found["note"] = "tokens per second are of runs that shared one device, all at once"
    found["runs"] = {
        name: {"precision": text, "cannot_run": cannot[name], "seeds": {}}
        for name, text in RUNS.items()
    }
    with TemporaryDirectory() as scratch:  # checkpoints are large and no part of the result
        toy = [*TOY, *toy_text(Path(scratch))] if lab.quick else []
        common = [*WIDE, *toy, SCHEDULE, f"budget.steps={steps}", "validation.sequences=16"]
        common.append(f"strategy.accelerator={lab.device}")
        found["overrides"] = common
        prepare_data(RECIPE, common)
        done: dict[str, dict[int, Path]] = {name: {} for name in able}
        for seed in seeds:
            with Fits(Path(scratch) / str(seed)) as fits:
                for name in able:
                    overrides = [*common, f"seed={seed}", f"precision={RUNS[name]}"]
                    fits.start(_folder(name), RECIPE, overrides, threads=1)
                ended = fits.results(SECONDS)
            for name in able:
                one, run = ended[_folder(name)], fits.run(_folder(name))
                found["runs"][name]["seeds"][seed] = _result_of_run(one, run)
                if one["ended"] == "finished":
                    done[name][seed] = run
                found["runs"][name]["to_bf16"] = against(done[BASE], done[name])
            lab.keep(part)
    return found


def _folder(name: str) -> str:
    return name.replace(" ", "_")


def _result_of_run(ended: dict[str, Any], run: Path) -> dict[str, Any]:
    """How a run ended, what it measured, and its losses."""
    summary, own = ended.pop("summary"), losses_by_step(run)
    kept = (
        "val_bits_per_byte",
        "val_loss",
        "tokens_per_second",
        "skipped_steps",
        "precision_paths",
    )
    return {
        **ended,
        **{key: summary.get(key) for key in kept},
        "first_step": min(own, default=None),
        "losses": [round(value, 6) for value in own.values()],
    }


def _training_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    table_rows = []
    for name, one in found["runs"].items():
        if not (seeds := list(one["seeds"].values())):
            continue
        parts = [f"{len(seeds)} seeds, {min(run['steps'] for run in seeds)} steps"]
        parts += [run.get("error") or run["ended"] for run in seeds if run["ended"] != "finished"]
        if name != BASE and (far := one["to_bf16"]):
            mean, last = (_percent(far[key]) for key in ("mean", "last"))
            parts.append(f"loss to bf16: mean {mean}, last {last}, largest {far['largest']:.3%}")
        if bits := [
            run["val_bits_per_byte"] for run in seeds if run["val_bits_per_byte"] is not None
        ]:
            parts.append(f"{sum(bits) / len(bits):.4f} bits per byte")
        paths = (seeds[0]["precision_paths"] or {}).get("experts.gate_up")
        table_rows.append((f"training, {name}", "; ".join([*parts, *([paths] if paths else [])])))
    missing = {name: one["cannot_run"] for name, one in found["runs"].items() if one["cannot_run"]}
    return table_rows + _absent("training", missing)


def _percent(value: dict[str, float | None]) -> str:
    within = "" if value["low"] is None else f" ({value['low']:+.3%}, {value['high']:+.3%})"
    return f"{value['value']:+.3%}{within}"
