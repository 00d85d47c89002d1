"""`core.evaluate` and `core.generate` on a plan: results are those without, and GPUs get what the hash gives them."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import MOE
from torch.distributed.device_mesh import init_device_mesh
from two_ranks import on_two_ranks

from core.contracts.errors import UserError
from core.deployment.placed import PhysicalLoads, place
from core.deployment.placing import Placing, between_ranks
from core.deployment.plan import read_plan
from core.deployment.work import PlacementOptions, report
from core.run.evaluation import evaluate
from core.run.loading import load
from core.training.resume import newest_checkpoint

from .conftest import Command


@pytest.fixture(scope="module")
def plan_file(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of the run's held-out documents for two GPUs, as `--json` prints it."""
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    options = PlacementOptions(gpus=2, replicas=12, held_out=True)
    file.write_text(json.dumps(report(finished, options).document), encoding="utf-8")
    return file


def document(command: Command, *arguments: str | Path) -> dict[str, Any]:
    """What a command prints with --json."""
    printed = command(*arguments, "--json")
    assert printed.code == 0, printed.err
    found: dict[str, Any] = json.loads(printed.out)
    return found


def assert_near(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same values, numbers within rounding of fp32."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, float):
            assert found[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
        else:
            assert found[key] == value, key


def test_validation_gives_the_same_and_says_what_each_gpu_received(
    finished: Path, plan_file: Path, command: Command
) -> None:
    expected = document(command, "evaluate", finished)
    found = document(command, "evaluate", finished, "--placement", plan_file)
    counted = found.pop("placement")
    assert_near(found, expected)
    planned = json.loads(plan_file.read_text(encoding="utf-8"))
    assert counted["layers"] == list(MOE)
    for index in range(len(MOE)):
        before = planned["load"]["after"][index]
        after = counted["load"][index]
        assert sum(after) == pytest.approx(sum(before))
        # at most every token of a copied expert goes to the other GPU; it is far less by the hash
        assert abs(after[0] - before[0]) < 4.5 * sum(before) ** 0.5
        assert counted["balancedness"][index] == pytest.approx(sum(after) / 2 / max(after))
    shown = command("evaluate", finished, "--placement", plan_file)
    assert f"load of GPUs in {MOE[0]}: {' '.join(map(str, counted['load'][0]))}" in shown.out


@pytest.mark.full
def test_a_text_scores_the_same(
    finished: Path, plan_file: Path, tmp_path: Path, command: Command
) -> None:
    text = tmp_path / "own.txt"
    text.write_text("abc def ghi jkl abc abc", encoding="utf-8")
    expected = document(command, "evaluate", finished, "--text", text)
    found = document(command, "evaluate", finished, "--text", text, "--placement", plan_file)
    counted = found.pop("placement")
    assert_near(found, expected)
    assert sum(counted["load"][0]) > 0


@pytest.mark.full
def test_generation_writes_the_same(finished: Path, plan_file: Path, command: Command) -> None:
    arguments = ("generate", finished, "--prompt", "abc", "--tokens", "6")
    expected = document(command, *arguments)
    found = document(command, *arguments, "--placement", plan_file)
    assert found["token_ids"] == expected["token_ids"]


@pytest.mark.full
def test_two_ranks_validate_as_one_process_does(
    finished: Path, plan_file: Path, tmp_path: Path, command: Command
) -> None:
    expected = document(command, "evaluate", finished, "--placement", plan_file)
    counted = expected.pop("placement")
    plan = read_plan(plan_file)

    def work(rank: int) -> Any:
        loads: list[PhysicalLoads] = []

        def prepare(model: Any) -> None:
            place(model, plan, mesh=init_device_mesh("cpu", (2,)))
            loads.append(PhysicalLoads(model, plan))
            stack.enter_context(loads[0].counting())

        with ExitStack() as stack:
            values = evaluate(
                newest_checkpoint(finished),
                say=lambda _: None,
                prepare=prepare,
                dispatcher=between_ranks(),
            )
        return values, loads[0].document()

    ranks = tmp_path / "ranks"
    ranks.mkdir()
    for values, document_of_rank in on_two_ranks(work, ranks):
        assert_near(values, expected)
        assert document_of_rank == counted


def test_every_precision_that_keeps_nothing_between_steps_takes_copies(finished: Path) -> None:
    model = load(finished)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer: Any = model.expert_layers()[MOE[0]]
    stack = layer.routed.gate_up
    stack.take_groups([3, 3, 0], first=2, all_groups=9)
    assert torch.equal(stack.weight[0], before["blocks.1.ffn.routed.gate_up.weight"][3])
    assert torch.equal(stack.weight[1], stack.weight[0])
    assert (stack.groups, stack.first_group, stack.all_groups) == (3, 2, 9)
    x = torch.randn(6, 32)
    ends = torch.tensor([1, 4, 6], dtype=torch.int32)
    by_hand = [x[:1] @ stack.weight[0].T, x[1:4] @ stack.weight[1].T, x[4:] @ stack.weight[2].T]
    assert torch.allclose(stack(x, ends), torch.cat(by_hand), atol=1e-6)


def test_mistakes_are_one_sentence_before_anything_is_read(
    finished: Path,
    plan_file: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = json.loads(plan_file.read_text(encoding="utf-8"))
    other["layers"][0] = "blocks.7"
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(other), encoding="utf-8")
    torn = tmp_path / "torn.json"
    torn.write_text("{", encoding="utf-8")
    cases = {
        wrong: "has a layer blocks.7, and the layers with experts of this model are blocks.1",
        torn: "is no JSON document",
        tmp_path / "missing.json": "missing.json",
    }
    for given, sentence in cases.items():
        for name, *rest in (("evaluate",), ("generate", "--prompt", "abc")):
            printed = command(name, finished, *rest, "--placement", given)
            assert printed.code == 2
            assert sentence in printed.sentence
            assert str(given) in printed.sentence
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="has gpus = 2, and 3 ranks were started: must be equal"):
        Placing(plan_file, divides=True)
    with pytest.raises(UserError, match=r"only core\.evaluate without --text and --tasks"):
        Placing(plan_file)
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match="WORLD_SIZE = 'many' in the environment"):
        Placing(plan_file)
    both = command("placement", finished, "--held-out", "--text", plan_file)
    assert "--held-out cannot be combined with --text" in both.sentence
