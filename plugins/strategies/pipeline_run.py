"""The stages of one process: how micro-batches pass through them, and what stages tell each other.

Only the residual stream and its gradient travel between stages while a window runs. What layers counted stays on their
stage until the window ends.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.utils import _pytree

from core.contracts.attention import Cache
from core.contracts.context import SequenceContext
from core.contracts.record import Record
from core.contracts.training import NamedParameter
from core.model.language_model import Decoded, LanguageModel, Losses, block_path
from core.model.ledger import Ledger
from core.numerics.promotion import at_least_fp32
from core.training.totals import WindowTotals
from core.training.window import MicroBatches
from plugins.strategies.pipeline_module import Stage, StageModule
from plugins.strategies.pipeline_stages import (
    Segment,
    held_modules,
    is_inside,
    segments_of,
    without_others,
)

if TYPE_CHECKING:
    from plugins.strategies.pipeline import Pipeline


class PipelineRun:
    """The stages of this process.

    Args:
        model: the language model, on the meta device and whole; the weights of other stages become its `absent`.
        mesh: stages x ranks of each.
        strategy: the strategy, with its settings and its inner strategy.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, strategy: "Pipeline") -> None:
        assert isinstance(model, LanguageModel)
        config = strategy.config
        self.model = model
        self.config = config
        self.inner = strategy.inner
        self.stage = int(mesh.get_local_rank("stages"))
        self.pipe: dist.ProcessGroup = mesh.get_group("stages")
        self.data = strategy.data_group(mesh)
        self.segments = segments_of(model, config)
        self.own = [segment for segment in self.segments if segment.stage == self.stage]
        held = [held_modules(model, self.segments, stage) for stage in range(config.stages)]
        self.held = held[self.stage]
        names = [name for name, _ in model.named_parameters()]
        model.absent = frozenset(name for name in names if not is_inside(name, self.held))
        first, last = self.segments[0].stage, self.segments[-1].stage
        self.shared: frozenset[str] = frozenset(
            name for name in names if is_inside(name, held[first]) and is_inside(name, held[last])
        )
        self.ends: dist.ProcessGroup | None = None
        if self.shared:
            for ranks in mesh.mesh.reshape(config.stages, -1).T.tolist():
                group = dist.new_group([ranks[first], ranks[last]])
                if dist.get_rank() in ranks:
                    self.ends = group
        self.is_first = first == self.stage
        self.is_end = self.stage in (first, last)
        self.work: MicroBatches | None = None
        self._stream = _stream_like(model)
        self._schedules: dict[Any, tuple[Any, list[StageModule]]] = {}
        self._counted_elsewhere: set[int] = set()
        self.run_segment: Callable[..., Any] = self._run_segment
        if self.inner.shards:
            with without_others(model, self.held):
                self.inner.parallelize(model, mesh[tuple(self.inner.mesh_dims())])
            model.run_segment = self._run_segment  # type: ignore[assignment]
            register_fsdp_forward_method(model, "run_segment")
            self.run_segment = model.run_segment  # type: ignore[assignment]
        model.read = self.read  # type: ignore[method-assign]

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        for name, weight in self.model.named_parameters():
            if name not in self.model.absent:
                return weight.device
        raise AssertionError("a stage has weights")

    def _run_segment(
        self,
        segment: Segment,
        stream: Tensor | None,
        context: SequenceContext,
        caches: list[Cache] | None = None,
        logits_at_B: Tensor | None = None,
    ) -> tuple[Tensor, Losses | Decoded]:
        """Runs a segment: the stream after its blocks, and what its layers saw, with the losses of the last segment.

        Where an inner strategy divides weights this is called as a method of the model, by `run_segment`, so that the
        weights are gathered.

        Args:
            segment: the segment.
            stream: the stream before it; None for the first one.
            context: the micro-batch.
            caches: those of all blocks, in decoding only; the last segment then returns logits, not losses.
            logits_at_B: the one token of each row whose logits are wanted; None: of all.
        """
        model = self.model
        if stream is None:
            stream = model.first_stream(context)
        records: dict[str, dict[str, Record]] = {}
        kept: dict[int, Tensor] = {}
        read = model.read_by_heads()
        for index in segment.blocks:
            stream, records[block_path(index)] = model.run_block(index, stream, context, caches)
            if index in read:
                kept[index] = model.residual.collapse(stream)
        if not segment.is_last:
            return stream, Losses({}, records)
        states = model.last_states(stream, records, kept)
        if caches is not None:
            return stream, model.decoded(states, logits_at_B)
        return stream, model.losses_of(states, context)

    def run_window(self, work: MicroBatches) -> None:
        """Runs the micro-batches of a step forwards and backwards by the schedule."""
        tokens = [context.tokens_BL for context in work.contexts]
        schedule, modules = self._schedule(len(tokens), tokens[0])
        self.work = work
        for module in modules:
            module.next = 0
        given = (torch.cat(tokens),) if self.is_first else ()
        target = torch.zeros(len(tokens), device=self.device) if self._has_last else None
        try:
            schedule.step(*given, target=target, return_outputs=False)
        finally:
            self.work = None

    def begin_backward(self, *, last: bool) -> None:
        """Says whether the backward that begins is the window's last one, where the inner strategy divides weights."""
        if self.inner.shards:
            self.inner.set_requires_gradient_sync(self.model, required=last)
            self.model.set_is_last_backward(last)  # type: ignore[operator]

    @property
    def _has_last(self) -> bool:
        return self.own[-1].is_last

    def _schedule(self, count: int, tokens_BL: Tensor) -> tuple[Any, list[StageModule]]:
        """torch's schedule for some micro-batches, made when a window first has so many."""
        key = (count, tuple(tokens_BL.shape))
        if key in self._schedules:
            return self._schedules[key]
        device = self.device
        modules = [StageModule(self, segment) for segment in self.own]
        stages: list[PipelineStage] = []
        for module in modules:
            segment = module.segment
            stream = self.empty_stream(tokens_BL).requires_grad_()
            made = Stage(
                self,
                module,
                segment.number,
                len(self.segments),
                device,
                input_args=(torch.empty_like(tokens_BL) if segment.is_first else stream,),
                output_args=(stream[0, 0].sum() if segment.is_last else stream,),
                group=self.pipe,
            )
            stages.append(made)
        options: dict[str, Any] = {"loss_fn": _the_loss, "scale_grads": False}
        if self.config.chunks == 1:
            schedule: Any = Schedule1F1B(stages[0], count, **options)
        else:
            schedule = ScheduleInterleaved1F1B(stages, count, **options)  # type: ignore[arg-type]
        self._schedules[key] = schedule, modules
        return schedule, modules

    def empty_stream(self, tokens_BL: Tensor) -> Tensor:
        """Memory for the stream of some tokens."""
        shape = (*tokens_BL.shape, *self._stream.shape[2:])
        return torch.empty(shape, dtype=self._stream.dtype, device=self.device)

    def run_forward(self, context: SequenceContext) -> Losses:
        """Runs one micro-batch forwards through all segments; returns what those of this stage computed."""
        heads: dict[str, Any] = {}
        records: dict[str, dict[str, Record]] = {}
        for losses in self._forward(context):
            assert isinstance(losses, Losses)
            heads.update(losses.heads)
            records.update(losses.records)
        return Losses(heads, records)

    def _forward(
        self,
        context: SequenceContext,
        caches: list[Cache] | None = None,
        logits_at_B: Tensor | None = None,
    ) -> list[Losses | Decoded]:
        """Runs one micro-batch forwards through all segments; returns what each segment of this stage did."""
        found: list[Losses | Decoded] = []
        for segment in self.own:
            stream = None
            if not segment.is_first:
                stream = self.empty_stream(context.tokens_BL)
                dist.recv(stream, self._rank_of(segment.number - 1), group=self.pipe)
            stream, result = self.run_segment(segment, stream, context, caches, logits_at_B)
            found.append(result)
            if not segment.is_last:
                dist.send(stream.contiguous(), self._rank_of(segment.number + 1), group=self.pipe)
        return found

    def _rank_of(self, number: int) -> int:
        """The rank that holds a segment, by its number in the run."""
        return dist.get_global_rank(self.pipe, self.segments[number].stage)

    def read(
        self,
        tokens_BL: Tensor,
        caches: list[Cache],
        *,
        valid_BL: Tensor | None = None,
        logits_at_B: Tensor | None = None,
    ) -> Decoded:
        """Replaces `LanguageModel.read`: every stage runs its blocks, and the last one's result goes to all."""
        context = self.model.new_tokens(tokens_BL, caches[self.own[0].blocks.start], valid_BL)
        result = self._forward(context, caches, logits_at_B)[-1]
        found = [_to(result, torch.device("cpu")) if self._has_last else None]
        source = self._rank_of(len(self.segments) - 1)
        dist.broadcast_object_list(found, source, group=self.pipe)
        decoded: Decoded = _to(found[0], self.device)
        return decoded

    def all_losses(self, losses: Losses) -> Losses:
        """The losses and records of one micro-batch over all stages; sums of balancers are left out."""
        records: dict[str, dict[str, Record]] = {}
        for path, parts in losses.records.items():
            records[path] = {
                name: replace(record, sums=[], balancer_tallies=[])
                for name, record in parts.items()
            }
        heads: dict[str, Any] = {}
        found: dict[str, dict[str, Record]] = {}
        for other in self._gathered(Losses(losses.heads, records)):
            heads.update(other.heads)
            found.update(other.records)
        order = [path for path, _, _ in self.model.block_layers()]
        return Losses(heads, {path: found[path] for path in dict.fromkeys(order) if path in found})

    def all_totals(self, totals: WindowTotals, ledger: Ledger) -> WindowTotals:
        """The totals of a step over all stages."""
        terms = list(ledger)
        numbers = {term: number for number, term in enumerate(terms)}
        own = {
            "sums": {numbers[term]: value for term, value in totals.sums.items()},
            "loads": totals.loads,
            "dropped": totals.dropped,
            "balancer_tallies": totals.balancer_tallies,
            "tallies": totals.tallies,
            "metrics": totals.metrics,
            "paths": {role: list(ways) for role, ways in self.model.kernels_used().ran.items()},
        }
        merged = WindowTotals()
        for other in self._gathered(own):
            for number, value in other["sums"].items():
                merged.sums[terms[number]] = value
            merged.loads.update(other["loads"])
            merged.balancer_tallies.update(other["balancer_tallies"])
            merged.tallies.update(other["tallies"])
            merged.metrics.update(other["metrics"])
            for role, ways in other["paths"].items():
                for way in ways:
                    self.model.kernels_used().note(role, way)
            if other["dropped"] is not None:
                before = merged.dropped
                merged.dropped = other["dropped"] if before is None else before + other["dropped"]
        merged.loads = {
            path: merged.loads[path] for path in self.model.expert_layers() if path in merged.loads
        }
        return merged

    def _gathered(self, own: Any) -> list[Any]:
        """Small values of every stage, in the order of the stages."""
        values: list[Any] = [None] * self.config.stages
        dist.all_gather_object(values, _to(own, torch.device("cpu")), group=self.pipe)
        return [_to(value, self.device) for value in values]

    def exchange_gradients(self, weights: Sequence[NamedParameter]) -> None:
        """Completes the gradients of a step.

        They are added up over the ranks of the stage. Those of weights that the first and the last stage have are added
        up over both, so that both copies are updated alike and stay identical.
        """
        own = [named for named in weights if named.name not in self.model.absent]
        shared = [named for named in own if named.name in self.shared]
        for named in shared:
            if named.parameter.grad is None:
                named.parameter.grad = torch.zeros_like(named.parameter)
        if dist.get_world_size(self.data) > 1 and not self.inner.shards:
            _add_up({named.name: named.parameter for named in own}, self.data)
        self._counted_elsewhere = set()
        if self.ends is not None and self.is_end:
            _add_up({named.name: named.parameter for named in shared}, self.ends)
            if not self.is_first:
                self._counted_elsewhere = {id(named.parameter.grad) for named in shared}

    def gradient_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The L2 norm of the gradients of all stages, the same on every rank."""
        counted = [g for g in gradients if id(g) not in self._counted_elsewhere]
        square = torch.zeros((), device=self.device, dtype=torch.float32)
        if counted:
            wide = [at_least_fp32(gradient) for gradient in counted]
            square = torch.nn.utils.get_total_norm(wide).square()
        found = torch.zeros((), device=self.device, dtype=torch.float64)
        found += square
        dist.all_reduce(found, group=None if self.inner.shards else self.pipe)
        return found.sqrt().to(square.dtype)


def _the_loss(output: Tensor, target: Tensor) -> Tensor:
    """What the last segment returned is the loss."""
    return output


def _stream_like(model: LanguageModel) -> Tensor:
    """The stream of a single token of a model on the meta device: its shape and format."""
    one = torch.zeros(1, 1, dtype=torch.int64, device="meta")
    return model.first_stream(SequenceContext.of(one)).detach()


def _to(value: Any, device: torch.device) -> Any:
    """Nested containers with every tensor on a device, without a gradient."""

    def moved(leaf: Any) -> Any:
        return leaf.detach().to(device) if isinstance(leaf, Tensor) else leaf

    return _pytree.tree_map(moved, value)


def _add_up(weights: Mapping[str, Tensor], group: dist.ProcessGroup) -> None:
    """Adds the gradients of some weights up over ranks that have the same ones, one exchange for each format."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for weight in weights.values():
        if weight.grad is not None:
            by_dtype.setdefault(weight.grad.dtype, []).append(weight.grad)
    for gradients in by_dtype.values():
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
