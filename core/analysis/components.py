"""Where a model's parameters and FLOPs are: a row for each kind of component."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import nn

from core.analysis.products import Products, products_in
from core.model.block import Block
from core.model.language_model import LanguageModel

NAMES = {
    "attention": "attention",
    "ffn": "dense feed-forward",
    "experts": "routed experts",
    "shared_experts": "shared experts",
    "router": "routers",
}
"""What people call the products whose role begins so."""

ORDER = ("embedding", *NAMES.values(), "norms", "selection biases", "output", "other")


@dataclass
class Sums:
    """Of one kind of component.

    Args:
        parameters: with persistent buffers of floating point.
        active: of them, used by one token.
        mixing: forward FLOPs per token that belong to no parameter.
    """

    parameters: int = 0
    active: int = 0
    mixing: float = 0.0


def components(model: LanguageModel, products: Products) -> list[dict[str, Any]]:
    """A row for each kind of component: parameters, those that one token uses, training FLOPs per token.

    The rows add up to `params_total` and `params_mtp`, to `params_active` and what the heads use, and to
    `flops_per_token`. A head's row holds all of its modules and its use of the output. What a component's `costs`
    count differently from its products is `other`, which may be negative.
    """
    sums: dict[str, Sums] = defaultdict(Sums)
    embedding = model.embedding.weight.numel()
    sums["embedding"].parameters = embedding
    sums["output"].parameters = _elements(model.output)
    sums["output"].active = embedding  # as large, tied or not
    sums["norms"].parameters = sums["norms"].active = model.norm.dim
    for block in model.blocks:
        assert isinstance(block, Block)
        _add_block(sums, block, products)
    rows = [_row(name, sums[name]) for name in ORDER if name in sums and sums[name] != Sums()]
    for name, head in model.loss_heads():
        costs = head.costs()
        if costs.active or _elements(head):
            rows.append(_row(f"heads.{name}", Sums(_elements(head), costs.active, costs.mixing)))
    return rows


def _add_block(sums: dict[str, Sums], block: Block, products: Products) -> None:
    costs, before = block.costs(), Sums(*_totals(sums))
    top_k = block.ffn.traits.top_k if block.ffn.traits else 0
    taken: set[nn.Parameter] = set()
    for layer, product in products_in(block, products):
        kind = sums[NAMES.get(product.role.partition(".")[0], "other")]
        own = [p for p in layer.parameters() if p not in taken]
        parameters = sum(p.numel() for p in own)
        kind.parameters += parameters
        kind.active += parameters * top_k // product.groups if product.groups else parameters
        taken.update(own)
    sums["attention"].mixing += costs.mixing
    for name, part in (("attention", block.attention), ("norms", block)):
        vectors = [p for p in part.parameters() if p.ndim == 1 and p not in taken]
        sums[name].parameters += sum(p.numel() for p in vectors)
        sums[name].active += sum(p.numel() for p in vectors)
        taken.update(vectors)
    sums["selection biases"].parameters += _elements(block) - sum(p.numel() for p in block.parameters())
    after = Sums(*_totals(sums))
    sums["other"].parameters += _elements(block) - (after.parameters - before.parameters)
    sums["other"].active += costs.active - (after.active - before.active)


def _totals(sums: dict[str, Sums]) -> tuple[int, int]:
    return sum(s.parameters for s in sums.values()), sum(s.active for s in sums.values())


def _row(name: str, sums: Sums) -> dict[str, Any]:
    flops = 6.0 * sums.active + 3.0 * sums.mixing
    return {"component": name, "parameters": sums.parameters, "active": sums.active, "flops_per_token": flops}


def _elements(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in module.state_dict().values() if tensor.is_floating_point())
