"""The callback `ema` with every component that is registered: no deep copy, no other bits, and the right average."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, assert_same

from core.assemble import build
from core.checkpoints.listing import checkpoints_in
from core.checkpoints.reading import read_checkpoint
from core.contracts.errors import UserError
from core.extension.loader import installed_registry
from core.run.environment import check_environment
from core.run.evaluation import evaluate

DECAY = 0.75
EMA = f"callbacks=[{{name: ema, decay: {DECAY}}}]"
SHORT = (
    "budget.steps=4",
    "checkpoint={every_steps: 1, keep: 9}",
    "validation.every_steps=2",
    "loggers=[{name: csv}]",
)
PLACES = {
    "attention": "model.attention={}",
    "dispatcher": "model.blocks.moe.ffn.dispatcher={}",
    "ffn": "model.blocks.moe.ffn={}",
    "router": "model.blocks.moe.ffn.router={}",
    "balancer": "model.blocks.moe.ffn.balance=[{}]",
    "residual": "model.residual={}",
    "loss_head": "model.heads.more={}",
    "precision": "precision={}",
    "optimizer": "optimizer={}",
}
"""Where the small recipe has a component of a slot."""

DELAYED = "precision={name: fp8_emulated, scaling: delayed}"


def cases() -> list[Any]:
    """An override of the small recipe for each component, and some in which more is kept than weights."""
    found: list[Any] = []
    for slot in PLACES:
        for entry in entries(slot):
            found.append(pytest.param(slot, entry.name, id=f"{slot} {entry.name}"))
    return found


def entries(slot: str) -> list[Any]:
    """The registered components of a slot, sorted by their names."""
    found: list[Any] = []
    for _, registered in installed_registry().entries.items():
        found += [entry for entry in registered if entry.slot == slot]
    return sorted(found, key=lambda entry: entry.name)


def overrides_of(slot: str, name: str) -> list[str]:
    """The overrides that put a component's example into the small recipe."""
    (entry,) = [entry for entry in entries(slot) if entry.name == name]
    example = json.dumps(entry.load()[0].example)
    overrides = [PLACES[slot].format(example)]
    if slot == "router":
        overrides.append("model.blocks.moe.ffn.balance=[]")
    return overrides


def check_run(lab: Lab, folder: Path, overrides: list[str]) -> None:
    """Trains with and without the average, and compares it with a slow loop over the checkpoints of all steps."""
    try:
        check_environment(lab.recipe(*SHORT, *overrides))
    except UserError as error:
        pytest.skip(f"the small recipe cannot have it here: {error}")
    summary = lab.fit(folder / "ema", *SHORT, *overrides, EMA)
    lab.fit(folder / "plain", *SHORT, *overrides)
    runs = [checkpoints_in(folder / "ema"), checkpoints_in(folder / "plain")]
    average: dict[str, torch.Tensor] = {}
    for files in zip(*runs, strict=True):
        one, two = [read_checkpoint(file) for file in files]
        for key in ("state_dict", "optimizer_states"):
            assert_same(one[key], two[key])
        assert_same(one["moeloom"]["step_states"], two["moeloom"]["step_states"])
        kept = one["averages"]["ema"]["weights"]
        for name in kept:
            weight = one["state_dict"][name]
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            average[name] = (
                torch.lerp(average[name], wide, 1 - DECAY) if name in average else wide.clone()
            )
        assert_same(kept, average)
    model = build(lab.recipe(*SHORT, *overrides), device="meta")
    assert list(average) == [f"model.{name}" for name, _ in model.named_parameters()]
    own = evaluate(runs[0][-1], say=lambda _: None)["val_loss"]
    found = evaluate(runs[0][-1], weights="ema", say=lambda _: None)["val_loss"]
    assert found != own
    if own == summary["val_loss"]:  # not if the precision scales by what it saw in training
        assert found == summary["ema/val_loss"]
    else:
        rounds = "compile=true" in overrides  # `evaluate` does not compile
        assert rounds or any("delayed" in override for override in overrides)
        rel = 1e-6 if rounds else 0.05
        assert own == pytest.approx(summary["val_loss"], rel=rel)
        assert found == pytest.approx(summary["ema/val_loss"], rel=rel)


@pytest.mark.parametrize(("slot", "name"), cases())
def test_every_component_trains_with_an_average(
    lab: Lab, tmp_path: Path, slot: str, name: str
) -> None:
    check_run(lab, tmp_path, overrides_of(slot, name))


@pytest.mark.parametrize(
    "overrides",
    [
        [DELAYED],
        ["model.tied_embedding=true"],
        ["recompute.blocks=[dense, moe]"],
        [
            "model.blocks.moe.ffn.router={name: hash, map: balanced}",
            "model.blocks.moe.ffn.balance=[]",
        ],
        [
            "optimizer={name: muon, lr: 0.003}",
            "model.residual={name: hyper_connections, scale: 0.01}",
            "model.heads.mtp.reads=streams",
            "recompute.blocks=[dense, moe]",
        ],
        ["compile=true", "model.heads.mtp=null"],
    ],
    ids=["delayed scaling", "tied embedding", "recompute", "hash tables", "muon", "compile"],
)
def test_what_is_kept_beside_weights_is_not_averaged(
    lab: Lab, tmp_path: Path, overrides: list[str]
) -> None:
    check_run(lab, tmp_path, overrides)
