"""A table of a model's parameters and FLOPs with a row for each kind of component."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from core.analysis.products import Products, products_in
from core.analysis.size import elements, training_flops
from core.contracts.component import Costs
from core.contracts.residual import Residual
from core.model.block import Block
from core.model.language_model import LanguageModel

NAMES = {
    "attention": "attention",
    "ffn": "dense feed-forward",
    "experts": "routed experts",
    "shared_experts": "shared experts",
    "router": "routers",
}
"""Row names by the first part of a product's role; a role that a component declares itself has a row of its own."""

ORDER = ("embedding", *NAMES.values(), "norms", "residual", "selection biases", "output", "other")


@dataclass
class Sums:
    """Sums over one kind of component.

    Args:
        parameters: number of parameters, persistent buffers of floating point included.
        active: those of them that one token uses.
        attention_flops, other_flops: those of `Costs`, summed.
    """

    parameters: int = 0
    active: int = 0
    attention_flops: float = 0.0
    other_flops: float = 0.0


def components(model: LanguageModel, products: Products) -> list[dict[str, Any]]:
    """A row for each kind of component: parameters, those that one token uses, training FLOPs per token.

    The rows add up to `params_total` and `params_mtp`, to `params_active` and what the heads use, and to
    `flops_per_token`. A head's row holds all of its modules and its use of the output. What a component's `costs`
    count differently from its products is `other`, which may be negative.
    """
    sums: dict[str, Sums] = defaultdict(Sums)
    embedding = model.embedding.weight.numel()
    sums["embedding"].parameters = embedding
    sums["output"].parameters = elements(model.output)
    sums["output"].active = embedding  # as large, tied or not
    sums["norms"].parameters = model.norm.dim
    sums["norms"].active = model.norm.dim
    _add_residual(sums, model.residual, set())
    for block in model.blocks:
        assert isinstance(block, Block)
        _add_block(sums, block, products)
    declared = [name for name in sums if name not in ORDER]
    order = [*ORDER[:-1], *declared, ORDER[-1]]
    rows = [_row(name, sums[name]) for name in order if name in sums and sums[name] != Sums()]
    for name, head in model.loss_heads():
        costs = head.costs()
        parameters = elements(head)
        if costs.active or parameters:
            own = Sums(parameters, costs.active, costs.attention_flops, costs.other_flops)
            rows.append(_row(f"heads.{name}", own))
    return rows


def _add_block(sums: dict[str, Sums], block: Block, products: Products) -> None:
    """Adds a block's parameters to the kinds that they belong to, each parameter once."""
    costs = block.costs()
    parameters_before, active_before = _totals(sums)
    properties = block.ffn.routing_properties
    top_k = properties.top_k if properties else 0
    counted: set[nn.Parameter] = set()
    for layer, product in products_in(block, products):
        first_part = product.role.partition(".")[0]
        kind = sums[NAMES.get(first_part, first_part or "other")]
        parameters = _count_once(layer.parameters(), counted)
        kind.parameters += parameters
        # A token uses top_k of the experts that a grouped layer holds, all of the same size.
        if product.groups:
            kind.active += parameters * top_k // product.groups
        else:
            kind.active += parameters
    sums["attention"].attention_flops += costs.attention_flops
    in_residuals = 0.0
    for residual in (block.attention_residual, block.ffn_residual):
        in_residuals += _add_residual(sums, residual, counted)
    sums["other"].other_flops += costs.other_flops - in_residuals
    for name, part in (("attention", block.attention), ("norms", block)):
        vectors = _count_once((p for p in part.parameters() if p.ndim == 1), counted)
        sums[name].parameters += vectors
        sums[name].active += vectors
    buffers = elements(block) - sum(p.numel() for p in block.parameters())
    sums["selection biases"].parameters += buffers

    parameters_after, active_after = _totals(sums)
    other = sums["other"]
    other.parameters += elements(block) - (parameters_after - parameters_before)
    other.active += costs.active - (active_after - active_before)


def _add_residual(sums: dict[str, Sums], residual: Residual, counted: set[nn.Parameter]) -> float:
    """Adds the weights and costs of a residual; returns its `other_flops`."""
    costs = residual.costs()
    own = sums["residual"]
    own.parameters += _count_once(residual.parameters(), counted)
    own.active += costs.active
    own.other_flops += costs.other_flops
    return costs.other_flops


def _count_once(parameters: Iterable[nn.Parameter], counted: set[nn.Parameter]) -> int:
    """The number of elements of those parameters that are not in `counted`; they are added to it."""
    total = 0
    for parameter in parameters:
        if parameter not in counted:
            total += parameter.numel()
            counted.add(parameter)
    return total


def _totals(sums: dict[str, Sums]) -> tuple[int, int]:
    """Parameters and active parameters of all kinds together."""
    return sum(s.parameters for s in sums.values()), sum(s.active for s in sums.values())


def _row(name: str, sums: Sums) -> dict[str, Any]:
    costs = Costs(
        active=sums.active, attention_flops=sums.attention_flops, other_flops=sums.other_flops
    )
    return {
        "component": name,
        "parameters": sums.parameters,
        "active": sums.active,
        "flops_per_token": training_flops(costs),
    }
