"""Known traps of divided weights: formats, the clipping norm, the balancer, skipped steps and what is exchanged.

Every run here is compared with one process on the same global batch. What is compared with it number by number, for
every strategy and 1, 2 and 4 ranks, is in `test_exact_ranks.py`.
"""

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from exact_cases import CLOSE, FP64, LENGTHS, RECOMPUTE, compare
from lab import MOE, Lab, assert_same
from observed_run import differences, observe
from test_window import cut, padded
from torch import Tensor, nn
from torch.nn import functional as F

import core.run.run_model
from core.assemble import compile_parts
from core.contracts.precision import NEVER_LOW
from core.testing.forked_ranks import on_ranks
from core.training.launchers import Launch
from core.training.local_parameters import local_state

FSDP = "{name: fsdp, ranks: 2}"
EXPERTS = "{name: expert_parallel, expert_ranks: 2}"
EXPERTS_AND_DATA = "{name: expert_parallel, expert_ranks: 2, ranks: 4}"
BOTH = {"fsdp": FSDP, "expert_parallel": EXPERTS}
BF16 = "precision.name=bf16"
TINY = 1e-7
"""A clipping norm so small that AdamW's epsilon counts: a wrong norm then changes the updated weights."""

EXPERT = "blocks.1.ffn.routed.down.weight"
ROUTER = "blocks.1.ffn.router.centroids.weight"


