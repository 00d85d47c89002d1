"""Tasks of torchrun and srun on several machines are the ranks of a run, or one sentence says why they cannot be."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lab import Lab

from core.contracts.errors import UserError
from core.training.launchers import Launch, launch_of, without_launcher
from core.training.rank_processes import RunEnvironment
from core.training.rank_watch import is_connection_loss, is_timeout
from core.training.same_start import Start, first_difference
from plugins.strategies.data_parallel import DataParallel

SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NNODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODELIST": "gpu[01-08]",
}
"""The third of four tasks on two nodes."""

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "29511",
}
"""The fourth."""

BOTH = "strategy.ranks = 4, strategy.nodes = 2: "


def section(ranks: int = 4, nodes: int = 2) -> Any:
    """The section of a strategy."""
    config = SimpleNamespace(ranks=ranks, nodes=nodes)
    return SimpleNamespace(component=DataParallel, config=config)


def test_tasks_on_two_nodes_are_the_ranks() -> None:
    by_srun = launch_of(section(), SRUN)
    assert by_srun == Launch(2, 4, "srun", None, 15070, 0, 1, 2, address="gpu[07-08]")
    by_torchrun = launch_of(section(), TORCHRUN)
    assert by_torchrun == Launch(3, 4, "torchrun", None, 29511, 1, 1, 2, address="gpu07")
    assert by_srun.ranks_per_node == by_torchrun.ranks_per_node == 2


def test_libraries_see_the_place_of_the_recipe() -> None:
    """Lightning gets rank, node and address of the launch; SLURM's list of nodes gives its first."""
    environment = RunEnvironment(launch_of(section(), SRUN))
    assert environment.creates_processes_externally
    assert (environment.global_rank(), environment.world_size()) == (2, 4)
    assert (environment.local_rank(), environment.node_rank()) == (0, 1)
    assert (environment.main_address, environment.main_port) == ("gpu07", 15070)
    left = without_launcher(SRUN, environment.launch)
    assert not left.keys() & {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID"}
    assert without_launcher(TORCHRUN, launch_of(section(), TORCHRUN)) == TORCHRUN


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, "gpu07"),
        ({"SLURM_STEP_NODELIST": "gpu[3,5-8],cpu1"}, "gpu3"),
        ({"SLURM_STEP_NODELIST": "a1,a2"}, "a1"),
        ({"SLURM_STEP_NODELIST": "rack[01-02]-n4"}, "rack01-n4"),
        ({"MASTER_ADDR": "10.0.0.7"}, "10.0.0.7"),
        ({"MASTER_ADDR": "fd00::7"}, "fd00::7"),
    ],
)
def test_the_ranks_meet_on_the_first_node(variables: dict[str, str], address: str) -> None:
    launch = launch_of(section(), {**SRUN, **variables})
    assert RunEnvironment(launch).main_address == address


def test_the_port_may_be_given() -> None:
    assert launch_of(section(), {**SRUN, "MASTER_PORT": "29600"}).port == 29600


def test_one_node_meets_at_this_machine() -> None:
    """A list of nodes or an address that somebody has exported changes nothing there."""
    one = {
        **SRUN,
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_LOCALID": "2",
        "SLURM_STEP_TASKS_PER_NODE": "4",
        "MASTER_ADDR": "gpu01",
    }
    launch = launch_of(section(nodes=1), one)
    assert launch == Launch(2, 4, "srun", port=15070, local_rank=2)
    assert RunEnvironment(launch).main_address == "127.0.0.1"


WITHOUT = None
"""The value of a variable that is not set."""

