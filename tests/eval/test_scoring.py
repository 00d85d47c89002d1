"""Log-likelihoods in batches are those of one token after another."""

import math
import random

import pytest
import torch
from lab import Lab

from core.assemble import build
from core.harness.scoring import Request, score
from core.model import loss
from core.model.language_model import LanguageModel

from .by_hand import greedy, log_likelihood

EXACT = 1e-10
"""Tolerance of sums of a few logarithms in fp64."""


def random_requests(count: int, longest: int = 25) -> list[Request]:
    """Requests of many lengths, three to each context."""
    draw = random.Random(5)
    made = []
    while len(made) < count:
        ids = [0, *(draw.randrange(300) for _ in range(draw.randint(1, longest - 1)))]
        scored = draw.randint(1, len(ids) - 1)
        made += [Request((*ids[:-1], draw.randrange(300)), scored) for _ in range(3)]
    return made[:count]


def test_only_the_tokens_of_the_continuation_count(model: LanguageModel) -> None:
    requests = random_requests(30)
    found = score(model, requests, batch_size=7)
    for request, got in zip(requests, found, strict=True):
        assert got.log_likelihood == pytest.approx(
            log_likelihood(model, request.ids, request.scored), abs=EXACT
        )


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_what_shares_a_batch_changes_nothing(model: LanguageModel, batch_size: int) -> None:
    requests = random_requests(30)
    for got, expected in zip(
        score(model, requests, batch_size=batch_size),
        score(model, requests[::-1], batch_size=5)[::-1],
        strict=True,
    ):
        assert got.log_likelihood == pytest.approx(expected.log_likelihood, abs=EXACT)
        assert got.greedy == expected.greedy


def test_nor_where_a_router_draws_and_drops(lab: Lab) -> None:
    """GShard draws its second choices and drops over capacity, in groups of one sequence."""
    ffn = "model.blocks.moe.ffn"
    gshard = f"{ffn}.router={{name: gshard, capacity_factor: 0.8}}"
    model = build(lab.recipe("precision.name=fp64", gshard, f"{ffn}.balance=[]")).eval()
    requests = random_requests(30)
    one, many = (score(model, requests, batch_size=size) for size in (1, 8))
    assert [s.log_likelihood for s in one] == pytest.approx(
        [s.log_likelihood for s in many], abs=EXACT
    )


def test_logits_in_pieces_are_the_same(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = random_requests(20)
    whole = score(model, requests, batch_size=20)
    assert sum(len(request.ids) - 1 for request in requests[::3]) > 3
    monkeypatch.setattr("core.harness.scoring.ROWS", 3)
    assert loss.ROWS != 3
    pieces = score(model, requests, batch_size=20)
    assert [s.log_likelihood for s in pieces] == pytest.approx(
        [s.log_likelihood for s in whole], abs=EXACT
    )
    assert [s.greedy for s in pieces] == [s.greedy for s in whole]


def test_greedy_means_that_every_token_is_the_likeliest(model: LanguageModel) -> None:
    likeliest = greedy(model, [0, 17, 40], 5)
    changed = [(token + 1) % 300 for token in likeliest]
    right = Request((0, 17, 40, *likeliest), 5)
    last = Request((0, 17, 40, *likeliest[:4], changed[4]), 5)
    first = Request((0, 17, 40, changed[0]), 1)
    of_context = Request((0, 17, 40, changed[0], *greedy(model, [0, 17, 40, changed[0]], 2)), 2)
    found = score(model, [right, last, first, of_context], batch_size=4)
    assert [s.greedy for s in found] == [True, False, False, True]


def test_of_all_tokens_one_is_the_likeliest(model: LanguageModel) -> None:
    found = score(model, [Request((0, 17, 40, token), 1) for token in range(300)], batch_size=1)
    assert [token for token, got in enumerate(found) if got.greedy] == greedy(model, [0, 17, 40], 1)
    assert sum(math.exp(got.log_likelihood) for got in found) == pytest.approx(1, abs=EXACT)


def test_choices_that_differ_in_their_last_token_share_a_forward(model: LanguageModel) -> None:
    forwards = []
    handle = model.embedding.register_forward_hook(
        lambda _, given, out: forwards.append(given[0].shape)
    )
    try:
        found = score(
            model, [Request((0, 5, 6, letter), 1) for letter in (7, 8, 9, 10)], batch_size=4
        )
    finally:
        handle.remove()
    assert forwards == [torch.Size([1, 3])]
    for letter, got in zip((7, 8, 9, 10), found, strict=True):
        assert got.log_likelihood == pytest.approx(
            log_likelihood(model, (0, 5, 6, letter), 1), abs=EXACT
        )


def test_one_input_may_be_cut_at_several_places(model: LanguageModel) -> None:
    ids = (0, 5, 6, 7, 8)
    found = score(model, [Request(ids, scored) for scored in (0, 1, 4)], batch_size=4)
    expected = [0.0, *(log_likelihood(model, ids, scored) for scored in (1, 4))]
    assert [s.log_likelihood for s in found] == pytest.approx(expected, abs=EXACT)
    assert found[0].greedy


def test_everything_that_is_answered_is_reported(model: LanguageModel) -> None:
    counts: list[int] = []
    score(model, [*random_requests(10), Request((0,), 0)], batch_size=2, done=counts.append)
    assert sum(counts) == 11
    assert score(model, [], batch_size=2) == []
