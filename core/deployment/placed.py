"""Models that run on physical experts: on one device, or with the experts of each GPU on a rank of its own."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from core.contracts.dispatcher import Placement
from core.contracts.errors import UserError
from core.contracts.ffn import FeedForward
from core.contracts.precision import StepState
from core.contracts.record import Record
from core.deployment.effect import balancedness
from core.deployment.plan import PlacementPlan
from core.model.language_model import LanguageModel
from core.training.ranks import all_reduce_sum

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TALLY = "physical_load"
"""The tally of a layer's record that counts assignments to its physical experts."""


def place(
    model: LanguageModel,
    plan: PlacementPlan,
    *,
    mesh: "DeviceMesh | None" = None,
    name: str = "plan",
) -> LanguageModel:
    """Makes a model run on the physical experts of a plan; the model itself is changed, and can no longer be trained.

    Outputs stay the same up to rounding. A choice of an expert goes to one of its copies, by a hash of the token's
    sequence and position.

    Args:
        model: a trained model, not divided over ranks, in memory of its own; every rank has the same.
        plan: a placement for each of its layers with experts.
        mesh: the ranks, one for each GPU of the plan, in one dimension; each then keeps the experts of its GPU and all
            other weights, and all ranks must run the model at the same time. None: one device has all physical experts.
        name: what an error message calls the plan.

    Returns:
        The model, in evaluation mode.

    Raises:
        UserError: the plan is another model's, or the model cannot run on it. Nothing has changed then, unless a layer
            of another package refuses after those before it were placed.
    """
    check_plan(model, plan, name=name)
    layers = model.expert_layers()
    if mesh is not None:
        _check_ranks(layers, plan, mesh, name)
    model.eval().requires_grad_(False)
    for path, layer in layers.items():
        expert_P = plan.layers[path].expert_P
        held = range(len(expert_P))
        if mesh is not None:
            slots = len(expert_P) // plan.gpus
            first = mesh.get_local_rank() * slots
            held = range(first, first + slots)
        try:
            layer.replicate(expert_P, held)
        except NotImplementedError as cause:
            raise UserError(f"{name}: {path} cannot run on physical experts: {cause}") from cause
        if mesh is not None:
            inside = plan.gpus // plan.nodes
            for dispatcher in layer.dispatchers:
                dispatcher.bind(mesh, Placement.even(len(expert_P), plan.gpus, inside))
    return model


def check_plan(model: LanguageModel, plan: PlacementPlan, *, name: str = "plan") -> None:
    """Checks that a plan has a placement for each layer of a model, and that each layer can take it.

    Args:
        model: the model, on any device.
        plan: the plan.
        name: what an error message calls it.

    Raises:
        UserError: the plan is another model's, or the model cannot run on it.
    """
    layers = model.expert_layers()
    if not layers:
        raise UserError(f"{name}: the model has no experts")
    for path in plan.layers:
        if path not in layers:
            raise UserError(
                f"{name}: has a layer {path}, and the layers with experts of this model are {', '.join(layers)}: "
                "is the plan another model's?"
            )
    for path, layer in layers.items():
        if path not in plan.layers:
            raise UserError(f"{name}: has no layer {path}, which has experts in this model")
        placement = plan.layers[path]
        if placement.experts != layer.experts:
            raise UserError(
                f"{name}: {path} has {placement.experts} experts, and {layer.experts} in this model: is the plan "
                "another model's?"
            )
        if type(layer).replicate is FeedForward.replicate:
            raise UserError(f"{name}: {path} ({layer.label}) cannot run on physical experts")
        if layer.is_replicated:
            raise UserError(f"{name}: the model has a placement already: load it again for another")
        if any(isinstance(part, StepState) for part in layer.modules()):
            raise UserError(
                f"{name}: the precision of {path} keeps maxima of each expert from step to step, so copies are not "
                "possible"
            )


def _check_ranks(
    layers: Mapping[str, FeedForward], plan: PlacementPlan, mesh: "DeviceMesh", name: str
) -> None:
    """Raises `UserError` unless there is a rank for each GPU, and dispatchers work between them."""
    if mesh.ndim != 1 or mesh.size() != plan.gpus:
        raise UserError(
            f"{name}: has gpus = {plan.gpus}, and there are {mesh.size()} ranks: must be equal"
        )
    for path, layer in layers.items():
        for dispatcher in layer.dispatchers:
            if "between_ranks" not in dispatcher.capabilities:
                raise UserError(
                    f"{name}: the dispatcher {dispatcher.label} of {path} works on one device; all_to_all moves "
                    "tokens between ranks"
                )


class PhysicalLoads:
    """Counts what physical experts receive, in forwards that return records: evaluation does, decoding does not.

    Args:
        model: a placed model.
        plan: its plan.
    """

    def __init__(self, model: LanguageModel, plan: PlacementPlan) -> None:
        self.plan = plan
        self._layers = model.expert_layers()
        self._counted: dict[str, Tensor] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """A context in which forwards are counted."""
        handles = []
        for path, layer in self._layers.items():
            handles.append(layer.register_forward_hook(self._hook(path)))
        try:
            with torch.compiler.set_stance("force_eager"):  # hooks would be compiled otherwise
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Any:
        def hook(layer: nn.Module, given: Any, result: tuple[Tensor, Record | None]) -> None:
            record = result[1]
            if record is None or TALLY not in record.tallies:
                return
            load_P = record.tallies[TALLY]
            before_P = self._counted.get(path)
            self._counted[path] = load_P if before_P is None else before_P + load_P

        return hook

    def of_experts(self) -> dict[str, list[int]]:
        """The load of each physical expert by layer, over all ranks; all of them call it together."""
        found = {}
        for path, placement in self.plan.layers.items():
            nothing = torch.zeros(len(placement.expert_P), dtype=torch.int64)
            load_P = self._counted.get(path, nothing)
            found[path] = all_reduce_sum(load_P).tolist()
        return found

    def of_gpus(self) -> dict[str, list[int]]:
        """The load of each GPU by layer, over all ranks; all of them call it together."""
        found = {}
        for path, load_P in self.of_experts().items():
            slots = len(load_P) // self.plan.gpus
            found[path] = [sum(load_P[at : at + slots]) for at in range(0, len(load_P), slots)]
        return found

    def document(self) -> dict[str, Any]:
        """The loads and balancedness of each layer's GPUs, for a JSON document."""
        loads = self.of_gpus()
        return {
            "gpus": self.plan.gpus,
            "layers": list(loads),
            "load": list(loads.values()),
            "balancedness": [balancedness(load_G) for load_G in loads.values()],
        }
