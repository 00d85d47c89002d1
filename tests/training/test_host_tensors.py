"""No collective of a run gets a tensor of the host, which NCCL would not take; gloo takes it silently."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from device_guard import DEVICE, HostTensorError, device_guard
from lab import Lab
from tiers import first_by_default
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from two_ranks import on_two_ranks

from core.checkpoints.listing import remove_checkpoint

STRATEGIES = {
    "ddp": "strategy={name: ddp, ranks: 2, accelerator: cpu}",
    "fsdp": "strategy={name: fsdp, ranks: 2, accelerator: cpu}",
    "expert_parallel": "strategy={name: expert_parallel, expert_ranks: 2, accelerator: cpu}",
}
"""Every strategy with several ranks; another one is one line."""

EVERY_REDUCTION = (
    "plugins=[own_parts]",
    "model.attention={name: watched, heads: 4}",
    "model.blocks.dense.ffn={name: watched, hidden: 48}",
    "model.blocks.moe.ffn.balance=[{name: bias, rate: 0.01}, {name: sequence, alpha: 0.01}, {name: batch, alpha: 0.01},"
    " {name: micro_batch, alpha: 0.01}, {name: histogram}]",
    "data.sequence_length=8",
    "model.rope.max_length=8",
    "budget.steps=2",
    "validation.every_steps=1",
    "checkpoint.every_steps=1",
)
"""A run that reduces all there is over ranks: losses, loads, tallies, metrics, validations; and that saves.

