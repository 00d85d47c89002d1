"""Divides the weights of a model over ranks, by torch's `fully_shard` (FSDP2), and stacks of experts by hand."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from core.contracts.dispatcher import Placement
from core.contracts.errors import ConfigError
from core.contracts.precision import StepState
from core.model.block import Block
from core.model.language_model import LanguageModel
from core.numerics.linear import GroupedLinear, ProductLayer

FORWARD_METHODS = ("hidden", "logits", "decode", "read")
"""Methods of the model beside `forward` that read its weights."""


def check_experts(model: nn.Module, expert_ranks: int) -> None:
    """Checks that the experts of every layer can be divided.

    Raises:
        ConfigError: the first layer whose experts cannot be, and why.
    """
    assert isinstance(model, LanguageModel)
    for path, layer in model.expert_layers().items():
        name = f"the layer {path}.ffn ({layer.label or type(layer).__name__})"
        if layer.experts % expert_ranks:
            raise ConfigError("expert_ranks", f"must divide the {layer.experts} experts of {name}")
        if not layer.dispatchers:
            raise ConfigError("name", f"{name} has no dispatcher, so its experts cannot be divided")
        stacks = list(_stacks(layer))
        if not stacks or any(stack.groups != layer.experts for stack in stacks):
            why = (
                f"the weights of {name} are not one matrix for each of its {layer.experts} experts"
            )
            raise ConfigError("name", why)
        for stack in stacks:
            if any(isinstance(part, StepState) for part in stack.modules()):
                why = f"the precision may keep maxima of each expert of {name} from step to step"
                raise ConfigError("name", f"{why}, and ranks would hold different experts")


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leaves each rank of a mesh its share of the matrices of every stack of experts.

    Args:
        model: a language model on the meta device.
        mesh: the expert ranks, in one dimension.
    """
    assert isinstance(model, LanguageModel)
    for layer in model.expert_layers().values():
        share = layer.experts // mesh.size()
        for stack in _stacks(layer):
            stack.keep_groups(mesh.get_local_rank() * share, share)


def bind_dispatchers(model: nn.Module, mesh: DeviceMesh, ranks_per_node: int) -> None:
    """Tells the dispatcher of every layer on which ranks its experts are.

    Args:
        model: a language model.
        mesh: the expert ranks, in one dimension.
        ranks_per_node: ranks with a fast connection to each other.
    """
    assert isinstance(model, LanguageModel)
    inside = min(ranks_per_node, mesh.size())
    for layer in model.expert_layers().values():
        placement = Placement.even(layer.experts, mesh.size(), inside)
        for dispatcher in layer.dispatchers:
            dispatcher.bind(mesh, placement)


