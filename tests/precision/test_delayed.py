"""P49, delayed scaling: a step's products only take maxima; the history moves when the optimizer has stepped."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.multiprocessing as mp
from lab import Lab, assert_same_run, forked, last_checkpoint
from torch import Tensor

from core.testing.products import skipped_steps_are_forgotten
from core.training.callbacks import KeepLatest
from core.training.module import TrainingModule
from core.training.ranks import all_reduce_max_

from .layers import drawn, precision, through, with_weight
from .slow import quantised

DELAYED = "precision={name: fp8_emulated, scaling: delayed, history: 3}"
RECOMPUTED = "recompute.blocks=[dense, moe]"


def layer(**keys: Any) -> Any:
    made = precision(scaling="delayed", e5m6=[], **keys)
    return with_weight(made.linear(40, 24, "ffn.down", std=0.1))


def known(of: Any) -> list[float]:
    """What the next product's scales come from: activation, weight, gradient."""
    return [float(of.amax.known(operand).max()) for operand in ("activation", "weight", "gradient")]


def step(of: Any, x: Tensor, dy: Tensor, *, done: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    found = through(of, x, dy)
    of.amax.end_step(done=done)
    return found


def test_the_scales_are_those_of_the_step_before() -> None:
    """Also where that was smaller: what is beyond it saturates."""
    own, first, second = layer(), drawn(30, 40, seed=2), 3 * drawn(30, 40, seed=3)
    dy, later = drawn(30, 24, seed=4), 2 * drawn(30, 24, seed=5)
    step(own, first, dy)
    y, dx, dw = through(own, second, later)
    amax = [float(t.detach().abs().max()) for t in (first, own.weight, dy)]
    x, w, slope = (
        quantised(t, 0, 0, amax=a)[0]
        for t, a in zip((second, own.weight, later), amax, strict=True)
    )
    assert x.abs().max() < second.abs().max()
    for found, exact in ((y, x @ w.T), (dx, slope @ w), (dw, slope.T @ x)):
        torch.testing.assert_close(
            found.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max())
        )


def test_within_a_step_nothing_changes_however_often_a_product_runs() -> None:
    """Recomputation, accumulation and a second reading: the same bits, the same maxima."""
    one, two, x, dy = layer(), layer(), drawn(30, 40, seed=2), drawn(30, 24, seed=3)
    for own in (one, two):
        step(own, 2 * x, dy)
    first = through(one, x, dy)
    for _ in range(3):
        for again, before in zip(through(two, x, dy), first, strict=True):
            assert torch.equal(again, before)
    for own in (one, two):
        own.amax.end_step(done=True)
    assert known(one) == known(two)


def test_a_step_of_several_micro_batches_keeps_the_largest() -> None:
    own, small, large = layer(), drawn(30, 40, seed=2), 9 * drawn(30, 40, seed=3)
    dy, steep = drawn(30, 24, seed=4), 7 * drawn(30, 24, seed=5)
    for x, slope in ((small, steep), (large, dy), (small, dy)):
        through(own, x, slope)
        assert known(own) == [0, 0, 0]
    own.amax.end_step(done=True)
    assert known(own) == [float(t.detach().abs().max()) for t in (large, own.weight, steep)]


def test_the_history_is_as_long_as_it_is_said_to_be() -> None:
    own, dy = layer(history=3), drawn(30, 24)
    found = []
    for size in (8.0, 2.0, 4.0, 1.0, 1.0, 1.0):
        step(own, torch.full((30, 40), size), dy)
        found.append(known(own)[0])
    assert found == [8.0, 8.0, 8.0, 4.0, 4.0, 1.0]


def test_a_skipped_step_is_forgotten() -> None:
    own, dy = layer(), drawn(30, 24)
    step(own, torch.full((30, 40), 2.0), dy)
    before = known(own)
    step(own, torch.full((30, 40), 64.0), 1e9 * dy, done=False)
    assert known(own) == before
    step(own, torch.full((30, 40), 1.0), dy)
    assert known(own) == before


def test_what_is_not_finite_enters_no_history() -> None:
    own, x = layer(), drawn(30, 40)
    x[0, 0] = torch.inf
    y, _, _ = step(own, x, torch.full((30, 24), torch.nan))
    assert y.isnan().all()
    assert known(own)[0] == known(own)[2] == 0


def test_evaluation_is_not_a_step() -> None:
    own, x = layer(), drawn(30, 40)
    with torch.no_grad():
        own(x)
    own.eval()(x.requires_grad_()).sum().backward()
    own.amax.end_step(done=True)
    assert known(own) == [0, 0, 0]


def test_every_expert_has_a_scale_of_its_own() -> None:
    grouped = with_weight(
        precision(scaling="delayed").grouped_linear(3, 40, 24, "experts.down", std=0.1)
    )
    with torch.no_grad():
        grouped.weight.mul_(torch.tensor([1.0, 100.0, 0.01])[:, None, None])
    grouped(drawn(30, 40), torch.tensor([10, 20, 25], dtype=torch.int32)).sum().backward()
    grouped.amax.end_step(done=True)
    assert torch.equal(
        grouped.amax.known("weight").flatten(), grouped.weight.detach().abs().amax(dim=(1, 2))
    )


