"""The contract of routers."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from core.contracts.context import SequenceContext
from core.contracts.router import CAPABILITIES, Routing
from core.testing import bench
from core.testing.clauses import check, hold, spare
from core.testing.subject import Subject, distance, perturbed

COSTS = "core/contracts/component.py, Costs"
CONTRACT, ROUTING = "core/contracts/router.py, Router", "core/contracts/router.py, Routing"
WORDS = "core/contracts/router.py, CAPABILITIES"
BATCHES = ([8, 8, 8], [8, 5, 0], [1], [0, 0], [8])
"""Valid tokens of each sequence: full, padded, one token, nothing but padding, one sequence."""


def plain(scores_TE: Tensor) -> Tensor:
    """No balancer."""
    return scores_TE


def routed(module: Any, given: SequenceContext, adjust: Any = plain, seed: int = 0) -> Routing:
    """The routing of random states."""
    result: Routing = module(bench.states(given, seed=seed).flatten(0, 1), adjust, given)
    return result


def kept(routing: Routing) -> Tensor:
    """kept_A, all True where it is not given."""
    return torch.ones_like(routing.token_A, dtype=torch.bool) if routing.kept_A is None else routing.kept_A


def dense_gates(routing: Routing) -> Tensor:
    """T x E: the weight with which each expert's output really enters each token's; 0 where it does not."""
    tokens, experts = routing.scores_TE.shape
    gate_A = routing.gate_A * kept(routing)
    return (
        gate_A.new_zeros(tokens * experts)
        .index_add(0, routing.token_A * experts + routing.expert_A, gate_A)
        .view(tokens, -1)
    )


@check("router", clause="capabilities are words that the contract knows", where=WORDS)
def capabilities_are_known(subject: Subject) -> None:
    """So that other components can ask for them."""
    unknown = subject.capabilities - set(CAPABILITIES)
    hold(not unknown, f"unknown: {', '.join(sorted(unknown))}")


@check("router", clause="a routing is a list of int64 assignments, of a length that the shapes fix", where=ROUTING)
def routings_are_well_formed(subject: Subject) -> None:
    """For full, padded, single-token and all-masked batches."""
    module = perturbed(subject.made())
    for lengths in BATCHES:
        given = bench.padded(lengths)
        tokens = given.tokens_BL.numel()
        routing = routed(module, given)
        for name, below in (("token_A", tokens), ("expert_A", bench.EXPERTS), ("choice_A", bench.EXPERTS)):
            index_A = getattr(routing, name)
            hold(index_A.dtype == torch.int64, f"{name} is {index_A.dtype}")
            hold(not index_A.numel() or 0 <= int(index_A.min()) <= int(index_A.max()) < below, f"{name} out of range")
        hold(routing.kept_A is None or routing.kept_A.dtype == torch.bool, "kept_A is not bool")
        shapes = {tuple(t.shape) for t in (routing.scores_TE, routing.logits_TE)}
        hold(shapes == {(tokens, bench.EXPERTS)}, f"scores and logits are {shapes}")
        again = routed(module, given, seed=1)
        hold(len(again.token_A) == len(routing.token_A), "the length of the list depends on the values")
        if routing.choices:
            order_A = torch.arange(tokens).repeat_interleave(routing.choices)
            hold(torch.equal(routing.token_A, order_A), "choices is set, and the list is not token-major")


@check("router", clause=f"`token_choice`: it {CAPABILITIES['token_choice']}", where=WORDS)
def every_token_gets_its_experts(subject: Subject) -> None:
    """top_k different ones."""
    spare("token_choice" in subject.capabilities, "not declared")
    routing, top_k = routed(perturbed(subject.made()), bench.tokens()), subject.made().top_k
    hold(routing.choices == top_k, f"choices is {routing.choices}, top_k {top_k}")
    for chosen in routing.expert_A.view(-1, top_k).tolist():
        hold(len(set(chosen)) == top_k, f"a token is sent to {chosen}")


@check(
    "router",
    clause="gates and affinities are finite, and computed in fp32 or wider whatever the model is in",
    where=CONTRACT,
)
def gates_are_finite_and_wide(subject: Subject) -> None:
    """With ordinary and with very large inputs, in bf16, and under autocast."""
    module = perturbed(subject.made(torch.float32))
    given = bench.tokens()
    x_TD = bench.states(given, torch.float32).flatten(0, 1)
    expected = module(x_TD, plain, given)
    with torch.autocast("cpu", torch.bfloat16):
        cast = module(x_TD, plain, given)
    for name in ("gate_A", "scores_TE", "logits_TE"):
        hold(torch.equal(getattr(cast, name), getattr(expected, name)), f"autocast changes {name}")
    narrow, widened = (module(x, plain, given) for x in (x_TD.bfloat16(), x_TD.bfloat16().float()))
    for name in ("gate_A", "scores_TE", "logits_TE"):
        same = torch.equal(getattr(narrow, name), getattr(widened, name))
        hold(same, f"{name} of bf16 tokens is not that of the same numbers in fp32")
    for inputs in (x_TD, 1e4 * x_TD, x_TD.bfloat16(), torch.zeros_like(x_TD)):
        routing = module(inputs, plain, given)
        for name in ("gate_A", "scores_TE", "logits_TE"):
            value = getattr(routing, name)
            hold(value.dtype in (torch.float32, torch.float64), f"{name} is {value.dtype}")
            hold(bool(value.isfinite().all()), f"{name} is not finite")


@check("router", clause="`adjust` changes who is selected, never a gate", where=CONTRACT)
def gates_know_no_bias(subject: Subject) -> None:
    """A bias that changes no selection changes nothing; one that does leaves the affinities alone."""
    module, given = perturbed(subject.made()), bench.tokens()
    expected = routed(module, given)
    shifted = routed(module, given, lambda scores_TE: scores_TE + 7.0)
    same = torch.equal(dense_gates(shifted), dense_gates(expected))
    hold(same, "the same bias for all experts changes a gate")
    tilt_E = torch.arange(bench.EXPERTS, dtype=torch.float64)
    tilted = routed(module, given, lambda scores_TE: scores_TE + tilt_E)
    hold(torch.equal(tilted.scores_TE, expected.scores_TE), "a bias changes the affinities")
    slightly = routed(module, given, lambda scores_TE: scores_TE + 1e-9 * tilt_E)
    if torch.equal(slightly.expert_A, expected.expert_A):
        hold(torch.equal(slightly.gate_A, expected.gate_A), "a bias that changes no selection changes a gate")


@check(
    "router",
    clause=f"`selects_with_bias`: it {CAPABILITIES['selects_with_bias']}; without the word it does not",
    where=WORDS,
)
def bias_selects_as_declared(subject: Subject) -> None:
    """A very large bias brings its experts in, where they can be reached."""
    module, given = perturbed(subject.made()), bench.tokens()
    favoured_E = torch.zeros(bench.EXPERTS, dtype=torch.float64)
    favoured_E[0] = 1e3
    plainly, biased = routed(module, given), routed(module, given, lambda scores_TE: scores_TE + favoured_E)
    if "selects_with_bias" in subject.capabilities:
        hold(int((biased.expert_A == 0).sum()) == given.tokens_BL.numel(), "a token escapes a bias of 1000")
    else:
        hold(torch.equal(biased.expert_A, plainly.expert_A), "a bias changes who is selected")


@check("router", clause="no gradient goes through selection", where=CONTRACT)
def no_gradient_reaches_the_bias(subject: Subject) -> None:
    """Not even one that asks for it."""
    module, given = perturbed(subject.made()), bench.tokens()
    bias_E = torch.zeros(bench.EXPERTS, dtype=torch.float64, requires_grad=True)
    routing = routed(module, given, lambda scores_TE: scores_TE + bias_E)
    total = routing.gate_A.sum() + routing.scores_TE.sum()
    if total.requires_grad:
        total.backward()
    hold(bias_E.grad is None or not bias_E.grad.any(), "the bias has a gradient")


@check("router", clause=f"`learned`: it {CAPABILITIES['learned']}, so gates carry a gradient", where=WORDS)
def gates_teach_the_router(subject: Subject) -> None:
    """One normalised gate, for instance, is a constant, and would teach nothing (P15)."""
    spare("learned" in subject.capabilities, "not declared")
    module = perturbed(subject.made())
    gate_TE = dense_gates(routed(module, bench.tokens()))
    (gate_TE * torch.linspace(1, 2, gate_TE.numel()).view_as(gate_TE)).sum().backward()
    taught = [p for p in module.parameters() if p.grad is not None and float(p.grad.abs().max()) > 1e-9]
    hold(taught, "no parameter gets a gradient from the gates")
    hold(all(bool(p.grad.isfinite().all()) for p in taught), "a gradient is not finite")


@check(
    "router",
    clause=f"`groups`: it {CAPABILITIES['groups']}, whatever the bias (masked with -inf, never 0)",
    where=WORDS,
)
def group_limit_is_honoured(subject: Subject) -> None:
    """Under none, negative, positive and mixed biases."""
    spare("groups" in subject.capabilities, "not declared")
    for key in ("groups", "reach"):
        hold(hasattr(subject.config, key), f"Config has no {key}, which a router with `groups` needs")
    groups, reach = subject.config.groups, subject.config.reach
    module, given = perturbed(subject.made()), bench.tokens()
    draw = torch.Generator().manual_seed(0)
    mixed_E = torch.randn(bench.EXPERTS, dtype=torch.float64, generator=draw)
    for bias_E in (0 * mixed_E, mixed_E, mixed_E - 1e4, mixed_E + 1e4, 50 * mixed_E):
        routing = routed(module, given, lambda scores_TE, bias_E=bias_E: scores_TE + bias_E)
        for chosen in routing.expert_A.view(-1, routing.choices).tolist():
            met = {expert // (bench.EXPERTS // groups) for expert in chosen}
            hold(len(met) <= reach, f"a token reaches {len(met)} groups, and the limit is {reach}")


@check("router", clause=f"`causal`: it {CAPABILITIES['causal']}", where=WORDS)
def causality_is_as_declared(subject: Subject) -> None:
    """Later tokens are replaced many times; what earlier tokens get stays, drops included."""
    spare("causal" in subject.capabilities, "not declared")
    module, given = perturbed(subject.made()), bench.tokens()
    x_BLD = bench.states(given)
    expected = dense_gates(module(x_BLD.flatten(0, 1), plain, given)).view(3, 8, -1)[:, :4]
    for seed in range(1, 9):
        other = torch.cat([x_BLD[:, :4], 3 * bench.states(given, seed=seed)[:, 4:]], dim=1)
        got = dense_gates(module(other.flatten(0, 1), plain, given)).view(3, 8, -1)[:, :4]
        hold(distance(got, expected) < 1e-10, "an earlier token is routed otherwise because of a later one")


@check(
    "router", clause="without `batch_dependent` a sequence is routed as if it were alone, in training too", where=WORDS
)
def sequences_are_independent(subject: Subject) -> None:
    """1 x N equals N x 1: random choices have addresses."""
    spare("batch_dependent" not in subject.capabilities, "declared to depend on the batch")
    module, given = perturbed(subject.made()).train(), bench.padded([8, 3, 8, 6])
    x_BLD = bench.states(given)
    whole = dense_gates(module(x_BLD.flatten(0, 1), plain, given)).view(4, 8, -1)
    for row in range(4):
        part = slice(row, row + 1)
        alone = dense_gates(module(x_BLD[part].flatten(0, 1), plain, bench.rows(given, part)))
        length = int(given.valid()[row].sum())
        hold(distance(alone[:length], whole[row, :length]) < 1e-10, "a sequence is routed otherwise when it is alone")


@check("router", clause="padding takes part in nothing", where=CONTRACT)
def padding_takes_part_in_nothing(subject: Subject) -> None:
    """Its values change no valid token's routing; loads count valid tokens only, drops are of valid tokens."""
    module, given = perturbed(subject.made()), bench.padded([8, 3, 0])
    x_BLD, valid_T = bench.states(given), given.valid().flatten()
    other = torch.where(given.valid()[:, :, None], x_BLD, 5 * x_BLD.flip(2))
    one, two = (module(x.flatten(0, 1), plain, given) for x in (x_BLD, other))
    hold(
        distance(dense_gates(two)[valid_T], dense_gates(one)[valid_T]) < 1e-10,
        "padding changes a valid token's routing",
    )
    hold(torch.equal(one.load(valid_T), two.load(valid_T)), "padding changes the load")
    load, dropped = int(one.load(valid_T).sum()), int(one.dropped(valid_T))
    hold(load == int(valid_T[one.token_A].sum()), "the load is not that of valid tokens")
    hold(0 <= dropped <= load, "more is dropped than assigned")


