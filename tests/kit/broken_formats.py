"""Checkpoint formats, each with one mistake: DeepSeek-V3's with something taken away."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from core.contracts.checkpoint_format import TensorMapping
from core.contracts.errors import ConfigError
from plugins.hf_deepseek.v3 import DeepSeekV3


class Anonymous(DeepSeekV3):
    """Does not read the architecture that its example has."""

    example = {"name": "anonymous"}
    architectures = ("SomebodyElsesForCausalLM",)


class Scaleless(DeepSeekV3):
    """Leaves out the factor on the gates when it writes a configuration."""

    example = {"name": "scaleless"}

    def config_of(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().config_of(recipe), "routed_scaling_factor": 1.0}


class Credulous(DeepSeekV3):
    """Writes any attention as if it were its own."""

    example = {"name": "credulous"}

    def config_of(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return super().config_of(recipe)
        except ConfigError:
            return {}


class Overlapping(DeepSeekV3):
    """Puts every up projection over the gate."""

    example = {"name": "overlapping"}

    def tensor_mappings(
        self, config: Mapping[str, Any], recipe: Mapping[str, Any], names: Collection[str] | None
    ) -> Iterator[TensorMapping]:
        for piece in super().tensor_mappings(config, recipe, names):
            yield replace(piece, first=0) if ".up_proj." in piece.theirs else piece


FORMATS = {
    Anonymous: "format_names_its_architectures",
    Scaleless: "format_translates_both_ways",
    Credulous: "format_refuses_with_a_reason",
    Overlapping: "format_accounts_for_every_row",
}
"""The one check that each must fail."""
