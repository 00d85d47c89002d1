"""A model's size and costs, counted from its own tensors and its components' declarations."""

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
        flops_per_token_full: `flops_per_token` with the whole square of attention.
        flops_per_token_megatron: `flops_per_token` by the count of Megatron-LM: without routers, and without norms
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
    """The size of a model, counted from its own tensors and its components' costs; works on the meta device."""
    main = model.costs()
    heads = sum((head.costs() for _, head in model.loss_heads()), start=Costs())
    both = main + heads
    in_heads = elements(model.heads)
    all_uncounted = _uncounted_by_megatron(model)
    uncounted = all_uncounted - _uncounted_by_megatron(model.heads)
    other_half = Costs(attention_flops=main.attention_flops + heads.attention_flops)
    return Size(
        params_total=elements(model) - in_heads,
        params_heads=in_heads,
        params_experts=_in_experts(model),
        params_active=main.active,
        flops_per_token=training_flops(both),
        flops_per_token_main=training_flops(main),
        flops_per_token_full=training_flops(both + other_half),
        flops_per_token_megatron=training_flops(both + Costs(active=-all_uncounted)),
        flops_per_token_megatron_main=training_flops(main + Costs(active=-uncounted)),
        cache_elements=main.cache,
    )


def elements(module: nn.Module) -> int:
    """The number of parameters and persistent buffers of floating point; a shared one counts once, integers do not."""
    tensors = module.state_dict().values()
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())


def training_flops(costs: Costs) -> float:
    """Training FLOPs per token: 6 per active parameter, and three times the forward's other FLOPs.

    A product takes 2 FLOPs per weight forward and 4 backward (Kaplan et al., arXiv 2001.08361, section 2.1); attention
    over the sequence, and what belongs to no parameter, likewise take twice their forward FLOPs backward.
    """
    return 6.0 * costs.active + 3.0 * (costs.attention_flops + costs.other_flops)


def _in_experts(model: LanguageModel) -> int:
    """The parameters of routed and shared experts in the main model, which its layers declare."""
    total = 0
    for path, layer in model.expert_layers().items():
        if path.startswith("blocks.") and layer.routing_properties:
            total += layer.routing_properties.expert_parameters
    return total


def _uncounted_by_megatron(module: nn.Module) -> int:
    """The number of parameters without FLOPs in Megatron-LM: routers, and vectors (norms) outside attention.

    Its `num_floating_point_operations` takes a latent's norm together with the latent's products, so attention
    counts whole.
    """
    attention: set[nn.Parameter] = set()
    uncounted: set[nn.Parameter] = set()
    for part in module.modules():
        if isinstance(part, Attention):
            attention.update(part.parameters())
        if isinstance(part, Router):
            uncounted.update(part.parameters())
    for parameter in module.parameters():
        if parameter.ndim == 1 and parameter not in attention:
            uncounted.add(parameter)
    return sum(parameter.numel() for parameter in uncounted)
