"""The forwards and backwards of an optimizer step as one CUDA graph, for models so small that the host is the limit.

A graph is captured for the shapes of a step's batches at its first step, and replayed at every later one. What it reads
has fixed addresses: copies of the batches, the coefficients of the loss terms, weights, selection biases. What it
computes has fixed addresses too; gradients are read there, and everything else is copied before the next replay.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from core.contracts.errors import UserError
from core.data.batch import Batch
from core.model.block import Block
from core.model.language_model import LanguageModel
from core.model.ledger import Term
from core.numerics.grouped import waits_on_gpu
from core.numerics.linear import GroupedLinear
from core.training.totals import WindowTotals

WARM_UPS = 3
"""Runs before a capture, in which libraries and the compiler do what they do only once."""

Coefficients = Mapping[Term, Tensor]
"""The factor of each loss term, a scalar of fp64."""


@dataclass(frozen=True)
class StepResults:
    """The results of the forwards and backwards of a step, beside the gradients.

    Args:
        totals: what the forwards recorded, over all ranks.
        counts: each term's denominator over the window.
    """

    totals: WindowTotals
    counts: dict[Term, Tensor]

    def copied(self) -> "StepResults":
        """The same results in memory of their own."""
        fields = tree_map_only(Tensor, torch.clone, dict(vars(self.totals)))
        counts = {term: count.clone() for term, count in self.counts.items()}
        return StepResults(WindowTotals(**fields), counts)


Run = Callable[[Sequence[Batch], Coefficients], StepResults]
"""The forwards and backwards of a step; gradients are added to those of the weights."""


class Graph(ABC):
    """Work of a device that is captured once and can be replayed.

    Attributes:
        results: what the captured function returned; every replay writes into it.
    """

    results: StepResults

    @abstractmethod
    def capture(self, function: Callable[[], StepResults]) -> None:
        """Captures the work of a function."""

    @abstractmethod
    def replay(self) -> None:
        """Does the captured work again."""


class CudaGraph(Graph):
    """`torch.cuda.CUDAGraph`, captured after runs on a stream of its own."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, function: Callable[[], StepResults]) -> None:
        """Captures the kernels that a function queues; it must not wait for the device."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph):
            self.results = function()

    def replay(self) -> None:
        """Queues the captured kernels."""
        self._graph.replay()


@dataclass(frozen=True)
class _Captured:
    """One graph, with what it reads and the gradients that it writes."""

    graph: Graph
    batches: list[Batch]
    gradients: list[Tensor | None]


class CapturedSteps:
    """Runs the forwards and backwards of steps as graphs, one for each combination of batch shapes.

    Args:
        run: the forwards and backwards of a step; reads nothing that changes from step to step but its arguments,
            weights and buffers.
        parameters: the weights whose gradients it computes.
        graph: makes a graph.
    """

    def __init__(
        self,
        run: Run,
        parameters: Sequence[nn.Parameter],
        graph: Callable[[], Graph] = CudaGraph,
    ) -> None:
        self._run = run
        self._parameters = list(parameters)
        self._make_graph = graph
        self._captured: dict[Any, _Captured] = {}
        self._terms: list[Term] = []
        self._values: list[float] = []
        self._coefficients: Tensor | None = None

    def __call__(self, batches: Sequence[Batch], coefficients: Mapping[Term, float]) -> StepResults:
        """Runs a step: each weight's `grad` is then the step's gradient, whatever it was before.

        Args:
            batches: the step's micro-batches.
            coefficients: the factor of each loss term in this step.

        Raises:
            UserError: the step cannot be captured on this device.
        """
        factors = self._written(batches[0].tokens_BL.device, coefficients)
        shapes = tuple(_shapes_of(batch) for batch in batches)
        if shapes not in self._captured:
            self._captured[shapes] = self._capture(batches, factors)
        captured = self._captured[shapes]
        for own, given in zip(captured.batches, batches, strict=True):
            _copy(own, given)
        captured.graph.replay()
        for parameter, gradient in zip(self._parameters, captured.gradients, strict=True):
            parameter.grad = gradient
        return captured.graph.results.copied()

    def _written(self, device: torch.device, coefficients: Mapping[Term, float]) -> Coefficients:
        """The coefficients as scalars with fixed addresses; they are copied to the device only where they changed."""
        values = list(coefficients.values())
        if self._coefficients is None:
            self._terms = list(coefficients)
            self._coefficients = torch.zeros(len(values), dtype=torch.float64, device=device)
        assert self._terms == list(coefficients), "the ledger of a model never changes"
        if values != self._values:
            self._coefficients.copy_(torch.tensor(values, dtype=torch.float64))
            self._values = values
        return dict(zip(self._terms, self._coefficients.unbind(), strict=True))

    def _capture(self, batches: Sequence[Batch], coefficients: Coefficients) -> _Captured:
        """Captures a step of these shapes; weights and buffers stay as they are."""
        own = [Batch._make(None if x is None else x.clone() for x in one) for one in batches]
        graph = self._make_graph()

        def work() -> StepResults:
            for parameter in self._parameters:
                parameter.grad = None
            return self._run(own, coefficients)

        try:
            graph.capture(work)
        except (RuntimeError, torch.AcceleratorError) as cause:
            why = str(cause).strip().partition("\n")[0]
            raise UserError(
                f"cuda_graph = true: this model's step cannot be captured ({why}); "
                "cuda_graph=false trains it without a graph"
            ) from cause
        gradients = [parameter.grad for parameter in self._parameters]
        return _Captured(graph, own, gradients)


def _shapes_of(batch: Batch) -> tuple[torch.Size | None, ...]:
    return tuple(None if tensor is None else tensor.shape for tensor in batch)


def _copy(own: Batch, given: Batch) -> None:
    """Copies the tensors of one batch into those of another."""
    for target, source in zip(own, given, strict=True):
        if target is not None and source is not None:
            target.copy_(source, non_blocking=True)


def why_not_captured(model: LanguageModel) -> str | None:
    """The reason, as a sentence, why steps of a model cannot be replayed; None where nothing is known against it.

    A replay repeats what the first step did, so nothing in Python may differ from step to step.
    """
    for path, module in model.named_modules():
        if isinstance(module, Block) and not module.traceable:
            return (
                f"{path} has parts that torch.compile cannot trace as one graph, because they wait for the device "
                "or draw numbers by the step"
            )
        if isinstance(module, GroupedLinear) and waits_on_gpu(module.compute_dtype):
            kind = str(module.compute_dtype).removeprefix("torch.")
            return (
                f"{path} multiplies in {kind}, which waits for the device; precision bf16 does not"
            )
    return None
