"""Models that run on physical experts compute what the model computes, and load GPUs as the plan says."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from model import tiny
from tiers import first_by_default
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from two_ranks import on_two_ranks

import core
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.deployment.balancing import Deployment, place_layer
from core.deployment.effect import by_plan
from core.deployment.loads import RecordedLoads
from core.deployment.placed import PhysicalLoads, place
from core.deployment.plan import PlacementPlan, plan_placement
from core.model.language_model import LanguageModel
from core.model.trace import Trace, trace_context
from core.routing.replicas import Replicas

MODEL = (*tiny.MTP, "precision.name=fp64", "model.init.std=0.3")


def built(*overrides: str) -> LanguageModel:
    """The tiny model in fp64."""
    return tiny.build(*MODEL, *overrides).eval()


def text(rows: int = 6, length: int = 12, first: int = 0) -> SequenceContext:
    """Sequences of drawn tokens, of which one is padded."""
    tokens = torch.randint(300, (rows, length), generator=torch.Generator().manual_seed(5))
    valid = torch.ones(rows, length, dtype=torch.bool)
    valid[-1, 5:] = False
    return SequenceContext.of(
        tokens, targets_BL=tokens.roll(-1, 1), valid_BL=valid, first_sequence=first
    )


def part(context: SequenceContext, rows: slice) -> SequenceContext:
    """Some sequences of a context, with the numbers that they had."""
    assert context.targets_BL is not None
    return SequenceContext.of(
        context.tokens_BL[rows],
        targets_BL=context.targets_BL[rows],
        valid_BL=context.valid()[rows],
        first_sequence=context.first_sequence + rows.start,
    )


def planned(model: LanguageModel, *contexts: SequenceContext, gpus: int = 2) -> PlacementPlan:
    """A plan from the loads of these texts, with more than one copy of several experts."""
    traces = [trace_context(model, context) for context in contexts]
    return plan_placement(RecordedLoads.of_traces(traces), gpus=gpus, replicas=12)


def outputs(model: LanguageModel, context: SequenceContext) -> list[Tensor]:
    """Hidden states, logits, and the sums of all heads' losses."""
    with torch.no_grad():
        hidden_BLD, _ = model.hidden(context)
        losses = model(context)
    sums = [value.detach() for head in losses.heads.values() for value in head.terms.values()]
    return [hidden_BLD, model.output(hidden_BLD).detach(), *sums]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Within 1e-12 of the largest number."""
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-12 * max(1.0, float(other.abs().max()))


def split_by_hand(trace: Trace, plan: PlacementPlan) -> dict[str, list[int]]:
    """The load of each physical expert, by a loop over assignments and the hash of one token at a time."""
    found = {}
    for path, placement in plan.layers.items():
        block = trace.blocks[path]
        routing = block.routing
        assert routing is not None
        replicas = Replicas(placement.expert_P, placement.experts)
        load_P = [0] * len(placement.expert_P)
        length = block.context.tokens_BL.shape[1]
        positions_BL = block.context.positions_BL.expand(block.context.tokens_BL.shape)
        for token, expert in zip(routing.token_A.tolist(), routing.expert_A.tolist(), strict=True):
            row, column = divmod(token, length)
            if not block.context.valid()[row, column]:
                continue
            place = (row + block.context.first_sequence, int(positions_BL[row, column]))
            physical = int(replicas.choose(*map(torch.tensor, (expert, *place))))
            assert placement.expert_P[physical] == expert
            load_P[physical] += 1
        found[path] = load_P
    return found


def test_outputs_are_those_without_replicas() -> None:
    model = built()
    context = text()
    expected = outputs(model, context)
    plan = planned(model, context)
    assert any(max(layer.counts) > 1 for layer in plan.layers.values())
    placed = place(model, plan)
    assert placed is model
    assert placed.blocks[-1].ffn.routed.gate_up.weight.shape[0] == 12  # type: ignore[union-attr]
    assert_equal(outputs(placed, context), expected)


ROUTERS = (
    "{name: switch}",
    "{name: gshard}",
    "{name: gshard_dropless}",
    "{name: expert_choice}",
    "{name: hash}",
    "{name: hash_gated}",
    "{name: forced_balance}",
)


@pytest.mark.parametrize("router", first_by_default(ROUTERS, keep=2))
def test_every_router_gives_the_same_with_replicas(router: str) -> None:
    model = built(f"model.blocks.moe.ffn.router={router}", f"{tiny.BALANCE}=[]")
    context = text()
    expected = outputs(model, context)
    assert_equal(outputs(place(model, planned(model, context)), context), expected)


@pytest.mark.full
def test_the_weights_of_every_copy_are_read() -> None:
    """Sets one copy to 0: outputs change exactly where the hash sends a token there."""
    model = built()
    context = text()
    plan = planned(model, context)
    placed = place(deepcopy(model), plan)
    before = outputs(placed, context)
    path = next(iter(plan.layers))
    counts = plan.layers[path].counts
    expert = counts.index(max(counts))
    copies = plan.layers[path].physical_experts[expert]
    load = split_by_hand(trace_context(model, context), plan)[path]
    assert all(load[copy] for copy in copies)
    for copy in copies:
        broken = deepcopy(placed)
        layer: Any = broken.expert_layers()[path]
        layer.routed.down.weight.data[copy] = 0.0
        assert float((outputs(broken, context)[0] - before[0]).abs().max()) > 1e-6


def test_loads_are_exactly_as_the_hash_splits_them() -> None:
    model = built()
    context = text(rows=8, first=3)
    plan = planned(model, context, gpus=3)
    trace = trace_context(model, context)
    expected = split_by_hand(trace, plan)
    placed = place(model, plan)
    loads = PhysicalLoads(placed, plan)
    with loads.counting():
        placed(context)
    assert loads.of_experts() == expected
    by_gpu = loads.of_gpus()
    for path, load_P in expected.items():
        assert by_gpu[path] == [sum(load_P[at : at + 4]) for at in (0, 4, 8)]
        load_E = trace.blocks[path].load
        assert load_E is not None
        for expert, copies in enumerate(plan.layers[path].physical_experts):
            assert sum(load_P[copy] for copy in copies) == int(load_E[expert])


def test_the_load_of_each_gpu_is_the_plans_within_what_a_hash_gives() -> None:
    """The count of a copy is binomial: a GPU's load stays within 4.5 standard deviations of the planned one."""
    model = built()
    contexts = [text(rows=16, length=16, first=first) for first in (0, 16, 32, 48)]
    plan = planned(model, *contexts)
    layers = RecordedLoads.of_traces([trace_context(model, context) for context in contexts])
    logical = layers.between(0, len(layers.at))
    expected = by_plan(plan, logical)
    placed = place(model, plan)
    loads = PhysicalLoads(placed, plan)
    with loads.counting():
        for context in contexts:
            placed(context)
    for path, load_G in loads.of_gpus().items():
        placement = plan.layers[path]
        slots = len(placement.expert_P) // plan.gpus
        for gpu, load in enumerate(load_G):
            variance = 0.0
            own = placement.expert_P[gpu * slots : (gpu + 1) * slots]
            for expert in set(own):
                share = own.count(expert) / placement.counts[expert]
                variance += logical[path][expert] * share * (1 - share)
            assert abs(load - expected[path][gpu]) <= 4.5 * variance**0.5 + 1e-9


