"""Predictions beside published and measured steps, with one set of efficiencies, and where the efficiencies come from.

Every case has the goal that was set for it and the error that is reached. A case that misses its goal is listed with
its error as it is, so that a change for the better or for the worse is seen.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.analysis.describe import RecordingPrecision
from core.analysis.memory import units_of
from core.assemble import build, make
from core.cluster.cluster_file import Cluster, Efficiencies, Inner, Strategy, read_cluster
from core.cluster.predict import predict
from core.cluster.subject import subject_of
from core.cluster.work import Work, stage_works
from core.recipe.compose import compose

ROOT = Path(__file__).parents[2]
GPU = json.loads((ROOT / "records/gpu/gpu.json").read_text())
GPU2 = json.loads((ROOT / "records/gpu2/gpu.json").read_text())
MLA = (
    "model.attention={name: mla, heads: 8, kv_rank: 512, nope_dim: 128, rope_dim: 64, value_dim: 128}",
    "model.blocks.moe.ffn.router={name: deepseek_v3, top_k: 6, scale: 2.5}",
    "data.sequence_length=4096",
    "model.rope.max_length=4096",
)
MOONLIGHT = ("model.heads.mtp=null", "data.tokenizer.vocab=163840")
LARGE = ("data.sequence_length=4096", "optimizer.moments=bf16", "data.tokenizer.vocab=129280")


def prediction(recipe: str, overrides: tuple[str, ...], cluster: Cluster) -> dict[str, Any]:
    """The prediction of a recipe on a cluster."""
    return predict(subject_of(compose(recipe, list(overrides))), cluster).document


def two_h200(strategy: Strategy | None = None, **layout: Any) -> Cluster:
    """The two H200 of records/gpu2 with another layout."""
    found = read_cluster("h200_2")
    if strategy is not None:
        layout["strategy"] = strategy
    return replace(found, layout=replace(found.layout, **layout))


def inner(name: str, ranks: int = 2, expert_ranks: int = 1) -> Strategy:
    return Strategy(inner=Inner(name=name, ranks=ranks, expert_ranks=expert_ranks))


def test_deepseek_v3_on_2048_h800_within_ten_percent() -> None:
    """arXiv 2505.09343, table 4: 19.926 s; goal 10%."""
    found = prediction("dsv3_671b", (), read_cluster("h800_2048"))
    assert found["tokens_per_step"] == 15_360 * 4096
    assert found["step_seconds"] / 19.926 - 1 == pytest.approx(-0.088, abs=0.005)
    parts = found["parts"]
    backward = parts["backward"] + parts["backward_inputs"]
    # one forward, backward, weights, pair and bubble of the table; the bubble is the part that is missed
    for own, published, error in (
        (parts["forward"], 1.13, -0.005),
        (backward, 1.99, -0.075),
        (parts["backward_weights"], 0.48, -0.47),
        (parts["overlapped_forward_backward"], 13.95, -0.035),
        (parts["bubble"], 2.06, -0.355),
    ):
        assert own / published - 1 == pytest.approx(error, abs=0.015)


@pytest.mark.parametrize(
    ("precision", "published", "error"),
    # 276: goal 15%. 338 is an earlier release's figure in FP8, of 8,192 sequences, which no goal was set for
    [("bf16", 276.0, 0.079), ("fp8", 338.0, 0.036)],
)
def test_deepseek_v3_in_megatron_bridge_within_fifteen_percent(
    precision: str, published: float, error: float
) -> None:
    cluster = read_cluster("h100_1024")
    layout = replace(cluster.layout, precision=precision)
    if precision == "fp8":
        layout = replace(layout, micro_batches=128)
    found = prediction("dsv3_671b", (), replace(cluster, layout=layout))
    assert found["tflops_per_gpu"] / published - 1 == pytest.approx(error, abs=0.005)


def test_moonlight_on_16_h100_within_fifteen_percent() -> None:
    """Megatron-Bridge's card: 22,528 tokens/s for each GPU, 386.6 TFLOP/s; goal 15%."""
    found = prediction("dsv3_16b", MOONLIGHT, read_cluster("h100_16"))
    assert found["tokens_per_second_per_gpu"] / 22_528 - 1 == pytest.approx(-0.062, abs=0.005)
    counted = found["tflops_per_gpu"] * 1e12 / found["tokens_per_second_per_gpu"]
    assert counted == pytest.approx(386.6e12 / 22_528, rel=2e-3)  # the same FLOPs for a token


@pytest.mark.parametrize(
    ("name", "strategy", "error", "memory"),
    [
        ("one", Strategy(), -0.113, 0.03),
        ("ddp", inner("ddp"), -0.140, -0.09),
        # missed: the record says why (weights gathered anew for each micro-batch; functions that were not compiled)
        ("fsdp", inner("fsdp"), -0.31, 0.01),
        ("expert_parallel", inner("expert_parallel", 2, 2), -0.66, 0.01),
    ],
)
def test_one_billion_on_two_h200_as_held_out(
    name: str, strategy: Strategy, error: float, memory: float
) -> None:
    """records/gpu2: goal 15%, reached with one GPU and under ddp, missed where something else decided the step."""
    overlap = name == "ddp"
    found = prediction("dsv3_1b", MLA, two_h200(strategy, overlap=overlap))
    medians = [one["median"] for one in GPU2["scaling"]["found"][name]["step_seconds"]]
    measured = [value for value in medians if value is not None]
    mean = sum(measured) / len(measured)
    assert found["step_seconds"] / mean - 1 == pytest.approx(error, abs=0.01)
    fullest = max(max(one) for one in GPU2["scaling"]["found"][name]["peak_bytes"] if one)
    assert found["largest_bytes"] / fullest - 1 == pytest.approx(memory, abs=0.015)


