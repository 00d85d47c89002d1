"""The layout of a recipe's model, as far as one configuration for all layers can express it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.contracts.errors import ConfigError

_Section = tuple[str, Mapping[str, Any]]
"""The key path of a section in the recipe, and the section."""

_TRAINING_KEYS = ("balance", "dispatcher", "token_dropping")
"""Keys of a layer with experts that do not affect a forward in evaluation, except by the bias."""

_BIASING = ("bias", "quantile")
"""Balancers that hold a selection bias; a layer has at most one of them."""


@dataclass(frozen=True)
class BiasPosition:
    """The balancer that holds a layer's selection bias, as an index into its list of balancers."""

    index: int


@dataclass(frozen=True)
class HfLayout:
    """A model of dense layers, then layers with experts, all with one attention.

    Args:
        dim, vocabulary: widths of the model and of its output.
        layers: number of layers.
        dense: number of layers without experts, which come first.
        attention: the recipe's section of its attention.
        hidden: width of the dense layers; None if there are none.
        experts: the recipe's section of the layers with experts; None if there are none.
        bias: the selection bias of those layers.
        mtp: the name of the multi-token head; None if there is none.
        depths: number of its modules.
        tied: whether the output shares the weights of the embedding.
    """

    dim: int
    vocabulary: int
    layers: int
    dense: int
    attention: Mapping[str, Any]
    hidden: int | None
    experts: Mapping[str, Any] | None
    bias: BiasPosition | None
    mtp: str | None
    depths: int
    tied: bool


def layout_of(recipe: Mapping[str, Any], attention_name: str) -> HfLayout:
    """Returns the layout of a resolved recipe.

    Args:
        recipe: the recipe.
        attention_name: the name of the attention that the architecture has.

    Raises:
        ConfigError: the layers cannot be described by one configuration.
    """
    model = recipe["model"]
    if model["residual"]["name"] != "add":
        raise ConfigError(
            "model.residual.name", "must be add: the architecture has no other residual stream"
        )
    attentions: list[_Section] = []
    ffns: list[_Section] = []
    for name, block in model["blocks"].items():
        path = f"model.blocks.{name}"
        for _ in range(block["count"]):
            attentions.append((f"{path}.attention", block["attention"] or model["attention"]))
            ffns.append((f"{path}.ffn", block["ffn"]))
    attention = _same(attentions)
    if attention["name"] != attention_name:
        raise ConfigError(
            "model.attention.name",
            f"must be {attention_name}: the architecture has no other attention",
        )
    for path, ffn in ffns:
        if ffn["name"] not in ("swiglu", "moe"):
            raise ConfigError(
                f"{path}.name", "must be swiglu or moe: the architecture has no other layers"
            )
        if ffn.get("swiglu_limit") is not None:
            raise ConfigError(
                f"{path}.swiglu_limit", "must be null: the architecture does not clamp its SwiGLU"
            )
    dense = sum(ffn["name"] == "swiglu" for _, ffn in ffns)
    if any(ffn["name"] == "swiglu" for _, ffn in ffns[dense:]):
        raise ConfigError(
            "model.blocks", "must hold all dense blocks before the first one with experts"
        )
    hidden = _same(ffns[:dense])["hidden"] if dense else None
    experts = _same(ffns[dense:]) if dense < len(ffns) else None
    mtp, depths = _multi_token(model["heads"])
    bias = _bias(experts, ffns[-1][0]) if experts else None
    return HfLayout(
        dim=model["dim"],
        vocabulary=recipe["data"]["tokenizer"]["vocab"],
        layers=len(ffns),
        dense=dense,
        attention=attention,
        hidden=hidden,
        experts=experts,
        bias=bias,
        mtp=mtp,
        depths=depths,
        tied=model["tied_embedding"],
    )


def _same(sections: list[_Section]) -> Mapping[str, Any]:
    """Returns the section that all layers have; raises `ConfigError` if they differ."""
    first = _compared(sections[0][1])
    for path, section in sections[1:]:
        if _compared(section) != first:
            raise ConfigError(
                path,
                "must be the same in all blocks of this kind: one configuration describes them all",
            )
    return sections[0][1]


def _compared(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what must be equal in all layers: the keys of a forward, and the index of the bias."""
    kept = {key: value for key, value in section.items() if key not in _TRAINING_KEYS}
    biasing = [b["name"] in _BIASING for b in section.get("balance", ())]
    kept["bias"] = biasing.index(True) if any(biasing) else None
    return kept


def _bias(experts: Mapping[str, Any], path: str) -> BiasPosition | None:
    """Returns the selection bias of the layers with experts; raises `ConfigError` if it is not additive."""
    for index, balancer in enumerate(experts["balance"]):
        if balancer["name"] in _BIASING:
            if balancer.get("form", "additive") != "additive":
                raise ConfigError(
                    f"{path}.balance.{index}.form",
                    "must be additive: the architecture adds its bias",
                )
            return BiasPosition(index)
    return None


def _multi_token(heads: Mapping[str, Any]) -> tuple[str | None, int]:
    """Returns the name of the multi-token head and the number of its modules; None and 0 without one."""
    found = [name for name, head in heads.items() if head["name"] == "mtp"]
    for name, head in heads.items():
        if head["name"] not in ("next_token", "mtp") or name in found[1:]:
            raise ConfigError(
                f"model.heads.{name}",
                "must be next_token, or one mtp: the architecture has no other heads",
            )
    if not found:
        return None, 0
    if heads[found[0]].get("reads", "collapsed") != "collapsed":
        raise ConfigError(
            f"model.heads.{found[0]}.reads",
            "must be collapsed: the architecture's multi-token modules read states after the final norm",
        )
    return found[0], heads[found[0]]["depth"]
