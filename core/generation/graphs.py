"""Decoding steps as CUDA graphs: a step is recorded once, and a token then costs what its kernels cost.

A graph repeats the same kernels on the same addresses. So a recorded step has constant shapes, reads its tokens from a
fixed place, finds the lengths of rows on the device, and is valid as long as the weights stay where and what they are.
Recording takes as long as a few steps. Steps belong to caches, so caches are lent to one decoder after the other, with
the graphs that were recorded for them.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from core.contracts.attention import Cache
from core.model.language_model import Decoded, LanguageModel
from core.numerics.linear import ProductLayer

MOST_NEW = 16
"""New tokens of each row up to which a step is recorded; more are a prompt, whose kernels keep a GPU busy."""

CAPACITY_STEP = 256
"""Capacities are multiples of this, so that calls with prompts of similar lengths share their graphs."""

MOST_IDLE = 4
"""Caches with their graphs that are kept for later decoders of a model; those that were used last stay."""

WARM_UP = 2
"""Steps before recording, in which libraries choose their kernels and allocate their workspaces."""

Function = Callable[[], None]
Recorder = Callable[[Function, Function], Function]
"""Records a function and returns one that repeats its work on the device, and none of that on the host.

The second argument undoes what one call of the function did to the caches.
"""


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """A context in which graphs are recorded and kernels started on this GPU; nothing on a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def record_cuda_graph(function: Function, take_back: Function) -> Function:
    """Records a function as a CUDA graph, after a few calls of it; see `Recorder`."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP):
            function()
            take_back()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    take_back()
    replay: Function = graph.replay
    return replay


@dataclass(frozen=True)
class _Step:
    """A recorded step: where its tokens come from, what repeats it, and where its results are."""

    tokens_BL: Tensor
    replay: Function
    results: list[Decoded]


class RecordedSteps:
    """The caches of some rows, and the steps that were recorded with them.

    It holds no reference to the model, whose idle steps are kept only as long as it lives.

    Args:
        caches: one for each block; all can be truncated and advanced.
        capacity: tokens of each row that they hold.
        limit: tokens of each row that the model may read.
        weights: what `fingerprint` says of the model.
        record: records a function.
    """

    def __init__(
        self,
        caches: list[Cache],
        capacity: int,
        limit: int,
        weights: Any,
        record: Recorder,
    ) -> None:
        self.caches = caches
        self.capacity = capacity
        self.limit = limit
        self.weights = weights
        self._record = record
        self._steps: dict[int, _Step] = {}
        self._works = True

    def takes(self, new: int) -> bool:
        """Whether a step of so many new tokens can be replayed."""
        fits = self.caches[0].longest + new <= self.limit
        return self._works and fits and new <= MOST_NEW

    def read(self, model: LanguageModel, tokens_BL: Tensor) -> Decoded:
        """What `LanguageModel.read` returns for new tokens, which the caches then hold."""
        new = tokens_BL.shape[1]
        if new not in self._steps:
            try:
                self._steps[new] = self._recorded(model, tokens_BL)
            except RuntimeError as error:
                self._works = False
                warnings.warn(f"decoding goes on without CUDA graphs: {error}", stacklevel=2)
                return model.read(tokens_BL, self.caches)
        step = self._steps[new]
        step.tokens_BL.copy_(tokens_BL)
        step.replay()
        for cache in self.caches:
            cache.advance(new)
        (decoded,) = step.results
        stream = None if decoded.stream is None else decoded.stream.clone()
        return Decoded(decoded.hidden_BLD.clone(), decoded.logits_BLV.clone(), stream)

    def clear(self) -> None:
        """Empties the caches."""
        self._cut(torch.zeros_like(self.caches[0].lengths, device="cpu"))

    def _recorded(self, model: LanguageModel, tokens_BL: Tensor) -> _Step:
        """Records a step; the caches hold afterwards what they held before."""
        lengths_B = self.caches[0].lengths.clone().cpu()
        own_BL = tokens_BL.clone()
        results: list[Decoded] = []

        def step() -> None:
            results[:] = [model.read(own_BL, self.caches)]

        def take_back() -> None:
            self._cut(lengths_B)

        try:
            self._set_constant_shapes(True)
            with reading_copies(model):
                replay = self._record(step, take_back)
        finally:
            self._set_constant_shapes(False)
            take_back()
        return _Step(own_BL, replay, results)

    def _set_constant_shapes(self, value: bool) -> None:
        for cache in self.caches:
            cache.constant_shapes = value

    def _cut(self, lengths_B: Tensor) -> None:
        """Cuts every row to a length at most."""
        for cache in self.caches:
            cache.truncate(lengths_B)


_idle: WeakKeyDictionary[nn.Module, list[RecordedSteps]] = WeakKeyDictionary()
"""Steps that no decoder has now, by their model."""


def lend_steps(
    borrower: object, model: LanguageModel, rows: int, capacity: int, device: torch.device
) -> RecordedSteps | None:
    """Caches with recorded steps, or with none yet, until the borrower is deleted; the caches are empty.

    Args:
        borrower: who uses them; no one else does meanwhile.
        model: the model in evaluation mode. Its weights must not change while steps are lent.
        rows: rows of the caches.
        capacity: tokens of each row that are needed at least.
        device: where the model computes.

    Returns:
        None where steps cannot be recorded: on other devices than GPUs, and for a model with a layer that needs the
        host (products in FP8, a dispatcher between ranks, a cache of another kind).
    """
    if not is_recordable(model, device):
        return None
    _refresh_copies(model)
    capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
    steps = _take_idle(model, rows, capacity)
    if steps is None:
        caches = model.new_caches(rows, capacity, device)
        if not all(_can_be_replayed(cache) for cache in caches):
            return None
        limit = min(capacity, model.max_length)
        steps = RecordedSteps(caches, capacity, limit, fingerprint(model), record_cuda_graph)
    finalize(borrower, _give_back, ref(model), steps).atexit = False
    return steps


def _take_idle(model: LanguageModel, rows: int, capacity: int) -> RecordedSteps | None:
    """Idle steps of these sizes, emptied; those that were recorded with other weights are dropped."""
    weights = fingerprint(model)
    idle = [steps for steps in _idle.get(model, []) if steps.weights == weights]
    _idle[model] = idle
    for steps in idle:
        if len(steps.caches[0].lengths) == rows and steps.capacity == capacity:
            idle.remove(steps)
            steps.clear()
            return steps
    return None


def _give_back(model: "ref[LanguageModel]", steps: RecordedSteps) -> None:
    """Keeps steps for the next decoder, if the model still lives."""
    owner = model()
    if owner is not None:
        idle = _idle.setdefault(owner, [])
        idle.append(steps)
        del idle[:-MOST_IDLE]


def is_recordable(model: LanguageModel, device: torch.device) -> bool:
    """Whether a step runs on a GPU without the host: plain weights and products, and experts that are all here."""
    if device.type != "cuda":
        return False
    for weight in model.parameters():
        if type(weight) is not nn.Parameter or weight.is_inference():
            return False
    for product in _product_layers(model):
        if not product.is_plain:
            return False
    for layer in model.expert_layers().values():
        for dispatcher in layer.dispatchers:
            if not dispatcher.is_local:
                return False
        properties = layer.routing_properties
        if (
            properties is not None and properties.batch_dependent
        ):  # which tokens are padding then matters
            return False
    return True


_steps_of_optimizers: list[int] = []
"""How many steps the optimizers of this process have taken, since they are counted; empty before."""


def _count_optimizer_steps() -> None:
    """Counts the steps of all optimizers from now on: fused ones leave the versions of weights as they are."""
    if not _steps_of_optimizers:
        _steps_of_optimizers.append(0)
        register_optimizer_step_post_hook(_count_step)


def _count_step(*_: Any) -> None:
    _steps_of_optimizers[0] += 1


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Where the weights are, how often they were written to, and how many steps optimizers have taken.

    Another one means that graphs and copies are of no use. Writes through `data` and through numpy are not noticed.
    """
    _count_optimizer_steps()
    tensors = [*model.parameters(), *model.buffers()]
    places = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    return (_steps_of_optimizers[0], places)


_copied: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()
"""The fingerprint of each model when its weights were last copied in the format of products."""


def _refresh_copies(model: LanguageModel) -> None:
    """Copies all weights in the format of products, unless they are what they were."""
    weights = fingerprint(model)
    if _copied.get(model) == weights:
        return
    for layer in _product_layers(model):
        layer.keep_operand()
    _copied[model] = weights


@contextmanager
def reading_copies(model: nn.Module) -> Iterator[None]:
    """Lets products read the copies of their weights: validation and training never do."""
    layers = _product_layers(model)
    for layer in layers:
        layer.reads_copy = True
    try:
        yield
    finally:
        for layer in layers:
            layer.reads_copy = False


def _product_layers(model: nn.Module) -> list[ProductLayer]:
    """Every product layer of a model."""
    return [module for module in model.modules() if isinstance(module, ProductLayer)]


def _can_be_replayed(cache: Cache) -> bool:
    """Whether a cache can be cut, and advanced without its own work."""
    return cache.truncates and type(cache).advance is not Cache.advance
