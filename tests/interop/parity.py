"""Two forwards of one checkpoint side by side: which experts, which token, which logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from core.contracts.router import Router, Routing

from .hf_reference import route

NEAR = 1e-5
"""Another expert or argmax is a matter of rounding where the gap between the two is smaller than this."""

EXACT = 1e-10
"""Largest difference between a model of ours in fp64 and the loops."""

FEW = 2
"""So many positions at most may differ by such ties, of a whole case: more would be a pattern."""

FP32, FP64 = 1e-5, 2e-6
"""Largest differences of logits, times max(1, largest logit). transformers rounds norms and gate to fp32 always."""


@dataclass(frozen=True)
class Outputs:
    """One forward: logits B x L x V, and for every layer with experts who was chosen, T x K, in any order."""

    logits: Tensor
    experts: list[Tensor]


@torch.no_grad()
def ours(model: Any, tokens_BL: Tensor) -> Outputs:
    """What a model of this repository does; only the main model runs."""
    layers: list[Tensor] = []

    def note(module: object, arguments: object, routing: Routing) -> None:
        layers.append(routing.expert_A.unflatten(0, (tokens_BL.numel(), -1)))

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, Router)]
    seen = Outputs(model.logits(tokens_BL), layers)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def theirs(model: Any, tokens_BL: Tensor) -> tuple[Outputs, list[tuple[Tensor, Tensor | None]]]:
    """What a model of transformers does, and every layer's router logits T x E with its selection bias."""
    layers: list[Tensor] = []
    routers: list[tuple[Tensor, Tensor | None]] = []

    def note(module: Any, arguments: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        layers.append(output[2])
        routers.append((output[0].double(), getattr(module, "e_score_correction_bias", None)))

    hooks = [
        m.register_forward_hook(note)
        for m in model.modules()
        if type(m).__name__.endswith("TopkRouter")
    ]
    seen = Outputs(model(tokens_BL).logits, layers)
    for hook in hooks:
        hook.remove()
    return seen, routers


def assert_same_model(our_model: Any, hf_model: Any, tokens_BL: Tensor, tolerance: float) -> None:
    """Checks that experts, argmax and logits are the same; ties are counted, printed, and few.

    A token that went to another expert by a tie is left out of the comparison of logits, with what follows it.
    """
    found = ours(our_model, tokens_BL)
    expected, routers = theirs(hf_model, tokens_BL)
    assert found.logits.shape == expected.logits.shape
    assert len(found.experts) == len(expected.experts) == len(routers)
    strays = _strays(found, expected, routers, hf_model.config.to_dict(), tokens_BL.shape)
    compared_BL = ~(strays.cumsum(dim=1) > 0)
    largest = max(1.0, float(expected.logits.abs().max()))
    error_BL = (found.logits.double() - expected.logits.double()).abs().amax(dim=-1)
    worst = float(error_BL[compared_BL].max()) / largest
    other = _other_argmax(found.logits, expected.logits, compared_BL)
    print(
        f"largest difference {worst:.1e}; other experts {int(strays.sum())}, other argmax {other}: by ties"
    )
    assert int(strays.sum()) + other <= FEW
    assert worst < tolerance


def _strays(
    found: Outputs,
    expected: Outputs,
    routers: list[tuple[Tensor, Tensor | None]],
    config: Mapping[str, Any],
    shape: Any,
) -> Tensor:
    """The positions B x L where some layer chose other experts; each such choice must have been a tie."""
    strays_T = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    for layer, (logits_TE, bias_E) in enumerate(routers):
        one, two = (seen.experts[layer].sort(dim=1).values for seen in (found, expected))
        for t in torch.nonzero((one != two).any(dim=1) & ~strays_T).flatten().tolist():
            margin = route(logits_TE[t], bias_E, config).margin
            earlier = strays_T.view(shape)[t // shape[1], : t % shape[1]].any()
            assert margin < NEAR or earlier, (
                f"layer {layer}, token {t}: {one[t]} for {two[t]}, by a margin of {margin}"
            )
            strays_T[t] = True
    return strays_T.view(shape)


def _other_argmax(found: Tensor, expected: Tensor, compared_BL: Tensor) -> int:
    """How many compared positions have another likeliest token; there it must have been a tie."""
    one, two = found.argmax(dim=-1), expected.argmax(dim=-1)
    other = (one != two) & compared_BL
    gaps = expected.amax(dim=-1) - expected.gather(-1, one[..., None])[..., 0]
    assert bool((gaps[other] < NEAR).all()), (
        f"another likeliest token, by {float(gaps[other].max())}"
    )
    return int(other.sum())


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to tolerance times max(1, largest expected value)."""
    assert found.shape == expected.shape
    difference = float((found.double() - expected.double()).abs().max())
    assert difference < tolerance * max(1.0, float(expected.abs().max()))


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, shapes, number formats and bits."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        one, two = (t.contiguous().flatten().view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(one, two), name