@check(
    "router",
    clause=f"`drops`: it {CAPABILITIES['drops']}; without the word every assignment is carried out",
    where=WORDS,
)
def drops_are_declared(subject: Subject) -> None:
    """On inputs that all look alike, where a limit must show."""
    spare("drops" not in subject.capabilities, "declared to drop")
    module, given = perturbed(subject.made()), bench.tokens(4, 16)
    x_BLD = bench.states(given)[:1, :1].expand(4, 16, -1)
    for inputs in (x_BLD, bench.states(given)):
        routing = module(inputs.flatten(0, 1), plain, given)
        hold(int(routing.dropped(given.valid().flatten())) == 0, "an assignment is not carried out")


@check("router", clause="experts have no order, unless they stand in groups", where=CONTRACT)
def permuting_experts_only_permutes_results(subject: Subject) -> None:
    """The axes that grow with the number of experts are permuted, within groups."""
    spare("learned" in subject.capabilities and "ordered" not in subject.capabilities, "experts are not learned")
    module, given = perturbed(subject.made()), bench.tokens()
    larger = subject.made(experts=2 * bench.EXPERTS).state_dict()
    size = bench.EXPERTS // getattr(subject.config, "groups", 1)
    order_E = torch.cat([torch.arange(size).roll(1) + start for start in range(0, bench.EXPERTS, size)])
    before = dense_gates(routed(module, given))
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            for axis, (few, many) in enumerate(zip(tensor.shape, larger[name].shape, strict=True)):
                if few != many:
                    tensor.copy_(tensor.index_select(axis, order_E))
    after = dense_gates(routed(module, given))
    hold(distance(after, before[:, order_E]) < 1e-10, "results do not follow the experts")


