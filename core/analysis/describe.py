"""The description of a recipe: layers, plugins, sizes, precision of every role, effective loss coefficients."""

from typing import Any

import torch
from torch import nn

from core.analysis.budget import plan_of
from core.analysis.components import components
from core.analysis.exchange import described
from core.analysis.gpu_hours import gpu_hours, speed
from core.analysis.memory import per_gpu
from core.analysis.options import DescribeOptions
from core.analysis.products import MatrixProduct
from core.analysis.rank_memory import average_bytes, per_rank
from core.analysis.size import Size, size_of
from core.assemble import build, make
from core.contracts.component import Environment
from core.contracts.errors import UserError
from core.contracts.ffn import RoutingProperties
from core.contracts.precision import Precision
from core.contracts.schedule import Progress
from core.contracts.schema import Section
from core.extension.checks import format_error_at
from core.model.language_model import LanguageModel
from core.model.ledger import Ledger
from core.model.parameters import named_parameters
from core.recipe.compose import Recipe
from core.recipe.plan import TrainingPlan

CONVENTION = (
    "training FLOPs per token = 6 x active parameters (embedding excluded, output included) + 3 x forward attention "
    "over the causal half of the sequence and over residual streams; flops_per_token counts the multi-token modules "
    "with one more use of the output each, flops_per_token_main does not; flops_per_token_full takes the whole "
    "square of attention; flops_per_token_megatron is Megatron-LM's count: without routers, and without norms "
    "outside attention; params_total is the main model with its selection biases, params_experts what its routed "
    "and shared experts own"
)


def document_of(recipe: Recipe, options: DescribeOptions | None = None) -> dict[str, Any]:
    """The description of a recipe, which is built on the meta device with a precision that records its roles.

    Raises:
        UserError: a part of the model cannot take its shapes or settings.
    """
    precision = RecordingPrecision(make(recipe.precision))
    try:
        model = build(recipe, device="meta", precision=precision)
    except UserError as error:
        raise UserError(f"{recipe.source}: {error}") from error
    return describe(recipe, model, plan_of(recipe, model), precision, options)


def describe(
    recipe: Recipe,
    model: LanguageModel,
    plan: TrainingPlan,
    precision: "RecordingPrecision",
    options: DescribeOptions | None = None,
) -> dict[str, Any]:
    """The description as plain containers, which `--json` prints.

    Args:
        recipe: what is described.
        model: the recipe's, on the meta device, built with `precision`.
        plan: the recipe's steps.
        precision: the recipe's, which has recorded the model's roles and products.
        options: what else to work out.

    Raises:
        UserError: the layout is impossible for the model, or a speed is out of range.
    """
    options = options or DescribeOptions()
    size = size_of(model)
    routing = routing_of(model)
    stream_bytes = precision.compute_dtype("embedding").itemsize
    rate = speed(precision, options.mfu, options.tflops)
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
        "memory_bytes": memory(recipe, model, size, stream_bytes),
        "layout": _layout(recipe, model, plan, precision, options),
        "rank_memory": per_rank(recipe, model, plan, precision.made, precision),
        "exchange": described(recipe, model, plan, options),
        "steps": plan.steps,
        "tokens": plan.tokens,
        "gpu_hours": gpu_hours(size.flops_per_token_megatron_main, plan.tokens, rate),
        "components": components(model, precision.made),
        "layers": layers(model),
        "loss_coefficients": coefficients(model, plan),
        "precision": precision.table(),
        "plugins": plugins(recipe),
        "notices": recipe.notices(),
        "runnable_here": unmet_requirements(recipe) or True,
        "dropped_keys": list(recipe.dropped),
    }


def _layout(
    recipe: Recipe,
    model: LanguageModel,
    plan: TrainingPlan,
    precision: "RecordingPrecision",
    options: DescribeOptions,
) -> dict[str, Any] | None:
    """The memory of one GPU under the layout that the options name; None without one."""
    if options.layout is None:
        return None
    return per_gpu(
        recipe,
        model,
        plan,
        precision.made,
        precision,
        options.layout,
        sequences=options.sequences,
        schedule=options.schedule,
    )


def routing_of(model: LanguageModel) -> RoutingProperties:
    """The properties of the whole model: the most assignments and the tightest capacity of all layers with experts."""
    expert_parameters = 0
    top_k = 0
    capacity_factors: list[float] = []
    drops = False
    causal = True
    batch_dependent = False
    for layer in model.expert_layers().values():
        own = layer.routing_properties
        if own is None:
            continue
        expert_parameters += own.expert_parameters
        top_k = max(top_k, own.top_k)
        if own.capacity_factor is not None:
            capacity_factors.append(own.capacity_factor)
        drops |= own.drops
        causal &= own.causal
        batch_dependent |= own.batch_dependent
    return RoutingProperties(
        expert_parameters=expert_parameters,
        top_k=top_k,
        capacity_factor=min(capacity_factors, default=None),
        drops=drops,
        causal=causal,
        batch_dependent=batch_dependent,
    )


