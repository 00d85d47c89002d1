"""Plugins with one error each, of kinds that occurred in real code."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from broken_formats import *  # noqa: F403 - classes that are found by their name
from broken_formats import FORMATS
from broken_optimizers import *  # noqa: F403
from broken_optimizers import OPTIMIZERS
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from core.contracts.attention import Cache
from core.contracts.balancer import Balancer
from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.dispatcher import Dispatcher, Handle, Placement
from core.contracts.ffn import Networks
from core.contracts.loss_head import HeadOutput
from core.contracts.precision import StepState
from core.contracts.record import StepTotals
from core.contracts.router import AdjustScores, GroupLimit, Routing
from core.contracts.schedule import Progress
from core.contracts.schema import setting
from core.contracts.strategy import StrategyFactory
from core.contracts.training import CallbackFactory, WeightAverage
from core.extension.hookspec import hookimpl
from core.model.attend import TensorCache
from core.numerics.linear import Linear
from core.routing.rows import Done, gated_sums, sort_by_expert
from core.routing.share_loss import ShareLoss
from core.testing.bench import WIDTH, KitAttention, KitDense, KitHead, KitPrecision, KitRouter
from plugins.deepseek_moe.ffn import MixtureOfExperts

CONTRACTS = "2.0"

BROKEN = {
    ("attention", "small_talk"): "declared_cache_is_real",
    ("attention", "spare_key"): "config_is_honest",
    ("router", "narrow"): "gates_are_finite_and_wide",
    ("router", "biased_gates"): "gates_know_no_bias",
    ("router", "zero_mask"): "group_limit_is_honoured",
    ("router", "hoarder"): "copies_are_equal",
    ("router", "idle_weight"): "gates_teach_every_weight",
    ("balancer", "counts_padding"): "padding_balances_nothing",
    ("balancer", "melting"): "state_is_exact",
    ("ffn", "diary"): "forward_writes_nothing",
    ("loss_head", "wrong_divisor"): "head_counts_are_known_beforehand",
    ("precision", "optimist"): "products_are_as_exact_as_declared",
    ("precision", "saturating"): "infinities_propagate",
    ("precision", "boaster"): "what_ran_is_noted",
    ("precision", "grudge"): "skipped_steps_are_forgotten",
    ("attention", "one_cache"): "decoding_equals_the_full_forward",
    ("attention", "own_positions"): "positions_come_from_the_context",
    ("balancer", "forgetful"): "state_round_trips",
    ("loss_head", "prophet"): "head_does_not_see_its_target",
    ("loss_head", "all_or_nothing"): "targets_that_are_not_learned_are_left_out",
    ("attention", "idle_role"): "declared_roles_have_products",
    ("attention", "idle_rope"): "named_ropes_are_used",
    ("attention", "secret_rope"): "component_can_be_built",
    ("strategy", "wrapper"): "divided_weights_are_the_whole_models",
    ("strategy", "redrawer"): "divided_weights_are_the_whole_models",
    ("dispatcher", "one_way"): "bound_dispatch_equals_a_loop",
    ("router", "hearsay"): "limits_are_those_of_the_selection",
    ("callback", "hasty"): "averages_follow_the_weights",
    ("router", "round_sum"): "gates_add_up_as_stated",
    ("ffn", "padded_width"): "networks_are_as_stated",
    ("ffn", "misdelivered"): "copies_compute_the_same",
}
BROKEN |= {("checkpoint_format", cls.example["name"]): check for cls, check in FORMATS.items()}
BROKEN |= {("optimizer", cls.example["name"]): check for cls, check in OPTIMIZERS.items()}
"""The one check that each must fail."""


@hookimpl
def register(registry: Any) -> None:
    """Registers all broken components."""
    for (slot, name), cls in zip(BROKEN, CLASSES, strict=True):
        registry.add(slot, name, f"broken_plugins:{cls.__name__}")


class SmallTalk(KitAttention):
    """Declares half of what its cache keeps."""

    example = {"name": "small_talk"}

    def costs(self) -> Costs:
        return replace(super().costs(), cache=super().costs().cache // 2)


class SpareKey(KitAttention):
    """Has a key that nothing reads."""

    example = {"name": "spare_key"}

    @dataclass(kw_only=True)
    class Config:
        """A key that nothing reads."""

        unread_temperature: float = setting(20.0, doc="degrees")


class Narrow(KitRouter):
    """Lets autocast compute its product in bf16."""

    example = {"name": "narrow"}

    def forward(
        self, x_TD: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        logits_TE = torch.nn.functional.linear(x_TD.to(wide), self.centroids.weight.to(wide)).to(
            wide
        )  # type: ignore[operator,union-attr]
        return self.route(logits_TE, adjust_scores, context)


class BiasedGates(KitRouter):
    """Takes gates from the adjusted scores, which are meant for selection only."""

    example = {"name": "biased_gates"}

    def route(
        self, logits_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        routing = super().route(logits_TE, adjust_scores, context)
        shift_TE = (adjust_scores(routing.scores_TE) - routing.scores_TE).detach()
        gate_A = routing.gate_A + shift_TE[routing.token_A, routing.expert_A]
        return replace(routing, gate_A=gate_A)


class ZeroMask(KitRouter):
    """Masks groups out of reach with 0, so that a negative bias brings them back."""

    example = {"name": "zero_mask"}

    @dataclass(kw_only=True)
    class Config:
        """Groups."""

        top_k: int = setting(2, doc="experts per token")
        groups: int = setting(4, doc="groups of experts")
        reachable_groups: int = setting(1, doc="groups that a token reaches")

    def route(
        self, logits_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        scores_TE = logits_TE.sigmoid()
        biased_TE = adjust_scores(scores_TE.detach())
        grouped_TGX = biased_TE.unflatten(1, (self.config.groups, -1))
        near_TM = grouped_TGX.amax(dim=2).topk(self.config.reachable_groups, dim=1).indices
        far_TG = torch.ones_like(grouped_TGX[:, :, 0], dtype=torch.bool).scatter(1, near_TM, False)
        expert_TK = (
            grouped_TGX.masked_fill(far_TG[:, :, None], 0.0)
            .flatten(1)
            .topk(self.top_k, dim=1)
            .indices
        )
        gate_TK = scores_TE.gather(1, expert_TK)
        limit = GroupLimit(self.config.groups, self.config.reachable_groups)
        return Routing.top_k(expert_TK, gate_TK, scores_TE, logits_TE, limit=limit)


class Hoarder(KitRouter):
    """Keeps the data of the run, which a copy of the module then copies too."""

    example = {"name": "hoarder"}

    def __init__(self, config: Any, build: BuildContext, *, experts: int) -> None:
        super().__init__(config, build, experts=experts)
        self.token_counts = build.token_counts


class IdleWeight(KitRouter):
    """Has centroids that no gate is computed from."""

    example = {"name": "idle_weight"}

    def __init__(self, config: Any, build: BuildContext, *, experts: int) -> None:
        super().__init__(config, build, experts=experts)
        self.spare = build.linear(build.dim, experts, "router")

    def costs(self) -> Costs:
        return Costs(active=sum(p.numel() for p in self.centroids.parameters()))


@dataclass(kw_only=True)
class _Alpha:
    """A coefficient."""

    alpha: float = setting(0.01, doc="coefficient")


class CountsPadding(ShareLoss):
    """Adds up the shares of padded tokens too."""

    Config = _Alpha
    example = {"name": "counts_padding"}

    def observe(self, routing: Routing, context: SequenceContext) -> dict[str, Tensor]:
        everything = super().observe(routing, replace(context, valid_BL=None))
        return {**super().observe(routing, context), "share_NE": everything["share_NE"]}


class Melting(ShareLoss):
    """Keeps a count in a plain buffer, which a cast of the model converts."""

    Config = _Alpha
    example = {"name": "melting"}

    def __init__(self, config: Any, build: BuildContext, *, experts: int, top_k: int) -> None:
        super().__init__(config, build, experts=experts, top_k=top_k)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(experts))

    def reset_parameters(self) -> None:
        self.seen.zero_()

    def on_step_end(self, totals: StepTotals, progress: Progress) -> None:
        self.seen += totals.load_E.sign()


class Diary(KitDense):
    """Counts its forwards in a buffer."""

    example = {"name": "diary"}

    def __init__(self, config: Any, build: BuildContext) -> None:
        super().__init__(config, build)
        self.visited: Tensor
        self.register_buffer("visited", torch.zeros(1))

    def reset_parameters(self) -> None:
        self.visited.zero_()

    def forward(self, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, None]:
        if self.training:
            self.visited.fill_(1)
        return super().forward(x_BLD, context)


class WrongDivisor(KitHead):
    """Divides by all tokens, padding included."""

    example = {"name": "wrong_divisor"}

    def counts(self, context: SequenceContext) -> dict[str, Tensor]:
        learned_BM = torch.ones(1) if context.learned_BM is None else context.learned_BM[:, 1:]
        return {"loss": (torch.ones_like(context.tokens_BL) * learned_BM).sum().long()}


class AllOrNothing(KitHead):
    """Learns all targets as soon as one is to be learned."""

    example = {"name": "all_or_nothing"}

    def forward(self, hidden_BLD: Tensor, context: SequenceContext, shared: Any) -> HeadOutput:
        return super().forward(hidden_BLD, self._all_or_nothing(context), shared)

    def counts(self, context: SequenceContext) -> dict[str, Tensor]:
        return super().counts(self._all_or_nothing(context))

    def _all_or_nothing(self, context: SequenceContext) -> SequenceContext:
        if context.learned_BM is None or not context.learned_BM.any():
            return context
        return replace(context, learned_BM=None)


class IdleRole(KitAttention):
    """Declares a role for which it makes no matrix product."""

    example = {"name": "idle_role"}
    roles = {"idle.product": "nothing"}


class IdleRope(KitAttention):
    """Reads rotary positions and does not use them."""

    example = {"name": "idle_rope", "rope": "local"}

    @dataclass(kw_only=True)
    class Config:
        """The positions."""

        rope: str = setting(doc="name of the rotary positions")

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        build.rope_named(config.rope)


class SecretRope(KitAttention):
    """Reads rotary positions by a name of its own, which no setting contains."""

    example = {"name": "secret_rope"}

    def __init__(self, config: Any, build: BuildContext) -> None:
        super().__init__(config, build)
        build.rope_named("local")


class Wrapper(StrategyFactory):
    """Shards experts inside a wrapping module, so that their weights get other names."""

    example = {"name": "wrapper"}

    @dataclass(kw_only=True)
    class Config:
        """Nothing to set."""

    def trainer_arguments(self) -> dict[str, Any]:
        return {"accelerator": "cpu", "devices": 1}

    def parallelize(self, model: nn.Module, mesh: DeviceMesh) -> None:
        blocks = model.get_submodule("blocks")
        blocks[0] = nn.Sequential(blocks[0])  # type: ignore[index,operator]
        fully_shard(blocks[0], mesh=mesh)  # type: ignore[index,arg-type]


class Redrawer(Wrapper):
    """Shards a weight as a copy that is not drawn again."""

    example = {"name": "redrawer"}

    def parallelize(self, model: nn.Module, mesh: DeviceMesh) -> None:
        block = model.get_submodule("blocks.0")
        fully_shard(block, mesh=mesh)
        for module in block.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters = lambda: None  # type: ignore[assignment,operator]


class Optimist(KitPrecision):
    """Declares that the router is computed in fp32, but computes it in bf16."""

    example = {"name": "optimist"}

    @dataclass(kw_only=True)
    class Config:
        """Nothing to set."""

    def __init__(self, config: Any) -> None:
        super().__init__(torch.float32)

    def linear(self, inputs: int, outputs: int, role: str, *, std: float) -> Any:
        layer = super().linear(inputs, outputs, role, std=std)
        if role == "router":
            layer.register_forward_pre_hook(lambda _, given: (given[0].bfloat16(),))
        return layer


class _Plain(KitPrecision):
    """An fp32 precision that the kit can build."""

    @dataclass(kw_only=True)
    class Config:
        """Nothing to set."""

    def __init__(self, config: Any) -> None:
        super().__init__(torch.float32)


class Saturating(_Plain):
    """Replaces what is not finite by the largest number, as a cast to a small format does."""

    example = {"name": "saturating"}

    def linear(self, inputs: int, outputs: int, role: str, *, std: float) -> Any:
        layer = super().linear(inputs, outputs, role, std=std)
        layer.register_forward_pre_hook(lambda _, given: (given[0].nan_to_num(),))
        return layer


class Boaster(_Plain):
    """Reports another kernel than the one that runs."""

    example = {"name": "boaster"}

    def path(self, role: str) -> str:
        return "tensor cores"


class Remembering(Linear, StepState):
    """Clips values to twice the largest of earlier steps."""

    def __init__(self, inputs: int, outputs: int, **formats: Any) -> None:
        super().__init__(inputs, outputs, **formats)
        self.now, self.known = [0.0], [torch.inf]

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.now.append(float(x.detach().abs().max()))
        return super().forward(
            x.where(~x.isfinite(), x.clamp(-2 * max(self.known), 2 * max(self.known)))
        )

    def end_step(self, *, done: bool) -> None:
        self.known, self.now = [max(self.now)], [0.0]

    def step_state(self) -> dict[str, Tensor]:
        return {"known": torch.tensor(self.known)}

    def load_step_state(self, state: dict[str, Tensor]) -> None:
        self.known = state["known"].tolist()


class Grudge(_Plain):
    """Keeps what a skipped step computed."""

    example = {"name": "grudge"}

    def linear(self, inputs: int, outputs: int, role: str, *, std: float) -> Any:
        return Remembering(inputs, outputs, std=std, **self._formats(role))


class OneCache(KitAttention):
    """Gives every sequence of tokens the same cache."""

    example = {"name": "one_cache"}

    def __init__(self, config: Any, build: BuildContext) -> None:
        super().__init__(config, build)
        self.kept: Cache | None = None

    def new_cache(self, rows: int, capacity: int, device: torch.device | None = None) -> Cache:
        if self.kept is None:
            self.kept = TensorCache(rows, capacity, device)
        return self.kept


class Hearsay(KitRouter):
    """Says that tokens reach one of four groups, which is not how it selects."""

    example = {"name": "hearsay"}

    def route(
        self, logits_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        routing = super().route(logits_TE, adjust_scores, context)
        return replace(routing, limit=GroupLimit(4, 1))


class OwnPositions(KitAttention):
    """Counts rows itself instead of reading their positions."""

    example = {"name": "own_positions"}

    def forward(
        self, x_BLD: Tensor, context: SequenceContext, cache: Cache | None = None
    ) -> Tensor:
        place_BL = torch.arange(x_BLD.shape[1], device=x_BLD.device)[None]
        if cache is not None:
            place_BL = place_BL + cache.lengths[:, None]
        return super().forward(x_BLD * (1 + place_BL[:, :, None]), context, cache)


class Forgetful(Balancer):
    """Keeps its bias where no checkpoint finds it."""

    Config = _Alpha
    example = {"name": "forgetful"}
    needs = frozenset({"selects_with_bias"})

    def __init__(self, config: Any, build: BuildContext, *, experts: int, top_k: int) -> None:
        super().__init__(config, build, experts=experts, top_k=top_k)
        self.config, self.bias = config, None

    def adjust_scores(self, scores_TE: Tensor) -> Tensor:
        return scores_TE if self.bias is None else scores_TE + self.bias

    def on_step_end(self, totals: StepTotals, progress: Progress) -> None:
        load_E = totals.load_E
        before = torch.zeros(self.experts) if self.bias is None else self.bias
        self.bias = before + self.config.alpha * (load_E.sum() - self.experts * load_E).sign()


class Prophet(KitHead):
    """Adds the target's own embedding before it predicts it."""

    example = {"name": "prophet"}

    def forward(self, hidden_BLD: Tensor, context: SequenceContext, shared: Any) -> HeadOutput:
        return super().forward(hidden_BLD + 3 * shared.embed(context.targets_BL), context, shared)


