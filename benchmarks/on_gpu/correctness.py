"""Compares results of the GPU with those of the CPU: logits, losses, and the emulation of FP8.

Without a GPU everything is compared with the CPU itself, so that each step can be tried.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import core
from benchmarks.on_gpu.compare import (
    calc_diff,
    differing,
    drawn,
    layer_of,
    precision_of,
    short,
    three_products,
)
from benchmarks.on_gpu.measure import Lab, attempt, failed
from benchmarks.on_gpu.runs import TOTAL, Fits, prepare_data, toy_text
from core.analysis.budget import plan_of
from core.contracts.context import SequenceContext
from core.contracts.router import Router
from core.model.language_model import LanguageModel
from core.numerics import number_formats
from core.numerics import quantise as q
from core.run.data import text_data
from core.run.loading import load_weights
from core.study import training_losses
from core.training.resume import newest_checkpoint

RECIPE = "dsv3_small"
TOY = [
    "model.dim=32",
    "model.attention={name: mla, heads: 2, q_rank: 16, kv_rank: 16, nope_dim: 8, rope_dim: 8, value_dim: 16}",
    "model.blocks.dense.ffn.hidden=64",
    "model.blocks.moe.count=1",
    "model.blocks.moe.ffn.expert_hidden=16",
]
"""The sizes of a dry run."""
SECONDS = 240.0


def run(lab: Lab) -> dict[str, Any]:
    """Compares while the runs go on in other processes; each part of the result has its own error."""
    found: dict[str, Any] = {}
    # Checkpoints are large and no part of the result, so the run folders are temporary.
    with TemporaryDirectory() as scratch, Fits(Path(scratch)) as fits:
        started = attempt(start_losses, lab, fits)
        found["fp8_emulated"] = attempt(emulation, lab)
        lab.keep(found)
        found["losses"] = started if failed(started) else attempt(losses, lab, fits)
        lab.keep(found)
        found["logits"] = attempt(logits, lab, fits)
    return found


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the short table."""
    parts = {"logits": _logit_rows, "losses": _loss_rows, "fp8_emulated": _emulation_rows}
    if sentence := failed(found):
        return [("correctness", sentence)]
    table_rows: list[tuple[str, str]] = []
    for name, rows_of in parts.items():
        part = found.get(name, {"error": "was not reached"})
        sentence = failed(part)
        table_rows += [(name, sentence)] if sentence else rows_of(part)
    return table_rows


# ---- losses


