"""Acceptance and residual: together they give the model's own distribution."""

import pytest
import torch
from torch import Tensor

from core.generation.speculation import acceptance, residual, verify, verify_greedy

VOCABULARY = 7


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Distributions p and q of all kinds."""
    generator = torch.Generator().manual_seed(3)

    def drawn(zeros: int = 0) -> Tensor:
        p = torch.rand(VOCABULARY, dtype=torch.float64, generator=generator) ** 3
        p[torch.randperm(VOCABULARY, generator=generator)[:zeros]] = 0
        return p / p.sum()

    one = drawn()
    left = torch.tensor([1, 2, 3, 0, 0, 0, 0], dtype=torch.float64) / 6
    right = torch.tensor([0, 0, 0, 4, 3, 2, 1], dtype=torch.float64) / 10
    best = torch.zeros(VOCABULARY, dtype=torch.float64)
    best[2] = 1.0
    found = {
        "equal": (one, one.clone()),
        "disjoint": (left, right),
        "p has one token": (best, drawn()),
        "q has one token": (drawn(), best),
        "both the same token": (best, best.clone()),
        "nearly equal": (one, (one + 1e-17) / (one + 1e-17).sum()),
    }
    for number in range(20):
        found[f"random {number}"] = (drawn(number % 6), drawn(number // 4))
    return found


PAIRS = pairs()


@pytest.mark.parametrize("name", PAIRS)
def test_the_mixture_of_accepted_drafts_and_residual_is_the_models_distribution(name: str) -> None:
    """Summed over every draft: the draft itself if it is accepted, otherwise each token of the residual."""
    p, q = PAIRS[name]
    rest = residual(p, q)
    assert float(rest.sum()) == pytest.approx(1, abs=1e-12)
    assert bool((rest >= 0).all())
    mixture = [0.0] * VOCABULARY
    for drafted in range(VOCABULARY):
        accepted = float(acceptance(p[drafted], q[drafted]))
        assert 0 <= accepted <= 1
        mixture[drafted] += float(q[drafted]) * accepted
        for token in range(VOCABULARY):
            mixture[token] += float(q[drafted]) * (1 - accepted) * float(rest[token])
    assert mixture == pytest.approx(p.tolist(), abs=1e-12)


def slow_verify(
    drafts: list[int],
    count: int,
    p: list[list[float]],
    q: list[list[float]],
    accept: list[float],
    last: list[float],
) -> tuple[int, int]:
    """Algorithm 1 of arXiv 2211.17192 for one row."""
    for place in range(count):
        token = drafts[place]
        if accept[place] < min(1.0, p[place][token] / q[place][token]):
            continue
        weights = [max(0.0, a - b) for a, b in zip(p[place], q[place], strict=True)]
        return place, slow_draw(weights, last[place])
    return count, slow_draw(p[count], last[count])


def slow_draw(weights: list[float], u: float) -> int:
    """The first token at which the cumulative sum exceeds u of the whole."""
    total = sum(weights)
    passed = 0.0
    for token, weight in enumerate(weights):
        passed += weight
        if passed > u * total:
            return token
    raise AssertionError("nothing was drawn")


def test_verifying_a_batch_is_the_algorithm_row_by_row() -> None:
    """Rows with fewer drafts among them; the drafts come from q, as they do in decoding."""
    generator = torch.Generator().manual_seed(1)
    rows, drafts = 200, 3

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    p_BMV = uniform(rows, drafts + 1, VOCABULARY) ** 4
    p_BMV = p_BMV / p_BMV.sum(dim=-1, keepdim=True)
    q_BNV = (p_BMV[:, :-1] + 0.1 * uniform(rows, drafts, VOCABULARY)) ** 1.5
    q_BNV = q_BNV / q_BNV.sum(dim=-1, keepdim=True)
    drafts_BN = torch.multinomial(q_BNV.flatten(0, 1), 1, generator=generator).view(rows, drafts)
    counts_B = torch.randint(drafts + 1, (rows,), generator=generator)
    accept_BN = uniform(rows, drafts)
    last_BM = uniform(rows, drafts + 1)
    found = verify(drafts_BN, counts_B, p_BMV, q_BNV, accept_BN, last_BM)
    columns = (drafts_BN, counts_B, p_BMV, q_BNV, accept_BN, last_BM)
    expected = [slow_verify(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
    assert list(zip(found.accepted_B.tolist(), found.next_B.tolist(), strict=True)) == expected
    assert {accepted for accepted, _ in expected} == {0, 1, 2, 3}


def test_greedy_verification_keeps_what_the_model_would_have_written() -> None:
    drafts_BN = torch.tensor([[4, 5, 6], [4, 0, 6], [0, 5, 6], [4, 5, 6], [4, 5, 6]])
    best_BM = torch.tensor([[4, 5, 6, 7]] * 5)
    counts_B = torch.tensor([3, 3, 3, 1, 0])
    found = verify_greedy(drafts_BN, counts_B, best_BM)
    assert found.accepted_B.tolist() == [3, 1, 0, 1, 0]
    assert found.next_B.tolist() == [7, 5, 4, 5, 4]
