"""The contracts of feed-forward layers and of loss heads."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from core.contracts.context import SequenceContext
from core.contracts.loss_head import HeadOutput
from core.contracts.schedule import Progress
from core.testing import bench
from core.testing.clauses import check, hold, spare
from core.testing.common import shared
from core.testing.subject import Subject, distance, perturbed

FFN, TRAITS = "core/contracts/ffn.py, FeedForward", "core/contracts/ffn.py, Traits"
HEAD = "core/contracts/loss_head.py, LossHead"
CONTEXT = "core/contracts/context.py, SequenceContext"


@check("ffn", clause="(x_BLD, context) -> (y_BLD, record), for any number of sequences and tokens", where=FFN)
def ffn_keeps_the_shape(subject: Subject) -> None:
    """A record where there are experts, with an entry for each balancer; without, at most one without a load."""
    module = subject.made()
    for lengths in ([8, 8, 8], [8, 3, 0], [1], [0, 0]):
        given = bench.padded(lengths)
        y_BLD, record = module(bench.states(given), given)
        hold(y_BLD.shape == (*given.tokens_BL.shape, bench.WIDTH), f"the result is {tuple(y_BLD.shape)}")
        hold(bool(y_BLD.isfinite().all()), "a result is not finite")
        has_load = record is not None and record.load_E is not None
        hold(has_load == (module.experts > 0), "record and experts disagree")
        if has_load:
            entries = {len(record.sums), len(record.balancer_tallies)}
            hold(entries == {len(module.balancers)}, "the record has not an entry for each balancer")
            hold(record.load_E.dtype == torch.int64, f"the load is {record.load_E.dtype}")
            hold(record.load_E.shape == (module.experts,), "the load has not an entry for each expert")


@check("ffn", clause="no output depends on a later token, unless `traits` say so", where=TRAITS)
def ffn_is_causal(subject: Subject) -> None:
    """Rows from position 4 on are replaced; the rows before stay."""
    module, given = perturbed(subject.made()), bench.tokens()
    spare(module.traits is None or module.traits.causal, "declared not to be causal")
    x_BLD = bench.states(given)
    other = torch.cat([x_BLD[:, :4], 3 * bench.states(given, seed=1)[:, 4:]], dim=1)
    before, after = module(x_BLD, given)[0], module(other, given)[0]
    hold(distance(after[:, :4], before[:, :4]) < 1e-10, "an earlier row changed with a later one")


@check("ffn", clause="padding changes neither a valid token's result nor the load", where=FFN)
def ffn_ignores_padding(subject: Subject) -> None:
    """Other values of padded states (P6)."""
    module, given = perturbed(subject.made()), bench.padded([8, 3, 0])
    x_BLD, valid_BL = bench.states(given), given.valid()
    other = torch.where(valid_BL[:, :, None], x_BLD, 5 * x_BLD.flip(2))
    (one, before), (two, after) = module(x_BLD, given), module(other, given)
    hold(distance(two[valid_BL], one[valid_BL]) < 1e-10, "padding changes a valid token's result")
    if before is not None and before.load_E is not None:
        hold(torch.equal(after.load_E, before.load_E), "padding changes the load")
        empty = module(bench.states(bench.padded([0, 0])), bench.padded([0, 0]))[1]
        hold(not empty.load_E.any(), "padding is counted in the load")


@check("ffn", clause="the backward is the forward's", where=FFN)
def ffn_gradients_are_right(subject: Subject) -> None:
    """Against finite differences in fp64; choices of experts are constant in so small a step."""
    module, given = perturbed(subject.made()), bench.tokens(1, 3)
    x_BLD = bench.states(given).requires_grad_()
    weights = [p for p in module.parameters() if p.requires_grad]
    run = lambda x, *_: module(x, given)[0]  # noqa: E731
    ok = torch.autograd.gradcheck(run, (x_BLD, *weights), raise_exception=False, fast_mode=True)
    hold(ok, "a gradient differs from finite differences")


@check(
    "ffn",
    clause="`costs().active` is what one token uses, within 2% of a counted run",
    where="core/contracts/component.py, Costs",
)
def ffn_costs_are_real(subject: Subject) -> None:
    """2 FLOPs for each active weight that is in a product."""
    module, given = subject.made(), bench.tokens(2, bench.LENGTH)
    with FlopCounterMode(display=False) as counter:
        module(bench.states(given), given)
    vectors = sum(p.numel() for p in module.parameters() if p.dim() == 1)
    declared = given.tokens_BL.numel() * (2 * (module.costs().active - vectors) + 2 * module.costs().mixing)
    counted = counter.get_total_flops()
    hold(abs(declared - counted) <= 0.02 * counted, f"declared {declared:g} FLOPs, counted {counted:g}")


def predicted(head: Any, x_BLD: Tensor, given: SequenceContext) -> HeadOutput:
    """What a head gives, with all that it reads."""
    found: HeadOutput = head(x_BLD, given, shared(head, x_BLD))
    return found


@check("loss_head", clause="`counts` are known from the data alone and are the terms' own", where=HEAD)
def head_counts_are_known_beforehand(subject: Subject) -> None:
    """Full, padded and all-masked; the coefficient is a finite number."""
    head = perturbed(subject.made())
    documents = bench.tokens(documents_BM=torch.tensor([[0] * 4 + [1] * 5] * 3))
    for lengths in ([8, 8, 8], [8, 3, 0], [0, 0]):
        given = bench.padded(lengths)
        output, counts = predicted(head, bench.states(given), given), head.counts(given)
        hold(set(output.terms) == set(counts), f"terms {sorted(output.terms)}, counts {sorted(counts)}")
        hold(set(output.records) <= set(head.contexts(given)), "a block of the head has no context")
        _plausible(counts, given)
    _plausible(head.counts(documents), documents)
    value = head.coefficient(Progress(1, 128, 100, 12800))
    hold(0 <= value < float("inf"), f"the coefficient is {value!r}")


def _plausible(counts: dict[str, Tensor], given: SequenceContext) -> None:
    most = int(given.predicted().sum())
    for name, count in counts.items():
        hold(0 <= int(count) <= most, f"{name}: {int(count)} counted, where {most} positions predict a token")


@check(
    "loss_head",
    clause="padding is predicted nowhere, and a batch of nothing but padding has loss 0 and gradient 0",
    where=HEAD,
)
def head_ignores_padding(subject: Subject) -> None:
    """Other states and targets at padded places change nothing (P17: 0, never NaN)."""
    head, given = perturbed(subject.made()), bench.padded([8, 3, 0])
    x_BLD, valid_BL = bench.states(given), given.valid()
    other = torch.where(valid_BL[:, :, None], x_BLD, 5 * x_BLD.flip(2))
    assert given.targets_BL is not None
    past_BL = ~valid_BL & ~valid_BL.roll(1, dims=1)  # the first padded place is the last valid token's target
    elsewhere = replace(
        given,
        tokens_BL=torch.where(past_BL, given.tokens_BL ^ 1, given.tokens_BL),
        targets_BL=torch.where(valid_BL, given.targets_BL, given.targets_BL ^ 1),
    )
    one, two = predicted(head, x_BLD, given), predicted(head, other, elsewhere)
    for name, term in one.terms.items():
        hold(distance(two.terms[name], term) < 1e-10, f"padding changes {name}")
    empty, nothing = bench.padded([0, 0]), bench.states(bench.padded([0, 0])).requires_grad_()
    terms = predicted(head, nothing, empty).terms
    hold(not any(value.any() for value in terms.values()), "the loss of nothing is not 0")
    total = torch.stack(list(terms.values())).sum()
    if total.requires_grad:
        total.backward()
        hold(nothing.grad is None or not nothing.grad.any(), "the loss of nothing has a gradient")


@check("loss_head", clause="sums are over tokens: a batch's terms are the sums of its sequences'", where=HEAD)
def head_sums_over_sequences(subject: Subject) -> None:
    """So that a window's mean does not depend on how it is split (P9, P24)."""
    head, given = perturbed(subject.made()), bench.padded([8, 5, 8])
    x_BLD = bench.states(given)
    whole = predicted(head, x_BLD, given).terms
    parts = [slice(row, row + 1) for row in range(3)]
    alone = [predicted(head, x_BLD[p], bench.rows(given, p)).terms for p in parts]
    for name, term in whole.items():
        total = torch.stack([terms[name] for terms in alone]).sum()
        hold(distance(total, term) < 1e-10, f"{name} of a batch is not the sum of its sequences'")
        counts = [int(head.counts(bench.rows(given, part))[name]) for part in parts]
        hold(int(head.counts(given)[name]) == sum(counts), f"{name}: counts do not add up")


