"""Checks of feed-forward layers and of loss heads."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from core.contracts.context import SequenceContext
from core.contracts.loss_head import HeadOutput
from core.contracts.schedule import Progress
from core.testing import bench
from core.testing.calls import shared
from core.testing.clauses import check, require, skip_unless
from core.testing.subject import (
    Subject,
    all_finite,
    perturbed,
    require_close,
    require_flops,
    require_gradients,
    vector_elements,
)

FFN = "core/contracts/ffn.py, FeedForward"
PROPERTIES = "core/contracts/ffn.py, RoutingProperties"
HEAD = "core/contracts/loss_head.py, LossHead"
CONTEXT = "core/contracts/context.py, SequenceContext"


@check(
    "ffn",
    clause="(x_BLD, context) -> (y_BLD, record), for any number of sequences and tokens",
    where=FFN,
)
def ffn_keeps_the_shape(subject: Subject) -> None:
    """Tries several batches; a layer with experts must return a record with an entry for each balancer."""
    module = subject.made()
    for lengths in ([8, 8, 8], [8, 3, 0], [1], [0, 0]):
        context = bench.padded(lengths)
        y_BLD, record = module(bench.states(context), context)
        keeps = y_BLD.shape == (*context.tokens_BL.shape, bench.WIDTH)
        require(keeps, f"the result is {tuple(y_BLD.shape)}")
        require(all_finite([y_BLD]), "a result is not finite")
        has_load = record is not None and record.load_E is not None
        require(has_load == (module.experts > 0), "record and experts disagree")
        if has_load:
            entries = {len(record.sums), len(record.balancer_tallies)}
            complete = entries == {len(module.balancers)}
            require(complete, "the record does not have an entry for each balancer")
            require(record.load_E.dtype == torch.int64, f"the load is {record.load_E.dtype}")
            complete = record.load_E.shape == (module.experts,)
            require(complete, "the load does not have an entry for each expert")


@check(
    "ffn",
    clause="no output depends on a later token, unless `routing_properties` say so",
    where=PROPERTIES,
)
def ffn_is_causal(subject: Subject) -> None:
    """Replaces the rows from position 4 on; the rows before must stay."""
    module = perturbed(subject.made())
    context = bench.tokens()
    properties = module.routing_properties
    skip_unless(properties is None or properties.causal, "declared not to be causal")
    x_BLD = bench.states(context)
    other = torch.cat([x_BLD[:, :4], 3 * bench.states(context, seed=1)[:, 4:]], dim=1)
    before = module(x_BLD, context)[0]
    after = module(other, context)[0]
    require_close(after[:, :4], before[:, :4], "an earlier row changed with a later one")


@check("ffn", clause="padding changes neither a valid token's result nor the load", where=FFN)
def ffn_ignores_padding(subject: Subject) -> None:
    """Changes the states at padded places (P6)."""
    module = perturbed(subject.made())
    context = bench.padded([8, 3, 0])
    x_BLD = bench.states(context)
    valid_BL = context.valid()
    other = bench.change_padding(x_BLD, context)
    one, before = module(x_BLD, context)
    two, after = module(other, context)
    require_close(two[valid_BL], one[valid_BL], "padding changes a valid token's result")
    if before is not None and before.load_E is not None:
        require(torch.equal(after.load_E, before.load_E), "padding changes the load")
        empty = module(bench.states(bench.padded([0, 0])), bench.padded([0, 0]))[1]
        require(not empty.load_E.any(), "padding is counted in the load")


@check("ffn", clause="gradients are those of the forward", where=FFN)
def ffn_gradients_are_right(subject: Subject) -> None:
    """Compares with finite differences in fp64; so small a step changes no choice of experts."""
    module = perturbed(subject.made())
    context = bench.tokens(1, 3)
    require_gradients(lambda x: module(x, context)[0], module, bench.states(context))


@check(
    "ffn",
    clause="`costs().active` is what one token uses, within 2% of a counted run",
    where="core/contracts/component.py, Costs",
)
def ffn_costs_are_real(subject: Subject) -> None:
    """Counts 2 FLOPs for each active weight that is in a product."""
    module = subject.made()
    context = bench.tokens(2, bench.LENGTH)
    with FlopCounterMode(display=False) as counter:
        module(bench.states(context), context)
    costs = module.costs()
    weights = costs.active - vector_elements(module)
    declared = context.tokens_BL.numel() * (2 * weights + 2 * costs.attention_flops)
    require_flops(declared, counter.get_total_flops())


def predicted(head: Any, x_BLD: Tensor, context: SequenceContext) -> HeadOutput:
    """Calls a head with all that it reads."""
    found: HeadOutput = head(x_BLD, context, shared(head, x_BLD))
    return found


@check(
    "loss_head",
    clause="`counts` depend on the data alone, and there is one for each term",
    where=HEAD,
)
def head_counts_are_known_beforehand(subject: Subject) -> None:
    """Tries full, padded and all-masked batches, and reads the coefficient."""
    head = perturbed(subject.made())
    documents = bench.tokens(documents_BM=torch.tensor([[0] * 4 + [1] * 5] * 3))
    for lengths in ([8, 8, 8], [8, 3, 0], [0, 0]):
        context = bench.padded(lengths)
        output = predicted(head, bench.states(context), context)
        counts = head.counts(context)
        found = f"terms {sorted(output.terms)}, counts {sorted(counts)}"
        require(set(output.terms) == set(counts), found)
        known = set(output.records) <= set(head.contexts(context))
        require(known, "a block of the head has no context")
        _require_plausible(counts, context)
    _require_plausible(head.counts(documents), documents)
    value = head.coefficient(Progress(1, 128, 100, 12800))
    require(0 <= value < float("inf"), f"the coefficient is {value!r}")


def _require_plausible(counts: dict[str, Tensor], context: SequenceContext) -> None:
    """Requires that no count is larger than the number of predicted positions."""
    most = int(context.predicted().sum())
    for name, count in counts.items():
        found = f"{int(count)} counted, but only {most} positions predict a token"
        require(0 <= int(count) <= most, f"{name}: {found}")


@check(
    "loss_head",
    clause="padding is predicted nowhere, and a batch of nothing but padding has loss 0 and gradient 0",
    where=HEAD,
)
def head_ignores_padding(subject: Subject) -> None:
    """Changes states, tokens and targets at padded places; a batch of padding alone has loss 0, never NaN (P17)."""
    head = perturbed(subject.made())
    context = bench.padded([8, 3, 0])
    x_BLD = bench.states(context)
    valid_BL = context.valid()
    other = bench.change_padding(x_BLD, context)
    assert context.targets_BL is not None
    # The token at the first padded place is the last valid token's target and stays.
    past_BL = ~valid_BL & ~valid_BL.roll(1, dims=1)
    elsewhere = replace(
        context,
        tokens_BL=torch.where(past_BL, context.tokens_BL ^ 1, context.tokens_BL),
        targets_BL=torch.where(valid_BL, context.targets_BL, context.targets_BL ^ 1),
    )
    one = predicted(head, x_BLD, context)
    two = predicted(head, other, elsewhere)
    for name, term in one.terms.items():
        require_close(two.terms[name], term, f"padding changes {name}")
    empty = bench.padded([0, 0])
    nothing = bench.states(bench.padded([0, 0])).requires_grad_()
    terms = predicted(head, nothing, empty).terms
    for value in terms.values():
        require(not value.any(), "the loss of nothing is not 0")
    total = torch.stack(list(terms.values())).sum()
    if total.requires_grad:
        total.backward()
        unmoved = nothing.grad is None or not nothing.grad.any()
        require(unmoved, "the loss of nothing has a gradient")


@check(
    "loss_head",
    clause="sums are over tokens: a batch's terms are the sums of its sequences'",
    where=HEAD,
)
def head_sums_over_sequences(subject: Subject) -> None:
    """Compares terms and counts of a batch with the sums over its sequences, each alone (P9, P24)."""
    head = perturbed(subject.made())
    context = bench.padded([8, 5, 8])
    x_BLD = bench.states(context)
    whole = predicted(head, x_BLD, context).terms
    sums: dict[str, list[Tensor]] = {name: [] for name in whole}
    counts = dict.fromkeys(whole, 0)
    for row in range(3):
        part = slice(row, row + 1)
        alone = bench.select_rows(context, part)
        output = predicted(head, x_BLD[part], alone)
        for name in whole:
            sums[name].append(output.terms[name])
            counts[name] += int(head.counts(alone)[name])
    for name, term in whole.items():
        total = torch.stack(sums[name]).sum()
        require_close(total, term, f"{name} of a batch is not the sum of its sequences'")
        require(int(head.counts(context)[name]) == counts[name], f"{name}: counts do not add up")


@check("loss_head", clause="the loss gives the hidden states a gradient", where=HEAD)
def head_teaches_the_model(subject: Subject) -> None:
    """Requires a finite gradient of the hidden states that is not 0."""
    head = perturbed(subject.made())
    context = bench.tokens()
    x_BLD = bench.states(context).requires_grad_()
    terms = predicted(head, x_BLD, context).terms
    torch.stack(list(terms.values())).sum().backward()
    gradient = x_BLD.grad
    require(gradient is not None, "no finite gradient")
    assert gradient is not None
    require(all_finite([gradient]) and bool(gradient.any()), "no finite gradient")


@check("loss_head", clause="a prediction does not depend on its target", where=HEAD)
def head_does_not_see_its_target(subject: Subject) -> None:
    """Adds up the probabilities of all possible last targets, with tied weights; the sum must be at most 1."""
    head = perturbed(subject.made())
    context = bench.tokens(1, 4)
    x_BLD = bench.states(context)
    tied = shared(head, x_BLD, tied=True)
    losses: dict[str, list[Tensor]] = {}
    assert context.targets_BL is not None
    for token in range(bench.VOCABULARY):
        targets_BL = torch.cat([context.targets_BL[:, :-1], torch.full((1, 1), token)], dim=1)
        output = head(x_BLD, replace(context, targets_BL=targets_BL), tied)
        for name, term in output.terms.items():
            losses.setdefault(name, []).append(term.detach())
    for name, values in losses.items():
        total = torch.stack(values).neg().exp().sum()
        constant = all(torch.equal(value, values[0]) for value in values)
        most_1 = constant or float(total) <= 1 + 1e-6
        require(most_1, f"{name}: probabilities add up to {total:.3g}")


@check(
    "loss_head", clause="a target that is not learned has no loss and is not counted", where=CONTEXT
)
def targets_that_are_not_learned_are_left_out(subject: Subject) -> None:
    """Tries a mask of no targets, and two complementary masks whose counts and losses must add up to the whole."""
    head = perturbed(subject.made())
    context = bench.tokens()
    x_BLD = bench.states(context)
    nothing = replace(context, learned_BM=torch.zeros(3, 9, dtype=torch.bool))
    for count in head.counts(nothing).values():
        require(not int(count), "targets that are not learned are counted")
    for value in predicted(head, x_BLD, nothing).terms.values():
        require(not value.any(), "targets that are not learned have a loss")
    odd_BM = (torch.arange(9) % 2 == 1).expand(3, -1)
    halves = [replace(context, learned_BM=odd_BM), replace(context, learned_BM=~odd_BM)]
    for name, whole in predicted(head, x_BLD, context).terms.items():
        one, two = (predicted(head, x_BLD, half).terms[name] for half in halves)
        require_close(one + two, whole, f"{name} is not the sum over learned targets")
        counted = sum(int(head.counts(half)[name]) for half in halves)
        complete = counted == int(head.counts(context)[name])
        require(complete, f"{name}: learned targets do not add up to all")


@check(
    "loss_head",
    clause="`draft` gives logits for each row if `drafts` says so, and raises NotImplementedError elsewhere",
    where=HEAD,
)
def drafting_is_as_declared(subject: Subject) -> None:
    """Drafts three tokens at once with each module, and the same one by one with the module's caches."""
    head = perturbed(subject.made()).eval()
    context = bench.tokens(2, 3)
    x_BLD = bench.states(context)
    if not head.drafts:
        try:
            head.draft(x_BLD, context, shared(head, x_BLD), [])
        except NotImplementedError:
            return
        require(False, "draft is declared not to work, but works")
    require(head.draft_depths >= 1, f"draft_depths is {head.draft_depths}")
    for depth in range(1, head.draft_depths + 1):
        caches = head.new_draft_caches(2, 3, depth=depth)
        at_once = head.draft(x_BLD, context, shared(head, x_BLD), caches, depth).logits_BLV
        shape = tuple(at_once.shape)
        require(shape == (2, 3, bench.VOCABULARY), f"drafted logits are {shape}")
        require(all_finite([at_once]), "drafted logits are not finite")
        one_by_one = _drafted_one_by_one(head, x_BLD, context, depth)
        found = "one token at a time drafts other logits"
        require_close(one_by_one, at_once, found, tolerance=1e-9)


def _drafted_one_by_one(head: Any, x_BLD: Tensor, context: SequenceContext, depth: int) -> Tensor:
    """The logits that a module drafts for one token after another."""
    caches = head.new_draft_caches(2, 3, depth=depth)
    parts = []
    for place in range(3):
        column = slice(place, place + 1)
        tokens_BL = context.tokens_BL[:, column]
        part = replace(context, tokens_BL=tokens_BL, positions_BL=context.positions_BL[:, column])
        own_BLD = x_BLD[:, column]
        draft = head.draft(own_BLD, part, shared(head, own_BLD), caches, depth)
        parts.append(draft.logits_BLV)
    return torch.cat(parts, dim=1)