@dataclass(frozen=True)
class Job:
    """One training run of one window or more.

    Args:
        strategy: the recipe's section; None: alone.
        more: further overrides.
        accumulate: micro-batches of a window.
        windows: optimizer steps.
        watch: callbacks of the Trainer to make, whose `found` comes back with the results.
    """

    strategy: str | None
    more: tuple[str, ...] = (FP64,)
    accumulate: int = 1
    windows: int = 1
    watch: tuple[Callable[[], "Watch"], ...] = ()

    def run(self, lab: Lab, launch: Launch | None) -> dict[str, Any]:
        """Trains; returns the fields of `Observed`, and what the callbacks found as `found`."""
        share = [8 // self.accumulate] * self.accumulate
        lengths = LENGTHS[: self.windows]
        windows = [cut(padded(valid, seed), share) for seed, valid in enumerate(lengths)]
        overrides = list(self.more)
        if self.strategy is not None:
            overrides.append(f"strategy={self.strategy}")
        callbacks = [make() for make in self.watch]
        seen = observe(
            lab,
            windows,
            [padded([16, 0, 5, 16], 7)],
            *overrides,
            launch=launch,
            gradient_clip=TINY,
            callbacks=callbacks,
        )
        found: dict[str, Any] = {}
        for callback in callbacks:
            found.update(callback.found)
        return {**asdict(seen), "found": found}


class Watch(L.Callback):
    """A callback that finds something out about a run."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}


class LayerFormats(Watch):
    """Notes the formats in which the layers of `NEVER_LOW` get their weights and inputs, and the router's product."""

    router: str | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Adds hooks that run after those that gather weights."""
        for name, module in pl_module.model.named_modules():
            if getattr(module, "role", None) in NEVER_LOW:
                module.register_forward_pre_hook(partial(self._note, name))
        original = F.linear

        def linear(x: Tensor, weight: Tensor, *more: Any) -> Tensor:
            if self.router is not None:
                self.found[f"{self.router}: product"] = (x.dtype, weight.dtype)
                self.router = None
            return original(x, weight, *more)

        self._original = original
        F.linear = linear  # type: ignore[assignment]

    def _note(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.found[name] = (module.weight.dtype, inputs[0].dtype)
        if getattr(module, "role", None) == "router":
            self.router = name

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Takes the product as it was."""
        F.linear = self._original  # type: ignore[assignment]


class Collectives(Watch):
    """Counts how often gradients are summed over the ranks, by the function that torch's `fully_shard` calls."""

    _function = "reduce_scatter_tensor"
    if hasattr(dist, "reduce_scatter_single"):
        _function = "reduce_scatter_single"

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Begins to count."""
        self.found["sums"] = 0
        original = self._original = getattr(dist, self._function)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.found["sums"] += 1
            return original(*arguments, **keywords)

        setattr(dist, self._function, counted)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Ends the count."""
        setattr(dist, self._function, self._original)


class Gathers(Collectives):
    """Counts in the same way how often weights are gathered."""

    _function = "all_gather_into_tensor"
    if hasattr(dist, "all_gather_single"):
        _function = "all_gather_single"


class Reloaded(Watch):
    """Loads the whole optimizer state that the first rank would save, and keeps this rank's part before and after."""

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Gathers the state, sets the moments to 0, and loads it."""
        strategy: Any = trainer.strategy
        self.found["saved"] = self._moments(pl_module, trainer.optimizers[0])
        whole = [copy.deepcopy(strategy.optimizer_state(trainer.optimizers[0]))]
        dist.broadcast_object_list(whole)
        for state in trainer.optimizers[0].state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
        strategy.load_optimizer_state_dict({"optimizer_states": whole})
        self.found["loaded"] = self._moments(pl_module, trainer.optimizers[0])

    def _moments(self, module: Any, optimizer: Any) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state of each weight, by the weight's name."""
        return {
            n.name: copy.deepcopy(optimizer.state[n.parameter])
            for n in module.local_parameters.named
        }


class PoisonedRank(Watch):
    """Makes one number of one expert's gradient NaN on the last rank, and keeps the state before and after."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Spoils the gradient after it has been exchanged."""
        self.found["before"] = copied(pl_module)
        original = pl_module.local_parameters.take_gradients

        def poisoned() -> None:
            original()
            if dist.get_rank() == dist.get_world_size() - 1:
                part = next(
                    n.parameter for n in pl_module.local_parameters.named if n.name == EXPERT
                )
                part.grad.flatten()[0] = float("nan")

        pl_module.local_parameters.take_gradients = poisoned

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the state of this rank."""
        self.found["after"] = copied(pl_module)
        self.found["moments"] = len(trainer.optimizers[0].state)
        self.found["skipped"] = pl_module.skipped_steps


def copied(module: Any) -> dict[str, Tensor]:
    """This rank's part of the model's state."""
    state = local_state(module.model)
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


def on_forked_ranks(lab: Lab, jobs: Sequence[Job], world: int = 2) -> list[list[dict[str, Any]]]:
    """The results of jobs that the same ranks do one after another, by rank."""

    def work(rank: int) -> list[dict[str, Any]]:
        launch = Launch(rank, world, "torchrun", port=1, local_rank=rank)
        return [job.run(lab, launch) for job in jobs]

    with tempfile.TemporaryDirectory() as folder:
        return on_ranks(work, Path(folder), world=world)


@pytest.fixture(scope="module")
def alone(lab: Lab) -> dict[str, Any]:
    """One step of one process."""
    return Job(None).run(lab, None)


@pytest.fixture(scope="module")
def divided(lab: Lab) -> dict[str, list[dict[str, Any]]]:
    """The same step on two ranks under each strategy that divides weights, by rank."""
    jobs = {name: Job(section, watch=(Collectives, Reloaded)) for name, section in BOTH.items()}
    by_rank = on_forked_ranks(lab, list(jobs.values()))
    return {name: [rank[i] for rank in by_rank] for i, name in enumerate(jobs)}


def assert_close(one: Any, other: Any) -> None:
    """Two containers of numbers agree to 1e-9 of each tensor's largest element."""
    far = [found for found in differences(one, other) if found[0] > CLOSE]
    assert not far, sorted(far, reverse=True)[:3]


def check_gradients(alone: dict[str, Any], seen: dict[str, Any]) -> None:
    """Gradients of an expert and of the router are one process's, not a multiple; so is the norm of all."""
    for name in (EXPERT, ROUTER):
        one = alone["gradients"][name]
        assert one.any()
        ratio = (seen["gradients"][name] * one).sum() / one.square().sum()
        assert float(ratio) == pytest.approx(1.0, rel=CLOSE), name
    every = [gradient.flatten() for gradient in seen["gradients"].values()]
    norm = float(torch.cat(every).norm())
    assert norm > 1e3 * TINY
    assert seen["steps"][0]["grad_norm"] == pytest.approx(norm, rel=CLOSE)
    assert seen["steps"][0]["grad_norm"] == pytest.approx(alone["steps"][0]["grad_norm"], rel=CLOSE)


def test_P46_router_norms_and_embedding_keep_their_format_where_products_are_bf16(
    lab: Lab,
) -> None:
    one = Job(None, (BF16,), watch=(LayerFormats,)).run(lab, None)["found"]
    wide = [name for name in one if name.endswith("product")]
    assert len(wide) == len(MOE)
    assert all(one[name] == (torch.float32, torch.float32) for name in wide)
    for seen in on_forked_ranks(lab, [Job(FSDP, (BF16,), watch=(LayerFormats,))]):
        found = seen[0]["found"]
        assert found == one
        assert {weight for weight, _ in found.values()} == {torch.float32}


@pytest.mark.parametrize("name", list(BOTH))
def test_P46_gradients_of_experts_are_those_of_one_process(
    alone: dict[str, Any], divided: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for seen in divided[name]:
        check_gradients(alone, seen)


@pytest.mark.full
def test_P46_gradients_and_the_norm_are_right_over_two_meshes(
    lab: Lab, alone: dict[str, Any]
) -> None:
    """Experts are divided over 2 x 2 ranks, everything else over 4; the case "experts and data" has all numbers."""
    for (seen,) in on_forked_ranks(lab, [Job(EXPERTS_AND_DATA)], world=4):
        check_gradients(alone, seen)
        assert_close(alone["loads"], seen["loads"])
        if seen["state"]:
            assert_close(alone["state"], seen["state"])


@pytest.mark.parametrize("name", list(BOTH))
def test_P54_the_clipping_norm_counts_every_part_once(
    alone: dict[str, Any], divided: dict[str, list[dict[str, Any]]], name: str
) -> None:
    """The clipped gradient is far below AdamW's epsilon, so the updated weights are proportional to it."""
    for part in ("state", "optimizer"):
        assert_close(alone[part], divided[name][0][part])
    moments = [state["exp_avg"].flatten() for state in divided[name][0]["optimizer"].values()]
    assert float(torch.cat(moments).norm()) == pytest.approx(0.1 * TINY, rel=1e-5)


@pytest.mark.parametrize("name", list(BOTH))
def test_P54_moments_of_experts_survive_saving_and_loading(
    divided: dict[str, list[dict[str, Any]]], name: str
) -> None:
    """Checkpoints of whole runs are tested in `test_divided_runs.py`."""
    parts = []
    for seen in divided[name]:
        saved, loaded = seen["found"]["saved"], seen["found"]["loaded"]
        assert_same(loaded, saved)
        assert len(saved[EXPERT]["exp_avg"]) == 4
        parts.append(saved[EXPERT]["exp_avg"])
    assert all(part.any() for part in parts)
    assert not torch.equal(*parts)


@pytest.mark.parametrize("name", list(BOTH))
def test_P54_gates_have_a_gradient_through_the_exchange(
    alone: dict[str, Any], divided: dict[str, list[dict[str, Any]]], name: str
) -> None:
    for seen in divided[name]:
        gradient = seen["gradients"][ROUTER]
        assert gradient.any(dim=-1).sum() >= 2
        assert_close(alone["gradients"][ROUTER], gradient)


@pytest.mark.parametrize("name", list(BOTH))
def test_bias_moves_under_every_strategy(
    alone: dict[str, Any], divided: dict[str, list[dict[str, Any]]], name: str
) -> None:
    """A balancer whose counts or whose update get lost between the ranks leaves its bias at 0."""
    for path in MOE:
        key = f"model.{path}.ffn.balance.0.bias"
        bias_E = divided[name][0]["state"][key]
        assert bias_E[:5].any(), path
        assert torch.equal(bias_E, alone["state"][key]), path
    for seen in divided[name]:
        assert_close(alone["loads"], seen["loads"])


def test_only_the_last_micro_batch_exchanges_gradients(
    lab: Lab, divided: dict[str, list[dict[str, Any]]]
) -> None:
    sums = {seen["found"]["sums"] for seen in divided["fsdp"]}
    assert len(sums) == 1
    assert 0 not in sums
    for (seen,) in on_forked_ranks(lab, [Job(FSDP, accumulate=4, watch=(Collectives,))]):
        assert {seen["found"]["sums"]} == sums


def test_weights_that_stay_gathered_are_gathered_once_in_a_step(lab: Lab) -> None:
    kept = FSDP.replace("}", ", reshard_after_forward: false}")
    jobs = [Job(kept, accumulate=count, watch=(Gathers,)) for count in (1, 4)]
    for one, four in on_forked_ranks(lab, jobs):
        assert one["found"]["sums"] == four["found"]["sums"] > 0


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(lab: Lab) -> None:
    jobs = [Job(section, watch=(PoisonedRank,)) for section in BOTH.values()]
    for rank in on_forked_ranks(lab, jobs):
        for seen in rank:
            found = seen["found"]
            assert found["skipped"] == 1
            assert found["moments"] == 0
            assert found["before"].keys() == found["after"].keys()
            for name, value in found["before"].items():
                assert torch.equal(value, found["after"][name]), name


ODD = (
    "model.dim=33",
    "model.blocks.dense.ffn.hidden=47",
    "model.blocks.moe.ffn.expert_hidden=15",
    "data.tokenizer.vocab=301",
)
"""Widths that two ranks cannot share evenly."""

EXACT = {
    "compiled fsdp": Job(FSDP, (FP64, "compile=true")),
    "compiled experts": Job(EXPERTS, (FP64, "compile=true", RECOMPUTE)),
    "odd fsdp": Job(FSDP, (FP64, RECOMPUTE, *ODD), accumulate=2, windows=2),
    "odd experts": Job(EXPERTS, (FP64, RECOMPUTE, *ODD), accumulate=2, windows=2),
}
for _name, _section in BOTH.items():
    for _key in ("reshard_after_forward: false", "offload: true"):
        EXACT[f"{_name} {_key}"] = Job(
            _section.replace("}", f", {_key}}}"), accumulate=2, windows=2
        )


@pytest.mark.full
@pytest.mark.parametrize("name", list(EXACT))
def test_options_and_odd_widths_change_no_number(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Compiled models are compared with one that is not compiled."""
    backend = partial(compile_parts, backend="aot_eager")
    monkeypatch.setattr(core.run.run_model, "compile_parts", backend)
    job = EXACT[name]
    more = tuple(key for key in job.more if key != "compile=true")
    one = Job(None, more, job.accumulate, job.windows).run(lab, None)
    for rank, (seen,) in enumerate(on_forked_ranks(lab, [job])):
        compare(f"{name}, rank {rank}", one, seen, is_first=rank == 0)