@check("router", clause="`costs().active` is what one token uses, within 2% of a counted run", where=COSTS)
def router_costs_are_real(subject: Subject) -> None:
    """2 FLOPs for each active weight that is in a product."""
    module, given = subject.made(), bench.tokens(2, bench.LENGTH)
    with FlopCounterMode(display=False) as counter:
        routed(module, given)
    vectors = sum(p.numel() for p in module.parameters() if p.dim() < 2)
    declared = given.tokens_BL.numel() * 2 * (module.costs().active - min(vectors, module.costs().active))
    counted = counter.get_total_flops()
    hold(abs(declared - counted) <= 0.02 * counted, f"declared {declared:g} FLOPs, counted {counted:g}")


@check("router", clause="no token at all is a batch too", where=CONTRACT)
def an_empty_batch_is_routed(subject: Subject) -> None:
    """A rank may be left with none."""
    given = SequenceContext.of(torch.zeros(1, 0, dtype=torch.int64))
    routing = subject.made()(torch.zeros(0, bench.WIDTH, dtype=torch.float64), plain, given)
    hold(len(routing.token_A) == 0, "assignments without tokens")
    hold(routing.load(torch.zeros(0, dtype=torch.bool)).tolist() == [0] * bench.EXPERTS, "a load without tokens")
