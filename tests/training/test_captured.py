"""Steps that are replayed as a graph are the same steps: every number that differs between them is read anew.

Without a GPU a stand-in replays: it calls the captured function again and writes the results and the gradients where
those of the first call are, as a CUDA graph does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lab import Lab, assert_same
from test_window import padded
from torch.utils._pytree import tree_leaves

from core.assemble import build
from core.contracts.errors import UserError
from core.data.batch import Batch
from core.training.captured import CapturedSteps, Graph, StepResults, why_not_captured
from core.training.module import TrainingModule

CUDA = torch.cuda.is_available()
RECIPE = (
    "model.heads.mtp={name: mtp, depth: 1, weight: {start: 0.5, segments: [{shape: linear, to: 0.1, until: 1.0}]}}",
    "model.blocks.moe.ffn.balance=[{name: bias, rate: 0.01}, {name: sequence, alpha: 0.1}]",
)


class StandIn(Graph):
    """Replays by calling the function again; results and gradients stay where they are."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters

    def capture(self, function: Callable[[], StepResults]) -> None:
        self.function = function
        self.results = function()
        self.gradients = [parameter.grad for parameter in self.parameters]

    def replay(self) -> None:
        new = self.function()
        for parameter, own in zip(self.parameters, self.gradients, strict=True):
            if own is not None:
                assert parameter.grad is not None
                own.copy_(parameter.grad)
            parameter.grad = None  # a graph writes into memory, and sets nothing in Python
        for own, value in zip(_tensors(self.results), _tensors(new), strict=True):
            own.copy_(value)


def _tensors(results: StepResults) -> list[torch.Tensor]:
    return [*tree_leaves(dict(vars(results.totals))), *results.counts.values()]


class Captured(L.Callback):
    """Lets a module replay its steps with the stand-in, and keeps what every step logged."""

    def __init__(self) -> None:
        self.values: list[dict[str, Any]] = []
        self.loads: list[dict[str, torch.Tensor]] = []
        self.graphs = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def run(batches: Any, coefficients: Any) -> StepResults:
            results: StepResults = pl_module._run_window(
                batches, pl_module.plan.progress(0), coefficients
            )
            return results

        parameters = list(pl_module.model.parameters())

        def graph() -> StandIn:
            self.graphs += 1
            return StandIn(parameters)

        pl_module.captured = CapturedSteps(run, parameters, graph)


class Values(L.Callback):
    """Keeps what every step logged, without copies."""

    def __init__(self) -> None:
        self.values: list[dict[str, Any]] = []
        self.loads: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(dict(pl_module.step_values))
        self.loads.append(pl_module.step_load)


def windows() -> list[list[Batch]]:
    """Steps of two shapes, one of them of two micro-batches, with padding that differs."""
    lengths = [[16, 9], [3, 16], [16, 16], [0, 5]]
    found = [
        [padded(one, seed=2 * i), padded(one[::-1], seed=2 * i + 1)]
        for i, one in enumerate(lengths)
    ]
    return [*found, [padded([12, 7], seed=20)], [padded([2, 15], seed=21)]]


def state(module: TrainingModule) -> Any:
    optimizer: Any = module.trainer.optimizers[0]
    return {"model": module.model.state_dict(), "optimizer": optimizer.state_dict()}


def test_replayed_steps_are_the_same_bits(lab: Lab) -> None:
    plain, replayed, captured = Values(), Values(), Captured()
    one = lab.train(*RECIPE, windows=windows(), callbacks=[plain])
    two = lab.train(*RECIPE, windows=windows(), callbacks=[captured, replayed])
    assert captured.graphs == 2
    assert_same(state(two), state(one))
    assert_same(replayed.values, plain.values)
    assert_same(replayed.loads, plain.loads)


def test_a_run_on_a_cpu_says_that_graphs_need_a_gpu(lab: Lab, tmp_path: Path) -> None:
    if CUDA:
        pytest.skip("this machine has a GPU")
    result = lab.command(
        "fit", lab.file, "compile=true", "cuda_graph=true", "--out", tmp_path / "run"
    )
    assert result.code == 2
    assert "cuda_graph = true: the run is on a CPU, and CUDA graphs need a GPU" in result.err


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["cuda_graph=true"], "must be false unless compile is true"),
        (
            ["cuda_graph=true", "compile=true", "strategy={name: ddp, ranks: 2}"],
            "must be false under strategy ddp",
        ),
    ],
)
def test_what_cannot_be_captured_is_refused(lab: Lab, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        lab.recipe(*overrides)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["precision.name=bf16"], None),
        (["precision.name=fp32"], "multiplies in float32, which waits for the device"),
        (
            [
                "precision.name=bf16",
                "model.blocks.moe.ffn.token_dropping={devices: 4, capacity_factor: 1.0}",
            ],
            "cannot trace as one graph",
        ),
        (
            ["precision.name=bf16", "model.blocks.moe.ffn.router={name: gshard}"],
            "cannot trace as one graph",
        ),
    ],
)
def test_models_that_cannot_be_captured_are_known_before_a_run(
    lab: Lab, overrides: list[str], sentence: str | None
) -> None:
    model = build(lab.recipe("model.blocks.moe.ffn.balance=[]", *overrides), device="meta")
    why = why_not_captured(model)
    if sentence is None:
        assert why is None
    else:
        assert why is not None
        assert sentence in why
