"""Frozen weights and balancers: nothing of them changes, and nothing is kept for them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, last_checkpoint
from observed_run import differences
from rank_runs import assert_same_end, cut_after, fit_on_ranks
from tiers import first_by_default

from core.analysis.describe import document_of
from core.assemble import build
from core.contracts.balancer import Balancer
from core.contracts.errors import UserError
from core.model.language_model import LanguageModel

BIASES = ("blocks.1.ffn.balance.0.bias", "heads.mtp.depths.0.block.ffn.balance.0.bias")
SHORT = ("budget.steps=3", "checkpoint.every_steps=1", "validation.every_steps=null")


def started(lab: Lab, *overrides: str) -> LanguageModel:
    """The model with its initial weights."""
    return build(lab.recipe(*overrides))


def changed(lab: Lab, run: Path, *overrides: str) -> set[str]:
    """Names of the tensors that a run has changed."""
    before = started(lab, *overrides).state_dict()
    after = last_checkpoint(run)["state_dict"]
    return {name for name in before if not torch.equal(before[name], after[f"model.{name}"])}


def states(content: dict[str, Any]) -> int:
    """How many weights the optimizers of a checkpoint keep something for."""
    return sum(len(optimizer["state"]) for optimizer in content["optimizer_states"])


CASES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "routers": (["router"], ["ffn.router."]),
    "biases": (["bias"], BIASES),
    "embedding": (["embedding"], ["embedding."]),
    "all but a module": (
        ["embedding", "blocks", ".norm", ".output"],
        ["embedding.", "blocks.0.", "blocks.1.", "norm.weight", "output.weight"],
    ),
}


@pytest.mark.parametrize("optimizer", first_by_default(["adamw", "muon"]))
@pytest.mark.parametrize("case", first_by_default(CASES))
def test_what_is_frozen_keeps_its_bits_and_has_no_state(
    lab: Lab, tmp_path: Path, case: str, optimizer: str
) -> None:
    """Weight decay is strong, so that it would show."""
    patterns, parts = CASES[case]
    settings = f"optimizer={{name: {optimizer}, lr: 0.01, weight_decay: 1.0}}"
    freeze = f"freeze=[{', '.join(patterns)}]"
    summary = lab.fit(tmp_path / "run", *SHORT, freeze, settings)
    model = started(lab, freeze)
    every = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    frozen = {name for name in every if is_named(name, parts)}
    assert frozen
    assert f"freeze: {len(frozen)} tensors are frozen" in summary["notices"][-1]
    assert changed(lab, tmp_path / "run") == every - frozen
    weights = {name for name, _ in model.named_parameters()}
    assert states(last_checkpoint(tmp_path / "run")) == len(weights - frozen)


def is_named(name: str, parts: Sequence[str]) -> bool:
    return any(
        name.startswith(part) or (part.startswith("ffn.") and part in name) for part in parts
    )


def test_a_frozen_router_is_still_balanced_and_a_frozen_bias_is_not(lab: Lab) -> None:
    def frozen(*patterns: str) -> list[bool]:
        model = build(lab.recipe(f"freeze=[{', '.join(patterns)}]"), device="meta")
        return [m.is_frozen for m in model.modules() if isinstance(m, Balancer)]

    assert frozen("router") == [False, False, False, False]
    assert frozen("balance.0") == [True, False, True, False]
    assert frozen("blocks.1.ffn.balance") == [True, False, False, False]


@pytest.mark.full
def test_a_run_that_is_resumed_with_frozen_parts_reaches_the_same_bits(
    lab: Lab, tmp_path: Path
) -> None:
    keys = ("freeze=[router, bias, embedding]", "checkpoint.keep=9", "budget.steps=6")
    ema = "callbacks=[{name: ema, decay: 0.9}]"
    lab.fit(tmp_path / "whole", *keys, ema)
    cut = cut_after(tmp_path / "whole", 5, tmp_path / "cut")
    lab.fit(cut, *keys, ema, resume=True)
    one, two = last_checkpoint(tmp_path / "whole"), last_checkpoint(cut)
    for part in ("state_dict", "optimizer_states", "averages"):
        assert not differences(one[part], two[part])
    with pytest.raises(UserError, match=r"freeze.* here, but the run was started with"):
        lab.fit(cut_after(tmp_path / "whole", 5, tmp_path / "other"), *keys[1:], ema, resume=True)


def test_the_gradient_norm_is_that_of_what_is_trained(lab: Lab) -> None:
    """Compares it with the gradients of a module that is frozen but for one weight."""
    module = lab.train("freeze=[embedding, blocks, heads, .norm]", "budget.steps=1")
    names = [named.name for named in module.local_parameters.named]
    assert names == ["output.weight"]


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [
        ("[routers]", "freeze: 'routers' chooses no tensor; did you mean router"),
        ("['*']", r"freeze: \* leaves no weight to train"),
        ("['a..b']", r"freeze = .*: 'a\.\.b' must be parts of a tensor's name, joined by dots"),
    ],
)
def test_patterns_that_choose_nothing_or_everything_are_refused(
    lab: Lab, tmp_path: Path, patterns: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        lab.fit(tmp_path / "run", f"freeze={patterns}")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.full
@pytest.mark.parametrize(
    "strategy",
    [
        "strategy={name: ddp, ranks: 2}",
        "strategy={name: fsdp, ranks: 2}",
        "strategy={name: expert_parallel, expert_ranks: 2}",
    ],
    ids=["ddp", "fsdp", "expert_parallel"],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "patterns", ["router, bias, embedding", "routed, blocks.0", "blocks, embedding, .output"]
)
def test_ranks_train_what_one_process_does(
    lab: Lab, tmp_path: Path, strategy: str, optimizer: str, patterns: str
) -> None:
    keys = (
        "precision.name=fp64",
        f"freeze=[{patterns}]",
        f"optimizer={{name: {optimizer}, lr: 0.01}}",
        "callbacks=[{name: ema, decay: 0.9}]",
        *SHORT,
    )
    lab.fit(tmp_path / "one", *keys)
    fit_on_ranks(lab, tmp_path / "two", *keys, strategy)
    assert_same_end(tmp_path / "one", tmp_path / "two")
    again = cut_after(tmp_path / "two", 3, tmp_path / "again")
    lab.fit(again, *keys, resume=True)
    assert_same_end(tmp_path / "one", again)


@pytest.mark.full
@pytest.mark.parametrize(
    "keys",
    [("compile=true",), ("recompute.blocks=[dense, moe]",), ("precision.name=fp8_emulated",)],
)
def test_frozen_parts_under_compile_recompute_and_fp8(
    lab: Lab, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    freeze = "freeze=[router, routed, dense, embedding, blocks.0]".replace("dense, ", "")
    lab.fit(tmp_path / "run", *SHORT, *keys, freeze)
    every = changed(lab, tmp_path / "run", *keys)
    assert not [name for name in every if ".router." in name or ".routed." in name]
    assert "output.weight" in every


def test_describe_counts_no_gradient_and_no_state_of_frozen_weights(lab: Lab) -> None:
    whole = document_of(lab.recipe())["memory_bytes"]
    part = document_of(lab.recipe("freeze=[embedding, routed]"))["memory_bytes"]
    weights = dict(started(lab).named_parameters())
    frozen = [w for name, w in weights.items() if name == "embedding.weight" or ".routed." in name]
    fewer = sum(4 * weight.numel() for weight in frozen)
    assert whole["gradients"] - part["gradients"] == fewer
    assert whole["optimizer"] - part["optimizer"] == 2 * fewer
    assert whole["weights"] == part["weights"]
