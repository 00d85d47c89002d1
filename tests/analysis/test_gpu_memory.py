"""Memory of one GPU: DeepSeek-V3's by hand, what all GPUs hold together, and activations against autograd's own."""

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import core
from core.analysis.activations import Widths, block_activations
from core.analysis.describe import RecordingPrecision, document_of
from core.analysis.options import DescribeOptions
from core.analysis.parallel_layout import ParallelLayout, PipelineSchedule
from core.assemble import build, make
from core.contracts.context import SequenceContext
from core.model.norm import RMSNorm

V3 = ParallelLayout(data=128, expert=64, pipeline=16)
EXPERT, ATTENTION, D, VOCABULARY = 3 * 7168 * 2048, 187_107_328, 7168, 129_280


@cache
def laid_out(
    name: str,
    layout: ParallelLayout,
    schedule: PipelineSchedule = "1f1b",
    sequences: int | None = None,
) -> dict[str, Any]:
    """`layout` of the description."""
    found = document_of(
        core.compose(name), DescribeOptions(layout=layout, schedule=schedule, sequences=sequences)
    )["layout"]
    assert isinstance(found, dict)
    return found


def test_a_middle_stage_of_deepseek_v3_by_hand() -> None:
    """Four layers with experts; a GPU holds 4 of each layer's 256, which two ranks of the stage hold."""
    stage = laid_out("dsv3_671b", V3)["stages"][5]
    assert stage["blocks"] == [f"blocks.{index}" for index in range(19, 23)]
    router, norms = 256 * D, 2 * D
    latent_norms = 1536 + 512
    alone = (
        ATTENTION + EXPERT + router + norms
    )  # beside the routed experts: attention, shared expert, router, norms
    routed = 256 // 64 * EXPERT
    assert stage["parameters"] == 4 * (alone + routed)
    wide = router + norms + latent_norms  # kept and computed in fp32: no copy
    assert stage["weights"] == 4 * (2 * (alone - wide) + 4 * wide + 2 * routed)
    assert stage["gradients"] == 4 * 4 * (alone + routed)
    master, moments = 4, 2 + 2
    replicated = (master + moments) * (alone - wide) + moments * wide
    assert stage["optimizer"] == pytest.approx(
        4 * (replicated / 128 + (master + moments) * routed / 2), abs=100
    )


def test_the_ends_of_deepseek_v3_hold_the_embedding_and_the_output() -> None:
    first, *_, last = laid_out("dsv3_671b", V3)["stages"]
    dense = ATTENTION + 2 * D + 3 * D * 18_432
    assert first["parameters"] == VOCABULARY * D + 3 * dense
    sparse = ATTENTION + EXPERT + 256 * D + 2 * D + 4 * EXPERT
    assert last["blocks"] == ["blocks.59", "blocks.60", "heads.mtp.depths.0.block"]
    assert last["parameters"] == 3 * sparse + 2 * D * D + 3 * D + D + VOCABULARY * D


def test_every_parameter_is_somewhere_and_its_states_once() -> None:
    """The states of all 2,048 GPUs add up to the model's; the biases are in no optimizer."""
    stages = laid_out("dsv3_671b", V3)["stages"]
    everything = 671_026_419_200 + 11_610_068_224 - 59 * 256
    routed = 59 * 256 * EXPERT
    assert sum(row["parameters"] for row in stages) == everything - routed + routed // 64
    fp32 = (
        59 * 256 * D + 62 * (2 * D + 2048) + D + 3 * D
    )  # routers; norms of 62 blocks, of the end, of the module
    assert sum(row["optimizer"] for row in stages) * 128 == pytest.approx(
        8 * everything - 4 * fp32, rel=1e-6
    )


