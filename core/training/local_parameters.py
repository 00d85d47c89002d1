"""The weights, or the parts of divided weights, that this rank owns and updates."""

from collections.abc import Collection

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import clip_grads_with_norm_

from core.contracts.training import NamedParameter
from core.model.parameters import named_parameters
from core.numerics.part_exchange import local_tensor
from core.training.weight_shards import WeightShard

CLIP_EPS = 1e-6
"""What torch adds to the norm before it divides by it."""


class LocalParameters:
    """The weights that this rank updates: those of the model, or the parts that it owns where they are divided.

    Frozen weights are not among them.

    Optimizers work on these parts as on plain tensors, so that their states and their order are the same under every
    strategy.

    Args:
        model: a language model, after its weights have been divided.
    """

    def __init__(self, model: nn.Module) -> None:
        self.named: list[NamedParameter] = []
        self._sharded: list[tuple[nn.Parameter, Tensor]] = []
        for named in named_parameters(model):
            weight = named.parameter
            if not weight.requires_grad:  # frozen
                continue
            if isinstance(weight, DTensor):
                part = local_tensor(weight)
                self._sharded.append((weight, part))  # type: ignore[arg-type]
                shard = WeightShard(weight) if _divides_matrices(weight) else None
                named = NamedParameter(named.name, part, named.role, named.kind, shard)
            self.named.append(named)

    def tensors(self) -> list[Tensor]:
        """The weights or parts, in the order of the model."""
        return [named.parameter for named in self.named]

    def take_gradients(self) -> None:
        """Gives each part its part of the gradient."""
        for weight, part in self._sharded:
            part.grad = None if weight.grad is None else local_tensor(weight.grad)

    def freeze_others(self, learning: Collection[str] | None) -> None:
        """Forgets the gradients of all weights but some, so that optimizers leave those and their states as they are.

        Args:
            learning: names of the weights that are updated; None: of all.
        """
        if learning is None:
            return
        for named in self.named:
            if named.name not in learning:
                named.parameter.grad = None

    def clear_gradients(self) -> None:
        """Forgets the gradients of divided weights; optimizers forget those of parts and of whole weights."""
        for weight, _ in self._sharded:
            weight.grad = None

    def gradients(self) -> list[Tensor]:
        """All gradients."""
        return [tensor.grad for tensor in self.tensors() if tensor.grad is not None]

    def clip_gradients(self, largest: float | None, norm: Tensor) -> None:
        """Scales the gradients down if their norm is larger than `largest`; None: never.

        Args:
            largest: the norm that they may have at most.
            norm: the global norm, over all ranks.
        """
        if largest is None or largest / (norm + CLIP_EPS) >= 1:  # torch would multiply by 1
            return
        clip_grads_with_norm_(self.tensors(), largest, norm)


def _divides_matrices(weight: DTensor) -> bool:
    """Whether a matrix of the weight is on several ranks; a stack may be divided between its matrices instead."""
    axes = [place.dim for place in weight.placements if isinstance(place, Shard)]
    return any(axis >= weight.ndim - 2 for axis in axes)


def local_state(module: nn.Module) -> dict[str, object]:
    """The state dict of a module with the part of each divided tensor that this rank owns."""
    state = module.state_dict()
    return {name: local_tensor(v) if isinstance(v, Tensor) else v for name, v in state.items()}
