"""The measures of load: exact values (A20)."""

from math import log, sqrt

import pytest
import torch
from torch import Tensor

from core.training.load import max_vio, measures


def counts(*load: int) -> Tensor:
    return torch.tensor(load, dtype=torch.int64)


@pytest.mark.parametrize(("experts", "each"), [(1, 7), (8, 1), (256, 12345)])
def test_A20_max_vio_of_uniform_load_is_zero(experts: int, each: int) -> None:
    assert float(max_vio(counts(*[each] * experts))) == 0.0


@pytest.mark.parametrize(("experts", "top_k"), [(8, 1), (8, 2), (16, 4), (6, 3)])
def test_A20_max_vio_of_one_expert_with_every_token_is_experts_over_top_k_minus_1(
    experts: int, top_k: int
) -> None:
    others = 10 * (experts - 1)
    tokens = others // (top_k - 1) if top_k > 1 else 70
    rest = [tokens * (top_k - 1) // (experts - 1)] * (experts - 1)
    load_E = counts(tokens, *rest)
    assert int(load_E.sum()) == tokens * top_k
    assert float(max_vio(load_E)) == pytest.approx(experts / top_k - 1, abs=1e-12)


def test_A20_an_empty_load_is_dead_and_not_a_number_nowhere() -> None:
    assert {name: float(value) for name, value in measures([counts(0, 0, 0, 0)]).items()} == {
        "max_vio": 0.0,
        "cv": 0.0,
        "dead_fraction": 1.0,
        "entropy": 0.0,
    }
    assert measures([]) == {}


def test_A20_measures_by_hand() -> None:
    found = {name: float(value) for name, value in measures([counts(1, 2, 3, 2, 0)]).items()}
    shares = [1 / 8, 2 / 8, 3 / 8, 2 / 8]
    mean = 8 / 5
    assert found == pytest.approx(
        {
            "max_vio": 3 / mean - 1,
            "cv": sqrt(sum((load - mean) ** 2 for load in (1, 2, 3, 2, 0)) / 5) / mean,
            "dead_fraction": 1 / 5,
            "entropy": -sum(p * log(p) for p in shares) / log(5),
        },
        abs=1e-12,
    )


def test_layers_are_measured_one_by_one_and_not_pooled() -> None:
    both = measures([counts(4, 0), counts(0, 4)])
    assert {name: float(value) for name, value in both.items()} == {
        "max_vio": 1.0,
        "cv": 1.0,
        "dead_fraction": 0.5,
        "entropy": 0.0,
    }


def test_one_assignment_in_a_billion_billion_is_seen() -> None:
    many = 1 << 52
    assert float(max_vio(counts(many + 2, many, many, many - 2))) > 0
    assert {value.dtype for value in measures([counts(many, 1)]).values()} == {torch.float64}