def test_activations_of_a_deepseek_v3_layer_by_hand() -> None:
    """Stage 5 keeps 11 micro-batches of a sequence, of four layers; bf16, norms and router in fp32."""
    stage = laid_out("dsv3_671b", V3)["stages"][5]
    bf16, fp32, heads, top_k = 2, 4, 128, 8
    latents = 1536 + 512
    norm_inputs = fp32 * (2 * D + latents)
    norm_outputs = bf16 * (2 * D + latents)
    queries_keys_values = (
        bf16 * heads * (192 + 192 + 128 + 128)
    )  # keys once more, from which the whole key was made
    heads_output = bf16 * heads * 128
    expert = bf16 * (
        2 * 2048 + 2048 + 2048
    )  # both halves, silu(gate), and what the second product reads
    routed = top_k * (bf16 * D + expert + bf16 * D)
    router = fp32 * (D + 2 * 256)
    none = (
        norm_inputs + norm_outputs + queries_keys_values + heads_output + routed + expert + router
    )
    assert stage["waiting"] == 11
    assert stage["activations"]["none"] == 11 * 4 * 4096 * none
    selective = bf16 * (2 * D + latents + 64) + heads_output + routed + expert + fp32 * 2 * 256
    assert stage["activations"]["selective"] == 4096 * (11 * 4 * selective + none - selective)
    assert stage["activations"]["full"] == 4096 * (11 * 4 * bf16 * D + none)
    for way, kept in stage["activations"].items():
        assert (
            stage["total"][way] == stage["weights"] + stage["gradients"] + stage["optimizer"] + kept
        )


def test_the_fullest_stage_is_reported() -> None:
    layout = laid_out("dsv3_671b", V3)
    for way, index in layout["largest"].items():
        totals = [row["total"][way] for row in layout["stages"]]
        assert layout["largest_bytes"][way] == totals[index] == max(totals)
    assert layout["largest"] == {"none": 1, "selective": 1, "full": 15}


def test_dualpipe_holds_two_stages_and_one_more_micro_batch() -> None:
    """Report, table 2: twice the parameters, P + 1 activations; the optimizer is spread over both copies."""
    plain, dual = (laid_out("dsv3_671b", V3, schedule) for schedule in ("1f1b", "dualpipe"))
    for index, row in enumerate(dual["stages"]):
        mirror = plain["stages"][15 - index]
        assert row["waiting"] == 17
        for key in ("parameters", "weights", "gradients"):
            assert row[key] == plain["stages"][index][key] + mirror[key]
    everywhere = [sum(row["optimizer"] for row in layout["stages"]) for layout in (plain, dual)]
    assert everywhere[1] == pytest.approx(everywhere[0], rel=1e-6)
    middle = [layout["stages"][5]["activations"]["none"] for layout in (plain, dual)]
    assert middle[1] * 11 == middle[0] * 17


def test_one_gpu_holds_the_whole_of_the_1b() -> None:
    layout = laid_out("dsv3_1b", ParallelLayout())
    (stage,) = layout["stages"]
    parameters = document_of(core.compose("dsv3_1b"))["params_total"] - 9 * 64
    assert stage["parameters"] == parameters
    assert (layout["microbatch_sequences"], layout["microbatches_per_step"], stage["waiting"]) == (
        16,
        72,
        1,
    )
    assert layout["largest_bytes"]["none"] < 80e9
    assert laid_out("dsv3_1b", ParallelLayout(), sequences=8)["microbatches_per_step"] == 144


def test_fp32_has_no_second_copy() -> None:
    (stage,) = laid_out("dsv3_small", ParallelLayout())["stages"]
    assert stage["weights"] == stage["gradients"] == 4 * stage["parameters"]
    assert stage["optimizer"] == 8 * stage["parameters"]


