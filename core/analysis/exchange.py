"""The exchange of tokens under expert parallelism, on paper: nodes that a token reaches, and bytes that it moves.

Experts lie on ranks in order, and `ranks_per_node` consecutive ranks are a node. A token crosses to a node once, even
if several of its experts are there, to the rank with its own number in the node, which passes it on inside; the
experts' outputs go back on the same way, added up at each stop (DeepSeek-V3's report, section 3.2.2).

Expected numbers hold for uniform choice: every set of allowed groups, and every set of experts in them, is equally
likely. A training step exchanges twice, forwards and backwards.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import comb, gcd
from typing import Any

from core.analysis.budget import plan_of
from core.analysis.options import DescribeOptions
from core.assemble import build
from core.contracts.errors import UserError
from core.model.language_model import LanguageModel
from core.recipe.compose import Recipe
from core.recipe.plan import TrainingPlan

TILE = 128
"""Columns that share one scale."""

SCALE_BYTES = 4
"""Bytes of one scale, in fp32."""

EXCHANGES_PER_STEP = 2
"""A forward and a backward, each with tokens out and results back."""

NODE = 8
"""GPUs of one node, unless something else is said."""

CONVENTION = (
    "bytes for uniform choice of experts; a copy of a token is one FP8 byte an element with an fp32 scale for each 128 "
    "out and bf16 back; one copy to each remote node, and one inside a node for each rank with a chosen expert other "
    "than the one where it arrives; a step counts forward and backward over all ranks"
)


@dataclass(frozen=True)
class CopyBytes:
    """Bytes of one token on the way to its experts and back.

    Args:
        out: FP8 elements and their scales.
        scales: the part of `out` that the scales take.
        back: bf16 elements.
    """

    out: int
    scales: int
    back: int

    @classmethod
    def of(cls, dim: int) -> "CopyBytes":
        """The bytes for a model width."""
        scales = -(-dim // TILE) * SCALE_BYTES
        return cls(dim + scales, scales, 2 * dim)


@dataclass(frozen=True)
class Choice:
    """How a token chooses its experts.

    Args:
        experts: routed experts of the layer.
        top_k: experts of a token.
        groups: consecutive groups of equally many experts.
        group_limit: groups among which a token's experts are.
    """

    experts: int
    top_k: int
    groups: int = 1
    group_limit: int = 1

    def touched(self, parts: int) -> float:
        """The expected number of equal, consecutive parts of the experts that hold one of a token's experts."""
        return parts * (1 - self._missed(parts))

    def most_touched(self, parts: int) -> int:
        """The largest number of such parts."""
        reachable = self.group_limit
        if parts > self.groups:
            reachable *= parts // self.groups
        return min(parts, reachable, self.top_k)

    def _missed(self, parts: int) -> float:
        """The probability that no expert of a token is in one of the parts."""
        size = self.experts // self.groups
        allowed = self.group_limit * size
        if self.groups <= parts:
            in_a_part = self.experts // parts
            is_allowed = self.group_limit / self.groups
            missed = comb(allowed - in_a_part, self.top_k) / comb(allowed, self.top_k)
            return 1 - is_allowed + is_allowed * missed
        inside = self.groups // parts
        missed = 0.0
        for chosen in range(min(inside, self.group_limit) + 1):
            ways = comb(inside, chosen) * comb(self.groups - inside, self.group_limit - chosen)
            left = comb(allowed - chosen * size, self.top_k) / comb(allowed, self.top_k)
            missed += ways / comb(self.groups, self.group_limit) * left
        return missed


@dataclass(frozen=True)
class LayerExchange:
    """The exchange of one token in one layer.

    Args:
        nodes_unlimited: expected nodes with one of its experts if every group may be chosen.
        nodes: the same with the layer's limit.
        most_nodes: the largest number of them.
        ranks: expected ranks with one of its experts.
        copies_between: expected copies to remote nodes.
        copies_inside: expected copies inside nodes.
    """

    nodes_unlimited: float
    nodes: float
    most_nodes: int
    ranks: float
    copies_between: float
    copies_inside: float

    @classmethod
    def of(cls, choice: Choice, expert_ranks: int, ranks_per_node: int) -> "LayerExchange":
        """The exchange of a layer whose experts are divided over ranks."""
        nodes = expert_ranks // ranks_per_node
        reached = choice.touched(nodes)
        ranks = choice.touched(expert_ranks)
        return cls(
            nodes_unlimited=Choice(choice.experts, choice.top_k).touched(nodes),
            nodes=reached,
            most_nodes=choice.most_touched(nodes),
            ranks=ranks,
            # A node, or a rank within one, is the token's own as often as any other.
            copies_between=reached * (nodes - 1) / nodes,
            copies_inside=ranks * (ranks_per_node - 1) / ranks_per_node,
        )