@check("loss_head", clause="the loss teaches the model below", where=HEAD)
def head_teaches_the_model(subject: Subject) -> None:
    """A finite gradient of the hidden states."""
    head, given = perturbed(subject.made()), bench.tokens()
    x_BLD = bench.states(given).requires_grad_()
    terms = predicted(head, x_BLD, given).terms
    torch.stack(list(terms.values())).sum().backward()
    hold(x_BLD.grad is not None and bool(x_BLD.grad.isfinite().all()) and bool(x_BLD.grad.any()), "no finite gradient")


@check("loss_head", clause="a prediction does not see what it predicts", where=HEAD)
def head_does_not_see_its_target(subject: Subject) -> None:
    """The probabilities of all possible last targets add up to at most 1, where the output is the embedding itself."""
    head, given = perturbed(subject.made()), bench.tokens(1, 4)
    x_BLD = bench.states(given)
    tied = shared(head, x_BLD, tied=True)
    losses: dict[str, list[Tensor]] = {}
    assert given.targets_BL is not None
    for token in range(bench.VOCABULARY):
        targets_BL = torch.cat([given.targets_BL[:, :-1], torch.full((1, 1), token)], dim=1)
        for name, term in head(x_BLD, replace(given, targets_BL=targets_BL), tied).terms.items():
            losses.setdefault(name, []).append(term.detach())
    for name, values in losses.items():
        total = torch.stack(values).neg().exp().sum()
        constant = all(torch.equal(value, values[0]) for value in values)
        hold(constant or float(total) <= 1 + 1e-6, f"{name}: probabilities add up to {total:.3g}")