def test_copies_of_an_expert_share_its_tokens_evenly() -> None:
    replicas = Replicas([0, 0, 1, 0, 2, 1], 3)
    sequence, position = torch.meshgrid(torch.arange(200), torch.arange(100), indexing="ij")
    for expert, copies in enumerate([[0, 1, 3], [2, 5], [4]]):
        chosen = replicas.choose(torch.full_like(sequence, expert), sequence, position)
        counts = torch.bincount(chosen.flatten(), minlength=6)
        n, c = 20_000, len(copies)
        deviation = (n / c * (1 - 1 / c)) ** 0.5
        for physical in range(6):
            expected = n / c if physical in copies else 0
            assert abs(int(counts[physical]) - expected) <= 4.5 * deviation
        # neighbours in a sequence, and the same position of others, do not choose alike
        if c == 2:
            same = (chosen[:, 1:] == chosen[:, :-1]).double().mean()
            across = (chosen[1:] == chosen[:-1]).double().mean()
            assert abs(float(same) - 0.5) < 0.02
            assert abs(float(across) - 0.5) < 0.02


def test_how_a_batch_is_split_changes_no_choice() -> None:
    model = built()
    context = text()
    plan = planned(model, context)
    placed = place(model, plan)
    whole, split = PhysicalLoads(placed, plan), PhysicalLoads(placed, plan)
    with whole.counting():
        placed(context)
    with split.counting():
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
            placed(part(context, rows))
    assert whole.of_experts() == split.of_experts()