class Sharder:
    """How the weights of a model are divided.

    Each block is a unit: its weights are gathered together when it runs. The rest of each loss head is one, and so is
    the rest of the model, which stays gathered from the forward to the end of the backward, because heads use embedding
    and output again.

    Within a block, weights of products in bf16 are gathered in bf16, and all others in their own format. Outside of
    blocks all weights are gathered in their own format: a gradient with several parts must not be summed up in bf16.
    Inputs are never cast; layers do that.

    Args:
        mesh: all ranks, in one dimension.
        experts_mesh: the ranks that hold the same experts, in one dimension; None: experts are not set apart.
        reshard: whether a block's gathered weights are freed after its forward.
        offload: whether weights are kept on the CPU.
    """

    def __init__(
        self, mesh: DeviceMesh, *, experts_mesh: DeviceMesh | None, reshard: bool, offload: bool
    ) -> None:
        self.mesh = mesh
        self.experts_mesh = experts_mesh
        self.reshard = reshard
        self.policy = OffloadPolicy()
        if offload:
            self.policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        self.offload = offload
        self.whole: set[nn.Parameter] = set()

    def apply(self, model: nn.Module) -> None:
        """Divides every weight of a model."""
        assert isinstance(model, LanguageModel)
        if self.experts_mesh is not None:
            for layer in model.expert_layers().values():
                self._shard_stacks(layer, self.experts_mesh)
        for module in list(model.modules()):
            if isinstance(module, Block):
                self._shard_block(module)
        for _, head in model.loss_heads():
            if any(True for _ in head.parameters()):
                self._unit(head, param_dtype=None)
        self._unit(model, param_dtype=None, reshard=False)
        _prefetch_in_order(model)
        for name in FORWARD_METHODS:
            register_fsdp_forward_method(model, name)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def _shard_stacks(self, layer: nn.Module, mesh: DeviceMesh) -> None:
        """Divides the experts that this rank holds over the ranks that hold the same ones."""
        for stack in _stacks(layer):
            if mesh.size() == 1 and not self.offload:
                self.whole.update(stack.parameters())
                continue
            self._unit(stack, param_dtype=_gathered_format(stack), mesh=mesh)

    def _shard_block(self, block: Block) -> None:
        """Divides a block, and lets all units inside it gather and free their weights with the block."""
        self._divide_block(block)
        for unit in _inner_units(block):
            _move_hooks(unit._get_fsdp_state(), block)

    def _divide_block(self, block: Block) -> None:
        """Divides a block in one unit, or in two if some of its products are in bf16."""
        low: list[nn.Module] = []
        kept: list[nn.Module] = []
        for module in _owners(block):
            target = kept if _gathered_format(module) is None else low
            target.append(module)
        if not low:
            self._unit(block, param_dtype=None)
            return
        mixed = all(not any(True for _ in module.children()) for module in kept)
        if not mixed:
            self._unit(block, param_dtype=None)
            return
        if kept:
            self._unit(kept, param_dtype=None)
        self._unit(block, param_dtype=torch.bfloat16)

    def _unit(
        self,
        modules: nn.Module | list[nn.Module],
        *,
        param_dtype: torch.dtype | None,
        mesh: DeviceMesh | None = None,
        reshard: bool | None = None,
    ) -> None:
        """Makes a module, or several as one, a unit whose weights are gathered in a format; None: in their own."""
        mesh = self.mesh if mesh is None else mesh
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if param_dtype is not None:
            policy = MixedPrecisionPolicy(
                param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        ranks = mesh.size()
        fully_shard(
            modules,  # type: ignore[arg-type]
            mesh=mesh,
            reshard_after_forward=self.reshard if reshard is None else reshard,
            shard_placement_fn=lambda parameter: _axis(parameter, ranks),
            mp_policy=policy,
            offload_policy=self.policy,
            ignored_params=self.whole,
        )


def _inner_units(block: nn.Module) -> list[FSDPModule]:
    """A module of each unit inside a block, in an order that is the same on every rank."""
    found: dict[Any, FSDPModule] = {}
    for module in block.modules():
        if module is not block and isinstance(module, FSDPModule):
            found.setdefault(module._get_fsdp_state(), module)
    return list(found.values())


def _prefetch_in_order(model: LanguageModel) -> None:
    """Starts to gather the next block when a block begins, in the forward and in the backward.

    Without it the gather of a block starts when Python reaches the block, and Python waits in each layer with experts
    between ranks for the counts of rows.
    """
    blocks: list[Any] = list(model.blocks)
    for before, after in pairwise(blocks):
        before.set_modules_to_forward_prefetch([after, *_inner_units(after)])
        after.set_modules_to_backward_prefetch([before, *_inner_units(before)])


def _move_hooks(state: Any, block: nn.Module) -> None:
    """Moves the hooks with which a unit gathers and frees its weights from its own modules to the block around them.

    A hook inside a compiled block cuts the block's graph in two, and under recomputation torch then compiles nothing of
    the block. torch has no public way to place them.

    Args:
        state: what `fully_shard` keeps of the unit.
        block: a module that is itself a unit.
    """
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    block.register_forward_pre_hook(state._pre_forward, prepend=True, with_kwargs=True)
    # Backward passes gather the block before in the order in which these end, so the block itself is the last one.
    block.register_forward_hook(state._post_forward, prepend=True)


def _stacks(layer: nn.Module) -> Iterator[GroupedLinear]:
    """The layers of a layer with experts that hold a matrix for each expert."""
    for module in layer.modules():
        if isinstance(module, GroupedLinear):
            yield module


def _owners(block: nn.Module) -> Iterator[nn.Module]:
    """The modules of a block that own weights and are in no unit yet."""
    for module in block.modules():
        if isinstance(module, FSDPModule):
            continue
        if any(True for _ in module.parameters(recurse=False)):
            yield module


def _gathered_format(module: nn.Module) -> torch.dtype | None:
    """bf16 for a layer whose product has wider weights and bf16 operands; None: the weights' own format."""
    if isinstance(module, ProductLayer) and module.compute_dtype == torch.bfloat16:
        return torch.bfloat16
    return None


def _axis(parameter: Tensor, ranks: int) -> Shard | None:
    """The axis along which a weight is divided: the first, but a matrix's rows if the ranks do not share a stack."""
    if parameter.ndim == 3 and parameter.shape[0] % ranks and parameter.shape[1] % ranks == 0:
        return Shard(1)
    return None