@check("loss_head", clause="a target that is not learned has no loss and is not counted", where=CONTEXT)
def targets_that_are_not_learned_are_left_out(subject: Subject) -> None:
    """Nothing is learned: no count and no loss. Two complementary masks: counts and losses add up to the whole's."""
    head, given = perturbed(subject.made()), bench.tokens()
    x_BLD = bench.states(given)
    nothing = replace(given, learned_BM=torch.zeros(3, 9, dtype=torch.bool))
    hold(not any(int(count) for count in head.counts(nothing).values()), "targets that are not learned are counted")
    terms = predicted(head, x_BLD, nothing).terms
    hold(not any(value.any() for value in terms.values()), "targets that are not learned have a loss")
    odd_BM = (torch.arange(9) % 2 == 1).expand(3, -1)
    halves = [replace(given, learned_BM=odd_BM), replace(given, learned_BM=~odd_BM)]
    for name, whole in predicted(head, x_BLD, given).terms.items():
        parts = [predicted(head, x_BLD, half).terms[name] for half in halves]
        hold(distance(parts[0] + parts[1], whole) < 1e-10, f"{name} is not the sum over learned targets")
        counts = [int(head.counts(half)[name]) for half in halves]
        hold(sum(counts) == int(head.counts(given)[name]), f"{name}: learned targets do not add up to all")


@check(
    "loss_head", clause="`draft` gives logits for each row where `drafts` says so, and is refused elsewhere", where=HEAD
)
def drafting_is_as_declared(subject: Subject) -> None:
    """Three tokens at once, and the same one by one with the head's caches."""
    head, given = perturbed(subject.made()).eval(), bench.tokens(2, 3)
    x_BLD = bench.states(given)
    if not head.drafts:
        try:
            head.draft(x_BLD, given, shared(head, x_BLD), [])
        except NotImplementedError:
            return
        hold(False, "draft is declared not to work, and works")
    at_once = head.draft(x_BLD, given, shared(head, x_BLD), head.new_draft_caches(2, 3)).logits_BLV
    hold(at_once.shape == (2, 3, bench.VOCABULARY), f"drafted logits are {tuple(at_once.shape)}")
    hold(bool(at_once.isfinite().all()), "drafted logits are not finite")
    caches, parts = head.new_draft_caches(2, 3), []
    for place in range(3):
        column = slice(place, place + 1)
        part = replace(given, tokens_BL=given.tokens_BL[:, column], positions_BL=given.positions_BL[:, column])
        own_BLD = x_BLD[:, column]
        parts.append(head.draft(own_BLD, part, shared(head, own_BLD), caches).logits_BLV)
    hold(distance(torch.cat(parts, dim=1), at_once) < 1e-9, "one token at a time drafts other logits")