def exchange_of(recipe: Recipe, expert_ranks: int, ranks_per_node: int) -> dict[str, Any]:
    """The exchange of a recipe's tokens under expert parallelism, as plain containers.

    Args:
        recipe: a recipe with routed experts.
        expert_ranks: ranks over which the experts of a layer are divided.
        ranks_per_node: how many of them are one node.

    Raises:
        UserError: the sizes do not divide.
    """
    model = build(recipe, device="meta")
    return exchange(model, plan_of(recipe, model), expert_ranks, ranks_per_node)


def described(
    recipe: Recipe, model: LanguageModel, plan: TrainingPlan, options: DescribeOptions
) -> dict[str, Any] | None:
    """The exchange under the layout of the options, else under the recipe's strategy.

    It is None without expert ranks, and where nobody said what a node is and the model's groups cannot be divided.

    Raises:
        UserError: the ranks of a node that the options name do not divide.
    """
    strategy = recipe.strategy
    per_node = options.gpus_per_node
    if options.layout is not None:
        ranks = options.layout.expert
    else:
        ranks, own_node = strategy.component.expert_layout_of(strategy.config) or (1, 1)
        per_node = per_node or own_node
    if ranks == 1 or not model.expert_layers():
        return None
    try:
        return exchange(model, plan, ranks, per_node or gcd(NODE, ranks))
    except UserError:
        if options.gpus_per_node is not None:
            raise
        return None


def exchange(
    model: LanguageModel, plan: TrainingPlan, expert_ranks: int, ranks_per_node: int
) -> dict[str, Any]:
    """The exchange of a model's tokens, as `exchange_of` returns it.

    Args:
        model: a model, on the meta device or another one.
        plan: the steps; the last one counts.
        expert_ranks, ranks_per_node: the layout.

    Raises:
        UserError: the sizes do not divide.
    """
    if ranks_per_node < 1 or expert_ranks % ranks_per_node:
        raise UserError(
            f"ranks of a node = {ranks_per_node}: must divide the {expert_ranks} expert ranks"
        )
    copy = CopyBytes.of(model.embedding.weight.shape[1])
    layers: dict[str, LayerExchange] = {}
    for path, choice in choices(model):
        check_choice(path, choice, expert_ranks, ranks_per_node)
        layers[path] = LayerExchange.of(choice, expert_ranks, ranks_per_node)
    per_token = {"between_nodes": 0.0, "inside_nodes": 0.0}
    for layer in layers.values():
        per_token["between_nodes"] += layer.copies_between * (copy.out + copy.back)
        per_token["inside_nodes"] += layer.copies_inside * (copy.out + copy.back)
    tokens = plan.window(plan.steps - 1).count * plan.sequences * plan.length
    return {
        "expert_ranks": expert_ranks,
        "ranks_per_node": ranks_per_node,
        "nodes": expert_ranks // ranks_per_node,
        "copy_bytes": asdict(copy),
        "layers": {path: asdict(layer) for path, layer in layers.items()},
        "bytes_per_token": per_token,
        "tokens_per_step": tokens,
        "bytes_per_step": {
            where: EXCHANGES_PER_STEP * tokens * size for where, size in per_token.items()
        },
        "convention": CONVENTION,
    }


def choices(model: LanguageModel) -> Iterator[tuple[str, Choice]]:
    """Each layer in which every token chooses experts, with how it does."""
    for path, layer in model.expert_layers().items():
        routing = layer.routing_properties
        if routing is None or not routing.token_choice:
            continue
        config = getattr(getattr(layer, "router", None), "config", None)
        groups = getattr(config, "groups", 1)
        limit = getattr(config, "reachable_groups", groups)
        yield path, Choice(layer.experts, routing.top_k, groups, limit)


def check_choice(path: str, choice: Choice, expert_ranks: int, ranks_per_node: int) -> None:
    """Raises `UserError` unless a layer's experts and groups can be divided over ranks and nodes."""
    if choice.experts % expert_ranks:
        raise UserError(
            f"expert ranks = {expert_ranks}: must divide the {choice.experts} experts of {path}"
        )
    for parts in (expert_ranks // ranks_per_node, expert_ranks):
        if parts % choice.groups and choice.groups % parts:
            raise UserError(
                f"{path}: its {choice.groups} groups and {parts} ranks or nodes must divide each other"
            )


def decode_exchange_seconds(
    *,
    tokens: int = 32,
    copies: int = 9,
    dim: int = 7000,
    bytes_per_second: float = 50e9,
) -> float:
    """The time of one exchange while text is written, as DeepSeek computes it (arXiv 2505.09343, section 2.3.2).

    Every device has some tokens of a micro-batch, each goes to eight routed experts and the shared one, as one byte an
    element out and two back. The paper takes 7K as 7,000 and finds 120.96 us; with 7,168 it is 123.86 us.
    """
    return (1 + 2) * tokens * copies * dim / bytes_per_second


def decode_token_seconds(exchange_seconds: float, *, layers: int = 61) -> float:
    """The time of one token if nothing but exchanges counts: two micro-batches in turns, one exchange in each layer."""
    return 2 * exchange_seconds * layers
