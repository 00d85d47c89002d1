"""Optimizers of torch.optim by name: groups, checked arguments, states, resumed runs, divided weights."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, assert_same, last_checkpoint
from rank_runs import assert_same_end, cut_after, fit_on_ranks
from torch import Tensor

from core.assemble import build, make
from core.contracts.errors import UserError
from core.contracts.training import NamedParameter
from core.model.parameters import check_groups, named_parameters
from core.run.environment import check_environment
from plugins.torch_optimizer.arguments import ELEMENTWISE, algorithms
from plugins.torch_optimizer.arguments import make as make_torchs

VECTORS = "{kinds: [vector], arguments: {weight_decay: 0}}"
LIKE_ADAMW = "optimizer={name: torch, algorithm: AdamW, lr: 0.003, groups: [%s], arguments: %s}"
ADAMW_ARGUMENTS = "{betas: [0.9, 0.95], weight_decay: 0.1, fused: true}"
MATRICES = (
    "optimizer={name: torch, algorithm: Muon, lr: 0.01, groups: [{kinds: [vector, stack, table], algorithm: AdamW, "
    "lr_scale: 0.5, arguments: {weight_decay: 0.2}}]}"
)
USABLE = sorted(set(algorithms()) - {"LBFGS", "SparseAdam", "Muon"})


def weights_of(lab: Lab, *overrides: str) -> list[NamedParameter]:
    """The weights of the small model."""
    return named_parameters(build(lab.recipe(*overrides)))


def test_AdamW_is_the_plugin_adamw_to_the_bit(lab: Lab) -> None:
    """Weights and moments, in one order."""
    states = []
    weights = []
    for optimizer in (
        "optimizer={name: adamw, lr: 0.003}",
        LIKE_ADAMW % (VECTORS, ADAMW_ARGUMENTS),
    ):
        module = lab.train(optimizer, "budget.steps=4")
        weights.append(module.model.state_dict())
        states.append(module.trainer.optimizers[0].state_dict()["state"])
    assert_same(weights[1], weights[0])
    assert_same(states[1], states[0])


def test_without_the_fused_kernel_it_is_the_same_to_1e_12_in_fp64(lab: Lab) -> None:
    plugin = lab.train("precision={name: fp64}", "budget.steps=4")
    arguments = "{betas: [0.9, 0.95], weight_decay: 0.1}"
    ours = lab.train("precision={name: fp64}", "budget.steps=4", LIKE_ADAMW % (VECTORS, arguments))
    for name, weight in plugin.model.state_dict().items():
        torch.testing.assert_close(
            ours.model.state_dict()[name], weight, rtol=1e-12, atol=1e-12, msg=name
        )


def test_every_weight_is_in_the_group_that_names_it(lab: Lab) -> None:
    groups = (
        "[{names: ['*attention*.weight', '*.q_up.weight'], kinds: [vector], lr_scale: 0.5}, "
        "{roles: [router, experts.*], arguments: {momentum: 0.5}}]"
    )
    recipe = lab.recipe(
        f"optimizer={{name: torch, algorithm: SGD, lr: 0.1, arguments: {{momentum: 0.9}}, groups: {groups}}}"
    )
    named = weights_of(lab)
    factory = make(recipe.optimizer)
    check_environment(recipe)
    made = factory.make(named)
    check_groups(made, named)
    assert len(made) == 1
    by_id = {id(one.parameter): one for one in named}
    rest, first, second = made[0].param_groups
    for weight in first["params"]:
        one = by_id[id(weight)]
        assert one.kind == "vector" or "attention" in one.name
    for weight in second["params"]:
        assert by_id[id(weight)].role.startswith(("router", "experts."))
    assert [g["momentum"] for g in (rest, first, second)] == [0.9, 0.9, 0.5]
    assert [g.get("lr_scale", 1.0) for g in (rest, first, second)] == [1.0, 0.5, 1.0]
    assert sum(len(g["params"]) for g in (rest, first, second)) == len(named)


def test_rates_of_groups_are_multiples_of_the_schedule(lab: Lab) -> None:
    """SGD: each weight moves by its own rate times its gradient."""
    groups = "[{kinds: [vector], lr_scale: 0.25}]"
    recipe = lab.recipe(
        f"optimizer={{name: torch, algorithm: SGD, lr: 0.5, groups: {groups}}}",
    )
    named = named_parameters(build(recipe))
    before = {one.name: one.parameter.detach().clone() for one in named}
    optimizer = make(recipe.optimizer).make(named)[0]
    for one in named:
        one.parameter.grad = torch.ones_like(one.parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.5 * group.get("lr_scale", 1.0)
    optimizer.step()
    for one in named:
        rate = 0.125 if one.kind == "vector" else 0.5
        torch.testing.assert_close(one.parameter.detach(), before[one.name] - rate)


@pytest.mark.full
@pytest.mark.parametrize("algorithm", USABLE)
def test_a_run_resumes_to_the_bit(lab: Lab, tmp_path: Path, algorithm: str) -> None:
    overrides = (
        f"optimizer={{name: torch, algorithm: {algorithm}, lr: 0.001}}",
        "budget.steps=8",
        "checkpoint={every_steps: 4, keep: 9}",
    )
    lab.fit(tmp_path / "run", *overrides)
    again = cut_after(tmp_path / "run", 4, tmp_path / "again")
    lab.fit(again, *overrides, resume=True)
    end, other = last_checkpoint(tmp_path / "run"), last_checkpoint(again)
    assert_same(other["state_dict"], end["state_dict"])
    assert_same(other["optimizer_states"], end["optimizer_states"])


def test_states_keep_their_formats_when_they_are_loaded() -> None:
    """torch casts NAdam's fp32 scalar to the weight's fp64; the next steps would differ."""
    from plugins.torch_optimizer.optimizer import keep_formats

    def stepped(optimizer: torch.optim.Optimizer, weight: Tensor) -> None:
        weight.grad = torch.ones_like(weight)
        optimizer.step()

    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    first = make_torchs("NAdam", [weight], {})
    for _ in range(3):
        stepped(first, weight)
    other = torch.nn.Parameter(weight.detach().clone())
    second = make_torchs("NAdam", [other], {})
    keep_formats(second)
    second.load_state_dict(first.state_dict())
    for name, value in first.state[weight].items():
        assert second.state[other][name].dtype == value.dtype, name
    stepped(first, weight)
    stepped(second, other)
    assert torch.equal(weight, other)


@pytest.mark.full
def test_muon_of_torch_with_AdamW_for_the_rest_runs_and_resumes(lab: Lab, tmp_path: Path) -> None:
    overrides = (MATRICES, "budget.steps=6", "checkpoint={every_steps: 3, keep: 9}")
    lab.fit(tmp_path / "run", *overrides)
    content = last_checkpoint(tmp_path / "run")
    assert len(content["optimizer_states"]) == 2
    again = cut_after(tmp_path / "run", 3, tmp_path / "again")
    lab.fit(again, *overrides, resume=True)
    assert_same(last_checkpoint(again)["state_dict"], content["state_dict"])


def _halves_are_the_whole(algorithm: str) -> bool:
    """Whether halves of a matrix, along either axis, are updated as the whole matrix is."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.nn.Parameter(torch.rand(6, 8, generator=draw, dtype=torch.float64))
    gradients = [torch.randn(6, 8, generator=draw, dtype=torch.float64) for _ in range(4)]
    for axis in (0, 1):
        weight = torch.nn.Parameter(whole.detach().clone())
        parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().chunk(2, axis)]
        one = make_torchs(algorithm, [weight], {})
        other = make_torchs(algorithm, parts, {})
        for gradient in gradients:
            weight.grad = gradient
            for part, own in zip(parts, gradient.chunk(2, axis), strict=True):
                part.grad = own.clone()
            for optimizer in (one, other):
                optimizer.param_groups[0]["lr"] = 0.1
                optimizer.step()
        if not torch.equal(torch.cat([part.detach() for part in parts], axis), weight.detach()):
            return False
    return True