The sample at its end is as short as the rotary table."""


@pytest.mark.parametrize("strategy", first_by_default(list(STRATEGIES)))
def test_P53_no_collective_of_a_run_gets_a_tensor_of_the_host(
    lab: Lab, tmp_path: Path, strategy: str
) -> None:
    """Trains, validates, saves and samples; then loses the last checkpoint and resumes from the one before."""
    run = tmp_path / "run"
    overrides = (*EVERY_REDUCTION, STRATEGIES[strategy])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank: int) -> tuple[int, int]:
        task = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in task.items()})  # as of torchrun
        with device_guard() as collectives:
            lab.fit(run, *overrides)
            dist.barrier()
            if rank == 0:
                (run / "summary.json").unlink()
                remove_checkpoint(run / "checkpoints" / "step-00000002.ckpt")
            dist.barrier()
            whole = len(collectives)
            lab.fit(run, *overrides, resume=True)
        return whole, len(collectives) - whole

    for whole, resumed in on_two_ranks(work, tmp_path):
        assert whole > resumed > 50
    assert (run / "sample.txt").is_file()
    assert (run / "summary.json").is_file()


# ---- the guard itself


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def unmoved() -> Tensor:
    return nn.Linear(2, 2).weight.detach()


def moved() -> Tensor:
    return nn.Linear(2, 2).to(DEVICE).weight.detach()


def emptied(device: torch.device | str) -> Tensor:
    return nn.Linear(2, 2, device="meta").to_empty(device=device).weight.detach()


def of_a_file(folder: Path) -> Tensor:
    torch.save({"weight": torch.ones(2, device=DEVICE)}, folder / "tensors.ckpt")
    content: dict[str, Tensor] = torch.load(folder / "tensors.ckpt", weights_only=True)
    return content["weight"]


ON_HOST: dict[str, Callable[[], Tensor]] = {
    "factory": lambda: torch.zeros(2),
    "named": lambda: torch.ones(2, device="cpu"),
    "number": lambda: torch.tensor(1.0, dtype=torch.float64),
    "numpy": lambda: torch.from_numpy(torch.ones(2).numpy()),
    "computed": lambda: (torch.ones(2) + 1).view(2, 1)[:1],
    "like a host's": lambda: torch.zeros_like(torch.ones(2)),
    "beside a host's": lambda: torch.ones(2, device=torch.ones(1).device),
    "copied": lambda: torch.ones(2, device=DEVICE).cpu(),
    "sent": lambda: torch.ones(2, device=DEVICE).to("cpu"),
    "written into": lambda: torch.zeros(2).copy_(torch.ones(2, device=DEVICE)),
    "parameter": unmoved,
    "parameter of a module made on the host": lambda: emptied("cpu"),
}
ON_DEVICE: dict[str, Callable[[], Tensor]] = {
    "factory": lambda: torch.zeros(2, device=DEVICE),
    "sent": lambda: torch.ones(2).to(DEVICE),
    "sent to another's": lambda: torch.ones(2).to(torch.ones(1, device=DEVICE)),
    "beside another": lambda: torch.ones(2, device=torch.ones(1, device=DEVICE).device),
    "with a host's number": lambda: torch.ones(2, device=DEVICE) * torch.tensor(2.0),
    "written into": lambda: torch.zeros(2, device=DEVICE).copy_(torch.ones(2)),
    "parameter": moved,
    "parameter of a module made there": lambda: emptied(DEVICE),
}


@pytest.mark.parametrize("name", ON_HOST)
def test_the_guard_sees_a_tensor_of_the_host(group: None, name: str) -> None:
    with device_guard(), pytest.raises(HostTensorError, match="made in"):
        dist.all_reduce(ON_HOST[name]())
    with device_guard(), pytest.raises(HostTensorError, match="made in"):
        functional.all_reduce(ON_HOST[name](), "sum", dist.group.WORLD)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_the_guard_lets_tensors_of_the_device_pass(group: None, name: str) -> None:
    with device_guard() as collectives:
        dist.all_reduce(ON_DEVICE[name]())
    assert collectives == ["c10d::allreduce_"]


def test_the_guard_sees_a_tensor_of_a_file_and_one_among_others(
    group: None, tmp_path: Path
) -> None:
    with device_guard(), pytest.raises(HostTensorError, match="a file"):
        dist.all_reduce(of_a_file(tmp_path))
    with device_guard(), pytest.raises(HostTensorError, match="allgather"):
        dist.all_gather([torch.empty(2)], torch.ones(2, device=DEVICE))


def test_the_guard_lets_tensors_of_the_host_pass_in_a_group_made_for_them(group: None) -> None:
    with device_guard() as called:
        of_host = dist.new_group(backend="gloo")
        dist.all_reduce(torch.zeros(2), group=of_host)
        assert called == []
        with pytest.raises(HostTensorError):
            dist.all_reduce(torch.zeros(2))
        with pytest.raises(HostTensorError):
            dist.all_reduce(torch.zeros(2), group=dist.new_group())


def test_the_guard_lets_objects_pass_and_sends_copies(group: None) -> None:
    with device_guard() as collectives:
        found = [{"step": 3}]
        dist.broadcast_object_list(found)
        host = torch.ones(2)
        sent = host.to(DEVICE)
        sent.zero_()
        assert host.tolist() == [1.0, 1.0]
    assert found == [{"step": 3}]
    assert collectives


def test_the_guard_lets_sharded_weights_pass(tmp_path: Path) -> None:
    """torch's own sharding calls the device of its mesh `cpu`."""

    def work(rank: int) -> set[str]:
        with device_guard() as collectives:
            mesh = init_device_mesh("cpu", (2,))
            with torch.device("meta"):
                model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
            fully_shard(model, mesh=mesh)
            model.to_empty(device=DEVICE)
            for parameter in model.parameters():
                nn.init.ones_(parameter)
            model(torch.ones(3, 4, device=DEVICE)).sum().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            assert isinstance(norm, DTensor)
            assert norm.full_tensor() > 0
            options = StateDictOptions(full_state_dict=True)
            assert get_model_state_dict(model, options=options)["0.weight"].shape == (4, 4)
        return {name.split("::")[1] for name in collectives}

    for called in on_two_ranks(work, tmp_path):
        assert {"_allgather_base_", "_reduce_scatter_base_", "all_gather_into_tensor"} <= called
