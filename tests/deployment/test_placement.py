"""`core.placement`: its document against plain loops, its sources, its page, and errors of a user."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab import MOE
from safetensors.torch import load_file, save_file

from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.deployment.effect import balancedness, by_lag, good_for, in_order, over_layers, step_gain
from core.deployment.loads import RecordedLoads, read_loads
from core.deployment.page import render
from core.deployment.plan import plan_placement, read_plan
from core.deployment.work import PlacementOptions, experts_share, report
from core.inspection.work import Options, inspect
from core.model.trace import trace, trace_context
from core.run.loading import load

from .conftest import Command

TEXT = "abc def ghi jkl abc abc def kjh abc ghi lkj def abc " * 6


@pytest.fixture(scope="module")
def found(finished: Path) -> dict[str, Any]:
    """The document of the finished run, on 4 GPUs."""
    return report(finished, PlacementOptions(gpus=4, stretches=4)).document


def gpu_loads(load_E: list[float], expert_P: list[int], gpus: int) -> list[float]:
    """The load of each GPU, by a loop over the physical experts."""
    slots = len(expert_P) // gpus
    loads = []
    for gpu in range(gpus):
        own = expert_P[gpu * slots : (gpu + 1) * slots]
        loads.append(sum(load_E[expert] / expert_P.count(expert) for expert in own))
    return loads


def test_the_document_says_what_a_loop_over_the_recorded_loads_says(
    finished: Path, found: dict[str, Any]
) -> None:
    tensors = load_file(finished / "loads.safetensors")
    steps = tensors["steps"].tolist()
    entries = len(np.array_split(steps, 4)[-1])
    assert found["source"]["planned_from"] == [steps[-entries], steps[-1]]
    assert found["layers"] == list(MOE)
    total = {"before": [0.0, 0.0], "after": [0.0, 0.0]}
    for index, path in enumerate(MOE):
        load_E = tensors[f"load.{path}"][-entries:].sum(dim=0).tolist()
        before = [sum(load_E[2 * gpu : 2 * gpu + 2]) for gpu in range(4)]
        after = gpu_loads(load_E, found["phy2log"][index], 4)
        assert found["load"]["before"][index] == pytest.approx(before)
        assert found["load"]["after"][index] == pytest.approx(after)
        assert found["balancedness"]["after"][index] == pytest.approx(sum(after) / 4 / max(after))
        if path.startswith("blocks."):
            for name, values in (("before", before), ("after", after)):
                total[name][0] += sum(values) / 4
                total[name][1] += max(values)
    prefill = found["prefill"]
    for name, (mean, largest) in total.items():
        assert prefill["balancedness"][name] == pytest.approx(mean / largest)
    gain = total["before"][1] / total["after"][1] - 1
    assert prefill["gain"]["experts"] == pytest.approx(gain)
    share = prefill["experts_share"]
    assert 0 < share < 1
    slow = 1 - share + share * total["before"][1] / total["before"][0]
    fast = 1 - share + share * total["after"][1] / total["after"][0]
    assert prefill["gain"]["step"] == pytest.approx(slow / fast - 1)
    assert found["experts"] == [8, 8]
    assert [len(row) for row in found["phy2log"]] == [12, 12]


def test_the_share_of_experts_is_their_part_of_the_flops(finished: Path) -> None:
    model = load(finished)
    costs = model.costs()
    by_hand = 2 * (2 * 3 * 32 * 16)  # top 2, three matrices, width 32, inner width 16
    forward = 2 * costs.active + costs.attention_flops + costs.other_flops
    assert experts_share(model) == pytest.approx(by_hand / forward)


def test_balancedness_is_the_mean_over_the_maximum() -> None:
    assert balancedness([3, 3, 3]) == 1
    assert balancedness([6, 0, 0]) == pytest.approx(1 / 3)
    assert balancedness([0, 0]) == 1
    assert over_layers({"a": [4, 0], "b": [1, 1]}) == pytest.approx(3 / 5)
    assert in_order([1, 2, 4, 8, 16, 32], 3) == [3, 12, 48]
    assert in_order([1, 2], 4) == [1, 0, 2, 0]
    assert step_gain(0.5, 1.0, 1.0) == pytest.approx(1.0)
    assert step_gain(0.5, 1.0, 0.5) == pytest.approx(0.5)
    assert step_gain(0.5, 1.0, 0.0) == 0


def test_a_plan_from_one_stretch_is_measured_on_the_later_ones() -> None:
    """Loads move by one expert at each stretch, so that every plan is right for its own stretch alone."""
    rows = np.full((4, 4), 1.0)
    for stretch in range(4):
        rows[stretch, stretch] = 5.0
    loads = RecordedLoads("made", "step", [1, 2, 3, 4], {"a": rows})

    def plan(part: Any) -> Any:
        return plan_placement(part, gpus=2, replicas=6)

    lags = by_lag(loads, 4, plan)
    assert [one.pairs for one in lags] == [4, 3, 2, 1]
    for lag in range(4):
        values = []
        for first in range(4 - lag):
            placed = plan({"a": rows[first].tolist()}).layers["a"]
            load_G = gpu_loads(rows[first + lag].tolist(), list(placed.expert_P), 2)
            values.append(sum(load_G) / 2 / max(load_G))
        assert lags[lag].balancedness == pytest.approx(sum(values) / len(values))
        assert lags[lag].lowest == pytest.approx(min(values))
        assert lags[lag].in_order == pytest.approx(4 / 6)
    assert good_for(lags) is not None
    assert good_for(lags[:1]) is None
    steady = RecordedLoads("made", "step", [1, 2, 3, 4], {"a": np.tile(rows[0], (4, 1))})
    assert good_for(by_lag(steady, 4, plan)) == 3


def test_loads_of_a_text_are_those_that_the_inspection_counts(
    finished: Path, tmp_path: Path
) -> None:
    file = tmp_path / "own.txt"
    file.write_text(TEXT, encoding="utf-8")
    own = report(finished, PlacementOptions(gpus=2, text=file, stretches=3)).document
    seen = inspect(finished, Options(text=file)).document
    assert own["source"]["unit"] == "sequence"
    for index, layer in enumerate(seen["layers"]):
        loads = [expert["load"] for expert in layer["experts"]]
        expected = [sum(loads[:4]), sum(loads[4:])]
        assert own["load"]["before"][index] == expected
    saved = tmp_path / "seen.json"
    saved.write_text(json.dumps(seen), encoding="utf-8")
    again = report(saved, PlacementOptions(gpus=2, groups=4)).document
    assert again["phy2log"] == own["phy2log"]
    assert again["prefill"]["gain"]["step"] is None


def test_loads_of_a_trace_are_counted_by_sequence_without_padding(finished: Path) -> None:
    model = load(finished)
    rows = torch.randint(300, (3, 10), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(10) < torch.tensor([[10], [4], [7]])
    context = SequenceContext.of(rows, targets_BL=rows.roll(-1, 1), valid_BL=valid)
    traced = trace_context(model, context)
    loads = RecordedLoads.of_traces([traced, traced])
    assert loads.at == list(range(6))
    for path in MOE:
        block = traced.blocks[path]
        assert block.load is not None
        counted = np.zeros((3, 8))
        assert block.routing is not None
        length = block.context.tokens_BL.shape[1]
        pairs = zip(block.routing.token_A.tolist(), block.routing.expert_A.tolist(), strict=True)
        for token, expert in pairs:
            if block.context.valid().flatten()[token]:
                counted[token // length, expert] += 1
        assert (loads.layers[path][:3] == counted).all()
        assert (loads.layers[path][3:] == counted).all()
        assert counted.sum(axis=0).tolist() == block.load.tolist()
    plan = plan_placement(trace(model, rows), gpus=2, groups=4)
    assert list(plan.layers) == list(MOE)


def test_an_array_is_one_entry_or_several(tmp_path: Path) -> None:
    loads = np.arange(24).reshape(3, 2, 4) + 1
    np.save(tmp_path / "several.npy", loads)
    np.save(tmp_path / "one.npy", loads[0])
    several = read_loads(tmp_path / "several.npy")
    assert several.at == [0, 1, 2]
    assert (several.layers["layer 1"] == loads[:, 1]).all()
    one = report(tmp_path / "one.npy", PlacementOptions(gpus=2)).document
    assert one["lags"]["good_for"] is None
    assert any("one entry" in notice for notice in one["notices"])
    assert "one stretch" in render(one)


def test_the_command_writes_a_page_and_prints_a_plan_that_can_be_read(
    finished: Path, tmp_path: Path, command: Command
) -> None:
    page = tmp_path / "page.html"
    arguments = [str(finished), "--gpus", "2", "--out", str(page)]
    printed = command("placement", *arguments)
    assert printed.code == 0, printed.err
    assert "2 layers of 8 experts as 10 physical ones on 2 GPUs of 1 node" in printed.out
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "http" not in text.replace("http-equiv", "")
    for path in MOE:
        assert path in text
    shown = command("placement", *arguments[:3], "--json")
    assert shown.code == 0, shown.err
    document = json.loads(shown.out)
    plan = tmp_path / "plan.json"
    plan.write_text(shown.out, encoding="utf-8")
    again = read_plan(plan)
    # copies may be numbered in another order: where they are is the same
    assert again.to_dict()["phy2log"] == document["phy2log"]
    assert again.to_dict()["logcnt"] == document["logcnt"]


def test_text_in_a_document_cannot_end_the_page(found: dict[str, Any]) -> None:
    evil = "</title><script>alert(1)</script>"
    hostile = json.loads(json.dumps(found))
    hostile["layers"][0] = evil
    hostile["source"]["name"] = evil
    hostile["notices"] = [evil]
    assert "<script" not in render(hostile)


def change(file: Path, **changed: torch.Tensor | None) -> None:
    """Writes a file of loads with other tensors; None leaves one out."""
    tensors = load_file(file)
    for name, value in changed.items():
        key = "load.blocks.1" if name == "load" else name
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, file)


DAMAGED = {
    "nan": ({"load": torch.full((12, 8), torch.nan)}, "is nan for expert 0 in entry 0"),
    "huge": (
        {"load": torch.full((12, 8), 1e300, dtype=torch.float64)},
        "must be a number from 0 to 1e+15",
    ),
    "negative": ({"load": torch.full((12, 8), -1)}, "is -1.0 for expert 0 in entry 0"),
    "flat": ({"load": torch.ones(12, dtype=torch.int64)}, "has shape [12]: must be [entries"),
    "short": ({"load": torch.ones(3, 8)}, "has 3 entries: must be 12, as the others have"),
    "no steps": ({"steps": None}, "steps must be a list of whole numbers"),
    "no expert": ({"load": torch.ones(12, 0)}, "has shape [12, 0]"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_loads_that_cannot_be_are_one_sentence(
    finished: Path, tmp_path: Path, command: Command, case: str
) -> None:
    changed, sentence = DAMAGED[case]
    file = tmp_path / "loads.safetensors"
    shutil.copy(finished / "loads.safetensors", file)
    change(file, **changed)
    printed = command("placement", str(file), "--gpus", "2")
    assert printed.code == 2
    assert sentence in printed.sentence
    assert str(file) in printed.sentence


OPTIONS = {
    "--gpus 0": "--gpus = 0: must be from 1 to 100000",
    "--gpus 100000000": "--gpus = 100000000: must be from 1 to 100000",
    "--gpus 4 --nodes 3": "--gpus = 4: must be a multiple of --nodes = 3",
    "--gpus 4 --replicas 10": "--replicas = 10: must be a multiple of --gpus = 4",
    "--gpus 4 --replicas 4": "--replicas = 4: must be at least the 8 experts of a layer",
    "--gpus 4 --groups 3": "--groups = 3: must divide the 8 experts of a layer",
    "--stretches 0": "--stretches = 0: must be from 1 to 100000",
    "--experts-share 1.5": "--experts-share = 1.5: must be from 0 to 1",
    "--experts-share nan": "--experts-share = nan: must be from 0 to 1",
    "--tokens 0": "--tokens = 0: must be at least 1",
    "--weights ema": "--weights needs --text",
    "--text nowhere.txt": "nowhere.txt",
    "--out /": "--out /",
}


@pytest.mark.parametrize("given", OPTIONS)
def test_options_that_cannot_be_are_one_sentence(
    finished: Path, command: Command, given: str
) -> None:
    printed = command("placement", str(finished), *given.split())
    assert printed.code == 2
    assert OPTIONS[given] in printed.sentence


def test_sources_that_cannot_be_are_one_sentence(
    finished: Path, tmp_path: Path, command: Command
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(finished / "recipe.yaml", bare)
    (tmp_path / "torn.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "other.json").write_text("[1]", encoding="utf-8")
    np.save(tmp_path / "words.npy", np.array(["a"]))
    np.save(tmp_path / "line.npy", np.arange(3))
    np.save(tmp_path / "zeros.npy", np.zeros((2, 4)))
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "header.npy").write_bytes(b"\x93NUMPY\x01\x00\x0c\x00{'descr': ((\n")
    save_file({"steps": torch.arange(3)}, tmp_path / "dense.safetensors")
    cases = {
        "bare": "has no loads.safetensors",
        "nothing": "nothing",
        "missing.npy": "missing.npy",
        "torn.safetensors": "is no safetensors file",
        "dense.safetensors": "holds no tensor load.PATH",
        "other.json": "is not the document of core.inspect --json",
        "words.npy": "must hold an array of numbers",
        "line.npy": "has shape [3]",
        "zeros.npy": "every load is 0",
        "torn.npy": "is no array that numpy can read",
        "header.npy": "is no array that numpy can read",
    }
    for name, sentence in cases.items():
        printed = command("placement", str(tmp_path / name), "--gpus", "2")
        assert printed.code == 2, name
        assert sentence in printed.sentence, name
    text = command("placement", str(tmp_path / "zeros.npy"), "--text", str(tmp_path / "other.json"))
    assert text.code == 2
    assert "--text needs a run or a checkpoint" in text.sentence


PLAN = {"gpus": 2, "nodes": 1, "layers": ["a"], "phy2log": [[0, 1, 2, 0]], "logcnt": [[2, 1, 1]]}
PLANS = {
    "gpus": (0, "gpus = 0: must be a whole number from 1"),
    "nodes": (3, "gpus = 2: must be a multiple of nodes = 3"),
    "layers": ([], "layers must be the paths"),
    "phy2log": ([[0, 1, 0]], "3 physical experts: must be a multiple of gpus = 2"),
    "logcnt": ([[1, 1, 1]], "logcnt of a does not count the experts of phy2log"),
}
TABLES = {
    "hole": ([0, 2, 2, 0], "no place for expert 1"),
    "negative": ([0, -1, 1, 0], "has -1: must be the number of an expert"),
    "fraction": ([0, 1.5, 1, 0], "has 1.5: must be the number of an expert"),
    "truth": ([0, True, 1, 0], "has True: must be the number of an expert"),
    "empty": ([], "must be a list of experts"),
}


def test_plans_that_cannot_be_are_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    cases: list[tuple[Any, str]] = [({**PLAN, key: value}, s) for key, (value, s) in PLANS.items()]
    for table, sentence in TABLES.values():
        cases.append(({**PLAN, "phy2log": [table], "logcnt": [None]}, sentence))
    cases.append(({**PLAN, "layers": ["a", "b"]}, "phy2log must have one list for each of the 2"))
    cases.append(
        ({**PLAN, "layers": ["a", "a"], "phy2log": [[0, 1], [0, 1]]}, "names a layer twice")
    )
    cases.append(([1], "must be an object"))
    for document, sentence in cases:
        file.write_text(json.dumps(document), encoding="utf-8")
        with pytest.raises(UserError) as error:
            read_plan(file)
        assert sentence in str(error.value)
        assert str(file) in str(error.value)
    file.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is no JSON document"):
        read_plan(file)
    file.write_text(json.dumps(PLAN), encoding="utf-8")
    assert read_plan(file).layers["a"].expert_P == (0, 1, 2, 0)