@pytest.mark.parametrize("algorithm", sorted(set(algorithms()) - {"LBFGS", "SparseAdam"}))
def test_the_classes_for_divided_weights_are_those_whose_halves_are_updated_as_the_whole(
    algorithm: str,
) -> None:
    assert _halves_are_the_whole(algorithm) == (algorithm in ELEMENTWISE)


@pytest.mark.parametrize("strategy", ["fsdp, ranks: 2", "expert_parallel, expert_ranks: 2"])
@pytest.mark.parametrize("algorithm", ["Muon", "Adafactor"])
def test_classes_that_look_across_a_matrix_are_refused_where_it_is_divided(
    lab: Lab, strategy: str, algorithm: str
) -> None:
    with pytest.raises(UserError, match="optimizer torch needs whole matrices"):
        lab.recipe(
            f"optimizer={{name: torch, algorithm: {algorithm}, lr: 0.1}}",
            f"strategy={{name: {strategy}, accelerator: cpu}}",
        )
    lab.recipe(
        "optimizer={name: torch, algorithm: NAdam, lr: 0.1}",
        f"strategy={{name: {strategy}, accelerator: cpu}}",
    )


@pytest.mark.full
@pytest.mark.parametrize("algorithm", ["AdamW", "NAdam", "Adagrad", "RMSprop"])
@pytest.mark.parametrize("strategy", ["fsdp, ranks: 2", "expert_parallel, expert_ranks: 2"])
def test_divided_weights_are_updated_as_whole_ones(
    lab: Lab, tmp_path: Path, strategy: str, algorithm: str
) -> None:
    overrides = (
        "precision={name: fp64}",
        f"optimizer={{name: torch, algorithm: {algorithm}, lr: 0.001, groups: [{{kinds: [vector], lr_scale: 0.5}}]}}",
        "budget.steps=6",
        "checkpoint={every_steps: 3, keep: 9}",
    )
    divided = f"strategy={{name: {strategy}, accelerator: cpu}}"
    lab.fit(tmp_path / "whole", *overrides)
    fit_on_ranks(lab, tmp_path / "run", *overrides, divided, "checkpoint.sharded=false")
    assert_same_end(tmp_path / "whole", tmp_path / "run")
    fit_on_ranks(lab, tmp_path / "shards", *overrides, divided)
    again = cut_after(tmp_path / "shards", 3, tmp_path / "again")
    fit_on_ranks(lab, again, *overrides, divided, resume=True)
    assert_same_end(again, tmp_path / "whole")


