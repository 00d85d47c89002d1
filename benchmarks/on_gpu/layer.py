"""One mixture-of-experts layer of DeepSeek-V3's shape: its times compared with the roofline, the floor.

It has 32 of the experts, as on one GPU of eight. Every token chooses 8 of them, so that an expert has 1,024 rows of
4,096 tokens where the load is even. Weights are fp32, as in training, so casting or quantising them counts too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import core
from benchmarks.on_gpu.compare import obstacle
from benchmarks.on_gpu.measure import Lab, attempt, failed, in_turns, ratio
from benchmarks.on_gpu.shapes import fill, share
from core.contracts.context import SequenceContext
from core.contracts.ffn import FeedForward
from core.contracts.precision import KernelLog
from core.contracts.schema import Section

TOKENS, TOP_K, EXPERTS = 4096, 8, 32
ROUTERS = {
    "even": f"{{name: forced_balance, top_k: {TOP_K}, scale: 2.5}}",
    "routed": f"{{name: deepseek_v3, top_k: {TOP_K}, scale: 2.5}}",
}
"""The loads: experts chosen in turn, or by random centroids for tokens with a common part, as hidden states have."""
VERSIONS = {
    "bf16": ("{name: bf16}", False),
    "bf16 compiled": ("{name: bf16}", True),
    "te_fp8 block": ("{name: te_fp8}", False),
    "te_fp8 block compiled": ("{name: te_fp8}", True),
    "te_fp8 current": ("{name: te_fp8, scaling: current}", False),
    "fp8_native": ("{name: fp8_native}", False),
    "fp8_native compiled": ("{name: fp8_native}", True),
}
TOY = ["model.dim=64", "model.blocks.moe.ffn.expert_hidden=32"]


def run(lab: Lab) -> dict[str, Any]:
    """Measures the layer under both loads."""
    found: dict[str, Any] = {"tokens": _tokens(lab), "top_k": TOP_K, "experts": EXPERTS}
    for load in ROUTERS:
        found[load] = attempt(measure, lab, load)
        lab.keep(found)
        torch.compiler.reset()
    return found


def _tokens(lab: Lab) -> int:
    return 64 if lab.quick else TOKENS


def make_layer(
    lab: Lab, router: str, precision: str, owner: nn.Module | None
) -> tuple[FeedForward, Section, KernelLog]:
    """The layer of a recipe with new weights or those of `owner`, the section of its precision, its log of kernels."""
    overrides = [
        "model.blocks.dense.count=1",
        "model.blocks.moe.count=1",
        f"model.blocks.moe.ffn.experts={EXPERTS}",
    ]
    overrides += [
        f"model.blocks.moe.ffn.router={ROUTERS[router]}",
        "model.blocks.moe.ffn.balance=[]",
    ]
    recipe = core.compose(
        "dsv3_671b", [*overrides, f"precision={precision}", *(TOY if lab.quick else [])]
    )
    model = core.build(recipe, device="meta")
    layer = model.blocks[-1].ffn
    assert isinstance(layer, FeedForward)
    if owner is not None:
        share(layer, owner)
    else:
        fill(layer, lab.device)
    return layer.train(), recipe.precision, model.kernels_used()


def measure(lab: Lab, load: str) -> dict[str, Any]:
    """The seconds of all versions, in turns and with the same weights; the floors; the load."""
    owner, _, _ = make_layer(lab, load, "{name: fp32}", None)
    dim = next(p for p in owner.parameters()).shape[-1] if lab.quick else 7168
    stream = torch.bfloat16 if lab.device == "cuda" else torch.float32
    shared = 0.5 * torch.randn(1, 1, dim, device=lab.device)
    x_BLD = (
        (torch.randn(1, _tokens(lab), dim, device=lab.device) + shared).to(stream).requires_grad_()
    )
    dy_BLD = torch.randn_like(x_BLD) * 1e-3
    context = SequenceContext.of(torch.zeros(1, _tokens(lab), dtype=torch.int64, device=lab.device))
    forwards, both, left_out, paths, load_E = {}, {}, {}, {}, None
    for name, (section, compiled) in VERSIONS.items():
        on_device = "{name: fp32}" if lab.device == "cpu" else section
        made = attempt(make_layer, lab, load, on_device, owner)
        if failed(made):
            left_out[name] = made
            continue
        layer, precision, paths[name] = made
        if lab.device == "cuda" and (why := obstacle(precision, lab.device)):
            left_out[name] = why
            continue
        if compiled:
            layer.compile()
        forward, backward = _calls(layer, owner, x_BLD, dy_BLD, context)
        if failed(tried := attempt(backward)):
            left_out[name] = tried
            continue
        load_E = layer(x_BLD, context)[1].load_E
        forwards[name], both[name] = forward, backward
    rounds = {"rounds": 2, "warm": 1} if lab.quick else {"rounds": 15, "warm": 3}
    with torch.no_grad():
        alone = in_turns(forwards, lab.device, **rounds)
    together = in_turns(both, lab.device, **rounds)
    first = next(iter(together))
    best = "bf16 compiled" if "bf16 compiled" in together else first
    assert load_E is not None
    return {
        "floors": floors(owner, lab),
        "forward": alone,
        "forward_and_backward": together,
        "speed_over_bf16": {
            name: ratio(together[first], spent) for name, spent in together.items()
        },
        "speed_over_bf16_compiled": {
            name: ratio(together[best], spent) for name, spent in together.items()
        },
        "max_vio": float(load_E.max() / load_E.double().mean() - 1),
        "left_out": left_out,
        "paths": {name: paths[name].table() for name in together},
    }


def _calls(
    layer: FeedForward, owner: nn.Module, x_BLD: Tensor, dy_BLD: Tensor, context: SequenceContext
) -> tuple[Callable[[], None], Callable[[], None]]:
    def forward() -> None:
        layer(x_BLD, context)

    def both() -> None:
        layer(x_BLD, context)[0].backward(dy_BLD)
        owner.zero_grad()
        x_BLD.grad = None

    return forward, both


def floors(layer: nn.Module, lab: Lab) -> dict[str, float]:
    """The least seconds of forward and backward that measured rates allow (the roofline).

    Operations: three products of every weight with its rows, in bf16 and in FP8. Bytes: fp32 weights read once in each
    direction, their fp32 gradients written once, and the layer's input, output and their gradients.
    """
    tokens, operations = _tokens(lab), 0.0
    for weight in layer.parameters():
        uses = tokens * TOP_K / EXPERTS if weight.ndim == 3 else tokens
        operations += 6.0 * uses * weight.numel()
    weights = sum(4.0 * weight.numel() for weight in layer.parameters())
    stream = 4 * 2.0 * tokens * next(layer.parameters()).shape[-1]
    return {
        "operations": operations,
        "bf16_operations_seconds": operations / lab.ceilings["bf16"],
        "fp8_operations_seconds": operations / lab.ceilings["fp8"],
        "bytes": 3 * weights + stream,
        "bytes_seconds": (3 * weights + stream) / lab.ceilings["bytes"],
    }


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows of the table: milliseconds, the share of the floor, and ratios to bf16 with their range."""
    table_rows: list[tuple[str, str]] = []
    for load in ROUTERS:
        part = found[load]
        if sentence := failed(part):
            table_rows.append((load, f"failed: {sentence}"))
            continue
        floor = part["floors"]
        table_rows.append(
            (
                f"{load}: floors",
                f"operations {floor['bf16_operations_seconds'] * 1e3:.2f} ms in bf16 and "
                f"{floor['fp8_operations_seconds'] * 1e3:.2f} in FP8, bytes {floor['bytes_seconds'] * 1e3:.2f}; "
                f"MaxVio {part['max_vio']:.2f}",
            )
        )
        for name, spent in part["forward_and_backward"].items():
            times, over = part["speed_over_bf16"][name], part["speed_over_bf16_compiled"][name]
            least = max(
                floor["fp8_operations_seconds" if "fp8" in name else "bf16_operations_seconds"],
                floor["bytes_seconds"],
            )
            table_rows.append(
                (
                    f"{load}: {name}",
                    f"forward {part['forward'][name]['median'] * 1e3:.2f} ms, with backward "
                    f"{spent['median'] * 1e3:.2f} ({least / spent['median']:.0%} of the floor's speed); "
                    f"{times['median']:.2f}x bf16, {over['median']:.2f}x bf16 compiled "
                    f"({over['least']:.2f}-{over['most']:.2f})",
                )
            )
        table_rows += [
            (f"{load}: {name}", f"left out: {failed(why) or why}")
            for name, why in part["left_out"].items()
        ]
    return table_rows