MLA = "{name: mla, heads: 6, q_rank: 80, kv_rank: 48, nope_dim: 24, rope_dim: 8, value_dim: 32}"
DIRECT = "{name: mla, heads: 6, kv_rank: 48, nope_dim: 24, rope_dim: 8, value_dim: 32}"
SIZES = [
    "model.dim=160",
    "data.tokenizer.vocab=300",
    "data.sequence_length=100",
    "model.heads.mtp=null",
]
"""Values as wide as queries: the CPU's fused attention wants them so, and pads them elsewhere."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "attention",
    [
        MLA,
        DIRECT,
        "{name: mha, heads: 5, head_dim: 32}",
        "{name: gqa, heads: 6, kv_heads: 2, head_dim: 32}",
    ],
)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_activations_are_what_autograd_keeps(
    kind: str, attention: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every storage that a block's forward saves for its backward, within 3%: what is as narrow as a head is left out.

    Computed as on a GPU; a CPU's own functions keep less. Left aside: weights and their working copies, indices, and
    the normalised copy that torch's norm keeps on a CPU alone.
    """
    recipe = core.compose(
        "dsv3_small", [*SIZES, f"model.attention={attention}", f"precision.name={precision}"]
    )
    spy = RecordingPrecision(make(recipe.precision))
    model = build(recipe, precision=spy).train()
    block = model.blocks[0 if kind == "dense" else 1]
    tokens = torch.randint(0, 300, (3, 100), generator=torch.Generator().manual_seed(0))
    kept_on_cpu = saved_bytes(block, model.embedding(tokens), SequenceContext.of(tokens))
    monkeypatch.setattr("core.numerics.compiling.is_eager_on_cpu", lambda _: False)
    kept = saved_bytes(block, model.embedding(tokens), SequenceContext.of(tokens))
    assert kept_on_cpu < kept
    widths = Widths(spy)
    on_a_cpu = sum(widths.norm(norm.dim) for norm in block.modules() if isinstance(norm, RMSNorm))
    expected = block_activations(block, spy.made, widths).none
    assert expected <= (kept - on_a_cpu * tokens.numel()) / tokens.numel() <= 1.03 * expected


def test_full_recomputation_keeps_the_input_and_the_choices() -> None:
    recipe = core.compose(
        "dsv3_small", [*SIZES, f"model.attention={MLA}", "recompute.blocks=[moe]"]
    )
    spy = RecordingPrecision(make(recipe.precision))
    model = build(recipe, precision=spy).train()
    tokens = torch.randint(0, 300, (3, 100), generator=torch.Generator().manual_seed(0))
    kept = saved_bytes(
        model.blocks[1], model.embedding(tokens), SequenceContext.of(tokens), inside=False
    )
    expected = block_activations(model.blocks[1], spy.made, Widths(spy)).full
    assert kept == expected * tokens.numel()


def saved_bytes(
    block: nn.Module, x_BLD: torch.Tensor, context: SequenceContext, *, inside: bool = True
) -> int:
    """Bytes of the storages that autograd saves, each once, but for weights, casts of weights, and integers."""
    owned = {p.untyped_storage()._cdata for p in block.parameters()}
    shapes = {tuple(p.shape) for p in block.parameters()}
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        weight = (
            storage._cdata in owned or {tuple(tensor.shape), tuple(tensor.shape[::-1])} & shapes
        )
        if tensor.is_floating_point() and not weight:
            seen[storage._cdata] = storage
        return tensor

    x_BLD = x_BLD.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_BLD, _ = block(x_BLD, context)
    assert y_BLD.grad_fn is not None
    return sum(storage.nbytes() for storage in seen.values())


@pytest.mark.full
def test_the_largest_recipe_needs_little_memory_itself() -> None:
    """A process of its own, with a layout: under 2 GB (the time, under 20 s, is in docs/describe.md)."""
    code = (
        "import json, sys; from core import describe; from core.training.host_memory import resident; "
        "describe.main(describe.parser().parse_intermixed_args()); "
        "print(resident()[1], file=sys.stderr)"
    )
    arguments = ["dsv3_671b", "--json", "--layout", "data=128,expert=64,pipeline=16"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["params_total"] == 671_026_419_200
    assert int(done.stderr.splitlines()[-1]) < 2e9