@pytest.mark.parametrize("algorithm", USABLE)
def test_the_bytes_of_states_are_counted_exactly(lab: Lab, algorithm: str) -> None:
    factory = make(
        lab.recipe(f"optimizer={{name: torch, algorithm: {algorithm}, lr: 0.1}}").optimizer
    )
    named = weights_of(lab)
    optimizer = factory.make(named)[0]
    for one in named:
        one.parameter.grad = torch.ones_like(one.parameter)
    optimizer.step()
    for one in named:
        state = optimizer.state[one.parameter]
        held = sum(v.nbytes for v in state.values() if isinstance(v, Tensor))
        assert factory.state_bytes_of(one) == held, one.name


TORCH = "optimizer={name: torch, lr: 0.01, algorithm: "
BAD = {
    TORCH
    + "Adamw}": "optimizer.algorithm = 'Adamw': torch.optim has no such class; did you mean AdamW?",
    TORCH + "Optimizer}": "torch.optim has no such class",
    TORCH
    + "LBFGS}": "optimizer.algorithm = 'LBFGS': it needs a closure that computes the loss several times in a step",
    TORCH + "SparseAdam}": "it takes sparse gradients only",
    TORCH
    + "AdamW, arguments: {beta: [0.9, 0.9]}}": "optimizer.arguments.beta = [0.9, 0.9]: AdamW has no such argument; "
    "did you mean betas?",
    TORCH
    + "AdamW, arguments: {lr: 1}}": "optimizer.arguments.lr = 1: must not be given: the learning rate is "
    "optimizer.lr",
    TORCH + "AdamW, arguments: {maximize: true}}": "it would climb the loss",
    TORCH
    + "AdamW, arguments: {eps: true}}": "optimizer.arguments.eps = true: must be a finite number",
    TORCH + "AdamW, arguments: {eps: .nan}}": "finite",
    TORCH
    + "AdamW, arguments: {amsgrad: 1}}": "optimizer.arguments.amsgrad = 1: must be true or false",
    TORCH
    + "AdamW, arguments: {betas: 0.9}}": "must be a list of 2: a finite number, a finite number",
    TORCH + "AdamW, arguments: {betas: [0.9, 0.9, 0.9]}}": "must be a list of 2",
    TORCH
    + "AdamW, arguments: {betas: [0.9, 2.0]}}": "AdamW: Invalid beta parameter at index 1: 2.0",
    TORCH
    + "AdamW, arguments: {foreach: true, fused: true}}": "`fused` and `foreach` cannot be `True` together",
    TORCH
    + "AdamW, groups: [{}]}": "groups.0.names = []: names, roles or kinds must say which weights it holds",
    TORCH
    + "AdamW, groups: [{kinds: [vector], lr_scale: 0}]}": "groups.0.lr_scale = 0: must be more than 0 and finite",
    TORCH + "AdamW, groups: [{kinds: [vektor]}]}": "groups.0.kinds = ['vektor']: must be",
    TORCH
    + "AdamW, groups: [{kinds: [vector], arguments: {fused: true}}]}": "groups.0.arguments.fused = true: is one for "
    "all groups; give it in optimizer.arguments",
    TORCH
    + "AdamW, groups: [{kinds: [vector], arguments: {momentum: 1}}]}": "AdamW has no such argument; known:",
    TORCH
    + "AdamW, groups: [{kinds: [vector], algorithm: Sgd}]}": "groups.0.algorithm = 'Sgd': torch.optim has no such "
    "class; did you mean SGD",
    TORCH
    + "AdamW, groups: [{roles: [head, heads]}]}": "optimizer.groups.0.roles: 'heads' names no weight; did you mean "
    "head?",
    TORCH
    + "AdamW, groups: [{names: ['blocks.7.*']}]}": "optimizer.groups.0.names: 'blocks.7.*' names no weight; ",
    TORCH
    + "AdamW, groups: [{kinds: [vector]}, {roles: [norm]}]}": "weight is in groups.0 too; a weight must be in one "
    "group",
    TORCH
    + "Muon}": "optimizer.algorithm: Muon cannot update blocks.0.attention_norm.weight: Muon only supports 2D "
    "parameters",
    "optimizer={name: torch, lr: 0.01}": "optimizer.algorithm: required key is missing",
}


