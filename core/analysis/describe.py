"""What a recipe would build: layers, plugins, sizes, precision of every role, effective loss coefficients."""

from typing import Any

import torch
from torch import nn

from core.analysis.asked import Asked
from core.analysis.budget import plan_of
from core.analysis.components import components
from core.analysis.cost import gpu_hours, speed
from core.analysis.memory import per_gpu
from core.analysis.products import Product
from core.analysis.size import Size, size_of
from core.assemble import build, make
from core.contracts.component import Environment
from core.contracts.errors import UserError
from core.contracts.ffn import Traits
from core.contracts.precision import Precision
from core.contracts.schedule import Progress
from core.contracts.schema import Section
from core.contracts.training import StrategyFactory
from core.extension.checks import told_where
from core.model.language_model import LanguageModel
from core.model.ledger import Ledger
from core.recipe.compose import Recipe
from core.recipe.plan import Plan

CONVENTION = (
    "training FLOPs per token = 6 x active parameters (embedding excluded, output included) + 3 x forward attention "
    "over the causal half of the sequence; flops_per_token counts the multi-token modules with one more use of the "
    "output each, flops_per_token_main does not; flops_per_token_full takes the whole square of attention; "
    "flops_per_token_megatron is Megatron-LM's count: without routers, and without norms outside attention; "
    "params_total is the main model with its selection biases, params_experts what its routed and shared experts own"
)


def document_of(recipe: Recipe, asked: Asked | None = None) -> dict[str, Any]:
    """Build the recipe on the meta device, with a precision that remembers its roles, and describe it."""
    spy = RoleSpy(make(recipe.precision))
    model = build(recipe, device="meta", precision=spy)
    return describe(recipe, model, plan_of(recipe, model), spy, asked)


def describe(
    recipe: Recipe, model: LanguageModel, plan: Plan, roles: "RoleSpy", asked: Asked | None = None
) -> dict[str, Any]:
    """The description as plain containers: what `--json` prints.

    Args:
        model: the recipe's, on the meta device, built with `roles` as its precision.
        plan: the recipe's steps.
        asked: what else to work out.

    Raises:
        UserError: a layout that the model cannot have, or a speed that no GPU has.
    """
    asked = asked or Asked()
    size, routing = size_of(model), routing_of(model)
    rate = speed(roles, asked.mfu, asked.tflops)
    return {
        "recipe": recipe.source,
        "params_total": size.params_total,
        "params_experts": size.params_experts,
        "params_mtp": size.params_heads,
        "params_active": size.params_active,
        "flops_per_token": size.flops_per_token,
        "flops_per_token_main": size.flops_per_token_main,
        "flops_per_token_full": size.flops_per_token_full,
        "flops_per_token_megatron": size.flops_per_token_megatron,
        "flops_per_token_megatron_main": size.flops_per_token_megatron_main,
        "flops_convention": CONVENTION,
        "kv_bytes_per_token": 2 * size.cache_elements,
        "top_k": routing.top_k,
        "capacity_factor": routing.capacity_factor,
        "drops": routing.drops,
        "causal": routing.causal,
        "batch_dependent": routing.batch_dependent,
        "memory_bytes": memory(recipe, model, size, roles.compute_dtype("embedding").itemsize),
        "layout": _laid_out(recipe, model, plan, roles, asked),
        "steps": plan.steps,
        "tokens": plan.tokens,
        "gpu_hours": gpu_hours(size.flops_per_token_megatron_main, plan.tokens, rate),
        "components": components(model, roles.made),
        "layers": layers(model),
        "loss_coefficients": coefficients(model, plan),
        "precision": roles.table(),
        "plugins": plugins(recipe),
        "notices": recipe.notices(),
        "runnable_here": obstacles(recipe) or True,
        "dropped_keys": list(recipe.dropped),
    }


def _laid_out(
    recipe: Recipe, model: LanguageModel, plan: Plan, roles: "RoleSpy", asked: Asked
) -> dict[str, Any] | None:
    if asked.layout is None:
        return None
    sequences, schedule = asked.sequences, asked.schedule
    return per_gpu(recipe, model, plan, roles.made, roles, asked.layout, sequences=sequences, schedule=schedule)


def routing_of(model: LanguageModel) -> Traits:
    """What holds for the model: of all its layers with experts, the most assignments and the tightest capacity."""
    found = [layer.traits for layer in model.expert_layers().values() if layer.traits]
    return Traits(
        expert_parameters=sum(traits.expert_parameters for traits in found),
        top_k=max((traits.top_k for traits in found), default=0),
        capacity_factor=min((t.capacity_factor for t in found if t.capacity_factor is not None), default=None),
        drops=any(traits.drops for traits in found),
        causal=all(traits.causal for traits in found),
        batch_dependent=any(traits.batch_dependent for traits in found),
    )


