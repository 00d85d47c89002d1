"""Trains a few windows under a strategy, on one rank of several, and records all that must not depend on it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lab import Lab, Windows
from torch import Tensor

from core.analysis.budget import plan_of
from core.assemble import make
from core.data.batch import Batch
from core.data.windows import rows_of
from core.generation.sample import sample
from core.numerics.part_exchange import local_tensor
from core.run.data import text_data
from core.run.run_model import RunModel
from core.training.launchers import Launch
from core.training.module import TrainingModule
from core.training.rank_processes import RunEnvironment
from core.training.ranks import broadcast_int, rank_and_world
from core.training.sharded import ShardedStrategy
from core.training.totals import learning_alone

UNUSED = 5
"""The number of an expert that is never chosen."""


@dataclass
class Observed:
    """What a training run computed, the same on every rank.

    Args:
        steps: the logged values of each step.
        loads: the load of each layer in each step.
        gradients: the gradients of the first step, before clipping.
        state: weights and buffers after the last step.
        optimizer: the optimizer's state after the last step.
        validated: the values of the validation after the last step.
        text: tokens that the model writes at the end.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    loads: list[dict[str, Tensor]] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    validated: dict[str, float] = field(default_factory=dict)
    text: list[int] = field(default_factory=list)


class Observer(L.Callback):
    """Fills an `Observed` while a Trainer runs."""

    def __init__(self, seen: Observed) -> None:
        self.seen = seen

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Makes one expert of every layer unreachable, and records the gradients of the first step."""
        for layer in pl_module.model.expert_layers().values():
            for balancer in layer.balancers:
                bias_E = balancer.selection_bias()
                if bias_E is not None:
                    bias_E[UNUSED] = -1e3
        original = pl_module.strategy.gradient_norm

        def recorded(gradients: Sequence[Tensor]) -> Tensor:
            if not self.seen.steps:
                self.seen.gradients = whole_gradients(trainer, pl_module)
            norm: Tensor = original(gradients)
            return norm

        pl_module.strategy.gradient_norm = recorded

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the values of a step."""
        values = {name: float(value) for name, value in pl_module.step_values.items()}
        self.seen.steps.append(values)
        self.seen.loads.append({k: v.clone().cpu() for k, v in pl_module.step_load.items()})

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Records the state after the last step, and lets the model write."""
        self.seen.validated = dict(pl_module.validated)
        strategy = trainer.strategy
        self.seen.state = strategy.lightning_module_state_dict()
        self.seen.optimizer = strategy.optimizer_state(trainer.optimizers[0]).get("state", {})
        pl_module.eval()
        text = sample(
            pl_module.model,
            [1, 2, 3],
            tokens=6,
            temperature=0.8,
            device=pl_module.device,
            agreed=lambda token: broadcast_int(token, pl_module.device),
        )
        self.seen.text = list(text)


def whole_gradients(trainer: L.Trainer, module: TrainingModule) -> dict[str, Tensor]:
    """The gradients that the optimizer is about to read, each gathered from its parts; none of frozen weights."""
    found = {}
    strategy = trainer.strategy
    learning = learning_alone(module.model, module.plan.progress(module.windows_done))
    for named in module.local_parameters.named:
        gradient = named.parameter.grad
        if named.name in module.model.absent:
            continue
        if learning is not None and named.name not in learning:
            assert gradient is None
            continue
        assert gradient is not None
        if isinstance(strategy, ShardedStrategy):
            part = strategy.parts[f"model.{named.name}"]
            found[named.name] = part.gather(gradient).cpu().clone()
        else:
            found[named.name] = local_tensor(gradient).cpu().clone()
    return over_stages(found) if module.model.absent else found


def over_stages(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of all stages of a pipeline; those of a weight that two stages have are the same to the bit."""
    values: list[dict[str, Tensor]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(values, own)
    found: dict[str, Tensor] = {}
    for value in values:
        for name, gradient in value.items():
            assert torch.equal(found.setdefault(name, gradient), gradient), name
    return found


def observe(
    lab: Lab,
    windows: Sequence[Sequence[Batch]],
    validation: Sequence[Batch],
    *overrides: str,
    launch: Launch | None = None,
    gradient_clip: float = 0.5,
    callbacks: Sequence[L.Callback] = (),
) -> Observed:
    """Trains on whole windows, of which each rank reads its own rows; the ranks' process group exists.

    Args:
        lab: the small recipe.
        windows: the micro-batches of each step, for all ranks together.
        validation: batches of the validation, for all ranks together.
        overrides: overrides of the recipe, the strategy among them.
        launch: this process among the ranks; None: it is alone.
        gradient_clip: largest global gradient norm.
        callbacks: further callbacks of the Trainer.
    """
    launch = launch or Launch()
    steps = f"budget.steps={len(windows)}"
    sequences = f"batch.sequences={len(windows[0][0].tokens_BL)}"
    recipe = lab.recipe(steps, sequences, f"batch.accumulate={len(windows[0])}", *overrides)
    plan = plan_of(recipe)
    strategy = make(recipe.strategy)
    run_model = RunModel(recipe, strategy, text_data(recipe, plan))
    run_model.compile()
    module = TrainingModule(
        run_model.model,
        plan=plan,
        optimizer=make(recipe.optimizer),
        strategy=strategy,
        shard_weights=run_model.shard_weights,
        flops_per_token=1.0,
        gradient_clip=gradient_clip,
        validation_bytes=100,
    )
    seen = Observed()
    trainer = L.Trainer(
        **strategy.trainer_arguments(),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        max_epochs=1,
        check_val_every_n_epoch=None,
        val_check_interval=len(windows),
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        plugins=[RunEnvironment(launch)],
        callbacks=[Observer(seen), *callbacks],
    )
    rank, world = rank_and_world()
    data = recipe.strategy.component.data_ranks_of(recipe.strategy.config)
    place = (rank % data, min(data, world))
    own_windows = [[own_rows(batch, *place) for batch in window] for window in windows]
    trainer.fit(
        module,
        train_dataloaders=Windows(own_windows),
        val_dataloaders=Windows([own_rows(batch, *place) for batch in validation]),  # type: ignore[arg-type]
    )
    return seen


def own_rows(batch: Batch, rank: int, world: int) -> Batch:
    """A data rank's rows of a global micro-batch."""
    rows = list(rows_of(rank, world, len(batch.tokens_BL)))
    return Batch(*(None if part is None else part[rows] for part in batch))


NOISE = 1e-15
"""A difference of tensors is rounding of a zero below this fraction of the largest tensor beside them."""


def differences(one: Any, other: Any) -> list[tuple[float, str]]:
    """Every pair of numbers or tensors that differs, as (difference over the first one's largest element, where).

    Differences below a floor are left out, because sums that are 0 on paper, as the gradient of an expert whose gates
    cancel, are rounding noise without a scale of their own. The floor of tensors is 1e-15 of the largest element of all
    tensors in `one`; that of single numbers, which are of order 1, is 1e-15. Integers and names must be equal.
    """
    largest = max((_size(tensor) for tensor in _tensors(one)), default=0.0)
    return _differences(one, other, NOISE * largest, "")


def _size(tensor: Tensor) -> float:
    """The largest magnitude in a tensor."""
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor of floating-point numbers with at least one dimension in nested containers."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Tensor) and value.ndim and value.is_floating_point():
        yield value


def _differences(one: Any, other: Any, floor: float, path: str) -> list[tuple[float, str]]:
    """What `differences` returns, of a part of the containers; `path` says which."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), (path, set(one) ^ set(other))
        return [
            found
            for key in one
            for found in _differences(one[key], other[key], floor, f"{path}/{key}")
        ]
    if isinstance(one, list):
        assert len(one) == len(other), path
        pairs = zip(one, other, strict=True)
        return [
            found
            for index, (a, b) in enumerate(pairs)
            for found in _differences(a, b, floor, f"{path}/{index}")
        ]
    if one is None or isinstance(one, str):
        assert one == other, path
        return []
    a = torch.as_tensor(one).cpu()
    b = torch.as_tensor(other).cpu()
    assert a.shape == b.shape, (path, a.shape, b.shape)
    assert a.dtype == b.dtype, (path, a.dtype, b.dtype)
    if torch.equal(a, b):
        return []
    if not a.is_floating_point():
        return [(float("inf"), path)]
    if not torch.equal(a.isfinite(), b.isfinite()):
        return [(float("inf"), path)]
    # Both are not finite in the same places, as in a step that was skipped.
    a, b = (torch.where(value.isfinite(), value, 0.0) for value in (a, b))
    distance = _size(a.double() - b.double())
    if distance <= (floor if a.ndim else NOISE):
        return []
    return [(distance / max(_size(a), NOISE), path)]