@pytest.mark.parametrize(("override", "sentence"), BAD.items(), ids=range(len(BAD)))
def test_a_mistake_is_one_sentence_before_work_starts(
    lab: Lab, override: str, sentence: str
) -> None:
    with pytest.raises(UserError) as wrong:
        check_environment(lab.recipe(override))
    assert sentence in str(wrong.value)
    assert "\n" not in str(wrong.value)


class Diary(torch.optim.SGD):
    """Keeps a list for each weight, which no checkpoint of tensors can hold."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight].setdefault("seen", []).append(1)
        return super().step(closure)


def test_a_state_that_cannot_be_saved_is_refused(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(algorithms(), "Diary", Diary)
    sentence = "optimizer.algorithm: Diary cannot be saved in a checkpoint: it keeps seen, which is neither a tensor"
    with pytest.raises(UserError, match=sentence):
        check_environment(lab.recipe("optimizer={name: torch, lr: 0.01, algorithm: Diary}"))


def test_every_class_of_torch_with_a_closure_of_its_own_is_refused() -> None:
    """What the small list of names above relies on."""
    needing = []
    for name, algorithm in algorithms().items():
        closure = inspect.signature(algorithm.step).parameters["closure"]
        if closure.default is inspect.Parameter.empty:
            needing.append(name)
    assert needing == ["LBFGS"]
