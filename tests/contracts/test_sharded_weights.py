"""A strategy of the tests' own shards one weight over two gloo ranks, which draw only what they own."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab
from tiny_components import SHARDED, ShareExperts
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from two_ranks import on_two_ranks

from core.assemble import build
from core.contracts.context import SequenceContext
from core.contracts.schedule import Progress
from core.model.language_model import LanguageModel
from core.numerics import draw
from core.training.window import step_loss

FP64 = "precision.name=fp64"


def loss_and_gradients(model: LanguageModel, rows: slice) -> tuple[float, dict[str, Tensor]]:
    """The share of one rank in the loss of a step of four sequences, and its gradients."""
    tokens_BM = torch.randint(300, (4, 13), generator=torch.Generator().manual_seed(1))[rows]
    context = SequenceContext.of(
        tokens_BM[:, :-1], targets_BL=tokens_BM[:, 1:], first_sequence=rows.start
    )
    loss = step_loss(model.train(), context, Progress(1, 48, 10, 480))
    loss.backward()
    return float(loss.detach()), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.fixture(scope="module")
def ranks(lab: Lab) -> list[dict[str, Any]]:
    """What each rank has of the model, drew, and computed."""
    recipe = lab.recipe(FP64)

    def work(rank: int) -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (2,))
        drawn: list[int] = []
        original = draw.draw_normal

        def counted(weight: Tensor, std: float, *, seed: int | None = None) -> None:
            if not weight.is_meta:
                drawn.append(weight.numel())
            original(weight, std, seed=seed)

        draw.draw_normal = counted
        model = build(recipe, parallelize=lambda model: ShareExperts(None).parallelize(model, mesh))
        stack = sum(drawn)
        weight = dict(model.named_parameters())[SHARDED]
        assert isinstance(weight, DTensor)
        own = weight.to_local().detach().clone()
        loss, gradients = loss_and_gradients(model, slice(2 * rank, 2 * rank + 2))
        plain = {n: g for n, g in gradients.items() if not isinstance(g, DTensor)}
        shared = gradients[SHARDED]
        assert isinstance(shared, DTensor)
        return {
            "names": [name for name, _ in model.named_parameters()],
            "own": own,
            "drawn_in_stacks": stack,
            "loss": loss,
            "plain": plain,
            "shared": shared.to_local(),
            "others": {n: p.detach() for n, p in model.named_parameters() if n != SHARDED},
        }

    with tempfile.TemporaryDirectory() as folder:
        return on_two_ranks(work, Path(folder))


@pytest.fixture(scope="module")
def alone(lab: Lab) -> LanguageModel:
    return build(lab.recipe(FP64))


def test_each_rank_owns_its_rows_of_the_same_initial_weights(
    ranks: list[Any], alone: LanguageModel
) -> None:
    weights = dict(alone.named_parameters())
    assert torch.equal(torch.cat([rank["own"] for rank in ranks]), weights[SHARDED])
    for rank in ranks:
        assert rank["names"] == list(weights)
        assert all(torch.equal(value, weights[name]) for name, value in rank["others"].items())


def test_each_rank_draws_its_own_matrices_and_no_other(
    ranks: list[Any], alone: LanguageModel
) -> None:
    stacks = [p.numel() for name, p in alone.named_parameters() if p.ndim == 3]
    shared = dict(alone.named_parameters())[SHARDED].numel()
    for rank in ranks:
        assert rank["drawn_in_stacks"] == sum(stacks) - shared // 2


def test_loss_and_gradients_are_those_of_one_device(ranks: list[Any], alone: LanguageModel) -> None:
    """Every rank reads two of the four sequences; denominators are counted over both."""
    loss, gradients = loss_and_gradients(alone, slice(0, 4))
    assert sum(rank["loss"] for rank in ranks) == pytest.approx(loss, rel=1e-12)
    assert {*ranks[0]["plain"], SHARDED} == set(gradients)
    for name in ranks[0]["plain"]:
        both = sum(rank["plain"][name] for rank in ranks)
        torch.testing.assert_close(both, gradients[name], rtol=1e-10, atol=1e-13, msg=name)
    shared = 2 * torch.cat([rank["shared"] for rank in ranks])  # FSDP takes the mean over ranks
    torch.testing.assert_close(shared, gradients[SHARDED], rtol=1e-10, atol=1e-13)