def memory(recipe: Recipe, model: LanguageModel, size: Size, itemsize: int) -> dict[str, int]:
    """Estimates for one device that holds all of the model and a whole micro-batch.

    Weights, gradients and the optimizer's moments are exact; of the activations only the residual stream (two states
    a block, `itemsize` bytes each) and the logits are counted.
    """
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    optimizer = recipe.optimizer.component(recipe.optimizer.config)
    tokens = recipe.batch.sequences * recipe.data.sequence_length
    residual = tokens * recipe.model.dim * itemsize * 2 * (len(model.blocks) + len(model.heads))
    logits = tokens * recipe.data.tokenizer.vocab * 4
    return {
        "weights": weights,
        "gradients": sum(p.numel() * p.element_size() for p in model.parameters()),
        "optimizer": sum(optimizer.state_bytes(p) for p in model.parameters()),
        "residual_stream": residual,
        "logits": logits,
        "kv_cache_per_sequence": 2 * size.cache_elements * recipe.data.sequence_length,
    }


def layers(model: LanguageModel) -> list[dict[str, Any]]:
    """A row for each part, in order: parameters, those that one token uses, forward FLOPs, experts."""
    rows = [_row("embedding", model.embedding, active=0)]
    for index, block in enumerate(model.blocks):
        costs = block.costs()  # type: ignore[operator]
        row = _row(f"blocks.{index}", block, active=costs.active)
        row["kind"] = f"{type(block.attention).__name__} + {type(block.ffn).__name__}"
        row["experts"] = block.ffn.experts  # type: ignore[union-attr]
        rows.append(row)
    rows.append(_row("norm", model.norm, active=model.norm.dim))
    rows.append(_row("output", model.output))
    rows += [_row(f"heads.{name}", head, active=head.costs().active) for name, head in model.loss_heads()]
    return rows


def _row(name: str, module: nn.Module, active: int | None = None) -> dict[str, Any]:
    parameters = sum(p.numel() for p in module.parameters())
    used = parameters if active is None else active
    return {"part": name, "kind": type(module).__name__, "parameters": parameters, "active": used, "experts": 0}


def coefficients(model: LanguageModel, plan: Plan) -> dict[str, dict[str, float]]:
    """What every loss term is multiplied by in the first and the last step: a missing key is seen here."""
    first, last = plan.progress(0), plan.progress(plan.steps - 1)
    ledger = Ledger.of(model)
    found = {term.head_name: _ends(term.head, first, last) for term in ledger.heads}
    for balance in ledger.balance:
        if balance.scope != "none":
            found[f"{balance.layer} {balance.balancer.label}"] = _ends(balance.balancer, first, last)
    for own in ledger.layers:
        found[f"{own.layer} {own.label}"] = _ends(own.component, first, last)
    return found


def _ends(owner: Any, first: Progress, last: Progress) -> dict[str, float]:
    return {"first": owner.coefficient(first), "last": owner.coefficient(last)}


NO_PRODUCT = {"embedding": "lookup", "norm": "norm"}
"""Roles that have a format and no matrix product."""


class RoleSpy(Precision):
    """Passes everything on and remembers the roles that were asked for, in order, and what it made for them."""

    def __init__(self, inner: Precision) -> None:
        self.inner, self.seen = inner, dict.fromkeys(["embedding"])
        self.made: dict[nn.Module, Product] = {}

    def linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        self.seen[role] = None
        layer = self.inner.linear(inputs, outputs, role, std=std)
        self.made[layer] = Product(role, inputs, outputs)
        return layer

    def grouped_linear(self, groups: int, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        self.seen[role] = None
        layer = self.inner.grouped_linear(groups, inputs, outputs, role, std=std)
        self.made[layer] = Product(role, inputs, outputs, groups)
        return layer

    def table(self) -> dict[str, dict[str, str]]:
        """The formats of every role that was asked for, and the code that takes its products."""
        return {
            role: {
                "kept": _short(self.param_dtype(role)),
                "computed": _short(self.compute_dtype(role)),
                "path": NO_PRODUCT.get(role) or self.inner.path(role),
            }
            for role in self.seen
        }

    def param_dtype(self, role: str) -> torch.dtype:
        self.seen.setdefault(role)
        return self.inner.param_dtype(role)

    def compute_dtype(self, role: str) -> torch.dtype:
        return self.inner.compute_dtype(role)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plugins(recipe: Recipe) -> list[dict[str, str]]:
    """Every component of the recipe with its owner."""
    rows = {
        (s.slot, s.name): {
            "slot": s.slot,
            "name": s.name,
            "distribution": s.provenance.distribution,
            "version": s.provenance.version,
            "module": s.provenance.module,
        }
        for s in recipe.sections()
    }
    return list(rows.values())


def obstacles(recipe: Recipe) -> list[str]:
    """Why the recipe cannot run on this machine; empty where it can."""
    cuda = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if cuda else None
    environment = Environment("cuda" if cuda else "cpu", capability, torch.version.cuda)
    found = []
    for section in recipe.sections():
        why = _required(section, environment)
        if section.slot == "strategy" and section.component.parallelize is not StrategyFactory.parallelize:
            why = "it shards weights (parallelize), and training with sharded weights is not in this version"
        if why:
            found.append(f"{section.slot} {section.name}: {why}")
    return found


def _required(section: Section, environment: Environment) -> str | None:
    """What a component's `requires` says; a mistake of its own is told as such.

    Raises:
        UserError: `requires` raises.
    """
    try:
        why: str | None = section.component.requires(section.config, environment)
    except Exception as cause:
        owner = section.provenance.distribution
        raise UserError(f"{section.slot} {section.name} of {owner}: requires raises {told_where(cause)}") from cause
    return why
