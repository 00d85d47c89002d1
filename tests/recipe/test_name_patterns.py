"""Patterns that choose tensors by name."""

import pytest

from core.contracts.errors import ConfigError
from core.contracts.name_patterns import check_chosen, check_patterns, chosen_by, folded

NAMES = (
    "embedding.weight",
    "blocks.1.attention.output.weight",
    "blocks.1.ffn.router.centroids.weight",
    "blocks.1.ffn.balance.0.bias",
    "blocks.10.ffn.down.weight",
    "heads.mtp.depths.0.block.ffn.balance.0.bias",
    "output.weight",
)


@pytest.mark.parametrize(
    ("pattern", "chosen"),
    [
        ("router", [2]),
        ("bias", [3, 5]),
        ("blocks.1", [1, 2, 3]),
        ("blocks.1?", [4]),
        ("output", [1, 6]),
        (".output", [6]),
        ("blocks.*.bias", [3]),
        ("heads.mtp", [5]),
        ("output.weight", [1, 6]),
        ("*", range(7)),
        ("out", []),
        ("[ab]", []),
    ],
)
def test_a_pattern_chooses_whole_parts_of_names(pattern: str, chosen: list[int]) -> None:
    assert chosen_by([pattern], NAMES) == {NAMES[number] for number in chosen}


@pytest.mark.parametrize("pattern", ["", ".", "a..b", "a.", "..a"])
def test_a_pattern_with_an_empty_part_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="must be parts of a tensor's name, joined by dots"):
        check_patterns([pattern], "freeze")


def test_a_pattern_of_nothing_is_refused_with_the_nearest_parts() -> None:
    with pytest.raises(ConfigError, match=r"'rooter' chooses no tensor; did you mean router"):
        check_chosen(["embedding", "rooter"], NAMES, "freeze")
    with pytest.raises(ConfigError, match=r"parts of names: embedding, weight, blocks"):
        check_chosen(["zzzzzz"], NAMES, "freeze")


def test_a_list_of_names_is_folded_over_their_numbers() -> None:
    assert folded(["blocks.1.a", "blocks.2.a", "b"]) == ["blocks.*.a (2)", "b"]
