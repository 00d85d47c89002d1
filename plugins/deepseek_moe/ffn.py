"""DeepSeekMoE (report, eq. 12-15; arXiv 2401.06066): shared experts that are always on, fine-grained routed ones.

The layer owns a router, a dispatcher and balancers, each a plugin, and knows none of them by name. It drops no
token by itself, unless `token_dropping` sets DeepSeek-V2's device budget for training. Shared experts are one
SwiGLU of their joint width, ungated, added to the routed output.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from core.contracts.balancer import Balancer
from core.contracts.build import BuildContext
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.counting import count
from core.contracts.dispatcher import Dispatcher
from core.contracts.errors import ConfigError
from core.contracts.ffn import FeedForward, Networks, RoutingProperties
from core.contracts.record import Record
from core.contracts.router import CAPABILITIES, Router, Routing
from core.contracts.schema import Child, child, children, setting
from core.model.activation import check_limit, swiglu, swiglu_product
from core.numerics.linear import GroupedLinear, is_hooked, plain_matrix
from core.routing.chance import Chance
from core.routing.replicas import Replicas, refuse_training
from core.routing.rows import sorted_rows
from plugins.deepseek_moe import chosen, training_on_cpu
from plugins.deepseek_moe.dropping import TokenDropping, drop_over_budget


class Experts(nn.Module):
    """E SwiGLU experts over rows sorted by expert."""

    def __init__(self, experts: int, hidden: int, build: BuildContext, limit: float | None) -> None:
        super().__init__()
        self.limit = limit
        self.gate_up = build.grouped_linear(experts, build.dim, 2 * hidden, "experts.gate_up")
        self.down = build.grouped_linear(experts, hidden, build.dim, "experts.down", residual=True)

    def forward(self, x_AD: Tensor, ends_E: Tensor) -> Tensor:
        """The outputs of rows sorted by expert; rows of expert e end at ends_E[e]."""
        result: Tensor = self.down(swiglu(self.gate_up(x_AD, ends_E), self.limit), ends_E)
        return result

    def of_chosen(self, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor | None:
        """The gated sum of each token's experts, without sorting; None where the products are not plain ones."""
        matrices = self._matrices()
        if matrices is None:
            return None
        return chosen.gated_experts(x_TD, *matrices, expert_TK, gate_TK, self.limit)

    def of_routing(self, x_TD: Tensor, routing: Routing) -> Tensor | None:
        """The gated sum of each token's experts, in training on a CPU; None where the products are not plain ones."""
        matrices = self._matrices()
        if matrices is None:
            return None
        rows, ends_E = sorted_rows(routing, len(x_TD), len(matrices[0]))
        return training_on_cpu.gated_experts(x_TD, *matrices, rows, ends_E, self.limit)

    def _matrices(self) -> tuple[Tensor, Tensor] | None:
        """The matrices of all experts; None where a call does more than multiply by them."""
        if is_hooked(self):
            return None
        gate_up = plain_matrix(self.gate_up)
        down = plain_matrix(self.down)
        if gate_up is None or down is None:
            return None
        return gate_up, down


class SharedExperts(nn.Module):
    """The experts that see every token, as one SwiGLU."""

    def __init__(self, hidden: int, build: BuildContext, limit: float | None) -> None:
        super().__init__()
        self.limit = limit
        self.gate_up = build.linear(build.dim, 2 * hidden, "shared_experts.gate_up")
        self.down = build.linear(hidden, build.dim, "shared_experts.down", residual=True)

    def forward(self, x_TD: Tensor) -> Tensor:
        """The shared experts' output for each token."""
        return swiglu_product(self.gate_up(x_TD), self.down, self.limit)


