"""Which methods declare that splitting a batch changes nothing; each must keep what it declares (P9)."""

from functools import cache
from typing import Any

import pytest
from lab import Lab
from test_window import FP64, Gradients, after, assert_close, cut, padded
from tiers import first_by_default
from torch import Tensor

from core.assemble import build
from core.contracts.context import SequenceContext
from core.contracts.schedule import Progress
from core.model.language_model import LanguageModel
from core.model.ledger import Ledger
from core.training.totals import WindowTotals
from core.training.window import Window, objective

FFN = "model.blocks.moe.ffn"
ROUTERS = {
    "deepseek_v3": "{name: deepseek_v3, top_k: 2, groups: 4, group_limit: 2}",
    "deepseek_v3, softmax, plain gates": "{name: deepseek_v3, top_k: 1, affinity: softmax, normalise: false}",
    "deepseek_v2": "{name: deepseek_v2, top_k: 2, groups: 4, group_limit: 2}",
    "gshard": "{name: gshard}",
    "gshard over a batch": "{name: gshard, group: batch}",
    "gshard_dropless": "{name: gshard_dropless}",
    "switch": "{name: switch, capacity_factor: 1.0}",
    "switch over sequences, with jitter": "{name: switch, capacity_factor: 1.0, group: sequence, jitter: 0.1}",
    "expert_choice": "{name: expert_choice, top_k: 2}",
    "expert_choice over sequences": "{name: expert_choice, top_k: 2, group: sequence}",
    "expert_choice over chunks": "{name: expert_choice, top_k: 2, group: sequence, chunk: 5}",
    "hash": "{name: hash}",
    "hash_gated": "{name: hash_gated, top_k: 2, scale: 1.5}",
    "deepseek_v3, sqrt_softplus": "{name: deepseek_v3, top_k: 2, affinity: sqrt_softplus, scale: 1.5}",
    "forced_balance": "{name: forced_balance, top_k: 2}",
}
BALANCERS = {
    "bias": "{name: bias, rate: 0.01}",
    "bias, proportional": "{name: bias, rate: 0.01, update: proportional, unit: fraction}",
    "bias, multiplicative and centred": "{name: bias, rate: 0.01, form: multiplicative, centre: true}",
    "quantile": "{name: quantile, bins: 100}",
    "sequence": "{name: sequence, alpha: 0.1}",
    "batch": "{name: batch, alpha: 0.1}",
    "micro_batch": "{name: micro_batch, alpha: 0.1}",
    "gshard loss": "{name: gshard, alpha: 1.0}",
    "gshard loss over the batch": "{name: gshard, alpha: 1.0, over: batch}",
    "switch loss": "{name: switch, alpha: 0.1}",
    "switch loss over the batch": "{name: switch, alpha: 0.1, over: batch}",
    "expert": "{name: expert, alpha: 0.1}",
    "device": "{name: device, alpha: 0.1, devices: 4}",
    "communication": "{name: communication, alpha: 0.1, devices: 4, device_limit: 2}",
    "z_loss": "{name: z_loss, alpha: 0.1}",
}
NO_PROMISE = {
    "gshard over a batch",
    "switch",
    "expert_choice",
    "micro_batch",
    "switch loss",
    "token dropping",
}
"""The methods whose result depends on how a batch is split; everything else must not."""


def overrides(name: str) -> tuple[str, ...]:
    """Overrides that give the small recipe one method, and nothing else that balances."""
    if name in ROUTERS:
        return (f"{FFN}.router={ROUTERS[name]}", f"{FFN}.balance=[]")
    if name in BALANCERS:
        return (f"{FFN}.balance=[{BALANCERS[name]}]",)
    return (f"{FFN}.balance=[]", f"{FFN}.token_dropping={{devices: 4}}")


METHODS = [*ROUTERS, *BALANCERS, "token dropping"]


@cache
def model_of(lab: Lab, name: str) -> LanguageModel:
    """The small recipe's model with one method, in fp64; a forward does not change it."""
    return build(lab.recipe("precision.name=fp64", *overrides(name))).train()


def gradients(lab: Lab, name: str, sizes: list[int]) -> dict[str, Tensor]:
    """The gradient of a window of unequal padding, read in micro-batches of these sizes, without a Trainer."""
    model = model_of(lab, name)
    model.zero_grad()
    batches = cut(padded([16, 3, 9, 0, 1, 12, 16, 7]), sizes)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    contexts = [
        SequenceContext.of(
            b.tokens_BL, targets_BL=b.targets_BL, valid_BL=b.valid_BL, step=3, first_sequence=start
        )
        for b, start in zip(batches, starts, strict=True)
    ]
    ledger, progress = (
        Ledger.of(model),
        Progress(step=1, tokens=64, total_steps=10, total_tokens=640),
    )
    window, totals = Window.of(model, ledger, contexts), WindowTotals()
    for context in contexts:
        objective(model, ledger, model(context), window, progress, totals).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", first_by_default(METHODS, keep=5))
def test_P9_splitting_a_batch_changes_what_was_not_promised_and_nothing_else(
    lab: Lab, name: str
) -> None:
    whole, *parts = (gradients(lab, name, sizes) for sizes in ([8], [2, 2, 2, 2], [1] * 8))
    for part in parts:
        assert part.keys() == whole.keys()
        if name in NO_PROMISE:
            assert any(not close(part[n], whole[n]) for n in whole)
        else:
            assert_close(part, whole)


def trained(lab: Lab, name: str, sequences: int, accumulate: int) -> dict[str, Any]:
    """Two steps of eight sequences each, split in one way, under Lightning."""
    watch = Gradients()
    batch = f"batch={{sequences: {sequences}, accumulate: {accumulate}}}"
    module = lab.train(*FP64, *overrides(name), batch, "budget.steps=2", callbacks=[watch])
    return after(module, watch)


@pytest.mark.parametrize("name", first_by_default(["batch", "gshard"]))
def test_P9_a_whole_training_step_is_split_without_a_change(lab: Lab, name: str) -> None:
    """Tries a method that draws by address, and one whose loss is formed over the whole batch."""
    assert_close(trained(lab, name, 2, 4), trained(lab, name, 8, 1))


def close(one: Tensor, two: Tensor) -> bool:
    return bool((one - two).abs().max() <= 1e-6 * two.abs().max().clamp(min=1e-3))


@pytest.mark.parametrize("name", first_by_default(METHODS, keep=10))
def test_P9_the_methods_that_do_not_promise_it_say_so(lab: Lab, name: str) -> None:
    for layer in model_of(lab, name).expert_layers().values():
        assert layer.routing_properties is not None
        dependent = layer.routing_properties.batch_dependent or any(
            b.scope == "micro_batch" for b in layer.balancers
        )
        assert dependent == (name in NO_PROMISE)
