"""Distributions beside lists of floats, and draws beside their definition."""

import itertools

import pytest
import torch

from core.contracts.errors import UserError
from core.generation.options import GenerationOptions
from core.generation.sampling import Draws, draw, probabilities

from .slow import distribution


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("top_k", [None, 1, 3, 20])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 1e-9])
def test_temperature_top_k_and_top_p_are_those_of_a_loop(
    temperature: float, top_k: int | None, top_p: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 20, dtype=torch.float64, generator=generator)
    logits[0, 0] = 1.0  # all equally likely
    logits[1, 1, 5:9] = 3.0  # ties
    options = GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    found = probabilities(logits, options)
    for row, column in itertools.product(range(4), range(3)):
        slow = distribution(logits[row, column].tolist(), temperature, top_k, top_p)
        assert found[row, column].tolist() == pytest.approx(slow, abs=1e-14)


def test_the_order_is_top_k_and_then_top_p_of_the_rest() -> None:
    """By hand: of 0.4, 0.3, 0.2, 0.1 the two best are 4/7 and 3/7, and 0.6 of these takes both."""
    logits = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64).log()
    both = GenerationOptions(temperature=1.0, top_k=2, top_p=0.6)
    assert probabilities(logits, both).tolist() == pytest.approx([0, 4 / 7, 3 / 7, 0])
    one = GenerationOptions(temperature=1.0, top_k=2, top_p=0.5)
    assert probabilities(logits, one).tolist() == pytest.approx([0, 1, 0, 0])


def test_at_temperature_0_and_at_a_tiny_one_the_best_token_has_all() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, -5.0, 0.0]])
    for temperature in (0.0, 1e-320):
        p = probabilities(logits, GenerationOptions(temperature=temperature))
        assert p.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_a_draw_is_where_the_cumulative_sum_passes_the_number() -> None:
    p = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    below_one = 1 - 2.0**-53
    expected = {0.0: 1, 0.2: 1, 0.25: 3, 0.74: 3, 0.75: 4, below_one: 4}
    for u, token in expected.items():
        assert int(draw(p[None], torch.tensor([u], dtype=torch.float64))) == token
        assert int(draw(p[None] * 0.3, torch.tensor([u], dtype=torch.float64))) == token


def test_a_draw_has_its_address() -> None:
    """A row's numbers are those of its prompt, whatever rows are beside it, and differ from one place to another."""
    cpu = torch.device("cpu")
    positions_B = torch.tensor([4, 5, 4])
    three = Draws(7, [0, 3, 9], cpu)("token", positions_B)
    assert torch.equal(three[1:2], Draws(7, [3], cpu)("token", positions_B[1:2]))
    grid_BL = Draws(7, [3, 9], cpu)("token", torch.tensor([[4, 5], [4, 5]]))
    assert (float(grid_BL[0, 1]), float(grid_BL[1, 0])) == (float(three[1]), float(three[2]))
    others = [
        Draws(8, [3], cpu)("token", positions_B[1:2]),
        Draws(7, [3], cpu)("accept", positions_B[1:2]),
    ]
    assert len({float(u) for u in [three[1], *grid_BL.flatten(), *others]}) == 6


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("tokens", 0, "tokens = 0: must be at least 1"),
        ("top_k", 0, "top_k = 0: must be at least 1"),
        ("batch", 0, "batch = 0: must be at least 1"),
        ("temperature", float("nan"), "temperature = nan: must be a number of at least 0"),
        ("top_p", 0.0, "top_p = 0.0: must be more than 0 and at most 1"),
        ("drafts", 65, "drafts = 65: must be 0 to 64"),
        ("stop", ("a", ""), "stop '': must have at least one character"),
    ],
)
def test_a_setting_that_cannot_be_is_one_sentence(key: str, value: object, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        GenerationOptions(**{key: value}).check()
    assert str(error.value) == sentence
