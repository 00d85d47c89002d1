"""Training steps of our model on one batch."""

import torch
from torch import Tensor

from core.assemble import build, compile_parts, make
from core.contracts.strategy import StrategyFactory
from core.contracts.training import OptimizerFactory
from core.model.language_model import Losses
from core.model.ledger import Ledger
from core.recipe.compose import Recipe
from core.recipe.plan import TrainingPlan
from core.speed.batches import TokenBatch
from core.training.local_parameters import LocalParameters
from core.training.totals import WindowTotals
from core.training.window import Window, objective

LEARNING_RATE = 1e-6
"""The learning rate of both sides: the weights hardly change, so that every step routes and costs the same."""


class OurSteps:
    """A model of ours that takes training steps, as `core.training.module` takes them.

    A step is forward, loss, backward, norm and clipping of the gradients, AdamW and zero_grad. Metrics and the update
    of selection biases are not part of it: the peer has neither, and both sides must choose the same experts.

    Args:
        recipe: what is trained.
        batches: the micro-batches of every step.
        device: where.
        plan: the recipe's steps.

    Attributes:
        loads: the int64 rows of each expert in each micro-batch, by block path.
    """

    def __init__(
        self, recipe: Recipe, batches: list[TokenBatch], device: torch.device, plan: TrainingPlan
    ) -> None:
        self.model = build(recipe, device=str(device)).train()
        if recipe.compile:
            compile_parts(self.model)
        self.ledger = Ledger.of(self.model)
        self.progress = plan.progress(0)
        self.contexts = [batch.context() for batch in batches]
        self.clip_norm = recipe.gradient_clip
        self.parameters = LocalParameters(self.model)
        factory: OptimizerFactory = make(recipe.optimizer)
        made = factory.make(self.parameters.named)
        self.optimizers: list[torch.optim.Optimizer] = made if isinstance(made, list) else [made]
        self.strategy: StrategyFactory = make(recipe.strategy)
        self.weights = list(self.model.parameters())
        self.loads: list[dict[str, Tensor]] = []

    def run(self) -> None:
        """Takes one optimizer step."""
        self.backward()
        self.parameters.take_gradients()
        norm = self.strategy.gradient_norm(self.parameters.gradients())
        self.parameters.clip_gradients(self.clip_norm, norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE
            optimizer.step()
            optimizer.zero_grad()
        self.parameters.clear_gradients()
        for layer in self.model.step_states().values():
            layer.end_step(done=True)

    def backward(self) -> None:
        """Runs every micro-batch forwards and backwards."""
        window = Window.of(self.model, self.ledger, self.contexts)
        totals = WindowTotals()
        self.loads = []
        for context in self.contexts:
            losses = self.model(context)
            value = objective(self.model, self.ledger, losses, window, self.progress, totals)
            value.backward()
            self.loads.append(_loads_of(losses))

    def forget(self) -> None:
        """Drops the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    @torch.no_grad()
    def loss(self) -> float:
        """The loss of the step, without taking it."""
        window = Window.of(self.model, self.ledger, self.contexts)
        total = 0.0
        for context in self.contexts:
            losses = self.model(context)
            value = objective(
                self.model, self.ledger, losses, window, self.progress, WindowTotals()
            )
            total += float(value)
        return total


def _loads_of(losses: Losses) -> dict[str, Tensor]:
    """The rows of each expert in one micro-batch, by the path of the block."""
    found = {}
    for path, record in losses.expert_records().items():
        assert record.load_E is not None
        found[path] = record.load_E
    return found
