"""Checks of routers."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from core.contracts.context import SequenceContext
from core.contracts.router import CAPABILITIES, Routing
from core.routing.gating import best_experts
from core.testing import bench
from core.testing.clauses import check, require, skip_unless
from core.testing.subject import Subject, all_finite, perturbed, require_close, require_flops

COSTS = "core/contracts/component.py, Costs"
CONTRACT = "core/contracts/router.py, Router"
ROUTING = "core/contracts/router.py, Routing"
WORDS = "core/contracts/router.py, CAPABILITIES"
BATCHES = ([8, 8, 8], [8, 5, 0], [1], [0, 0], [8])
"""Valid tokens of each sequence: full, padded, one token, nothing but padding, one sequence."""


def plain(scores_TE: Tensor) -> Tensor:
    """Returns scores as they are, as without a balancer."""
    return scores_TE


def routed(
    module: Any, context: SequenceContext, adjust_scores: Any = plain, seed: int = 0
) -> Routing:
    """Routes random states."""
    result: Routing = module(bench.states(context, seed=seed).flatten(0, 1), adjust_scores, context)
    return result


def kept(routing: Routing) -> Tensor:
    """The mask `kept_A` of a routing, all True if it is None."""
    if routing.kept_A is None:
        return torch.ones_like(routing.token_A, dtype=torch.bool)
    return routing.kept_A


def dense_gates(routing: Routing) -> Tensor:
    """The weight of each expert's output in each token's, T x E; 0 where it does not enter."""
    tokens, experts = routing.scores_TE.shape
    gate_A = routing.gate_A * kept(routing)
    place_A = routing.token_A * experts + routing.expert_A
    zeros = gate_A.new_zeros(tokens * experts)
    return zeros.index_add(0, place_A, gate_A).view(tokens, -1)


@check("router", clause="capabilities are words that the contract defines", where=WORDS)
def capabilities_are_known(subject: Subject) -> None:
    """Compares with the words of the contract, which other components can rely on."""
    unknown = subject.capabilities - set(CAPABILITIES)
    require(not unknown, f"unknown: {', '.join(sorted(unknown))}")


@check(
    "router",
    clause="a routing is a list of int64 assignments, of a length that the shapes fix",
    where=ROUTING,
)
def routings_are_well_formed(subject: Subject) -> None:
    """Tries full, padded, single-token and all-masked batches."""
    module = perturbed(subject.made())
    for lengths in BATCHES:
        context = bench.padded(lengths)
        tokens = context.tokens_BL.numel()
        routing = routed(module, context)
        limits = {"token_A": tokens, "expert_A": bench.EXPERTS, "choice_A": bench.EXPERTS}
        for name, below in limits.items():
            index_A = getattr(routing, name)
            require(index_A.dtype == torch.int64, f"{name} is {index_A.dtype}")
            if index_A.numel():
                in_range = 0 <= int(index_A.min()) <= int(index_A.max()) < below
                require(in_range, f"{name} out of range")
        require(routing.kept_A is None or routing.kept_A.dtype == torch.bool, "kept_A is not bool")
        shapes = {tuple(t.shape) for t in (routing.scores_TE, routing.logits_TE)}
        require(shapes == {(tokens, bench.EXPERTS)}, f"scores and logits are {shapes}")
        again = routed(module, context, seed=1)
        same_length = len(again.token_A) == len(routing.token_A)
        require(same_length, "the length of the list depends on the values")
        if routing.choices:
            order_A = torch.arange(tokens).repeat_interleave(routing.choices)
            token_major = torch.equal(routing.token_A, order_A)
            require(token_major, "choices is set, and the list is not token-major")


@check("router", clause=f"`token_choice`: it {CAPABILITIES['token_choice']}", where=WORDS)
def every_token_gets_its_experts(subject: Subject) -> None:
    """Requires `top_k` different experts for each token."""
    skip_unless("token_choice" in subject.capabilities, "not declared")
    routing = routed(perturbed(subject.made()), bench.tokens())
    top_k = subject.made().top_k
    require(routing.choices == top_k, f"choices is {routing.choices}, top_k {top_k}")
    for chosen in routing.expert_A.view(-1, top_k).tolist():
        require(len(set(chosen)) == top_k, f"a token is sent to {chosen}")


@check(
    "router",
    clause="gates and affinities are finite, and computed in fp32 or wider whatever the model is in",
    where=CONTRACT,
)
def gates_are_finite_and_wide(subject: Subject) -> None:
    """Tries ordinary and very large inputs, bf16, and autocast."""
    module = perturbed(subject.made(torch.float32))
    context = bench.tokens()
    x_TD = bench.states(context, torch.float32).flatten(0, 1)
    expected = module(x_TD, plain, context)
    with torch.autocast("cpu", torch.bfloat16):
        cast = module(x_TD, plain, context)
    for name in ("gate_A", "scores_TE", "logits_TE"):
        same = torch.equal(getattr(cast, name), getattr(expected, name))
        require(same, f"autocast changes {name}")
    narrow, widened = (
        module(x, plain, context) for x in (x_TD.bfloat16(), x_TD.bfloat16().float())
    )
    for name in ("gate_A", "scores_TE", "logits_TE"):
        same = torch.equal(getattr(narrow, name), getattr(widened, name))
        require(same, f"{name} of bf16 tokens is not that of the same numbers in fp32")
    for inputs in (x_TD, 1e4 * x_TD, x_TD.bfloat16(), torch.zeros_like(x_TD)):
        routing = module(inputs, plain, context)
        for name in ("gate_A", "scores_TE", "logits_TE"):
            value = getattr(routing, name)
            require(value.dtype in (torch.float32, torch.float64), f"{name} is {value.dtype}")
            require(all_finite([value]), f"{name} is not finite")


@check(
    "router",
    clause="`adjust_scores` changes which experts are selected, never a gate",
    where=CONTRACT,
)
def gates_know_no_bias(subject: Subject) -> None:
    """Tries biases that change no selection, which must change no gate, and one that changes it."""
    module = perturbed(subject.made())
    context = bench.tokens()
    expected = routed(module, context)
    shifted = routed(module, context, lambda scores_TE: scores_TE + 7.0)
    same = torch.equal(dense_gates(shifted), dense_gates(expected))
    require(same, "the same bias for all experts changes a gate")
    tilt_E = torch.arange(bench.EXPERTS, dtype=torch.float64)
    tilted = routed(module, context, lambda scores_TE: scores_TE + tilt_E)
    require(torch.equal(tilted.scores_TE, expected.scores_TE), "a bias changes the affinities")
    slightly = routed(module, context, lambda scores_TE: scores_TE + 1e-9 * tilt_E)
    if torch.equal(slightly.expert_A, expected.expert_A):
        same = torch.equal(slightly.gate_A, expected.gate_A)
        require(same, "a bias that changes no selection changes a gate")


@check(
    "router",
    clause=f"`selects_with_bias`: it {CAPABILITIES['selects_with_bias']}; without the word it does not",
    where=WORDS,
)
def bias_selects_as_declared(subject: Subject) -> None:
    """Tries a very large bias of one expert, which must then be selected for every token."""
    module = perturbed(subject.made())
    context = bench.tokens()
    favoured_E = torch.zeros(bench.EXPERTS, dtype=torch.float64)
    favoured_E[0] = 1e3
    plainly = routed(module, context)
    biased = routed(module, context, lambda scores_TE: scores_TE + favoured_E)
    if "selects_with_bias" in subject.capabilities:
        selected = int((biased.expert_A == 0).sum())
        require(selected == context.tokens_BL.numel(), "a token escapes a bias of 1000")
    else:
        require(
            torch.equal(biased.expert_A, plainly.expert_A),
            "a bias changes which experts are selected",
        )


@check(
    "router",
    clause="`limit` says within which groups the best adjusted affinities were selected; `groups` that limit give one",
    where=ROUTING,
)
def limits_are_those_of_the_selection(subject: Subject) -> None:
    """Compares the selected experts with the best ones within the groups, under several biases."""
    module = perturbed(subject.made())
    draw = torch.Generator().manual_seed(0)
    config = subject.config
    if {"groups", "selects_with_bias"} <= subject.capabilities:
        is_limited = config.reachable_groups < config.groups
        limit = routed(module, bench.tokens()).limit
        require(
            limit is not None or not is_limited, "tokens reach few groups, and no limit is given"
        )
    for spread in (0.0, 0.2, 5.0):
        bias_E = spread * torch.rand(bench.EXPERTS, dtype=torch.float64, generator=draw)
        routing = routed(module, bench.tokens(), lambda scores_TE, b_E=bias_E: scores_TE + b_E)
        limit = routing.limit
        skip_unless(limit is not None, "none is given")
        assert limit is not None
        found = "it is given where tokens do not all have as many experts"
        require(routing.choices > 0, found)
        adjusted_TE = routing.scores_TE.detach() + bias_E
        best_TK = best_experts(adjusted_TE, routing.choices, **limit._asdict())
        selected_TK = routing.expert_A.view(-1, routing.choices)
        same = torch.equal(best_TK.sort(dim=1).values, selected_TK.sort(dim=1).values)
        require(same, "other experts are the best within its groups")


@check("router", clause="no gradient goes through selection", where=CONTRACT)
def no_gradient_reaches_the_bias(subject: Subject) -> None:
    """Adds a bias that requires a gradient, which must not get one."""
    module = perturbed(subject.made())
    context = bench.tokens()
    bias_E = torch.zeros(bench.EXPERTS, dtype=torch.float64, requires_grad=True)
    routing = routed(module, context, lambda scores_TE: scores_TE + bias_E)
    total = routing.gate_A.sum() + routing.scores_TE.sum()
    if total.requires_grad:
        total.backward()
    require(bias_E.grad is None or not bias_E.grad.any(), "the bias has a gradient")


@check(
    "router",
    clause=f"`learned`: it {CAPABILITIES['learned']}, so gates carry a gradient",
    where=WORDS,
)
def gates_teach_the_router(subject: Subject) -> None:
    """Requires a gradient from the gates; a single normalised gate, for instance, is a constant (P15)."""
    skip_unless("learned" in subject.capabilities, "not declared")
    module = perturbed(subject.made())
    gate_TE = dense_gates(routed(module, bench.tokens()))
    (gate_TE * torch.linspace(1, 2, gate_TE.numel()).view_as(gate_TE)).sum().backward()
    gradients = []
    for parameter in module.parameters():
        if parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-9:
            gradients.append(parameter.grad)
    require(gradients, "no parameter gets a gradient from the gates")
    require(all_finite(gradients), "a gradient is not finite")


@check(
    "router",
    clause="every weight of a router gets a gradient from the gates, whoever chooses the experts",
    where=CONTRACT,
)
def gates_teach_every_weight(subject: Subject) -> None:
    """Weighs the gates differently and looks for a weight that cannot learn."""
    module = perturbed(subject.made())
    skip_unless(list(module.parameters()), "it has no weights")
    gate_TE = dense_gates(routed(module, bench.tokens()))
    (gate_TE * torch.linspace(1, 2, gate_TE.numel()).view_as(gate_TE)).sum().backward()
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        require(gradient is not None and bool(gradient.any()), f"{name} gets no gradient")


@check(
    "router",
    clause=f"`groups`: it {CAPABILITIES['groups']}, whatever the bias (masked with -inf, never 0)",
    where=WORDS,
)
def group_limit_is_honoured(subject: Subject) -> None:
    """Tries no bias, and negative, positive and mixed ones."""
    skip_unless("groups" in subject.capabilities, "not declared")
    for key in ("groups", "reachable_groups"):
        found = f"Config has no {key}, which a router with `groups` needs"
        require(hasattr(subject.config, key), found)
    size = bench.EXPERTS // subject.config.groups
    limit = subject.config.reachable_groups
    module = perturbed(subject.made())
    context = bench.tokens()
    draw = torch.Generator().manual_seed(0)
    mixed_E = torch.randn(bench.EXPERTS, dtype=torch.float64, generator=draw)
    for bias_E in (0 * mixed_E, mixed_E, mixed_E - 1e4, mixed_E + 1e4, 50 * mixed_E):
        routing = routed(module, context, lambda scores_TE, bias_E=bias_E: scores_TE + bias_E)
        for chosen in routing.expert_A.view(-1, routing.choices).tolist():
            reached = len({expert // size for expert in chosen})
            found = f"a token reaches {reached} groups, and the limit is {limit}"
            require(reached <= limit, found)


@check("router", clause=f"`causal`: it {CAPABILITIES['causal']}", where=WORDS)
def causality_is_as_declared(subject: Subject) -> None:
    """Replaces later tokens many times; the gates of earlier ones must stay, drops included."""
    skip_unless("causal" in subject.capabilities, "not declared")
    module = perturbed(subject.made())
    context = bench.tokens()
    x_BLD = bench.states(context)
    expected = dense_gates(module(x_BLD.flatten(0, 1), plain, context)).view(3, 8, -1)[:, :4]
    for seed in range(1, 9):
        other = torch.cat([x_BLD[:, :4], 3 * bench.states(context, seed=seed)[:, 4:]], dim=1)
        got = dense_gates(module(other.flatten(0, 1), plain, context)).view(3, 8, -1)[:, :4]
        require_close(got, expected, "an earlier token is routed otherwise because of a later one")


@check(
    "router",
    clause="without `batch_dependent` a sequence is routed as if it were alone, in training too",
    where=WORDS,
)
def sequences_are_independent(subject: Subject) -> None:
    """Compares a batch with its sequences alone; random choices must have addresses."""
    skip_unless("batch_dependent" not in subject.capabilities, "declared to depend on the batch")
    module = perturbed(subject.made()).train()
    context = bench.padded([8, 3, 8, 6])
    x_BLD = bench.states(context)
    whole = dense_gates(module(x_BLD.flatten(0, 1), plain, context)).view(4, 8, -1)
    for row in range(4):
        part = slice(row, row + 1)
        alone = dense_gates(
            module(x_BLD[part].flatten(0, 1), plain, bench.select_rows(context, part))
        )
        length = int(context.valid()[row].sum())
        found = "a sequence is routed otherwise when it is alone"
        require_close(alone[:length], whole[row, :length], found)


@check("router", clause="padding changes nothing and is not counted", where=CONTRACT)
def padding_takes_part_in_nothing(subject: Subject) -> None:
    """Changes the states at padded places, and counts loads and drops of valid tokens."""
    module = perturbed(subject.made())
    context = bench.padded([8, 3, 0])
    x_BLD = bench.states(context)
    valid_T = context.valid().flatten()
    other = bench.change_padding(x_BLD, context)
    one, two = (module(x.flatten(0, 1), plain, context) for x in (x_BLD, other))
    found = "padding changes a valid token's routing"
    require_close(dense_gates(two)[valid_T], dense_gates(one)[valid_T], found)
    require(torch.equal(one.load(valid_T), two.load(valid_T)), "padding changes the load")
    load = int(one.load(valid_T).sum())
    dropped = int(one.dropped(valid_T))
    require(load == int(valid_T[one.token_A].sum()), "the load is not that of valid tokens")
    require(0 <= dropped <= load, "more is dropped than assigned")


@check(
    "router",
    clause=f"`drops`: it {CAPABILITIES['drops']}; without the word every assignment is carried out",
    where=WORDS,
)
def drops_are_declared(subject: Subject) -> None:
    """Tries inputs that are all equal, where a limit would drop assignments."""
    skip_unless("drops" not in subject.capabilities, "declared to drop")
    module = perturbed(subject.made())
    context = bench.tokens(4, 16)
    x_BLD = bench.states(context)[:1, :1].expand(4, 16, -1)
    for inputs in (x_BLD, bench.states(context)):
        routing = module(inputs.flatten(0, 1), plain, context)
        dropped = int(routing.dropped(context.valid().flatten()))
        require(dropped == 0, "an assignment is not carried out")


@check("router", clause="experts have no order, unless they form groups", where=CONTRACT)
def permuting_experts_only_permutes_results(subject: Subject) -> None:
    """Permutes the experts within groups, on each axis that grows with their number."""
    free = "learned" in subject.capabilities and "ordered" not in subject.capabilities
    skip_unless(free, "experts are not learned")
    module = perturbed(subject.made())
    context = bench.tokens()
    larger = subject.made(experts=2 * bench.EXPERTS).state_dict()
    size = bench.EXPERTS // getattr(subject.config, "groups", 1)
    groups = [torch.arange(size).roll(1) + start for start in range(0, bench.EXPERTS, size)]
    order_E = torch.cat(groups)
    before = dense_gates(routed(module, context))
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            for axis, (few, many) in enumerate(zip(tensor.shape, larger[name].shape, strict=True)):
                if few != many:
                    tensor.copy_(tensor.index_select(axis, order_E))
    after = dense_gates(routed(module, context))
    require_close(after, before[:, order_E], "results do not follow the experts")


@check(
    "router",
    clause="`costs().active` is what one token uses, within 2% of a counted run",
    where=COSTS,
)
def router_costs_are_real(subject: Subject) -> None:
    """Counts 2 FLOPs for each active weight that is in a product."""
    module = subject.made()
    context = bench.tokens(2, bench.LENGTH)
    with FlopCounterMode(display=False) as counter:
        routed(module, context)
    active = module.costs().active
    vectors = sum(weight.numel() for weight in module.parameters() if weight.dim() < 2)
    declared = context.tokens_BL.numel() * 2 * (active - min(vectors, active))
    require_flops(declared, counter.get_total_flops())


@check("router", clause="a batch without any token can be routed", where=CONTRACT)
def an_empty_batch_is_routed(subject: Subject) -> None:
    """Routes an empty batch, which a rank may be left with."""
    context = SequenceContext.of(torch.zeros(1, 0, dtype=torch.int64))
    routing = subject.made()(torch.zeros(0, bench.WIDTH, dtype=torch.float64), plain, context)
    require(len(routing.token_A) == 0, "assignments without tokens")
    load_E = routing.load(torch.zeros(0, dtype=torch.bool))
    require(load_E.tolist() == [0] * bench.EXPERTS, "a load without tokens")