class OneWay(Dispatcher):
    """Sends gates to other ranks by an exchange without a gradient, so the router does not learn."""

    example = {"name": "one_way"}
    capabilities = frozenset({"between_ranks"})

    @dataclass(kw_only=True)
    class Config:
        """Nothing to set."""

    bound = False

    def bind(self, mesh: DeviceMesh, placement: Placement) -> None:
        self.bound = True

    def start(self, x_TD: Tensor, routing: Routing) -> Handle:
        if self.bound:
            routing = replace(routing, gate_A=routing.gate_A.detach())
        return Done(sort_by_expert(x_TD, routing, self.experts))

    def start_combine(self, y_AD: Tensor, state: Any) -> Handle:
        return Done(gated_sums(y_AD, state))


class HastyCallback(Callback):
    """Copies the weights after every step."""

    def __init__(self) -> None:
        self.average = WeightAverage("hasty", {})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        for named in pl_module.local_parameters.named:
            self.average.weights[named.name] = named.parameter.detach().clone()
        self.average.updates += 1


class Hasty(CallbackFactory):
    """Updates its average also after a step that was skipped."""

    average = "hasty"
    example = {"name": "hasty"}

    @dataclass(kw_only=True)
    class Config:
        """Nothing to set."""

    def make(self, folder: Path) -> Callback:
        return HastyCallback()