def test_generation_writes_the_same_tokens() -> None:
    model = built()
    prompts = [[5, 9, 200, 31], [3, 7], [250, 1, 1, 8, 120]]
    expected = core.complete(model, prompts, tokens=12)
    drafted = core.complete(model, prompts, tokens=12, drafts=1)
    placed = core.place(model, planned(model, text()))
    found = core.complete(placed, prompts, tokens=12)
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    again = core.complete(placed, prompts, tokens=12, drafts=1)
    assert [one.tokens for one in again] == [one.tokens for one in drafted]


def test_decoding_chooses_the_copies_that_the_whole_sequence_chose(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = built()
    plan = planned(model, text())
    assert len(plan.layers) == 4  # two of them in multi-token modules, which do not decode here
    placed = place(model, plan)
    chosen: list[Tensor] = []
    choose = Replicas.choose

    def keep(self: Replicas, *arguments: Tensor) -> Tensor:
        result = choose(self, *arguments)
        chosen.append(result)
        return result

    monkeypatch.setattr(Replicas, "choose", keep)
    (written,) = core.complete(placed, [[5, 9, 200, 31]], tokens=6)
    layers = 2
    decoded = [torch.cat([c.flatten() for c in chosen[index::layers]]) for index in range(layers)]
    chosen.clear()
    tokens = torch.tensor([[5, 9, 200, 31, *written.tokens[:-1]]])
    with torch.no_grad():
        placed.hidden(SequenceContext.of(tokens))
    for index in range(layers):
        assert decoded[index].tolist() == chosen[index].flatten().tolist()


@pytest.mark.full
def test_two_ranks_compute_what_one_device_computes(tmp_path: Path) -> None:
    model = built("model.blocks.moe.ffn.dispatcher.name=all_to_all")
    context = text()
    plan = planned(model, context)
    halves = (slice(0, 3), slice(3, 6))
    expected = [outputs(model, part(context, rows)) for rows in halves]
    alone = place(deepcopy(model), plan)
    on_one = PhysicalLoads(alone, plan)
    with on_one.counting():
        alone(context)
    prompts = [[5, 9, 200, 31], [3, 7]]
    written = [one.tokens for one in core.complete(alone, prompts, tokens=8)]

    def work(rank: int) -> Any:
        placed = place(deepcopy(model), plan, mesh=init_device_mesh("cpu", (2,)))
        shapes = {layer.routed.down.weight.shape[0] for layer in placed.expert_layers().values()}  # type: ignore[union-attr]
        loads = PhysicalLoads(placed, plan)
        with loads.counting():
            found = outputs(placed, part(context, halves[rank]))
        texts = [one.tokens for one in core.complete(placed, prompts, tokens=8)]
        return shapes, found, loads.of_experts(), loads.of_gpus(), texts

    for rank, (shapes, found, experts, gpus, texts) in enumerate(on_two_ranks(work, tmp_path)):
        assert shapes == {6}
        assert_equal(found, expected[rank])
        # `outputs` reads the main model twice
        main = [path for path in plan.layers if path.startswith("blocks.")]
        for path, load_P in on_one.of_experts().items():
            times = 2 if path in main else 1
            assert experts[path] == [times * load for load in load_P]
        for path, load_G in on_one.of_gpus().items():
            times = 2 if path in main else 1
            assert gpus[path] == [times * load for load in load_G]
        assert texts == written


def test_training_a_placed_model_is_refused() -> None:
    model = built()
    context = text()
    placed = place(model, planned(model, context))
    assert not any(parameter.requires_grad for parameter in placed.parameters())
    placed.train()
    with pytest.raises(UserError, match="redundant experts, which are for inference: load the run"):
        placed(context)


def even(experts: int, gpus: int = 2, replicas: int = 12) -> Any:
    """A placement of experts with even loads."""
    return place_layer([1.0] * experts, Deployment(gpus, 1, replicas))


def test_plans_of_other_models_are_one_sentence_and_change_nothing() -> None:
    model = built()
    plan = planned(model, text())
    paths = list(plan.layers)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good = even(8)
    cases = {
        "has a layer blocks.9": {**plan.layers, "blocks.9": good},
        f"has no layer {paths[-1]}": dict.fromkeys(paths[:-1], good),
        f"{paths[-1]} has 6 experts, and 8 in this model": {**plan.layers, paths[-1]: even(6)},
    }
    for sentence, layers in cases.items():
        with pytest.raises(UserError, match=sentence):
            place(model, PlacementPlan(2, 1, layers))
    after = model.state_dict()
    assert all(bool((after[name] == tensor).all()) for name, tensor in before.items())
    assert after.keys() == before.keys()
    place(model, plan)
    with pytest.raises(UserError, match="has a placement already"):
        place(model, plan)
    dense = tiny.build(*tiny.DENSE)
    with pytest.raises(UserError, match="the model has no experts"):
        place(dense, plan)


@pytest.mark.parametrize("dispatcher", first_by_default(["local", "all_to_all"]))
def test_ranks_that_do_not_fit_the_plan_are_one_sentence(tmp_path: Path, dispatcher: str) -> None:
    model = built(f"model.blocks.moe.ffn.dispatcher.name={dispatcher}")
    gpus = 2 if dispatcher == "local" else 3
    plan = planned(model, text(), gpus=gpus)

    def work(rank: int) -> str:
        with pytest.raises(UserError) as error:
            place(model, plan, mesh=init_device_mesh("cpu", (2,)))
        return str(error.value)

    sentence = (
        "works on one device; all_to_all"
        if dispatcher == "local"
        else "gpus = 3, and there are 2 ranks"
    )
    assert all(sentence in found for found in on_two_ranks(work, tmp_path))


@pytest.mark.full
def test_a_compiled_model_chooses_the_same_copies() -> None:
    model = tiny.build("precision.name=fp32").eval()
    context = text()
    plan = planned(model, context)
    plain = place(deepcopy(model), plan)
    compiled = place(deepcopy(model), plan)
    for block in compiled.blocks:
        block.compile()
    with torch.no_grad():
        expected = plain(context)
        found = compiled(context)
    for path in plan.layers:
        before = expected.records[path]["ffn"].tallies["physical_load"]
        assert torch.equal(found.records[path]["ffn"].tallies["physical_load"], before)


@pytest.mark.parametrize("scaling", ["dynamic", "delayed"])
def test_fp8_takes_copies_unless_it_keeps_maxima_of_experts(scaling: str) -> None:
    precision = "precision={name: fp8_emulated}"
    if scaling == "delayed":
        precision = "precision={name: fp8_emulated, scaling: delayed}"
    model = tiny.build(precision).eval()
    context = text()
    plan = planned(model, context)
    if scaling == "delayed":
        with pytest.raises(UserError, match="keeps maxima of each expert from step to step"):
            place(model, plan)
        return
    expected = outputs(model, context)
    found = outputs(place(model, plan), context)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
