"""Which weights an optimizer decays: matrices, but for the roles that a recipe names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, assert_same, last_checkpoint

from core.assemble import build, make
from core.contracts.errors import UserError
from core.model.parameters import named_parameters
from core.run.environment import check_environment

MUON = "optimizer={name: muon, lr: 0.01}"
ADAMW = "optimizer={name: adamw, lr: 0.01}"


def decays(lab: Lab, *overrides: str) -> dict[str, float]:
    """The decay of every weight of the small model, by its name."""
    recipe = lab.recipe(*overrides)
    named = named_parameters(build(recipe))
    made = make(recipe.optimizer).make(named)
    names = {id(one.parameter): one.name for one in named}
    found = {}
    for optimizer in made if isinstance(made, list) else [made]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                found[names[id(parameter)]] = group["weight_decay"]
    assert len(found) == len(named)
    return found


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
def test_by_default_all_but_vectors_decay(lab: Lab, optimizer: str) -> None:
    vectors = {n.name for n in named_parameters(build(lab.recipe())) if n.kind == "vector"}
    found = decays(lab, optimizer)
    assert {name for name, decay in found.items() if decay == 0} == vectors
    assert set(found.values()) == {0.0, 0.1}


EXCLUDED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "adamw": ((ADAMW, "optimizer.no_decay=[embedding, 'attention.*']"), ("embedding", "attention")),
    "muon's AdamW": ((MUON, "optimizer.adamw.no_decay=[embedding]"), ("embedding",)),
    "muon": ((MUON, "optimizer.no_decay=[router, experts.down]"), ("router", "experts.down")),
}


@pytest.mark.parametrize(("overrides", "roles"), EXCLUDED.values(), ids=EXCLUDED)
def test_the_roles_that_a_recipe_names_do_not(
    lab: Lab, overrides: tuple[str, ...], roles: tuple[str, ...]
) -> None:
    found = decays(lab, *overrides)
    for named in named_parameters(build(lab.recipe())):
        excluded = named.kind == "vector" or named.role.startswith(roles)
        assert found[named.name] == (0.0 if excluded else 0.1), named.name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_without_a_gradient_only_weights_that_decay_shrink(lab: Lab, name: str) -> None:
    optimizer = f"optimizer={{name: {name}, lr: 0.01}}"
    key = "optimizer.no_decay=[ffn.down]"
    recipe = lab.recipe(optimizer, key)
    named = named_parameters(build(recipe))
    before = {one.name: one.parameter.detach().clone() for one in named}
    for one in named:
        one.parameter.grad = torch.zeros_like(one.parameter)
    made: Any = make(recipe.optimizer).make(named)
    for one in made if isinstance(made, list) else [made]:
        for group in one.param_groups:
            group["lr"] = 0.5
        one.step()
    for one in named:
        stays = one.kind == "vector" or one.role == "ffn.down"
        expected = before[one.name] * (1.0 if stays else 0.95)
        torch.testing.assert_close(one.parameter.detach(), expected, rtol=1e-6, atol=0)


@pytest.mark.full
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_without_decay_of_some_roles_resumes_to_the_bit(
    lab: Lab, tmp_path: Path, name: str
) -> None:
    overrides = (f"optimizer={{name: {name}, lr: 0.01, no_decay: [ffn.down]}}", "budget.steps=10")
    lab.fit(tmp_path / "run", *overrides)
    end = last_checkpoint(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "checkpoints" / "step-00000010.ckpt").unlink()
    lab.fit(tmp_path / "run", *overrides, resume=True)
    again = last_checkpoint(tmp_path / "run")
    assert_same(again["state_dict"], end["state_dict"])
    assert_same(again["optimizer_states"], end["optimizer_states"])


BAD = {
    (
        ADAMW,
        "optimizer.no_decay=[norms]",
    ): "optimizer.no_decay = ['norms']: 'norms' is not a role; did you mean norm?",
    (MUON, "optimizer.adamw.no_decay=[heads]"): "'heads' is not a role; did you mean head?",
    (
        MUON,
        "optimizer.no_decay=[embedding]",
    ): "optimizer.no_decay: 'embedding' names weights that AdamW updates, "
    "which adamw.no_decay is for",
    (
        MUON,
        "optimizer.adamw.no_decay=[router]",
    ): "optimizer.adamw.no_decay: 'router' names weights that Muon updates, which no_decay is for",
    (
        MUON,
        "optimizer.split={head: 2}",
    ): "optimizer.split: 'head' names weights that AdamW updates, which are not split",
}


@pytest.mark.parametrize(("overrides", "sentence"), BAD.items())
def test_what_cannot_be_honoured_is_refused(
    lab: Lab, overrides: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(UserError) as wrong:
        check_environment(lab.recipe(*overrides))
    assert sentence in str(wrong.value)


def test_roles_that_a_component_declares_can_be_named(lab: Lab) -> None:
    """`residual` is a role of hyper-connections, which AdamW of muon must know too."""
    streams = "model.residual={name: hyper_connections, streams: 2}"
    for optimizer in (
        "optimizer={name: muon, lr: 0.01, adamw: {no_decay: [residual], roles: [embedding, head, residual]}}",
        "optimizer={name: adamw, lr: 0.01, no_decay: [residual]}",
    ):
        recipe = lab.recipe(streams, optimizer)
        check_environment(recipe)
        made: Any = make(recipe.optimizer).make(named_parameters(build(recipe)))
        assert made