CONTRADICTIONS: list[tuple[dict[str, str], dict[str, str | None], str]] = [
    (SRUN, {"SLURM_NTASKS": "8"}, "strategy.ranks = 4, but SLURM_NTASKS = 8 and SLURM_PROCID = 2"),
    (SRUN, {"SLURM_NTASKS": "8"}, "start torchrun or srun with 2 tasks on each of 2 nodes"),
    (SRUN, {"SLURM_NNODES": "4"}, f"{BOTH}SLURM_NNODES = 4 in the environment: must be 2,"),
    (SRUN, {"SLURM_STEP_NUM_NODES": "1"}, f"{BOTH}SLURM_STEP_NUM_NODES = 1"),
    (SRUN, {"SLURM_NNODES": WITHOUT}, f"{BOTH}SLURM_NNODES is not set in the environment"),
    (
        SRUN,
        {"SLURM_STEP_TASKS_PER_NODE": "3,1"},
        f"{BOTH}SLURM_STEP_TASKS_PER_NODE = 3,1 in the environment: must be 2(x2), because each node has 4 / 2 = 2 "
        "ranks (srun --ntasks-per-node=2)",
    ),
    (SRUN, {"SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_STEP_TASKS_PER_NODE = many"),
    (
        SRUN,
        {"SLURM_NODEID": "0", "SLURM_LOCALID": "1"},
        f"{BOTH}SLURM_NODEID = 0 in the environment: must be 1, because rank 2 is number 0 of the ranks of node 1, as "
        "ranks are numbered node by node (srun --distribution=block)",
    ),
    (SRUN, {"SLURM_LOCALID": "1"}, f"{BOTH}SLURM_LOCALID = 1 in the environment: must be 0,"),
    (SRUN, {"SLURM_LOCALID": WITHOUT}, f"{BOTH}SLURM_LOCALID is not set"),
    (SRUN, {"SLURM_DISTRIBUTION": "cyclic:block"}, "SLURM_DISTRIBUTION = cyclic:block"),
    (
        SRUN,
        {"SLURM_STEP_NODELIST": "", "SLURM_NODELIST": WITHOUT},
        "strategy.nodes = 2: SLURM_STEP_NODELIST is not set in the environment: must be the address",
    ),
    (TORCHRUN, {"WORLD_SIZE": "2"}, "strategy.ranks = 4, but WORLD_SIZE = 2 and RANK = 3"),
    (TORCHRUN, {"GROUP_WORLD_SIZE": "1"}, f"{BOTH}GROUP_WORLD_SIZE = 1 in the environment"),
    (TORCHRUN, {"LOCAL_WORLD_SIZE": "3"}, f"{BOTH}LOCAL_WORLD_SIZE = 3 in the environment"),
    (TORCHRUN, {"LOCAL_WORLD_SIZE": WITHOUT}, f"{BOTH}LOCAL_WORLD_SIZE is not set"),
    (
        TORCHRUN,
        {"LOCAL_RANK": "0"},
        f"{BOTH}LOCAL_RANK = 0 in the environment: must be 1, because rank 3 is number 1 of the ranks of node 1",
    ),
    (TORCHRUN, {"LOCAL_RANK": WITHOUT}, f"{BOTH}LOCAL_RANK is not set"),
    (TORCHRUN, {"GROUP_RANK": "0"}, f"{BOTH}GROUP_RANK = 0 in the environment: must be 1,"),
    (
        TORCHRUN,
        {"MASTER_ADDR": WITHOUT},
        "strategy.nodes = 2: MASTER_ADDR is not set in the environment: must be the address of the first node",
    ),
    (
        {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4"},
        {},
        "not a task of torchrun or srun; start torchrun or srun with 2 tasks on each of 2 nodes",
    ),
]


@pytest.mark.parametrize(("variables", "changed", "sentence"), CONTRADICTIONS)
def test_what_contradicts_the_recipe_is_an_error_in_one_sentence(
    variables: dict[str, str], changed: dict[str, str | None], sentence: str
) -> None:
    environment = {
        name: value for name, value in {**variables, **changed}.items() if value is not None
    }
    with pytest.raises(UserError) as caught:
        launch_of(section(), environment)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tasks_on_two_nodes_do_not_train_a_recipe_of_one() -> None:
    """The first difference is that of the nodes, not that of the tasks on each."""
    with pytest.raises(
        UserError, match=r"ranks = 4: SLURM_NNODES = 2 .* must be 1, .*strategy.nodes = 1"
    ):
        launch_of(section(nodes=1), SRUN)
    with pytest.raises(UserError, match=r"ranks = 4: GROUP_WORLD_SIZE = 2 .* must be 1, "):
        launch_of(section(nodes=1), TORCHRUN)


@pytest.mark.parametrize(
    "variables", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, {"RANK": "0", "WORLD_SIZE": "1"}]
)
def test_one_process_starts_no_ranks_on_other_machines(variables: dict[str, str]) -> None:
    with pytest.raises(UserError) as caught:
        launch_of(section(), variables)
    sentence = str(caught.value)
    assert sentence.startswith("strategy.nodes = 2: this process cannot start ranks on other")
    assert "`torchrun --nnodes=2 --node-rank=N --nproc-per-node=2 --master-addr=HOST" in sentence
    assert "-m core.fit RECIPE --out DIR`" in sentence
    assert "`srun --nodes=2 --ntasks-per-node=2 python -m core.fit RECIPE --out DIR`" in sentence


def test_a_recipe_of_two_nodes_is_shown_on_one(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--dry-run` starts nothing; the run itself ends before it makes a folder."""
    monkeypatch.chdir(tmp_path)
    two = "strategy={name: ddp, ranks: 2, nodes: 2}"
    assert lab.command("fit", lab.file, two, "--dry-run").code == 0
    result = lab.command("fit", lab.file, two)
    assert result.code == 2
    assert result.sentence.startswith("strategy.nodes = 2: this process cannot start ranks")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("nodes", [0, 3])
def test_nodes_divide_the_ranks(lab: Lab, nodes: int) -> None:
    with pytest.raises(
        UserError,
        match=rf"strategy.nodes = {nodes}: must be at least 1, and divide ranks = 2",
    ):
        lab.recipe(f"strategy={{name: ddp, ranks: 2, nodes: {nodes}}}")


def test_lightning_counts_devices_of_one_node() -> None:
    config = DataParallel.Config(ranks=8, nodes=2, accelerator="cpu")
    arguments = DataParallel(config).trainer_arguments()
    del arguments["strategy"]
    assert arguments == {"accelerator": "cpu", "devices": 4, "num_nodes": 2}


def test_ranks_that_start_otherwise_are_named() -> None:
    """A node that does not see the run folder would begin at the first step."""
    folder = Path("runs/a")
    first = Start(0, 5, "recipe", "data", "0.1.0 (source 1f0c)", "2.13.0")
    there = replace(first, node=1)
    assert first_difference([first, there], folder) is None
    others = {
        replace(there, step=0): "runs/a: rank 1 on node 1 would continue after step 0, and "
        "rank 0 after step 5: all nodes must see the same run folder",
        replace(there, recipe="other"): "rank 1 on node 1 has read another recipe than rank 0",
        replace(there, data="other"): "rank 1 on node 1 has read other training data than rank 0",
        replace(
            there, code="0.1.0 (source 9d3e)"
        ): "rank 1 on node 1 runs moeloom 0.1.0 (source 9d3e), and rank 0 "
        "runs 0.1.0 (source 1f0c): all nodes must have the same code",
        replace(
            there, torch="2.12.1"
        ): "rank 1 on node 1 has torch 2.12.1, and rank 0 has torch 2.13.0: all nodes",
    }
    for other, sentence in others.items():
        found = first_difference([first, other], folder)
        assert found is not None
        assert found.startswith(sentence)


def test_a_lost_connection_is_not_any_error() -> None:
    closed = "[gloo/transport/tcp/pair.cc:537] Read error [10.0.0.7]: Connection reset by peer."
    assert is_connection_loss(RuntimeError(closed))
    assert not is_connection_loss(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_connection_loss(ValueError(closed))
    late = RuntimeError("Timed out waiting 1800000ms for recv operation to complete")
    assert is_timeout(late)
    assert not is_connection_loss(late)
