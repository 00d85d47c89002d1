"""Stages of layers compute what one process computes, save what it saves, and refuse what they cannot do.

The exactness is that of `test_exact_ranks.py`: in fp64 to 1e-9 losses, gradients, gradient norm, bias updates, loads,
logged values, validation, weights and optimizer state after the steps, and the text that the model writes. Gradients of
weights that two stages have are compared bit by bit.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exact_cases import STRATEGIES, Case, compare
from lab import Lab, last_checkpoint, rows
from observed_run import differences
from rank_runs import assert_same_end, cut_after, fit_on_ranks
from test_ranks import EVERY_SCOPE
from torch import Tensor, nn
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from core.assemble import build
from core.contracts.errors import UserError
from core.contracts.schedule import Progress
from core.run.evaluation import evaluate
from core.run.loading import load
from core.testing.forked_ranks import on_ranks
from core.training.launchers import Launch
from core.training.ranks import all_reduce_sum, max_over_ranks, rank_and_world, set_data_group
from core.training.totals import WindowTotals, call_on_step_end
from plugins.strategies.pipeline import WHY_NOT_SPLIT
from plugins.strategies.pipeline_stages import even, held_modules, segments_of

FOUR_BLOCKS = "model.blocks.moe.count=3"
TIED = "model.tied_embedding=true"
RECOMPUTE = "recompute.blocks=[dense, moe]"
TWO_DEPTHS = "model.heads.mtp.depth=2"
NO_MTP = "model.heads.mtp=null"
MIXED = (
    "model.blocks.moe.ffn.balance=[{name: bias, rate: 0.01}, {name: sequence, alpha: 0.01}, "
    "{name: batch, alpha: 0.01}, {name: micro_batch, alpha: 0.01}, {name: z_loss}]"
)
TWO = "{name: pipeline, stages: 2}"
FOUR = "{name: pipeline, stages: 4}"
INTERLEAVED = "{name: pipeline, stages: 2, schedule: interleaved_1f1b, chunks: 2}"
DATA = "{name: pipeline, stages: 2, inner: {name: ddp, ranks: 2}}"
SHARDED = "{name: pipeline, stages: 2, inner: {name: fsdp, ranks: 2}}"
EXPERTS = "{name: pipeline, stages: 2, inner: {name: expert_parallel, expert_ranks: 2}}"

CASES: list[tuple[int, str, int, tuple[str, ...]]] = [
    (2, TWO, 2, ()),
    (2, TWO, 4, (TIED, RECOMPUTE)),
    (2, "{name: pipeline, stages: 2, layers: [1, 3]}", 2, (NO_MTP,)),
    (2, TWO, 2, (MIXED,)),
    (2, TWO, 2, ("model.blocks.moe.ffn.balance=[{name: quantile}]",)),
    (2, TWO, 2, ("optimizer={name: muon, lr: 0.01}",)),
    (2, TWO, 2, ("model.residual={name: hyper_connections, streams: 2}",)),
    (2, TWO, 2, ("freeze=[embedding.weight, 'blocks.0.*']",)),
    (2, TWO, 2, EVERY_SCOPE[2:4]),
    (2, INTERLEAVED, 2, (TIED,)),
    (2, INTERLEAVED, 4, (TWO_DEPTHS, RECOMPUTE)),
    (4, FOUR, 4, ()),
    (4, FOUR, 4, (TIED, RECOMPUTE, TWO_DEPTHS)),
    (4, FOUR, 8, (NO_MTP, TIED)),
    (4, DATA, 2, (TIED,)),
    (4, DATA, 4, (MIXED,)),
    (4, DATA.replace("stages: 2", "stages: 2, schedule: interleaved_1f1b, chunks: 2"), 2, ()),
    (4, SHARDED, 2, ()),
    (4, SHARDED, 4, (TIED, RECOMPUTE)),
    (4, EXPERTS, 2, ()),
    (4, EXPERTS, 4, (TIED, RECOMPUTE, TWO_DEPTHS)),
]


def check(lab: Lab, monkeypatch: pytest.MonkeyPatch, chosen: list[Any]) -> None:
    """Trains cases of as many ranks, and compares every rank with one process."""
    world = chosen[0][0]
    cases: list[Case] = []
    for number, (_, strategy, accumulate, more) in enumerate(chosen):
        monkeypatch.setitem(STRATEGIES, f"pipeline {number}", strategy)
        cases.append(Case(f"pipeline {number}", accumulate, (FOUR_BLOCKS, *more)))

    def work(rank: int) -> list[dict[str, Any]]:
        launch = Launch(rank, world, "torchrun", port=1, local_rank=rank)
        return [asdict(case.run(lab, launch)) for case in cases]

    with tempfile.TemporaryDirectory() as folder:
        by_rank = on_ranks(work, Path(folder), world=world)
    for index, case in enumerate(cases):
        alone = asdict(case.run(lab, None))
        assert alone["gradients"]
        for rank, seen in enumerate(results[index] for results in by_rank):
            where = f"{chosen[index][1]}, {case}, rank {rank}"
            compare(where, alone, seen, is_first=rank == 0)


def test_two_stages_are_exact(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tied embedding, which the multi-token module reads too: its gradient comes from both stages."""
    check(lab, monkeypatch, [(2, TWO, 2, (TIED,))])


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 4])
def test_every_pipeline_is_exact(lab: Lab, monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    check(lab, monkeypatch, [case for case in CASES if case[0] == world])


@pytest.fixture(scope="module")
def runs(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same run on one process and on two stages."""
    folder = tmp_path_factory.mktemp("pipeline")
    lab.fit(folder / "one", *WHOLE_RUN)
    fit_on_ranks(lab, folder / "stages", *WHOLE_RUN, f"strategy={TWO}")
    return folder / "one", folder / "stages"


WHOLE_RUN = ("precision.name=fp64", TIED, "model.blocks.moe.count=2")


@pytest.mark.full
def test_a_run_on_stages_leaves_the_results_of_one_process(
    lab: Lab, runs: tuple[Path, Path]
) -> None:
    """Its checkpoints, rows, loads, text and summary; so it is loaded and validated by one process too."""
    one, stages = runs
    assert_same_end(one, stages)
    assert (one / "sample.txt").read_text() == (stages / "sample.txt").read_text()
    own, other = (json.loads((run / "summary.json").read_text()) for run in runs)
    assert own.keys() == other.keys()
    assert own["precision_paths"] == other["precision_paths"]
    for key in ("val_loss", "max_vio_global", "mtp_acceptance", "params_total", "flops_per_token"):
        assert own[key] == pytest.approx(other[key], rel=1e-9), key
    checkpoint = last_checkpoint(stages)["state_dict"]
    newest = sorted((stages / "checkpoints").glob("step-*"))[-1]
    for name, tensor in load(newest).state_dict().items():
        assert torch.equal(tensor, checkpoint[f"model.{name}"]), name
    measured = evaluate(newest, say=lambda _: None)
    assert measured["val_loss"] == pytest.approx(other["val_loss"], rel=1e-9)


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "strategy"), [(2, TWO), (4, DATA), (4, EXPERTS)], ids=["single", "ddp", "experts"]
)
def test_a_run_on_stages_resumes_to_the_bit(
    lab: Lab, tmp_path: Path, ranks: int, strategy: str
) -> None:
    options = (*WHOLE_RUN, f"strategy={strategy}")
    fit_on_ranks(lab, tmp_path / "whole", *options, ranks=ranks)
    cut = cut_after(tmp_path / "whole", 5, tmp_path / "cut")
    fit_on_ranks(lab, cut, *options, ranks=ranks, resume=True)
    one, other = last_checkpoint(tmp_path / "whole"), last_checkpoint(cut)
    for part in ("state_dict", "optimizer_states"):
        assert not differences(one[part], other[part])
    for name, tensor in one["state_dict"].items():
        if isinstance(tensor, Tensor):
            assert torch.equal(tensor, other["state_dict"][name]), name
    assert len(rows(cut)) == len(rows(tmp_path / "whole"))


@pytest.mark.full
def test_a_run_on_stages_continues_on_one_process_and_back(
    lab: Lab, tmp_path: Path, runs: tuple[Path, Path]
) -> None:
    one, stages = runs
    alone = cut_after(stages, 5, tmp_path / "alone")
    lab.fit(alone, *WHOLE_RUN, resume=True)
    assert_same_end(one, alone)
    back = cut_after(one, 5, tmp_path / "back")
    fit_on_ranks(lab, back, *WHOLE_RUN, f"strategy={TWO}", resume=True)
    assert_same_end(one, back)


def test_a_signal_that_one_stage_receives_stops_all_of_them(tmp_path: Path) -> None:
    """Stages are no data ranks of each other, and all of them must end after the same step."""

    def work(rank: int) -> tuple[int, int, tuple[int, int]]:
        groups = [dist.new_group([0]), dist.new_group([1])]
        set_data_group(groups[rank])
        try:
            signum = max_over_ranks(15 * rank, torch.device("cpu"))
            counted = int(all_reduce_sum(torch.tensor(rank + 1)))
            return signum, counted, rank_and_world()
        finally:
            set_data_group(None)

    assert on_ranks(work, tmp_path, world=2) == [(15, 1, (0, 1)), (15, 2, (0, 1))]


def test_every_layer_is_on_one_stage_and_only_the_embedding_on_two(lab: Lab) -> None:
    recipe = lab.recipe(FOUR_BLOCKS, f"strategy={INTERLEAVED}")
    model = build(recipe, device="meta")
    segments = segments_of(model, recipe.strategy.config)
    assert [list(segment.blocks) for segment in segments] == [[0], [1], [2], [3]]
    assert [segment.stage for segment in segments] == [0, 1, 0, 1]
    assert held_modules(model, segments, 0) == ["embedding", "residual", "blocks.0", "blocks.2"]
    last = ["blocks.1", "blocks.3", "norm", "output", "residual", "heads", "embedding"]
    assert held_modules(model, segments, 1) == last
    alone = build(lab.recipe(FOUR_BLOCKS, NO_MTP), device="meta")
    assert "embedding" not in held_modules(alone, segments, 1)
    tied = build(lab.recipe(FOUR_BLOCKS, NO_MTP, TIED), device="meta")
    assert "embedding" in held_modules(tied, segments, 1)


def test_a_layer_ends_a_step_where_its_weights_are(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Balancers end it on every rank, because all log and save the biases of all layers."""
    model = build(lab.recipe(), device="cpu")
    model.absent = frozenset(
        name for name, _ in model.named_parameters() if name.startswith("blocks.1.")
    )
    ended: list[str] = []
    for path, name, layer in model.block_layers():
        monkeypatch.setattr(
            layer, "on_step_end", lambda *_, who=f"{path}.{name}": ended.append(who)
        )
    paths = list(model.expert_layers())
    totals = WindowTotals(loads={path: torch.arange(8) for path in paths})
    call_on_step_end(model, totals, Progress(1, 1, 1, 1))
    assert ended == [
        "blocks.0.attention",
        "blocks.0.ffn",
        "heads.mtp.depths.0.block.attention",
        "heads.mtp.depths.0.block.ffn",
    ]
    for layer in model.expert_layers().values():
        bias_E = layer.balancers[0].selection_bias()
        assert bias_E is not None
        assert bool(bias_E.any())


def test_blocks_are_divided_evenly() -> None:
    assert even(61, 16) == [4] * 13 + [3] * 3
    assert even(4, 4) == [1, 1, 1, 1]


REFUSED = [
    ("{name: pipeline, stages: 1}", "strategy.stages = 1: must be at least 2"),
    (
        "{name: pipeline, stages: 3}",
        "strategy.stages = 3: must be at most batch.accumulate = 2, the micro-batches of a step",
    ),
    (
        "{name: pipeline, stages: 8}",
        "strategy.stages = 8: stages x chunks = 8 must be at most the model's 4 blocks",
    ),
    (
        "{name: pipeline, stages: 2, schedule: interleaved_1f1b}",
        "strategy.chunks = 1: must be at least 2 with the schedule interleaved_1f1b",
    ),
    (
        "{name: pipeline, stages: 2, chunks: 2}",
        "strategy.chunks = 2: must be 1 with the schedule 1f1b",
    ),
    (
        "{name: pipeline, stages: 2, layers: [4, 0]}",
        "strategy.layers = [4, 0]: must have stages x chunks = 2 numbers, each at least 1",
    ),
    (
        "{name: pipeline, stages: 2, layers: [1, 2]}",
        "strategy.layers = [1, 2]: must add up to the model's 4 blocks",
    ),
    ("{name: pipeline, stages: 2, schedule: gpipe}", "must be 1f1b or interleaved_1f1b"),
    ("{name: pipeline, stages: 2, schedule: zbv}", WHY_NOT_SPLIT),
    ("{name: pipeline, stages: 2, schedule: dual_pipe_v}", WHY_NOT_SPLIT),
    (
        "{name: pipeline, stages: 2, inner: {name: ddp, ranks: 3}}",
        "strategy.inner.ranks = 3: must divide batch.sequences = 4",
    ),
    (
        "{name: pipeline, stages: 2, inner: {name: ddp, ranks: 2, nodes: 2}}",
        "must have 1 node: strategy.nodes says how many",
    ),
    (
        "{name: pipeline, stages: 2, inner: {name: pipeline, stages: 2}}",
        "must be another strategy than pipeline",
    ),
    (
        "{name: pipeline, stages: 2, schedule: interleaved_1f1b, chunks: 2, inner: {name: fsdp, ranks: 2}}",
        "strategy.schedule = 'interleaved_1f1b': must be 1f1b with inner fsdp",
    ),
]


@pytest.mark.parametrize(("strategy", "sentence"), REFUSED)
def test_a_bad_layout_is_refused_in_a_sentence(lab: Lab, strategy: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        lab.recipe(FOUR_BLOCKS, f"strategy={strategy}")
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("callbacks=[{name: ema}]", "cannot be pipeline with the callback ema"),
        ("precision={name: te_fp8, scaling: delayed}", "cannot be pipeline with precision"),
        ("checkpoint.sharded=true", "which writes a checkpoint as one file"),
        ("cuda_graph=true", "cuda_graph = true: must be false"),
        (
            "batch.accumulate={name: linear, start: 2, end: 4, over: 1}",
            "batch.accumulate",
        ),
    ],
)
def test_what_a_pipeline_does_not_combine_with_is_refused(
    lab: Lab, key: str, sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        lab.recipe(FOUR_BLOCKS, f"strategy={TWO}", "compile=true", key)
    assert sentence in str(error.value)


class _Product(torch.autograd.Function):
    """A product by a custom function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return gradient @ weight.T, x.T @ gradient


class _Twice(nn.Module):
    """Uses a weight at two places, one after the other, as a tied embedding or a multi-token module does."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.product = product
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.product(x, self.weight).tanh(), self.weight)


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch before 2.13 may count the weight twice (#180952)"
)
@pytest.mark.parametrize("product", [torch.matmul, _Product.apply], ids=["built in", "custom"])
def test_the_split_backward_of_torch_2_13_is_right_for_a_chained_weight(product: Any) -> None:
    """What schedules that split the backward need; it is not enough to offer them (see `WHY_NOT_SPLIT`)."""
    module = _Twice(product)
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(module(x).sum(), [module.weight])
    output = module(x)
    ones = torch.ones_like(output)
    _, groups = stage_backward_input([output], [ones], [x], iter(module.parameters()))
    stage_backward_weight(iter(module.parameters()), groups)
    assert module.weight.grad is not None
    torch.testing.assert_close(module.weight.grad, whole)
