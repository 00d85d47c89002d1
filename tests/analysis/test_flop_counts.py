"""FLOPs per token by two published conventions, against counts by hand and torch's own counter (A17, P39)."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import core
from core.analysis.size import size_of
from core.contracts.context import SequenceContext
from core.describe import document_of

SEQUENCE = 4096


@cache
def deepseek_v3() -> dict[str, Any]:
    """What `describe --json` prints of the published model."""
    return document_of(core.compose("dsv3_671b"))


def layer_macs(*, experts: int, hidden: int, attended: float) -> float:
    """Multiply-adds of one V3 layer for one token as Megatron-LM counts them: linear layers, a latent's norm with one
    multiply-add an element, attention over so many positions; no router, no other norm."""
    d, heads, nope, rope, value, q_rank, kv_rank = 7168, 128, 128, 64, 128, 1536, 512
    queries = q_rank * (d + heads * (nope + rope) + 1)
    keys_values = kv_rank * (d + heads * (nope + value) + 1) + d * rope
    core_attention = attended * heads * (nope + rope + value)
    return queries + keys_values + core_attention + heads * value * d + experts * 3 * d * hidden


def test_deepseek_v3_by_megatrons_count() -> None:
    """249.812 and, with a multi-token layer, 259.993 GFLOPs a token of 4,096; attention causal."""
    d, vocabulary, half = 7168, 129_280, SEQUENCE / 2
    dense = layer_macs(experts=1, hidden=18_432, attended=half)
    sparse = layer_macs(experts=8 + 1, hidden=2048, attended=half)
    main = 3 * dense + 58 * sparse + d * vocabulary
    with_mtp = main + sparse + 2 * d * d + d * vocabulary
    assert deepseek_v3()["flops_per_token_megatron_main"] == 6 * main
    assert deepseek_v3()["flops_per_token_megatron"] == 6 * with_mtp
    assert [round(6 * macs / 1e9, 3) for macs in (main, with_mtp)] == [249.812, 259.993]


def test_deepseek_v3_by_the_papers_count() -> None:
    """250.5 GFLOPs: six times the active parameters and the causal half of attention; 281.2 with the whole square."""
    attention = 6 * 61 * 128 * (192 + 128) * SEQUENCE
    found = deepseek_v3()["flops_per_token_main"]
    assert found == 6 * 36_625_603_584 + attention / 2
    assert round(found / 1e9, 1) == 250.5
    assert round((found + attention / 2) / 1e9, 1) == 281.2


def test_what_the_two_counts_differ_in() -> None:
    """Six times the routers and the norms of blocks and of the end, and nothing else."""
    left_out = 58 * 256 * 7168 + 61 * 2 * 7168 + 7168
    found = deepseek_v3()
    assert found["flops_per_token_main"] - found["flops_per_token_megatron_main"] == 6 * left_out
    mtp = found["flops_per_token"] - found["flops_per_token_main"]
    mtp_megatron = found["flops_per_token_megatron"] - found["flops_per_token_megatron_main"]
    assert mtp - mtp_megatron == 6 * (
        256 * 7168 + (2 + 3) * 7168
    )  # its router; its block's norms and its own three


def test_the_printed_figures_are_these() -> None:
    """docs/describe.md, in its table of conventions."""
    text = (Path(__file__).resolve().parents[2] / "docs/describe.md").read_text(encoding="utf-8")
    rows = [
        line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `flops_per_token")
    ]
    printed = {
        key.strip("` "): f
        for keys, _, figures in rows
        for key, f in zip(keys.split(","), figures.split(","), strict=True)
    }
    assert len(printed) == 5
    assert {key: f"{deepseek_v3()[key] / 1e9:.3f} G" for key in printed} == {
        k: f.strip() for k, f in printed.items()
    }


SIZES = [
    "model.dim=32",
    "data.sequence_length=16",
    "data.tokenizer.vocab=300",
    "model.blocks.moe.ffn.expert_hidden=12",
]
ATTENTIONS = {
    "mla": "{name: mla, heads: 4, q_rank: 24, kv_rank: 16, nope_dim: 8, rope_dim: 4, value_dim: 12}",
    "mla_direct": "{name: mla, heads: 4, kv_rank: 16, nope_dim: 8, rope_dim: 4, value_dim: 12}",
    "mha": "{name: mha, heads: 4, head_dim: 8}",
}


def counted(model: Any, length: int) -> FlopCounterMode:
    """One training step's products of one sequence, as torch sees them under the kernel that forms every score."""
    tokens = torch.randint(0, 300, (1, length + 1), generator=torch.Generator().manual_seed(0))
    context = SequenceContext.of(tokens[:, :-1], targets_BL=tokens[:, 1:])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        losses = model.train()(context)
        sum(value for head in losses.heads.values() for value in head.terms.values()).backward()
    return counter


@pytest.mark.parametrize("name", ATTENTIONS)
def test_P39_training_flops_are_torchs(name: str) -> None:
    """Forward and backward of a whole step; torch counts the full square of attention, of which half is causal, and
    no gated sum on a CPU; it counts no vector. The multi-token module reads one position less."""
    length = 16
    recipe = core.compose("dsv3_small", [*SIZES, f"model.attention={ATTENTIONS[name]}"])
    model = core.build(recipe)
    size, main, mtp = size_of(model), model.costs(), model.heads["mtp"].costs()
    in_mtp = {id(p) for p in model.heads.parameters()}
    vectors = [
        sum(p.numel() for p in model.parameters() if p.ndim == 1 and (id(p) in in_mtp) is i)
        for i in (False, True)
    ]
    expected = length * (6 * (main.active - vectors[0]) + 6 * main.attention_flops)
    shorter = length - 1
    expected += shorter * (
        6 * (mtp.active - vectors[1]) + 6 * mtp.attention_flops * shorter / length
    )
    assert counted(model, length).get_total_flops() == expected
    stated = size.flops_per_token_full
    assert stated == 6 * (main.active + mtp.active) + 6 * (
        main.attention_flops + mtp.attention_flops
    )


def test_P39_every_component_is_torchs() -> None:
    """The table's rows are three times what torch counts in each module's forward, with twice the causal half."""
    length = 16
    recipe = core.compose(
        "dsv3_small", [*SIZES, f"model.attention={ATTENTIONS['mla']}", "model.heads.mtp=null"]
    )
    model = core.build(recipe)
    rows = {row["component"]: row["flops_per_token"] for row in document_of(recipe)["components"]}
    context = SequenceContext.of(torch.zeros(1, length, dtype=torch.int64))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model.output(model.hidden(context)[0])

    def of(ending: str) -> float:
        found = (
            sum(v.values()) for k, v in counter.get_flop_counts().items() if k.endswith(ending)
        )
        return 3 * sum(found) / length

    latent_norms = 6 * 4 * (24 + 16)
    assert of(".attention") == rows["attention"] + 3 * model.costs().attention_flops - latent_norms
    assert of(".routed") == rows["routed experts"]
    assert of(".shared") == rows["shared experts"]
    assert of(".router") == rows["routers"]
    experts = ("routed experts", "shared experts", "routers")
    assert of(".ffn") == rows["dense feed-forward"] + sum(rows[name] for name in experts)
    assert sum(rows.values()) == 6 * model.costs().active + 3 * model.costs().attention_flops
