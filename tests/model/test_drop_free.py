"""Evaluation and generation that drop nothing, for every router that is installed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab
from torch import Tensor

import core
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.extension.loader import installed_registry
from core.model.drop_free import drop_nothing

from . import tiny
from .test_routers import inputs, layer, logits_of

TIGHT: dict[str, dict[str, Any]] = {
    "gshard": {"capacity_factor": 0.5, "group": "batch"},
    "gshard, second by chance": {"capacity_factor": 2.0},
    "switch": {"capacity_factor": 0.5, "eval_capacity_factor": 0.25, "group": "batch"},
}
"""Settings under which much is dropped, in evaluation too."""

ROUTERS = [*TIGHT, *sorted(set(installed_registry().names("router")) - {"gshard", "switch"})]
TOP_K = {
    "deepseek_v3": 2,
    "deepseek_v2": 2,
    "expert_choice": 2,
    "hash_gated": 2,
    "forced_balance": 2,
}


def made(name: str) -> Any:
    """A layer in evaluation mode, with a budget for each device where the router allows it."""
    router = name.split(",")[0]
    keys = TIGHT.get(name, {"top_k": TOP_K[router]} if router in TOP_K else {})
    budget = (f"{tiny.FFN}.token_dropping={{devices: 4}}",) if router == "deepseek_v2" else ()
    return layer(router, *budget, **keys).eval()


def outputs(ffn: Any, x_BLD: Tensor, context: SequenceContext) -> tuple[Tensor, Any]:
    with torch.no_grad():
        y_BLD, record = ffn(x_BLD, context)
    return y_BLD, record


@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "expert_choice"])
def test_every_assignment_is_carried_out_and_no_other_sequence_matters(name: str) -> None:
    """The output is that of all assignments, one at a time, and of each sequence by itself."""
    ffn = made(name)
    drops = name in TIGHT
    x_BLD = inputs(3 * logits_of("random", 24, seed=3)).view(3, 8, 32)
    context = tiny.context(3, 8, seed=3)
    _, before = outputs(ffn, x_BLD, context)
    assert (int(before.dropped) > 0) == drops
    ffn.drop_nothing()
    y_BLD, record = outputs(ffn, x_BLD, context)
    assert int(record.dropped) == 0
    assert torch.equal(record.load_E, before.load_E)
    x_TD = x_BLD.flatten(0, 1)
    routing = ffn.router(x_TD, ffn.adjust_scores, context)
    expected_TD = torch.zeros_like(x_TD)
    with torch.no_grad():
        for a in range(len(routing.token_A)):
            token, expert = int(routing.token_A[a]), int(routing.expert_A[a])
            ends_E = torch.zeros(8, dtype=torch.int64)
            ends_E[expert:] = 1
            expected_TD[token] += routing.gate_A[a] * ffn.routed(x_TD[token : token + 1], ends_E)[0]
        if ffn.shared is not None:
            expected_TD += ffn.shared(x_TD)
    assert (y_BLD.flatten(0, 1) - expected_TD).abs().max() < 1e-12
    for row in range(3):
        alone = SequenceContext.of(context.tokens_BL[row : row + 1], first_sequence=row)
        y_1LD, _ = outputs(ffn, x_BLD[row : row + 1], alone)
        assert (y_1LD[0] - y_BLD[row]).abs().max() < 1e-12
    properties = ffn.routing_properties
    assert (properties.drops, properties.batch_dependent) == (False, False)


@pytest.mark.parametrize("name", [*TIGHT, "deepseek_v2"])
def test_training_drops_as_before(name: str) -> None:
    ffn = made(name).train()
    x_BLD = inputs(3 * logits_of("random", 24, seed=3)).view(3, 8, 32)
    context = tiny.context(3, 8, seed=3)
    y_BLD, record = outputs(ffn, x_BLD, context)
    ffn.drop_nothing()
    again_BLD, same = outputs(ffn, x_BLD, context)
    assert torch.equal(y_BLD, again_BLD)
    assert int(record.dropped) == int(same.dropped) > 0


def test_expert_choice_says_that_it_drops_nothing_and_leaves_tokens_out(lab: Lab) -> None:
    router = "model.blocks.moe.ffn.router={name: expert_choice, top_k: 2}"
    model = core.build(lab.recipe(router, "model.blocks.moe.ffn.balance=[]"))
    with pytest.raises(UserError, match="experts choose tokens; those that none chooses go past"):
        drop_nothing(model)


@pytest.mark.full
def test_commands_refuse_it_before_weights_are_read(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = "model.blocks.moe.ffn.router={name: expert_choice, top_k: 2}"
    lab.fit(tmp_path / "run", router, "model.blocks.moe.ffn.balance=[]", "budget.steps=1")
    monkeypatch.setattr("core.run.loading.load_weights", None)
    for command, *more in (("evaluate",), ("generate", "--prompt", "a")):
        result = lab.command(command, tmp_path / "run", *more, "--drop-free")
        assert result.code == 2
        assert result.sentence.startswith("--drop-free: in blocks.1 experts choose tokens")


@pytest.fixture(scope="module")
def switching(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose router drops most of what it evaluates."""
    run = tmp_path_factory.mktemp("switching") / "run"
    router = "model.blocks.moe.ffn.router={name: switch, capacity_factor: 0.3, group: batch}"
    lab.fit(run, router, "model.blocks.moe.ffn.balance=[]", "budget.steps=2")
    return run


def test_commands_drop_nothing_where_they_are_asked(lab: Lab, switching: Path) -> None:
    before = json.loads(lab.command("evaluate", switching, "--json").out)
    after = json.loads(lab.command("evaluate", switching, "--json", "--drop-free").out)
    assert before["val_dropped_fraction"] > 0.2
    assert after["val_dropped_fraction"] == 0
    assert before["val_loss"] != after["val_loss"]
    file = switching / "texts.txt"
    file.write_text("abc deaf\nhead cabbage bead\n", encoding="utf-8")
    options = ("--tokens", "6", "--json", "--drop-free")
    together = lab.command("generate", switching, "--prompts", file, *options)
    assert "--batch 1 writes each by itself" not in together.err
    texts = [one["token_ids"] for one in json.loads(together.out)["completions"]]
    for prompt, ids in zip(file.read_text().splitlines(), texts, strict=True):
        alone = json.loads(lab.command("generate", switching, "--prompt", prompt, *options).out)
        assert alone["token_ids"] == ids