class RoundSum(KitRouter):
    """States a sum of gates that are not normalised."""

    example = {"name": "round_sum"}

    @property
    def gate_sum(self) -> float:
        return 1.0


class PaddedWidth(KitDense):
    """Names matrices of another width than it states."""

    example = {"name": "padded_width"}

    def networks(self) -> Networks:
        return Networks(always=("product.weight", "product.weight"), hidden=WIDTH)


class Misdelivered(MixtureOfExperts):
    """Gives each physical expert a matrix of its neighbour."""

    example = {**MixtureOfExperts.example, "name": "misdelivered"}

    def replicate(self, expert_P: Sequence[int], held: range) -> None:
        super().replicate(expert_P, held)
        weight = self.routed.down.weight
        weight.copy_(weight.roll(1, dims=0))


CLASSES = (
    *(SmallTalk, SpareKey, Narrow, BiasedGates, ZeroMask, Hoarder, IdleWeight),
    *(CountsPadding, Melting, Diary, WrongDivisor, Optimist, Saturating, Boaster, Grudge),
    *(OneCache, OwnPositions, Forgetful, Prophet, AllOrNothing),
    *(IdleRole, IdleRope, SecretRope, Wrapper, Redrawer, OneWay, Hearsay, Hasty),
    *(RoundSum, PaddedWidth, Misdelivered),
    *FORMATS,
    *OPTIMIZERS,
)
