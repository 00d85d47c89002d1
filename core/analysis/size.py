"""How large a model is and what it costs, counted from its own tensors and its components' declarations."""

from dataclasses import dataclass

from torch import nn

from core.contracts.attention import Attention
from core.contracts.component import Costs
from core.contracts.router import Router
from core.model.language_model import LanguageModel


@dataclass(frozen=True)
class Size:
    """What a model costs, by the conventions that `core.describe` names.

    Args:
        params_total: the main model, with its selection biases, without what the heads own; floating point only.
        params_heads: what the loss heads own (multi-token modules).
        params_experts: routed and shared experts of the main model, a part of `params_total`.
        params_active: used by one token of the main model; embedding excluded, output included.
        flops_per_token: training (forward + backward), causal attention, loss heads included.
        flops_per_token_main: the same without what the loss heads add.
        flops_per_token_full: as `flops_per_token`, but with the whole square of attention.
        flops_per_token_megatron: as `flops_per_token`, by the count of Megatron-LM: without routers, and without norms
            outside attention.
        flops_per_token_megatron_main: the same without what the loss heads add.
        cache_elements: kept per token in decoding, all main layers.
    """

    params_total: int
    params_heads: int
    params_experts: int
    params_active: int
    flops_per_token: float
    flops_per_token_main: float
    flops_per_token_full: float
    flops_per_token_megatron: float
    flops_per_token_megatron_main: float
    cache_elements: int


def size_of(model: LanguageModel) -> Size:
    """Counted from the model's own tensors and its components' costs; works on the meta device."""
    heads = sum((head.costs() for _, head in model.loss_heads()), start=Costs())
    main = model.costs()
    in_heads = _elements(model.heads)
    all_uncounted = _uncounted(model)
    uncounted = all_uncounted - _uncounted(model.heads)
    return Size(
        params_total=_elements(model) - in_heads,
        params_heads=in_heads,
        params_experts=_in_experts(model),
        params_active=main.active,
        flops_per_token=_training_flops(main + heads),
        flops_per_token_main=_training_flops(main),
        flops_per_token_full=_training_flops(main + heads + Costs(mixing=main.mixing + heads.mixing)),
        flops_per_token_megatron=_training_flops(main + heads + Costs(active=-all_uncounted)),
        flops_per_token_megatron_main=_training_flops(main + Costs(active=-uncounted)),
        cache_elements=main.cache,
    )


def _elements(module: nn.Module) -> int:
    """Parameters and persistent buffers of floating point, each shared one once: a table of integers is none."""
    return sum(tensor.numel() for tensor in module.state_dict().values() if tensor.is_floating_point())


def _in_experts(model: LanguageModel) -> int:
    layers = [layer for path, layer in model.expert_layers().items() if path.startswith("blocks.")]
    return sum(layer.traits.expert_parameters for layer in layers if layer.traits)


def _uncounted(module: nn.Module) -> int:
    """Parameters that Megatron-LM's FLOPs leave out: routers', and vectors (norms) that stand outside attention.

    Its `num_floating_point_operations` takes a latent's norm together with the latent's products, so attention
    counts whole.
    """
    found: dict[nn.Parameter, None] = {}
    attention = {p for part in module.modules() if isinstance(part, Attention) for p in part.parameters()}
    for part in module.modules():
        if isinstance(part, Router):
            found.update(dict.fromkeys(part.parameters()))
    found.update(dict.fromkeys(p for p in module.parameters() if p.ndim == 1 and p not in attention))
    return sum(parameter.numel() for parameter in found)


def _training_flops(costs: Costs) -> float:
    """6 per active parameter (2 forward, 4 backward), and 3 times the forward's mixing."""
    return 6.0 * costs.active + 3.0 * costs.mixing