@pytest.mark.parametrize("rest", [1e6, float("inf")])
def test_rows_that_belong_to_nobody_enter_no_history(rest: float) -> None:
    """Those of dropped assignments: neither as an activation nor as a gradient."""
    grouped = with_weight(
        precision(scaling="delayed").grouped_linear(3, 40, 24, "experts.down", std=0.1)
    )
    x, dy, ends = (
        drawn(30, 40, seed=2),
        drawn(30, 24, seed=3),
        torch.tensor([10, 10, 25], dtype=torch.int32),
    )
    x[25:], dy[25:] = rest, rest
    through(grouped, x, dy, ends)
    grouped.amax.end_step(done=True)
    assert known(grouped)[0] == float(x[:25].abs().max())
    assert known(grouped)[2] == float(dy[:25].abs().max())


def test_history_is_no_part_of_the_state_dict_and_keeps_its_format() -> None:
    own = layer()
    step(own, drawn(30, 40), drawn(30, 24))
    assert list(own.state_dict()) == ["weight"]
    before = own.amax.step_state()
    own.to(torch.bfloat16)
    assert all(torch.equal(own.amax.step_state()[name], value) for name, value in before.items())
    other = layer()
    other.amax.load_step_state(before)
    assert known(other) == known(own)


def test_the_kits_clause_of_what_is_kept_holds() -> None:
    """The example that the kit makes of fp8_emulated keeps nothing, so here it is checked under delayed scaling."""
    subject: Any = SimpleNamespace(
        precision=lambda: precision(scaling="delayed", history=2), capabilities=frozenset()
    )
    skipped_steps_are_forgotten(subject)


# ---- in runs


def test_recomputation_changes_no_bit_of_a_run(lab: Lab) -> None:
    plain, again = (
        lab.train(DELAYED, "budget.steps=2", *more).model for more in ((), (RECOMPUTED,))
    )
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for path, state in plain.step_states().items():
        other = again.step_states()[path].step_state()
        assert all(torch.equal(other[name], value) for name, value in state.step_state().items()), (
            path
        )


def test_every_low_layer_has_a_history_and_it_moves_once_a_step(lab: Lab) -> None:
    """Two micro-batches a step; three steps leave three entries, and the newest is not the oldest."""
    model = lab.train(DELAYED, "budget.steps=2").model
    states = {path: state.step_state() for path, state in model.step_states().items()}
    assert "blocks.1.ffn.routed.gate_up.amax" in states
    assert "heads.mtp.depths.0.block.attention.q_down.amax" in states
    assert not any("router" in path or path.startswith("output") for path in states)
    for path, state in states.items():
        history = torch.cat([value.flatten(1).amax(dim=1)[None] for value in state.values()])
        assert (history[:, :2] > 0).all(), path
        assert not history[:, 2].any(), path


@pytest.mark.full
def test_a_run_forgets_what_a_skipped_step_saw(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Histories as if its window had not been."""
    windows: list[Any] = []

    class Windows(L.Callback):
        def on_train_batch_start(
            self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
        ) -> None:
            windows.append(batch)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "_agreed_finite", lambda self, norm: self.windows_done != 1)
        skipped = lab.train(DELAYED, "budget.steps=4", callbacks=[Windows()])
    assert skipped.skipped_steps == 1
    without = lab.train(DELAYED, windows=[windows[0], *windows[2:]])
    for path, state in skipped.model.step_states().items():
        other = without.model.step_states()[path].step_state()
        assert all(torch.equal(other[name], value) for name, value in state.step_state().items()), (
            path
        )


@pytest.mark.full
def test_a_run_that_is_interrupted_resumes_to_the_same_bits(lab: Lab, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    overrides = (DELAYED, "budget.steps=8", "checkpoint.every_steps=3")
    lab.fit(whole, *overrides)

    def killed() -> None:
        save = KeepLatest.on_train_batch_end

        def stop(self: Any, trainer: Any, module: Any, *rest: Any) -> None:
            save(self, trainer, module, *rest)
            if module.windows_done == 5:
                raise SystemExit(9)

        KeepLatest.on_train_batch_end = stop  # type: ignore[method-assign]
        lab.fit(cut, *overrides)

    assert forked(killed).code != 0
    lab.fit(cut, *overrides, resume=True)
    assert_same_run(whole, cut)
    state = last_checkpoint(whole)["moeloom"]["step_states"]
    assert state.keys() == last_checkpoint(cut)["moeloom"]["step_states"].keys()


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    tensors = [torch.tensor([[1.0 + rank, 4.0 - rank]]), torch.tensor([float(rank), 0.5])]
    all_reduce_max_(tensors)
    torch.save(tensors, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_data_ranks_agree_on_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    mp.start_processes(_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        one, two = torch.load(tmp_path / str(rank))
        assert one.tolist() == [[2.0, 4.0]]
        assert two.tolist() == [1.0, 0.5]