def start_losses(lab: Lab, fits: Fits) -> None:
    """Starts the same steps on both devices: a few with the recipe's schedule, more under a warm-up over all of them.

    The latter also run in fp64, and on the CPU with another number of threads, which shows what rounding alone does.
    """
    toy = [*TOY, *toy_text(fits.folder)] if lab.quick else []
    steps = {"first": 2, "longer": 4} if lab.quick else {"first": 10, "longer": 50}
    own = ["validation.sequences=16", *toy]
    prepare_data(RECIPE, own)
    peak = core.compose(RECIPE).optimizer.config.lr.segments[0].to
    warm = f"optimizer.lr={{start: 0.0, segments: [{{shape: linear, to: {peak}, until: 1.0}}]}}"
    threads = max(1, (os.cpu_count() or 2) // 4)
    for name, precision, device, count in (
        ("first_cpu", "fp32", "cpu", threads),
        ("first_gpu", "fp32", lab.device, 1),
        ("longer_cpu", "fp32", "cpu", threads),
        ("longer_gpu", "fp32", lab.device, 1),
        ("longer_cpu_again", "fp32", "cpu", max(1, threads - 1)),
        ("longer_cpu_fp64", "fp64", "cpu", threads),
        ("longer_gpu_fp64", "fp64", lab.device, 1),
    ):
        kind = name.partition("_")[0]
        overrides = [
            *own,
            *([warm] if kind == "longer" else []),
            f"precision={{name: {precision}}}",
        ]
        overrides += [f"budget.steps={steps[kind]}", f"strategy.accelerator={device}"]
        fits.start(name, RECIPE, overrides, threads=count)


PAIRS = {
    "first": ("first_cpu", "first_gpu", "fp32, CPU to GPU, the recipe's schedule", " (goal 1e-5)"),
    "longer": ("longer_cpu", "longer_gpu", "fp32, CPU to GPU, warm-up all along", " (goal 1e-4)"),
    "longer_cpu": (
        "longer_cpu",
        "longer_cpu_again",
        "fp32, CPU to CPU with fewer threads, warm-up all along",
        "",
    ),
    "longer_fp64": (
        "longer_cpu_fp64",
        "longer_gpu_fp64",
        "fp64, CPU to GPU, warm-up all along",
        "",
    ),
}
"""Two runs each, their description, and the goal for the largest difference."""


def losses(lab: Lab, fits: Fits) -> dict[str, Any]:
    """The relative difference of the total loss at every step, and how the runs ended."""
    ended = fits.results(SECONDS)
    found: dict[str, Any] = {}
    for name, (one, other, _, _) in PAIRS.items():
        base, own = (training_losses.losses_by_step(fits.run(run), TOTAL) for run in (one, other))
        common = sorted(base.keys() & own.keys())
        each = [abs(own[step] - base[step]) / abs(base[step]) for step in common]
        found[name] = {
            "runs": [one, other],
            "steps": len(common),
            "steps_of_one_alone": len(base.keys() ^ own.keys()),  # missing, or not finite
            "largest": max(each, default=None),
            "largest_of_first_10": max(each[:10], default=None),
            "each": [short(value) for value in each],
            "losses": [[round(run[step], 9) for step in common] for run in (base, own)],
        }
    kept = ("steps", "val_loss", "tokens_per_second")
    for result in ended.values():
        result["summary"] = {key: result["summary"].get(key) for key in kept}
    return found | {"runs": ended, "column": TOTAL, "devices": ["cpu", lab.device]}


def _loss_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    table_rows = []
    for name, (_, _, said, goal) in PAIRS.items():
        one, what = found[name], f"losses, {said}, {found[name]['steps']} steps"
        shown = "no common step"
        if one["largest"] is not None:
            shown = (
                f"{one['largest']:.1e} at most{goal}; first ten {one['largest_of_first_10']:.1e}"
            )
        if alone := one["steps_of_one_alone"]:
            shown += f"; {alone} steps of one run alone"
        table_rows.append((what, shown))
    broken = {
        name: run.get("error") for name, run in found["runs"].items() if run["ended"] != "finished"
    }
    return table_rows + [
        (f"  {name}", why or found["runs"][name]["ended"]) for name, why in broken.items()
    ]


# ---- logits


def logits(lab: Lab, fits: Fits) -> dict[str, Any]:
    """The logits of one model on one batch of validation text in every format, compared with fp64 on the CPU.

    Its weights are those of the longer run on the CPU, or initial ones without such a run; `weights` says which.
    """
    trained = fits.run("longer_cpu")
    overrides = [*TOY, *toy_text(fits.folder)] if lab.quick else []
    recipe = core.compose(RECIPE, [*overrides, "validation.sequences=8"])
    data = text_data(recipe, plan_of(recipe))
    data.prepare()
    tokens_BL = next(iter(data.val_dataloader())).tokens_BL
    folder = attempt(newest_checkpoint, trained)
    source = (
        "initial weights" if failed(folder) else f"after training: {trained.name}/{folder.name}"
    )
    seen = {}
    for device, precision in dict.fromkeys(_formats(lab.device)):
        model: LanguageModel = core.build(
            core.compose(RECIPE, [*overrides, f"precision={{name: {precision}}}"])
        )
        if not failed(folder):
            load_weights(model, folder)
        seen[f"{device} {precision}"] = attempt(
            outputs, model.to(device).eval(), tokens_BL.to(device)
        )
    base, *others = seen.items()
    return {
        "weights": source,
        "tokens": tokens_BL.numel(),
        "largest_logit": float(base[1][0].abs().max()),
        "to": base[0],
        "formats": {name: attempt(beside, base[1], own) for name, own in others},
    }


def _formats(device: str) -> Iterator[tuple[str, str]]:
    yield from (
        ("cpu", "fp64"),
        ("cpu", "fp32"),
        (device, "fp64"),
        (device, "fp32"),
        (device, "bf16"),
    )


@torch.no_grad()
def outputs(model: LanguageModel, tokens_BL: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits in fp64, and for every expert layer whether a token takes an expert, T x E; both on the CPU."""
    chosen: dict[str, Tensor] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, routing: Any) -> None:
            taken_TE = torch.zeros_like(routing.scores_TE, dtype=torch.bool)
            taken_TE[routing.token_A, routing.expert_A] = True
            chosen[path] = taken_TE.cpu()

        return hook

    for path, module in model.named_modules():
        if isinstance(module, Router):
            module.register_forward_hook(keep(path))
    hidden_BLD, _ = model.hidden(SequenceContext.of(tokens_BL))
    return model.output(hidden_BLD).to("cpu", torch.float64), chosen


def beside(base: Any, own: Any) -> dict[str, Any]:
    """The distance of logits from those of the base, and the share of other choices of tokens and experts."""
    if sentence := failed(own):
        return {"error": sentence}
    (right, right_experts), (logits_BLV, experts) = base, own
    others = {path: int((taken & ~right_experts[path]).sum()) for path, taken in experts.items()}
    return {
        "largest_relative_to_largest_logit": float(
            (logits_BLV - right).abs().max() / right.abs().max()
        ),
        "calc_diff": calc_diff(logits_BLV, right),
        "other_argmax": float((logits_BLV.argmax(-1) != right.argmax(-1)).double().mean()),
        "other_experts": sum(others.values())
        / sum(int(taken.sum()) for taken in right_experts.values()),
        "other_experts_by_layer": others,
    }


def _logit_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    table_rows = []
    for name, one in found["formats"].items():
        shown = one.get("error") or (
            f"{one['largest_relative_to_largest_logit']:.1e} of the largest, calc_diff {one['calc_diff']:.1e}, "
            f"other argmax {one['other_argmax']:.2%}, other experts {one['other_experts']:.2%}"
        )
        table_rows.append((f"logits, {name} to {found['to']}", shown))
    return table_rows


# ---- the emulation of FP8

TILES = {
    "1x128": q.ROW,
    "128x1": q.COLUMN,
    "128x128": q.BLOCK,
    "tensor": q.WHOLE,
    "1x32": q.Tile(1, 32),
}
TILES["32x1"] = q.Tile(32, 1)
KEYS = (
    "",
    "weight_gradient: te",
    "scales: ue8m0",
    "gradients: e5m2",
    "scaling: tensor",
    "scaling: delayed",
)
KEYS += ("scaling: mxfp8", "accumulator_bits: 14")


def emulation(lab: Lab) -> dict[str, Any]:
    """Compares codes and scales bit by bit, and the products of layers by calc_diff and with a repetition."""
    return {"codes": attempt(codes_and_scales, lab), "products": attempt(emulated_products, lab)}


def codes_and_scales(lab: Lab) -> dict[str, Any]:
    """Compares every format, tile and kind of scale, plain and grouped, also for tiles of zeros and of infinities."""
    shape = (300, 333) if lab.quick else (1100, 1417)
    compared, unequal = Counter[str](), dict[str, int]()
    for name, x in _inputs(shape).items():
        ends_E = (torch.tensor([0.1, 0.1, 0.47, 0.97]) * len(x)).to(torch.int32)
        for form in number_formats.FORMATS.values():
            for label, tile in TILES.items():
                for power_of_two in (False, True):
                    both = [
                        _quantised(x.to(d), tile, form, power_of_two, ends_E.to(d))
                        for d in ("cpu", lab.device)
                    ]
                    for kind, one in both[0].items():
                        if kind == "codes" and name != "finite":
                            continue  # the codes of an infinite tile mean nothing; their values are compared
                        compared[kind] += one.numel()
                        if wrong := differing(one, both[1][kind]):
                            unequal[
                                f"{kind}, {name}, {form.name}, {label}, power_of_two={power_of_two}"
                            ] = wrong
    return {"compared": dict(compared), "unequal": unequal, "shape": list(shape)}


def _inputs(shape: tuple[int, int]) -> dict[str, Tensor]:
    finite = drawn(*shape, seed=0)
    special = finite.clone()
    special[5], special[7, 3], special[40:170, 128:256] = 0, torch.inf, 0
    return {"finite": finite, "zeros and infinities": special}


def _quantised(
    x: Tensor, tile: q.Tile, form: q.Format, power_of_two: bool, ends_E: Tensor
) -> dict[str, Tensor]:
    made = q.quantise(x, tile, form, power_of_two=power_of_two)
    found = {
        "scales": made.scales,
        "codes": made.codes.view(torch.uint8),
        "values": q.dequantise(made),
    }
    if tile.rows == 1 or tile.columns == 1:  # as activations and gradients of experts are
        found["grouped"] = q.rounded(x, tile, form, power_of_two=power_of_two, ends_E=ends_E)
    return found


def emulated_products(lab: Lab) -> dict[str, Any]:
    """Y, dX and dW of a plain layer, and of a grouped one with an empty expert and rows of no expert at the end."""
    rows = 300 if lab.quick else 1000
    ends_E = (torch.tensor([0.05, 0.05, 0.47, 0.97]) * rows).to(torch.int32)
    x, dy = drawn(rows, 200, seed=2), drawn(rows, 72, seed=3)
    found: dict[str, Any] = {}
    with deterministic():
        for keys in KEYS:
            for groups in (0, 4):
                text = f"{{name: fp8_emulated, {keys}}}" if keys else "{name: fp8_emulated}"
                made = []
                for device in ("cpu", lab.device, lab.device):
                    layer = layer_of(precision_of(text), "experts.down", 200, 72, groups, device)
                    more = (ends_E.to(device),) if groups else ()
                    made.append(three_products(layer, x.to(device), dy.to(device), *more))
                here, there, again = made
                found[f"{text}{', grouped' if groups else ''}"] = {
                    "calc_diff": {name: short(calc_diff(there[name], here[name])) for name in here},
                    "other_bits_again": sum(differing(there[name], again[name]) for name in here),
                    "elements": sum(t.numel() for t in here.values()),
                }
    return found


@contextmanager
def deterministic() -> Iterator[None]:
    """Turns on torch's deterministic algorithms, and the workspace that cuBLAS needs for them."""
    before = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        if before is None:
            del os.environ["CUBLAS_WORKSPACE_CONFIG"]
        else:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = before


def _emulation_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    codes, products = found["codes"], found["products"]
    table_rows = [("codes and scales, CPU to GPU", failed(codes) or "")]
    if not failed(codes):
        compared, wrong = codes["compared"], sum(codes["unequal"].values())
        table_rows = [
            ("codes and scales, CPU to GPU", f"{wrong} of {sum(compared.values()):,} differ")
        ]
    if sentence := failed(products):
        return [*table_rows, ("products of fp8_emulated", sentence)]
    largest = max(value for one in products.values() for value in one["calc_diff"].values())
    again = sum(one["other_bits_again"] for one in products.values())
    figure = f"calc_diff {largest:.1e} at most; other bits the second time: {again}"
    return [*table_rows, ("products of fp8_emulated, CPU to GPU", figure)]