class MixtureOfExperts(FeedForward):
    """y = shared(x) + sum over the chosen experts of gate * expert(x)."""

    paper = "DeepSeek-V3 technical report (arXiv 2412.19437), section 2.1.2; DeepSeekMoE (arXiv 2401.06066)"
    example = {
        "name": "moe",
        "experts": 8,
        "expert_hidden": 16,
        "router": {"name": "deepseek_v3", "top_k": 2, "groups": 4, "group_limit": 2},
    }

    @dataclass(kw_only=True)
    class Config:
        """A mixture-of-experts layer."""

        experts: int = setting(doc="routed experts")
        expert_hidden: int = setting(doc="inner width of one expert")
        shared_experts: int = setting(1, doc="experts that see every token; 0: none")
        router: Child = child("router", doc="how experts are chosen")
        balance: Child = children(
            "balancer", "list", doc="methods that keep the load even; several compose"
        )
        dispatcher: Child = child(
            "dispatcher", {"name": "local"}, doc="how tokens travel to their experts"
        )
        swiglu_limit: float | None = setting(
            None, doc="clamp of every expert's gate (from above) and up (both sides); null: none"
        )
        token_dropping: TokenDropping | None = setting(
            None, doc="DeepSeek-V2's device budget in training; null: none"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for counts that cannot be, and for a balancer that the router cannot serve."""
            for key, low in (("experts", 1), ("expert_hidden", 1), ("shared_experts", 0)):
                if getattr(self, key) < low:
                    raise ConfigError(key, f"must be at least {low}")
            check_limit(self.swiglu_limit)
            capabilities = self.router.component.capabilities_of(self.router.config)
            self._check_balance(capabilities)
            if self.token_dropping is not None:
                self._check_dropping(capabilities)

        def _check_balance(self, capabilities: frozenset[str]) -> None:
            biasing = []
            for index, section in enumerate(self.balance):
                needs = section.component.needs
                if missing := needs - capabilities:
                    need = f"{section.name} needs a router that {_words(missing)}"
                    why = f"{need}, and {self.router.name} does not"
                    raise ConfigError(f"balance.{index}", why)
                if "selects_with_bias" in needs:
                    biasing.append(index)
            if len(biasing) > 1:
                why = "must be the only one that biases selection: two would add up"
                raise ConfigError(f"balance.{biasing[1]}", why)

        def _check_dropping(self, capabilities: frozenset[str]) -> None:
            assert self.token_dropping is not None
            if missing := {"token_choice", "learned"} - capabilities:
                need = f"needs a router that {_words(missing)}"
                raise ConfigError("token_dropping", f"{need}, and {self.router.name} does not")
            if "capacity" in capabilities:
                why = f"{self.router.name} {_words({'capacity'})} by itself"
                raise ConfigError("token_dropping", f"must be null: {why}")
            groups = self.router.config.groups if "groups" in capabilities else 1
            if groups not in (1, self.token_dropping.devices):
                raise ConfigError(
                    "token_dropping.devices", f"must be the router's groups, {groups}"
                )

    def __init__(self, config: Config, build: BuildContext) -> None:
        super().__init__(config, build)
        self.config = config
        self.router: Router = build.make(config.router, experts=config.experts)
        self.dispatcher: Dispatcher = build.make(config.dispatcher, experts=config.experts)
        limit = config.swiglu_limit
        self.routed = Experts(config.experts, config.expert_hidden, build, limit)
        self.shared = None
        if config.shared_experts:
            shared_hidden = config.shared_experts * config.expert_hidden
            self.shared = SharedExperts(shared_hidden, build, limit)
        self.balance = nn.ModuleList()
        for section in config.balance:
            balancer = build.make(section, experts=config.experts, top_k=self.router.top_k)
            self.balance.append(balancer)
        self.router_capabilities = config.router.component.capabilities_of(config.router.config)
        self.sequence_chance = Chance(build.seed, None)
        self.replicas: Replicas | None = None
        self.is_drop_free = False

    @property
    def balancers(self) -> Sequence[Balancer]:
        """The balancers in the recipe's order."""
        return list(self.balance)  # type: ignore[arg-type]

    @property
    def dispatchers(self) -> Sequence[Dispatcher]:
        """The layer's one dispatcher."""
        return [self.dispatcher]

    @property
    def experts(self) -> int:
        """The number of routed experts."""
        return self.config.experts

    @classmethod
    def traceable_of(cls, config: Config) -> bool:
        """Whether router and dispatcher are traceable and nothing is dropped: protected sequences are drawn by step."""
        parts = (config.router, config.dispatcher)
        traceable = [part.component.traceable_of(part.config) for part in parts]
        return config.token_dropping is None and all(traceable)

    @property
    def routing_properties(self) -> RoutingProperties:
        """The properties of this layer's routing as it is configured."""
        dropping = None if self.is_drop_free else self.config.token_dropping
        capabilities = self.router_capabilities
        capacity_factor = self.router.capacity_factor
        if self.is_drop_free:
            # What made tokens depend on each other was who is dropped.
            capabilities = capabilities - {"drops", "batch_dependent"} | {"causal"}
            capacity_factor = None
        if dropping is not None:
            capacity_factor = dropping.capacity_factor
        return RoutingProperties(
            expert_parameters=_parameters(self.routed) + _parameters(self.shared),
            top_k=self.router.top_k,
            capacity_factor=capacity_factor,
            token_choice="token_choice" in capabilities,
            drops=dropping is not None or "drops" in capabilities,
            causal=dropping is None and "causal" in capabilities,
            batch_dependent=dropping is not None or "batch_dependent" in capabilities,
        )

    def networks(self) -> Networks:
        """The shared and the routed experts; experts with equal rows and biases are chosen together."""
        config = self.config
        always = None
        if config.shared_experts:
            always = ("shared.gate_up.weight", "shared.down.weight")
        by_expert: list[str] = []
        for part in ("router", "balance"):
            for name, tensor in getattr(self, part).state_dict(prefix=f"{part}.").items():
                if tensor.is_floating_point() and tensor.shape[:1] == (config.experts,):
                    by_expert.append(name)
        chooses = {"learned", "token_choice"} <= self.router_capabilities
        return Networks(
            always=always,
            hidden=config.shared_experts * config.expert_hidden,
            routed=("routed.gate_up.weight", "routed.down.weight"),
            expert_hidden=config.expert_hidden,
            experts=config.experts,
            by_expert=tuple(by_expert),
            top_k=self.router.top_k,
            gate_sum=self.router.gate_sum,
            limit=config.swiglu_limit,
            chooses_by_row=chooses and "drops" not in self.router_capabilities,
        )

    @property
    def is_replicated(self) -> bool:
        """Whether choices go to copies of experts."""
        return self.replicas is not None

    def replicate(self, expert_P: Sequence[int], held: range) -> None:
        """Copies the routed experts' matrices, and has the dispatcher move tokens to the copies."""
        stacks = []
        for stack in (self.routed.gate_up, self.routed.down):
            if not isinstance(stack, GroupedLinear) or stack.groups != self.experts:
                raise NotImplementedError("its weights are not one matrix for each expert")
            stacks.append(stack)
        own = [expert_P[physical] for physical in held]
        for stack in stacks:
            stack.take_groups(own, first=held.start, all_groups=len(expert_P))
        self.dispatcher.resize(len(expert_P))
        self.replicas = Replicas(expert_P, self.experts).to(stacks[0].weight.device)

    def drop_nothing(self) -> None:
        """Carries out every assignment in evaluation mode."""
        self.is_drop_free = True

    def adjust_scores(self, scores_TE: Tensor) -> Tensor:
        """The scores for selection, adjusted by one balancer after the other."""
        for balancer in self.balancers:
            scores_TE = balancer.adjust_scores(scores_TE)
        return scores_TE

    def forward(self, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, Record | None]:
        """The layer's output and its record; shared experts work while tokens travel."""
        if self.training and self.replicas is not None:
            refuse_training(self.label or "the layer")
        x_TD = x_BLD.flatten(0, 1)
        if not context.recorded and not self.training:
            y_TD = self._few(x_TD, context)
            if y_TD is not None:
                return y_TD.view_as(x_BLD), None
        routing = self.router(x_TD, self.adjust_scores, context)
        if self.training and self.config.token_dropping is not None:
            drawn_B = self.sequence_chance.of_sequences(context, "never dropped")
            routing = drop_over_budget(routing, self.config.token_dropping, context, drawn_B)
        if self.is_drop_free and not self.training:
            routing = replace(routing, kept_A=None)
        carried = routing
        if self.replicas is not None:
            carried = self.replicas.of_routing(routing, context)
        y_TD, tallies = self._output_and_tallies(x_TD, carried)
        if not context.recorded:
            return y_TD.view_as(x_BLD), None
        valid_T = context.valid().flatten()
        if self.replicas is not None:
            counted_A = valid_T.index_select(0, carried.token_A)
            load_P = count(carried.expert_A, self.replicas.physical, counted_A)
            tallies = {**tallies, "physical_load": load_P}
        record = Record(
            load_E=routing.load(valid_T),
            dropped=routing.dropped(valid_T),
            sums=[balancer.observe(routing, context) for balancer in self.balancers],
            balancer_tallies=[balancer.tally(routing, context) for balancer in self.balancers],
            tallies=tallies,
        )
        return y_TD.view_as(x_BLD), record

    def _output_and_tallies(
        self, x_TD: Tensor, routing: Routing
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The layer's output, and the tallies of what the dispatcher moved."""
        if routing.choices and self.dispatcher.is_local and training_on_cpu.pays(x_TD):
            y_TD = self.routed.of_routing(x_TD, routing)
            if y_TD is not None:
                return self._with_shared(y_TD, x_TD), {}
        sent = self.dispatcher.start(x_TD, routing)
        shared_TD = self.shared(x_TD) if self.shared is not None else None
        x_AD, ends_E, state = sent.wait()
        y_TD = self.dispatcher.start_combine(self.routed(x_AD, ends_E), state).wait()
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        return y_TD, self.dispatcher.tallies(state)

    def _with_shared(self, y_TD: Tensor, x_TD: Tensor) -> Tensor:
        """The routed output plus that of the shared experts."""
        if self.shared is None:
            return y_TD
        shared_TD: Tensor = self.shared(x_TD)
        return y_TD + shared_TD

    def _few(self, x_TD: Tensor, context: SequenceContext) -> Tensor | None:
        """The output for few tokens, whose experts are called without a dispatcher; None where that does not pay."""
        if not self.dispatcher.is_local or not chosen.are_few(x_TD, self.router.top_k):
            return None
        choices = self.router.choices(x_TD, self.adjust_scores, context)
        if choices is None:
            return None
        expert_TK, gate_TK = choices
        if self.replicas is not None:
            expert_TK = self.replicas.of_choices(expert_TK, context)
        y_TD = self.routed.of_chosen(x_TD, expert_TK, gate_TK)
        return None if y_TD is None else self._with_shared(y_TD, x_TD)

    def costs(self) -> Costs:
        """A token uses top_k of the routed experts and all of the rest."""
        one_expert = _parameters(self.routed) // self.config.experts
        active = one_expert * self.router.top_k + _parameters(self.shared)
        return self.router.costs() + Costs(active=active)


def _parameters(module: nn.Module | None) -> int:
    """The number of parameters of a module; 0 if there is none."""
    if module is None:
        return 0
    return sum(p.numel() for p in module.parameters())


def _words(capabilities: Iterable[str]) -> str:
    """Capabilities as the end of a sentence that begins with "a router that"."""
    return " and ".join(CAPABILITIES.get(word, f"has {word}") for word in sorted(capabilities))
