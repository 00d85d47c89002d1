"""The strategy `pipeline`: groups of layers on different ranks, and micro-batches that pass through them in turn.

How a model is divided into stages and how they run is in the files `pipeline_*.py` beside this one, which need torch.
This file does not, so that errors in a recipe need not wait for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from core.contracts.component import Environment
from core.contracts.errors import ConfigError
from core.contracts.schedule import Schedule
from core.contracts.schema import Child, child, setting
from core.contracts.strategy import StageLayout, StrategyFactory
from plugins.strategies.devices import (
    TIMEOUT,
    TIMEOUT_DOC,
    check_nodes,
    check_timeout,
    device_arguments,
    missing_gpu,
    timeout_of,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from core.contracts.schema import Section
    from core.contracts.training import NamedParameter
    from plugins.strategies.pipeline_run import PipelineRun

SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dual_pipe_v")
"""Schedules of torch that compute the gradients of weights apart from those of inputs."""

WHY_NOT_SPLIT = (
    "must be 1f1b or interleaved_1f1b: this schedule splits the backward, which counts weights that are used at two "
    "chained places twice in torch without the fix of pytorch #180952, and its runs have not been compared with one "
    "process"
)
"""Why such a schedule is refused."""


class Pipeline(StrategyFactory):
    """Divides the blocks over stages, each on its own ranks, and runs the micro-batches of a step by 1F1B.

    The first stage has the embedding; the last one the final norm, the output and the loss heads, and a copy of the
    embedding if the output or a head reads it. Only the residual stream and its gradient travel between stages. The
    ranks of one stage share its work as the strategy `inner` says.
    """

    paper = "PipeDream (arXiv 2006.09503), section 2; Megatron-LM (arXiv 2104.04473), section 2.2"
    example = {"name": "pipeline", "stages": 2}
    saves_shards = False

    @dataclass(kw_only=True)
    class Config:
        """The stages, their schedule, and how the ranks of one stage share its work."""

        stages: int = setting(doc="groups of ranks that the layers are divided over")
        schedule: str = setting(
            "1f1b",
            doc="order of forwards and backwards; 1f1b, or interleaved_1f1b with several chunks for each stage",
        )
        chunks: int = setting(1, doc="groups of following blocks that each stage holds")
        layers: list[int] | None = setting(
            None, doc="blocks of each chunk, from the first to the last one; null: divided evenly"
        )
        inner: Child = child(
            "strategy",
            {"name": "single"},
            doc="how the ranks of one stage share its work",
            outer=True,
        )
        nodes: int = setting(1, doc="machines, with equally many processes each")
        accelerator: Literal["auto", "cpu", "cuda"] = setting(
            "auto", doc="auto: GPUs if there are any"
        )
        timeout_minutes: float = setting(TIMEOUT, doc=TIMEOUT_DOC)

        def inner_ranks(self) -> int:
            """The ranks of each stage."""
            return int(self.inner.component.ranks_of(self.inner.config))

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for stages, schedules and inner strategies that cannot work together."""
            if self.stages < 2:
                raise ConfigError("stages", "must be at least 2")
            self._check_schedule()
            self._check_inner()
            check_nodes(self.nodes, self.stages * self.inner_ranks())
            check_timeout(self.timeout_minutes)
            self._check_blocks(parent)
            self._check_micro_batches(parent)

        def _check_schedule(self) -> None:
            if self.schedule in SPLIT_BACKWARD:
                raise ConfigError("schedule", WHY_NOT_SPLIT)
            if self.schedule not in ("1f1b", "interleaved_1f1b"):
                raise ConfigError("schedule", "must be 1f1b or interleaved_1f1b")
            if self.schedule == "1f1b" and self.chunks != 1:
                raise ConfigError("chunks", "must be 1 with the schedule 1f1b")
            if self.schedule != "1f1b" and self.chunks < 2:
                raise ConfigError("chunks", "must be at least 2 with the schedule interleaved_1f1b")

        def _check_inner(self) -> None:
            component = self.inner.component
            if issubclass(component, Pipeline):
                raise ConfigError("inner", "must be another strategy than pipeline")
            if component.shards and self.chunks > 1:
                why = f"must be 1f1b with inner {self.inner.name}: its exchange of gradients knows one last micro-batch"
                raise ConfigError("schedule", why)
            if getattr(self.inner.config, "offload", False):
                raise ConfigError(
                    "inner", "must not set offload: stages keep their weights on their devices"
                )
            if component.nodes_of(self.inner.config) != 1:
                raise ConfigError("inner", "must have 1 node: strategy.nodes says how many")

        def _check_blocks(self, parent: Any) -> None:
            parts = self.stages * self.chunks
            kinds = getattr(getattr(parent, "model", None), "blocks", None)
            if kinds is not None:
                blocks = sum(kind.count for kind in kinds.values())
                if parts > blocks:
                    key = "stages" if self.chunks == 1 else "chunks"
                    why = f"stages x chunks = {parts} must be at most the model's {blocks} blocks"
                    raise ConfigError(key, why)
                if self.layers is not None and sum(self.layers) != blocks:
                    raise ConfigError("layers", f"must add up to the model's {blocks} blocks")
            if self.layers is not None and (len(self.layers) != parts or min(self.layers) < 1):
                why = f"must have stages x chunks = {parts} numbers, each at least 1"
                raise ConfigError("layers", why)

        def _check_micro_batches(self, parent: Any) -> None:
            batch = getattr(parent, "batch", None)
            if batch is None:
                return
            if isinstance(batch.accumulate, Schedule):
                raise ConfigError("stages", "need batch.accumulate to be a number, not a schedule")
            count = int(batch.accumulate)
            if count < self.stages:
                why = f"must be at most batch.accumulate = {count}, the micro-batches of a step"
                raise ConfigError("stages", why)
            if self.chunks > 1 and count % self.stages:
                why = f"must divide batch.accumulate = {count} with the schedule interleaved_1f1b"
                raise ConfigError("stages", why)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.inner: StrategyFactory = config.inner.component(config.inner.config)
        self._run: PipelineRun | None = None

    @property
    def run(self) -> "PipelineRun":
        """The stages of this process, once `parallelize` has been called."""
        assert self._run is not None
        return self._run

    @classmethod
    def ranks_of(cls, config: Any) -> int:
        """The number of processes: stages x ranks of each."""
        return int(config.stages * config.inner_ranks())

    @classmethod
    def divides_weights_of(cls, config: Any) -> bool:
        """Whether the inner strategy divides weights."""
        return bool(config.inner.component.divides_weights_of(config.inner.config))

    @classmethod
    def data_ranks_of(cls, config: Any) -> int:
        """The ranks of one stage."""
        return int(config.inner_ranks())

    @classmethod
    def check_recipe(cls, config: Any, recipe: Any) -> None:
        """Raises `ConfigError` for averages of weights, or a precision whose products depend on what ran before."""
        for section in recipe.callbacks:
            if section.component.average is not None:
                why = f"cannot be pipeline with the callback {section.name}: averages need all weights on each rank"
                raise ConfigError("name", why)
        precision = recipe.precision
        if "remembers_products" in precision.component.capabilities_of(precision.config):
            why = f"cannot be pipeline with precision {precision.name} as it is set: a repeated product differs"
            raise ConfigError("name", why)

    @classmethod
    def requires(cls, config: Any, environment: Environment) -> str | None:
        """The sentence that GPUs are missing, where `accelerator` is cuda."""
        return missing_gpu(config, environment)

    def trainer_arguments(self) -> dict[str, Any]:
        """The Trainer's arguments."""
        from plugins.strategies.pipeline_training import PipelineStrategy

        config = self.config
        devices = device_arguments(
            config.accelerator, ranks=self.ranks_of(config), nodes=config.nodes
        )
        return {**devices, "strategy": PipelineStrategy(self, timeout=timeout_of(config))}

    def check_model(self, model: "nn.Module") -> None:
        """Raises `ConfigError` for a head that reads the state after a block of another stage than the last one."""
        from plugins.strategies.pipeline_stages import check_heads, segments_of

        check_heads(model, segments_of(model, self.config))
        self.inner.check_model(model)

    @classmethod
    def stages_of(
        cls, config: Any, model: "nn.Module", micro_batches: int
    ) -> list[StageLayout] | None:
        """The modules of each stage, and the micro-batches that are in flight there by the schedule."""
        from plugins.strategies.pipeline_stages import held_modules, in_flight, segments_of

        segments = segments_of(model, config)
        found: list[StageLayout] = []
        for stage in range(config.stages):
            held = held_modules(model, segments, stage)  # type: ignore[arg-type]
            found.append(StageLayout(held, in_flight(config, stage, micro_batches)))
        return found

    def mesh_dims(self) -> dict[str, int]:
        """The dimensions stages x those of the inner strategy; the ranks of one stage follow each other."""
        return {"stages": self.config.stages, **self.inner.mesh_dims()}

    def data_group(self, mesh: "DeviceMesh") -> "ProcessGroup":
        """The ranks of this stage, which read different data."""
        dims = tuple(self.inner.mesh_dims())
        if len(dims) == 1:
            group: ProcessGroup = mesh[dims[0]].get_group()
        else:
            group = mesh[dims]._flatten("all").get_group()
        return group

    def expert_group(self, mesh: "DeviceMesh") -> "ProcessGroup | None":
        """The ranks over which the inner strategy divides experts."""
        return self.inner.expert_group(mesh)

    @classmethod
    def expert_layout_of(cls, config: Any) -> tuple[int, int] | None:
        """The layout of the inner strategy."""
        found: tuple[int, int] | None = config.inner.component.expert_layout_of(config.inner.config)
        return found

    def replaced_dispatcher(self) -> "Section | None":
        """The dispatcher of the inner strategy."""
        return self.inner.replaced_dispatcher()

    def parallelize(self, model: "nn.Module", mesh: "DeviceMesh") -> None:
        """Leaves this rank the layers of its stage, which the inner strategy may divide over the stage's ranks."""
        from plugins.strategies.pipeline_run import PipelineRun

        self._run = PipelineRun(model, mesh, self)

    def gradient_scale(self, ranks: int) -> float:
        """1, because gradients are added up."""
        return 1.0

    def run_window(self, work: Any) -> None:
        """Runs the micro-batches through the stages by the schedule."""
        self.run.run_window(work)

    def run_forward(self, model: "nn.Module", context: Any) -> Any:
        """Runs one micro-batch forwards through all stages; in a process that has the whole model, through that."""
        if self._run is None:
            return model(context)
        return self._run.run_forward(context)

    def all_losses(self, losses: Any) -> Any:
        """Gathers the losses and records of a micro-batch over the stages."""
        return losses if self._run is None else self._run.all_losses(losses)

    def all_totals(self, totals: Any, ledger: Any) -> Any:
        """Gathers the totals of a step over the stages."""
        return self.run.all_totals(totals, ledger)

    def exchange_gradients(self, weights: "Sequence[NamedParameter]") -> None:
        """Adds gradients up over the ranks of the stage, and those of weights that two stages have over both."""
        self.run.exchange_gradients(weights)

    def gradient_norm(self, gradients: "Sequence[Tensor]") -> "Tensor":
        """The norm over all stages; a weight that two stages have counts once."""
        return self.run.gradient_norm(gradients)
