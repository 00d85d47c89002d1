"""The training step, top to bottom as the report describes it, under Lightning's manual optimization.

What Lightning calls a batch holds the whole window of an optimizer step. Only this step commits what the pure
forwards returned: it reduces the window's integer load once over the ranks, and the balancers and the
logged MaxVio read the same integers.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.errors import RunFailed
from core.contracts.schedule import Progress
from core.contracts.strategy import StrategyFactory
from core.contracts.training import OptimizerFactory
from core.data.batch import Batch
from core.model.language_model import LanguageModel, Losses
from core.model.ledger import Ledger, Term
from core.model.parameters import check_groups
from core.numerics.finite import not_finite_in
from core.recipe.plan import TrainingPlan
from core.recipe.recipe_schema import SpikeSection
from core.training.captured import CapturedSteps, StepResults
from core.training.load import measures
from core.training.local_parameters import LocalParameters, local_state
from core.training.module_state import load_module_state, module_state
from core.training.non_finite_advice import non_finite_advice
from core.training.ranks import (
    all_ranks,
    all_reduce_max_,
    all_reduce_sum,
    data_group,
    differentiable_all_reduce_sum,
    first_text_over_ranks,
    rank_and_world,
)
from core.training.spikes import SpikeGuard
from core.training.step_metrics import (
    as_scalar,
    balancer_metrics,
    component_metrics,
    exchange_metrics,
    loss_metrics,
)
from core.training.totals import (
    WindowTotals,
    call_on_step_end,
    call_on_step_start,
    learning_alone,
)
from core.training.validation import ValidationTotals
from core.training.window import MicroBatches, Window, objective


class TrainingModule(L.LightningModule):
    """Trains a language model by a plan.

    Args:
        model: the model.
        plan: the steps of the run.
        optimizer: makes the optimizer and gives each step's learning rate.
        strategy: says how ranks share the work.
        shard_weights: shards the model's weights over a mesh, once there is a process group; None: they stay whole.
        flops_per_token: training FLOPs, for MFU.
        mask_documents: keep attention and predictions inside documents.
        gradient_clip: largest global gradient norm, or None.
        max_skipped: consecutive skipped steps before the run fails.
        cuda_graph: replay the forwards and backwards of a step as one CUDA graph.
        skip_spikes: which gradient norms are too large beside those of the steps before; None: none.
        validation_bytes: bytes of the validation documents; 0 without a validation split.
        source_bytes: the same for each part of a mixture, by its name; losses are then logged by source.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        plan: TrainingPlan,
        optimizer: OptimizerFactory,
        strategy: StrategyFactory,
        shard_weights: Callable[[Any], None] | None = None,
        flops_per_token: float,
        mask_documents: bool = False,
        gradient_clip: float | None = 1.0,
        max_skipped: int = 5,
        cuda_graph: bool = False,
        skip_spikes: SpikeSection | None = None,
        validation_bytes: int = 0,
        source_bytes: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.plan = plan
        self.optimizer_factory = optimizer
        self.strategy = strategy
        self.local_parameters = LocalParameters(model)
        self._shard_weights = shard_weights
        self.flops_per_token = flops_per_token
        self.mask_documents = mask_documents
        self.gradient_clip = gradient_clip
        self.max_skipped = max_skipped
        self.cuda_graph = cuda_graph
        self.captured: CapturedSteps | None = None
        self.spikes = None if skip_spikes is None else SpikeGuard(skip_spikes)
        self.windows_done = 0
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self.not_finite_since: int | None = None
        self.step_load: dict[str, Tensor] = {}
        self.step_values: dict[str, Any] = {}
        self.seconds = 0.0
        self.wall_before = 0.0
        self.started = time.perf_counter()
        self.assigned = 0
        self.dropped = 0
        self.validated: dict[str, float] = {}
        self.averages_validated: dict[str, float] = {}
        self.same_threads = True
        self.validation_pending = False
        self.pending_step: int | None = None
        self.ended_early: str | None = None
        self._interval: int | float | None = None
        self.ledger = Ledger.of(model)
        self.source_names = tuple(source_bytes or ())
        self.validation = ValidationTotals(model, self.ledger, validation_bytes, source_bytes)

    def dropped_fraction(self) -> float:
        """The fraction of the whole run's assignments that were dropped."""
        return self.dropped / max(self.assigned, 1)

    @property
    def wall_seconds(self) -> float:
        """Seconds since the start of the run; of a resumed run, its earlier parts up to their last checkpoint too."""
        return self.wall_before + time.perf_counter() - self.started

    @property
    def reports_to_callbacks(self) -> bool:
        """Whether every step's values are logged through Lightning, for callbacks that read its metrics.

        This costs milliseconds a step, and the callbacks of this package read `step_values`.
        """
        kinds = {type(callback).__module__ for callback in self.trainer.callbacks}  # type: ignore[attr-defined]
        return any(not kind.startswith("core.") for kind in kinds)

    @property
    def flops_per_batch(self) -> int:
        """FLOPs of this rank's share of the window just done."""
        window = self.plan.window(max(self.windows_done - 1, 0))
        tokens = window.count * self.plan.sequences * self.plan.length // all_ranks()[1]
        return int(self.flops_per_token * tokens)

    def configure_model(self) -> None:
        """Shards the weights over the ranks if the strategy does so; a second call changes nothing."""
        if self._shard_weights is not None:
            shard_weights = self._shard_weights
            self._shard_weights = None
            shard_weights(self.trainer.strategy.device_mesh)  # type: ignore[attr-defined]

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer over every weight that this rank owns; selection biases are buffers, not weights."""
        self.local_parameters = LocalParameters(self.model)
        made = self.optimizer_factory.make(self.local_parameters.named)
        optimizers = made if isinstance(made, list) else [made]
        check_groups(optimizers, self.local_parameters.named)
        return made

    def _optimizers(self) -> list[Any]:
        """The optimizers, as Lightning wraps them."""
        found = self.optimizers()
        return found if isinstance(found, list) else [found]

    def context(self, batch: Batch, index: int = 0) -> SequenceContext:
        """The context of micro-batch number `index` of the step, or of the validation split.

        In evaluation random choices have the addresses of step 0, so that every validation of one model is the same.
        """
        rank, world = rank_and_world()
        documents_BM = batch.documents_BM if self.mask_documents else None
        step = self.windows_done if self.training else 0
        return SequenceContext.of(
            batch.tokens_BL,
            targets_BL=batch.targets_BL,
            valid_BL=batch.valid_BL,
            documents_BM=documents_BM,
            learned_BM=batch.learned_BM,
            source_B=batch.source_B,
            source_names=() if batch.source_B is None else self.source_names,
            step=step,
            first_sequence=(index * world + rank) * len(batch.tokens_BL),
            reduce_sum=differentiable_all_reduce_sum,
        )

    def training_step(self, batches: list[Batch], _: int) -> None:
        """One optimizer step: denominators, forwards and backwards, load, norm, guard, clip, update, balance, log."""
        optimizers = self._optimizers()
        progress = self.plan.progress(self.windows_done)
        call_on_step_start(self.model, progress)
        totals, counts = self._gradients(batches, progress)
        learning = learning_alone(self.model, progress)
        self.local_parameters.take_gradients()
        self.strategy.exchange_gradients(self.local_parameters.named)
        self.local_parameters.freeze_others(learning)
        norm = self.strategy.gradient_norm(self.local_parameters.gradients())
        rate = self.optimizer_factory.learning_rate(progress)
        finite = self._agreed_finite(norm)
        if finite and not self._is_spike(norm, learning):
            self.local_parameters.clip_gradients(self.gradient_clip, norm)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate * group.get("lr_scale", 1.0)
                optimizer.step()
            with torch.no_grad():
                call_on_step_end(self.model, totals, progress, balance=learning is None)
            self._end_step(done=True)
            self.skipped_in_a_row = 0
        else:
            self._end_step(done=False)
            loss = loss_metrics(self.ledger, totals, counts, progress)["loss/total"]
            self._skip(norm, loss, finite=finite)
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.local_parameters.clear_gradients()
        self.windows_done += 1
        self.step_load = totals.loads
        self._log(totals, counts, progress, norm, rate)
        # Only the time of steps counts: no validation, no saving.
        self.seconds += time.perf_counter() - self._began
        if self.windows_done == self.plan.steps:
            # The run ends here in any case; with this flag set Lightning validates after the last step too.
            self.trainer.should_stop = True

    def _gradients(
        self, batches: Sequence[Batch], progress: Progress
    ) -> tuple[WindowTotals, dict[Term, Tensor]]:
        """Computes the step's gradients; returns the totals over all ranks, and each term's denominator."""
        if self.captured is not None:
            coefficients = {term: term.coefficient(progress) for term in self.ledger}
            results = self.captured(batches, coefficients)
            return results.totals, results.counts
        results = self._run_window(batches, progress)
        return results.totals, results.counts

    def _run_window(
        self,
        batches: Sequence[Batch],
        progress: Progress,
        coefficients: Mapping[Term, Tensor] | None = None,
    ) -> StepResults:
        """Runs every micro-batch of a step forwards and backwards."""
        contexts = [self.context(batch, index) for index, batch in enumerate(batches)]
        window = Window.of(
            self.model, self.ledger, contexts, coefficients, run=self.strategy.run_forward
        )
        totals = self._backward(contexts, window, progress).over_ranks()
        return StepResults(self.strategy.all_totals(totals, self.ledger), window.counts)

    def _captured_steps(self) -> CapturedSteps:
        """What replays the forwards and backwards of steps; it takes all that differs between them as arguments."""
        first = self.plan.progress(0)

        def run(batches: Sequence[Batch], coefficients: Mapping[Term, Tensor]) -> StepResults:
            return self._run_window(batches, first, coefficients)

        return CapturedSteps(run, list(self.model.parameters()))

    def _backward(
        self, contexts: list[SequenceContext], window: Window, progress: Progress
    ) -> WindowTotals:
        """Runs every micro-batch forwards and backwards; returns what this rank's forwards recorded."""
        totals = WindowTotals()
        scale = self.strategy.gradient_scale(rank_and_world()[1])

        def loss_of(losses: Losses) -> Tensor:
            return objective(self.model, self.ledger, losses, window, progress, totals) * scale

        def run(index: int) -> None:
            with self._synchronised(last=index == len(contexts) - 1):
                # Nothing else keeps what the forward returned, so its memory is free before the next one.
                self.manual_backward(loss_of(self.model(contexts[index])))

        self.strategy.run_window(MicroBatches(contexts, loss_of, run))
        return totals

    @property
    def validation_follows(self) -> bool:
        """Whether the step just done will be validated."""
        interval = int(self.trainer.val_check_interval)
        due = self.windows_done % interval == 0 or self.trainer.should_stop
        return due and sum(self.trainer.num_val_batches) > 0

    def write_row(self, values: Mapping[str, Any]) -> None:
        """Hands some numbers of the step just done to the loggers."""
        numbers = {name: float(value) for name, value in values.items()}
        for logger in self.loggers:
            logger.log_metrics(numbers, step=self.windows_done)

    def _synchronised(self, *, last: bool) -> AbstractContextManager[Any]:
        """A context in which ranks exchange gradients only for the window's last backward."""
        self.strategy.set_requires_gradient_sync(self.model, required=last)
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        if last or block is None or rank_and_world()[1] == 1:
            return nullcontext()
        blocked: AbstractContextManager[Any] = block()
        return blocked

    def _agreed_finite(self, norm: Tensor) -> bool:
        """Whether the norm is finite on every rank."""
        bad = all_reduce_sum((~torch.isfinite(norm)).to(torch.int64))
        return int(bad) == 0

    def _is_spike(self, norm: Tensor, learning: Collection[str] | None) -> bool:
        """Whether a finite norm is too large beside those of the steps before."""
        return self.spikes is not None and self.spikes.skips(norm, learning)

    def _end_step(self, *, done: bool) -> None:
        """Advances the product layers that keep state between steps; their maxima are taken over the ranks first."""
        with torch.no_grad():
            layers = self.model.step_states().values()
            all_reduce_max_([tensor for layer in layers for tensor in layer.maxima()])
            for layer in layers:
                layer.end_step(done=done)

    def _skip(self, norm: Tensor, loss: Tensor, *, finite: bool) -> None:
        """Counts a skipped step: a norm that is not finite, or a spike, changes no weight, no moment and no bias."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row < self.max_skipped:
            return
        row, step = self.skipped_in_a_row, self.windows_done + 1
        if finite and self.spikes is not None:
            raise RunFailed(self.spikes.failure(float(norm), in_a_row=row, step=step))
        advice = non_finite_advice(self.weight_not_finite(), loss, steps_done=step - row)
        raise RunFailed(
            f"the gradient norm was {norm.item()} for {row} steps in a row, the last one step "
            f"{step}; the run stops with its last checkpoint as it is: {advice}"
        )

    def weight_not_finite(self) -> str | None:
        """A sentence about a weight that is not finite, on whichever rank it is; every rank calls this."""
        return first_text_over_ranks(not_finite_in(local_state(self.model)))

    def _log(
        self,
        totals: WindowTotals,
        counts: dict[Term, Tensor],
        progress: Progress,
        norm: Tensor,
        rate: float,
    ) -> None:
        """Logs the values of the step, and adds its assignments to those of the run."""
        values: dict[str, Any] = {"tokens": float(progress.tokens)}
        values.update(loss_metrics(self.ledger, totals, counts, progress))
        self._note_finiteness(values["loss/total"])
        loads = measures(list(totals.loads.values()))
        for name, value in loads.items():
            label = "max_vio_batch" if name == "max_vio" else name
            values[f"load/{label}"] = value
        if totals.dropped is not None:
            assigned = torch.stack([load_E.sum() for load_E in totals.loads.values()]).sum()
            values["load/dropped_fraction"] = totals.dropped / assigned.clamp(min=1)
            self.assigned += int(assigned)
            self.dropped += int(totals.dropped)
        values.update(balancer_metrics(self.model))
        values.update(component_metrics(totals))
        values.update(exchange_metrics(totals))
        values.update({"grad_norm": norm, "lr": rate, "skipped_steps": float(self.skipped_steps)})
        self.step_values = values
        if self.reports_to_callbacks:
            logged = {name: as_scalar(value) for name, value in values.items()}
            self.log_dict(logged, logger=False, batch_size=1)

    def _note_finiteness(self, loss: Tensor) -> None:
        """Remembers the step since which the loss has not been finite; None while it is finite."""
        if bool(loss.isfinite()):
            self.not_finite_since = None
        elif self.not_finite_since is None:
            self.not_finite_since = self.windows_done

    def on_train_start(self) -> None:
        """Lets Lightning validate first where the run was stopped in a validation, be it due by the interval or not."""
        if self.cuda_graph:
            self.captured = self._captured_steps()
        if self.validation_pending:
            self._interval = self.trainer.val_check_batch
            self.trainer.val_check_batch = self.windows_done

    def on_validation_end(self) -> None:
        """Returns to the interval after a validation that was due at a resume."""
        if self._interval is not None:
            self.trainer.val_check_batch = self._interval
            self._interval = None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Starts the clock of this step."""
        self._began = time.perf_counter()

    def on_validation_epoch_start(self) -> None:
        """Starts the totals of a validation at zero."""
        self.validation.reset()
        self.validation.process_group = data_group()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Adds one batch to the totals; nothing of the model changes."""
        context = self.context(batch, batch_idx)
        losses = self.strategy.run_forward(self.model, context)
        self.validation.update(self.strategy.all_losses(losses), context)

    def on_validation_epoch_end(self) -> None:
        """Logs the values over the whole validation split, of averaged weights too."""
        self.validated = {**self.validation.compute(), **self.averages_validated}
        self.averages_validated = {}
        self.validation_pending = False
        self.write_row(self.validated)
        # The totals are equal on all ranks already, but Lightning warns where several ranks log without sync_dist.
        # A maximum of equal numbers is that number, and NCCL takes only tensors of the device.
        for name, value in self.validated.items():
            scalar = as_scalar(value).to(self.device)
            self.log(name, scalar, logger=False, sync_dist=True, reduce_fx="max")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the module's own state, in plain containers and tensors, to Lightning's."""
        checkpoint["moeloom"] = module_state(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continues from the module's own state in a checkpoint.

        Raises:
            UserError: on a CPU, another number of threads, with which the bits would differ.
        """
        load_module_state(self, checkpoint["moeloom"])
