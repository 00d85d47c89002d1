"""Strategies that divide the weights over the ranks: `fsdp`, and `expert_parallel` for the experts of MoE layers.

How weights are divided is in `plugins.strategies.sharding`, which needs torch; this file does not, so that errors in a
recipe need not wait for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from core.contracts.component import Environment
from core.contracts.errors import ConfigError
from core.contracts.schema import Child, Section, child, sections_in, setting
from core.contracts.strategy import StrategyFactory
from plugins.strategies.devices import (
    TIMEOUT,
    TIMEOUT_DOC,
    check_nodes,
    check_share,
    check_timeout,
    device_arguments,
    missing_gpu,
    timeout_of,
)

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(kw_only=True)
class ShardedSettings:
    """The keys that both strategies have."""

    nodes: int = setting(1, doc="machines, with equally many processes each")
    accelerator: Literal["auto", "cpu", "cuda"] = setting("auto", doc="auto: GPUs if there are any")
    reshard_after_forward: bool = setting(
        True,
        doc="free a block's gathered weights after its forward and its backward; false: keep them for a whole step",
    )
    offload: bool = setting(False, doc="keep weights and optimizer states in the memory of the CPU")
    timeout_minutes: float = setting(TIMEOUT, doc=TIMEOUT_DOC)


class _Sharded(StrategyFactory):
    """What strategies with divided weights share: FSDP2's exchange, summed gradients, and a norm over all ranks."""

    @classmethod
    def requires(cls, config: Any, environment: Environment) -> str | None:
        """The sentence that GPUs are missing, where `accelerator` is cuda."""
        return missing_gpu(config, environment)

    def trainer_arguments(self) -> dict[str, Any]:
        """The Trainer's arguments."""
        from core.training.sharded import ShardedStrategy

        config = self.config
        ranks = self.ranks_of(config)
        devices = device_arguments(config.accelerator, ranks=ranks, nodes=config.nodes)
        strategy = ShardedStrategy(self, offload=config.offload, timeout=timeout_of(config))
        return {**devices, "strategy": strategy}

    def gradient_scale(self, ranks: int) -> float:
        """1, because FSDP2 is set to add gradients up."""
        return 1.0

    def set_requires_gradient_sync(self, model: "nn.Module", *, required: bool) -> None:
        """Lets FSDP2 exchange gradients in the next backward, or add them up on this rank.

        Weights that stay gathered after a forward stay so until the last backward of their window.
        """
        model.set_requires_gradient_sync(required)  # type: ignore[operator]
        if not self.config.reshard_after_forward:
            model.set_reshard_after_backward(required)  # type: ignore[operator]

    def gradient_norm(self, gradients: "Sequence[Tensor]") -> "Tensor":
        """The norm over all ranks: every number of a gradient is on one rank."""
        from core.training.sharded import norm_over_ranks

        return norm_over_ranks(gradients)


