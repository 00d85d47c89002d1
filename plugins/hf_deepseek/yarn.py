"""Rotary positions and YaRN: translates transformers' keys to ours and back.

Two numbers decide: the factor on cos and sin, and the factor on the softmax scale. With s the factor of the context
and m(x) = 0.1 x ln s + 1,

    transformers:  cos, sin: m(mscale) / m(mscale_all_dim) if both are given, else m(1), or `attention_factor`
                   scale:    m(mscale_all_dim)^2 if it is given, else 1
    here:          cos, sin: m(mscale) / m(mscale_all_dim), m of a missing one being 1
                   scale:    m(mscale_all_dim)^2, likewise

so only our `mscale` has to be computed, from m(mscale) = transformers' factor on cos and sin x m(mscale_all_dim).
"""

import math
from collections.abc import Mapping
from typing import Any

from core.contracts.errors import ConfigError

YARN_KEYS = {"beta_fast": 32.0, "beta_slow": 1.0}
"""Keys that both sides have, and their defaults."""

NUMBERS = (
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    *YARN_KEYS,
)
"""Keys whose values must be numbers."""


def temperature(factor: float, coefficient: float | None) -> float:
    """Returns m(x); 1 without a coefficient, or if the context is not extended."""
    if coefficient and factor > 1:
        return 0.1 * coefficient * math.log(factor) + 1.0
    return 1.0


def rope_of(config: Mapping[str, Any], max_length: int) -> tuple[dict[str, Any], list[str]]:
    """Returns our `model.rope`, and sentences for the user.

    The keys are `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (earlier versions).

    Args:
        config: the configuration.
        max_length: its `max_position_embeddings`.

    Raises:
        ConfigError: the rotary positions are of a type that is not supported, or a value is invalid.
    """
    where = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = _checked(config.get(where) or {}, where)
    if not _is_number(config.get("rope_theta") or 0):
        raise ConfigError("rope_theta", "must be a number")
    kind = given.get("rope_type", given.get("type", "default"))
    theta = given.get("rope_theta") or config.get("rope_theta") or 10000.0
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ConfigError(
            where, "partial_rotary_factor must be 1: the rotated part is qk_rope_head_dim"
        )
    if kind == "default":
        return {"theta": float(theta), "max_length": max_length}, []
    if kind != "yarn":
        raise ConfigError(where, f"the type {kind!r} is not supported; known: default, yarn")
    if not given.get("truncate", True):
        raise ConfigError(where, "truncate must be true")
    yarn = _yarn_of(config, given, max_length, where)
    longest = math.floor(yarn["factor"] * yarn["original_length"])
    notices = []
    if max_length > longest:
        notices = [
            f"max_position_embeddings = {max_length} is more than YaRN's factor allows: the model reads {longest}"
        ]
    return {"theta": float(theta), "max_length": min(max_length, longest), "yarn": yarn}, notices


def _checked(given: Any, where: str) -> dict[str, Any]:
    """Returns a section of the configuration; raises `ConfigError` if it is not one, or a value is not a number."""
    if not isinstance(given, Mapping):
        raise ConfigError(where, "must be a section")
    for key in NUMBERS:
        if not _is_number(given.get(key) or 0):
            raise ConfigError(where, f"{key} = {given[key]!r} must be a number")
    return dict(given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _yarn_of(
    config: Mapping[str, Any], given: Mapping[str, Any], max_length: int, where: str
) -> dict[str, Any]:
    """Returns our `model.rope.yarn`."""
    key = "original_max_position_embeddings"
    original = config.get(key) or given.get(key) or max_length
    factor = given.get("factor") or max_length / original
    mscale = given.get("mscale")
    all_dim = given.get("mscale_all_dim")
    both = bool(mscale and all_dim)
    ratio = given.get("attention_factor")
    if ratio is None and not both:
        ratio = temperature(factor, 1.0)
    if ratio is not None:
        mscale = _coefficient(factor, ratio * temperature(factor, all_dim), where)
    betas = {key: float(given.get(key) or default) for key, default in YARN_KEYS.items()}
    scales = {"mscale": mscale or None, "mscale_all_dim": all_dim or None}
    return {"factor": float(factor), "original_length": int(original), **betas, **scales}


def _coefficient(factor: float, wanted: float, where: str) -> float | None:
    """Returns the coefficient x with m(x) = wanted; None for 1."""
    if wanted == 1.0:
        return None
    if factor <= 1:
        raise ConfigError(where, "attention_factor must be 1 if the factor is 1")
    return (wanted - 1.0) / (0.1 * math.log(factor))


def config_of(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the configuration's keys, in the form that every version of transformers and vLLM reads."""
    config = {"rope_theta": rope["theta"], "max_position_embeddings": rope["max_length"]}
    yarn = rope["yarn"]
    if yarn is None:
        return {**config, "rope_scaling": None}
    factor = yarn["factor"]
    mscale = yarn["mscale"] or None
    all_dim = yarn["mscale_all_dim"] or None
    scaling = {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": yarn["original_length"],
    }
    scaling |= {key: yarn[key] for key in YARN_KEYS}
    if mscale and all_dim:
        scaling |= {"mscale": mscale, "mscale_all_dim": all_dim}
        return {**config, "rope_scaling": scaling}
    if all_dim:
        scaling["mscale_all_dim"] = all_dim
    ratio = temperature(factor, mscale) / temperature(factor, all_dim)
    if ratio != temperature(factor, 1.0):
        scaling["attention_factor"] = ratio
    return {**config, "rope_scaling": scaling}