def test_sixteen_billion_on_two_h200_is_missed_where_the_load_is_not_even() -> None:
    """records/gpu2: 7,376 tokens/s for each GPU at a MaxVio of 5 to 10; a rank's load was not recorded."""
    strategy = inner("expert_parallel", 2, 2)
    cluster = two_h200(strategy, micro_batches=2, recompute="full", overlap=False)
    found = prediction("dsv3_16b", LARGE, cluster)
    measured = GPU2["large"]["found"]["tokens_per_second_per_gpu"]["median"]
    assert found["tokens_per_second_per_gpu"] / measured == pytest.approx(2.30, abs=0.05)
    fullest = max(GPU2["large"]["found"]["peak_bytes"])
    assert found["largest_bytes"] / fullest - 1 == pytest.approx(0.09, abs=0.015)


KERNELS = {
    "forward": ("flash_fprop",),
    "backward": ("flash_bprop", "compute_dot_do_o", "convert_dq"),
}
"""Parts of the names of attention's kernels."""
TOKENS = 16_384


def measured(model: str, recipe: str, overrides: tuple[str, ...]) -> tuple[dict[str, Any], Work]:
    """The kernels of a profiled step in records/gpu, and the work of the model whose step it was."""
    built = compose(recipe, list(overrides))
    precision = RecordingPrecision(make(built.precision))
    meta = build(built, device="meta", precision=precision)
    (work,) = stage_works(meta, precision.made, precision, [len(units_of(meta))])
    return GPU["profile"]["found"][model], work


def test_the_efficiencies_are_those_of_the_record() -> None:
    """The constants of docs/cluster.md, derived anew from the profiled steps of two models on one H100."""
    known = Efficiencies()
    peak, bandwidth = 989e12, 3.35e12
    wide = ("model.blocks.moe.count=4", *MLA[2:])
    runs = [("1b_mla", "dsv3_1b", MLA), ("3b_wide", "dsv2_lite", wide)]
    copies = 3.0e12
    rates: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    passes = []
    forward = []
    backward = []
    optimizer = []
    busy = []
    for model, recipe, overrides in runs:
        profile, work = measured(model, recipe, overrides)
        kinds = profile["kinds"]
        router = sum(3 * p.flops * TOKENS for p in work.products if p.is_router) / 51.3e12
        for grouped in (True, False):
            own = [p for p in work.products if bool(p.groups) is grouped and not p.is_router]
            flops = sum(3 * p.flops * TOKENS for p in own)
            small = 0.0
            for p in own:
                rows = TOKENS * p.top_k / p.groups if p.groups else TOKENS
                small += 3 * p.flops * TOKENS * (1 / p.inputs + 1 / p.outputs + 1 / rows) / flops
            name = "grouped products" if grouped else "products"
            seconds = kinds[name] - (0 if grouped else router)
            rates[grouped].append((flops / seconds / peak, small))
        spent = {}
        for kind, parts in KERNELS.items():
            own_kernels = [
                k for k in profile["kernels"] if any(part in k["name"] for part in parts)
            ]
            spent[kind] = sum(k["seconds"] for k in own_kernels)
        forward.append(work.attention * TOKENS / spent["forward"] / peak)
        backward.append(2 * work.attention * TOKENS / spent["backward"] / peak)
        weights = sum(p.weights for p in work.products if not p.is_router)
        moved = (
            kinds["passes over memory"] + kinds["sorting and searching"] + kinds["copies"]
        ) * copies
        moved -= 6 * weights + 4 * work.logits * TOKENS * known.logits
        passes.append(moved / (work.bytes_none * TOKENS))
        parameters = GPU["speed"]["found"][model]["parameters"]
        optimizer.append(28 * parameters / kinds["optimizer and norm"] / bandwidth)
        busy.append(profile["busy_seconds"] / profile["wall_seconds"])
    for grouped, best in ((True, known.grouped), (False, known.dense)):
        for rate, small in rates[grouped]:
            assert rate == pytest.approx(best / (1 + known.shape * small), rel=0.03)
    for values, constant in (
        (forward, known.attention_forward),
        (backward, known.attention_backward),
        (passes, known.passes),
        (optimizer, known.optimizer),
        (busy, known.busy),
    ):
        assert sum(values) / 2 == pytest.approx(constant, rel=0.03)
    parts = [
        GPU[name]["ceilings"] for name in ("tests", "correctness", "speed", "layer", "profile")
    ]
    ratios = [ceiling["fp8_tiles"] / ceiling["bf16"] for ceiling in parts]
    assert sum(ratios) / len(ratios) == pytest.approx(known.fp8, rel=0.01)
    assert parts[3]["bf16"] / peak == pytest.approx(known.product, rel=0.01)
    assert copies / bandwidth == pytest.approx(known.memory, rel=0.01)