class FullyShardedDataParallel(_Sharded):
    """Divides every weight, its gradient and its optimizer state over all ranks, and gathers a block's when it runs.

    Gathered weights have the format of their products; gradients are summed in the format of the weights.
    """

    paper = "PyTorch FSDP (arXiv 2304.11277); torch's `fully_shard`"
    example = {"name": "fsdp", "ranks": 2}

    @dataclass(kw_only=True)
    class Config(ShardedSettings):
        """The ranks and the kind of device."""

        ranks: int = setting(doc="processes, one device each, over all machines")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` if the ranks cannot share a batch evenly, or the machines the ranks."""
            check_nodes(self.nodes, self.ranks)
            check_timeout(self.timeout_minutes)
            check_share(parent, "ranks", self.ranks)

    def parallelize(self, model: "nn.Module", mesh: "DeviceMesh") -> None:
        """Divides every weight over the mesh, by `fully_shard` of each block, each loss head and the model."""
        from plugins.strategies.sharding import Sharder

        sharder = Sharder(
            mesh,
            experts_mesh=None,
            reshard=self.config.reshard_after_forward,
            offload=self.config.offload,
        )
        sharder.apply(model)


class ExpertParallel(_Sharded):
    """Divides experts over groups of ranks, and everything else over all ranks as `fsdp` does.

    The ranks form a mesh of data ranks x expert ranks; expert ranks of one group follow each other. Each rank reads
    other sequences. A stack of experts is divided over the expert ranks, and each part over the data ranks.
    """

    paper = "DeepSeek-V3 technical report (arXiv 2412.19437), section 3.2; GShard (arXiv 2006.16668), section 3"
    example = {"name": "expert_parallel", "expert_ranks": 2}

    @dataclass(kw_only=True)
    class Config(ShardedSettings):
        """The ranks, and how tokens travel between them."""

        expert_ranks: int = setting(doc="ranks over which the experts of a layer are divided")
        ranks: int | None = setting(
            None, doc="processes, one device each, over all machines; null: expert_ranks"
        )
        ranks_per_node: int | None = setting(
            None, doc="ranks with a fast connection to each other; null: those of one machine"
        )
        dispatcher: Child = child(
            "dispatcher", {"name": "all_to_all"}, doc="replaces the dispatcher of every MoE layer"
        )

        def all_ranks(self) -> int:
            """The number of processes."""
            return self.expert_ranks if self.ranks is None else self.ranks

        def node_ranks(self) -> int:
            """The ranks with a fast connection to each other."""
            if self.ranks_per_node is None:
                return self.all_ranks() // self.nodes
            return self.ranks_per_node

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for sizes that do not divide, and for dispatchers that cannot work together."""
            if self.expert_ranks < 1:
                raise ConfigError("expert_ranks", "must be at least 1")
            ranks = self.all_ranks()
            if ranks < 1 or ranks % self.expert_ranks:
                raise ConfigError(
                    "ranks", f"must be a multiple of expert_ranks = {self.expert_ranks}"
                )
            check_nodes(self.nodes, ranks)
            check_timeout(self.timeout_minutes)
            self._check_ranks_per_node(ranks)
            check_share(parent, "expert_ranks" if self.ranks is None else "ranks", ranks)
            if "between_ranks" not in _capabilities(self.dispatcher):
                why = f"{self.dispatcher.name} works on one device; all_to_all moves tokens between ranks"
                raise ConfigError("dispatcher", why)
            self._check_layers(parent)

        def _check_ranks_per_node(self, ranks: int) -> None:
            inside = self.node_ranks()
            if inside < 1 or ranks % inside:
                raise ConfigError("ranks_per_node", f"must divide the number of ranks, {ranks}")
            if inside % self.expert_ranks and self.expert_ranks % inside:
                why = f"must divide expert_ranks = {self.expert_ranks} or be a multiple of it"
                raise ConfigError("ranks_per_node", why)

        def _check_layers(self, parent: Any) -> None:
            layers = list(_layers_with_experts(parent))
            for layer in layers:
                if layer.config.experts % self.expert_ranks:
                    why = f"must divide the {layer.config.experts} experts of a layer"
                    raise ConfigError("expert_ranks", why)
            for section in sections_in(getattr(parent, "model", None)):
                if section.slot != "dispatcher" or section.name == self.dispatcher.name:
                    continue
                if "replaceable" not in _capabilities(section):
                    why = f"cannot replace {section.name}, the dispatcher of a layer in model"
                    raise ConfigError("dispatcher", why)

    @classmethod
    def ranks_of(cls, config: Any) -> int:
        """The number of processes: `ranks`, or `expert_ranks` if it is null."""
        return int(config.all_ranks())

    @classmethod
    def expert_layout_of(cls, config: Any) -> tuple[int, int]:
        """`expert_ranks`, and those of them that are one node."""
        return config.expert_ranks, min(config.node_ranks(), config.expert_ranks)

    def check_model(self, model: "nn.Module") -> None:
        """Raises `ConfigError` for layers whose experts cannot be divided, or that keep something between steps."""
        from plugins.strategies.sharding import check_experts

        check_experts(model, self.config.expert_ranks)

    def mesh_dims(self) -> dict[str, int]:
        """The dimensions data ranks x expert ranks."""
        experts = self.config.expert_ranks
        return {"data": self.config.all_ranks() // experts, "experts": experts}

    def parallelize(self, model: "nn.Module", mesh: "DeviceMesh") -> None:
        """Divides experts over `experts` and then over `data`, everything else over the whole mesh."""
        from plugins.strategies.sharding import Sharder, bind_dispatchers, shard_experts

        shard_experts(model, mesh["experts"])
        bind_dispatchers(model, mesh["experts"], self.config.node_ranks())
        sharder = Sharder(
            flattened(mesh),
            experts_mesh=mesh["data"],
            reshard=self.config.reshard_after_forward,
            offload=self.config.offload,
        )
        sharder.apply(model)

    def expert_group(self, mesh: "DeviceMesh") -> "ProcessGroup | None":
        """The ranks of the mesh's `experts` dimension."""
        group: ProcessGroup = mesh["experts"].get_group()
        return group


def flattened(mesh: "DeviceMesh") -> "DeviceMesh":
    """All ranks of a mesh in one dimension; of a part of another mesh, those of the part."""
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh

    if mesh.size() < get_world_size():
        part: DeviceMesh = mesh._flatten("all")
        return part
    return init_device_mesh(mesh.device_type, (mesh.size(),), mesh_dim_names=("all",))


def _capabilities(section: Section) -> frozenset[str]:
    found: frozenset[str] = section.component.capabilities_of(section.config)
    return found


def _layers_with_experts(parent: Any) -> Iterator[Section]:
    """The sections of feed-forward layers that have experts."""
    for section in sections_in(getattr(parent, "model", None)):
        if section.slot == "ffn" and getattr(section.config, "experts", None):
            yield section