def memory(recipe: Recipe, model: LanguageModel, size: Size, itemsize: int) -> dict[str, int]:
    """Estimated bytes on one device that holds all of the model and a whole micro-batch.

    Weights, gradients, the optimizer's moments and averages of weights are exact; of the activations only the residual
    stream and the logits are counted.

    Args:
        recipe: its batch, its optimizer and its callbacks decide.
        model: the recipe's.
        size: the model's.
        itemsize: bytes per number of the residual stream.
    """
    optimizer = recipe.optimizer.component(recipe.optimizer.config)
    gradients = 0
    moments = 0
    averages = 0
    for named in named_parameters(model):
        if not named.parameter.requires_grad:
            continue
        gradients += named.parameter.numel() * named.parameter.element_size()
        moments += optimizer.state_bytes_of(named)
        averages += average_bytes(recipe, named.parameter)
    length = recipe.data.sequence_length
    tokens = recipe.batch.sequences * length
    # Two states of the residual stream in each block: the inputs of attention and of the feed-forward layer.
    states = 2 * (len(model.blocks) + len(model.heads))
    streams = model.residual.streams
    return {
        "weights": sum(t.numel() * t.element_size() for t in model.state_dict().values()),
        "gradients": gradients,
        "optimizer": moments,
        "averages": averages,
        "residual_stream": tokens * recipe.model.dim * itemsize * states * streams,
        "logits": tokens * recipe.data.tokenizer.vocab * 4,  # in fp32
        "kv_cache_per_sequence": 2 * size.cache_elements * length,  # in 16 bits
    }


def layers(model: LanguageModel) -> list[dict[str, Any]]:
    """A row for each part of the model, in order: parameters, those that one token uses, experts."""
    rows = [_row("embedding", model.embedding, active=0)]
    for index, block in enumerate(model.blocks):
        costs = block.costs()  # type: ignore[operator]
        row = _row(f"blocks.{index}", block, active=costs.active)
        row["kind"] = f"{type(block.attention).__name__} + {type(block.ffn).__name__}"
        row["experts"] = block.ffn.experts  # type: ignore[union-attr]
        rows.append(row)
    rows.append(_row("norm", model.norm, active=model.norm.dim))
    rows.append(_row("output", model.output))
    for name, head in model.loss_heads():
        rows.append(_row(f"heads.{name}", head, active=head.costs().active))
    return rows


def _row(name: str, module: nn.Module, active: int | None = None) -> dict[str, Any]:
    parameters = sum(p.numel() for p in module.parameters())
    if active is None:
        active = parameters
    return {
        "part": name,
        "kind": type(module).__name__,
        "parameters": parameters,
        "active": active,
        "experts": 0,
    }


def coefficients(model: LanguageModel, plan: TrainingPlan) -> dict[str, dict[str, float]]:
    """The coefficient of every loss term in the first and the last step, as the model would apply it."""
    first = plan.progress(0)
    last = plan.progress(plan.steps - 1)
    ledger = Ledger.of(model)
    terms: dict[str, Any] = {term.head_name: term.head for term in ledger.heads}
    for balance in ledger.balance:
        if balance.scope != "none":
            terms[f"{balance.layer} {balance.balancer.label}"] = balance.balancer
    for own in ledger.layers:
        terms[f"{own.layer} {own.label}"] = own.component
    return {name: _first_and_last(owner, first, last) for name, owner in terms.items()}


def _first_and_last(owner: Any, first: Progress, last: Progress) -> dict[str, float]:
    return {"first": owner.coefficient(first), "last": owner.coefficient(last)}


NO_PRODUCT = {"embedding": "lookup", "norm": "norm"}
"""Roles that have a format and no matrix product."""


class RecordingPrecision(Precision):
    """A precision that passes every call on, and records the requested roles in order and the layers made for them.

    Args:
        inner: the recipe's precision.
    """

    def __init__(self, inner: Precision) -> None:
        self.inner = inner
        self.recorded_roles = dict.fromkeys(["embedding"])
        self.made: dict[nn.Module, MatrixProduct] = {}

    def linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        self.recorded_roles[role] = None
        layer = self.inner.linear(inputs, outputs, role, std=std)
        self.made[layer] = MatrixProduct(role, inputs, outputs)
        return layer

    def grouped_linear(
        self, groups: int, inputs: int, outputs: int, role: str, *, std: float
    ) -> nn.Module:
        self.recorded_roles[role] = None
        layer = self.inner.grouped_linear(groups, inputs, outputs, role, std=std)
        self.made[layer] = MatrixProduct(role, inputs, outputs, groups)
        return layer

    def table(self) -> dict[str, dict[str, str]]:
        """The formats of every requested role, and the code that computes its products."""
        rows = {}
        for role in self.recorded_roles:
            rows[role] = {
                "kept": _short(self.param_dtype(role)),
                "computed": _short(self.compute_dtype(role)),
                "path": NO_PRODUCT.get(role) or self.inner.path(role),
            }
        return rows

    def param_dtype(self, role: str) -> torch.dtype:
        self.recorded_roles.setdefault(role)
        return self.inner.param_dtype(role)

    def compute_dtype(self, role: str) -> torch.dtype:
        return self.inner.compute_dtype(role)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plugins(recipe: Recipe) -> list[dict[str, str]]:
    """Every component of the recipe with its owner."""
    rows = {}
    for section in recipe.sections():
        rows[section.slot, section.name] = {
            "slot": section.slot,
            "name": section.name,
            "distribution": section.provenance.distribution,
            "version": section.provenance.version,
            "module": section.provenance.module,
        }
    return list(rows.values())


def unmet_requirements(recipe: Recipe) -> list[str]:
    """The reasons why the recipe cannot run on this machine; empty if it can."""
    environment = Environment("cpu", None, torch.version.cuda)
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        environment = Environment("cuda", capability, torch.version.cuda)
    reasons = []
    for section in recipe.sections():
        why = _requires(section, environment)
        if why:
            reasons.append(f"{section.slot} {section.name}: {why}")
    return reasons


def _requires(section: Section, environment: Environment) -> str | None:
    """What a component's `requires` returns.

    Raises:
        UserError: `requires` raises; the message names the component.
    """
    try:
        why: str | None = section.component.requires(section.config, environment)
    except Exception as cause:
        owner = section.provenance.distribution
        raise UserError(
            f"{section.slot} {section.name} of {owner}: requires raises {format_error_at(cause)}"
        ) from cause
    return why
