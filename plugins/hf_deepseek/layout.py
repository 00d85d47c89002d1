"""What a recipe's model is made of, as far as one configuration for all layers can say it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.contracts.errors import Wrong


@dataclass(frozen=True)
class Bias:
    """Where a layer keeps its selection bias: the place in its list of balancers."""

    index: int


@dataclass(frozen=True)
class Layout:
    """A model of dense layers, then layers with experts, all with one attention.

    Args:
        dim, vocabulary: widths.
        layers: how many there are.
        dense: how many of them come first and have no experts.
        attention: the section of MLA.
        hidden: width of the dense layers; None where there is none.
        experts: the section of the layers with experts; None where there is none.
        bias: the selection bias of those layers.
        mtp: the name of the multi-token head; None where there is none.
        depths: its modules.
        tied: whether the output is the embedding.
    """

    dim: int
    vocabulary: int
    layers: int
    dense: int
    attention: Mapping[str, Any]
    hidden: int | None
    experts: Mapping[str, Any] | None
    bias: Bias | None
    mtp: str | None
    depths: int
    tied: bool


def layout_of(recipe: Mapping[str, Any]) -> Layout:
    """The layout of a resolved recipe.

    Raises:
        Wrong: layers that one configuration cannot describe.
    """
    model = recipe["model"]
    kinds = [(name, block) for name, block in model["blocks"].items() for _ in range(block["count"])]
    attention = _same([(f"model.blocks.{n}.attention", b["attention"] or model["attention"]) for n, b in kinds])
    if attention["name"] != "mla":
        raise Wrong("model.attention.name", "must be mla: the architecture has no other attention")
    ffns = [(f"model.blocks.{name}.ffn", block["ffn"]) for name, block in kinds]
    for path, ffn in ffns:
        if ffn["name"] not in ("swiglu", "moe"):
            raise Wrong(f"{path}.name", "must be swiglu or moe: the architecture has no other layers")
    dense = sum(ffn["name"] == "swiglu" for _, ffn in ffns)
    if any(ffn["name"] == "swiglu" for _, ffn in ffns[dense:]):
        raise Wrong("model.blocks", "must hold all dense blocks before the first one with experts")
    experts = _same([(path, ffn) for path, ffn in ffns[dense:]]) if dense < len(ffns) else None
    mtp, depths = _multi_token(model["heads"])
    return Layout(
        dim=model["dim"],
        vocabulary=recipe["data"]["tokenizer"]["vocab"],
        layers=len(kinds),
        dense=dense,
        attention=attention,
        hidden=_same(ffns[:dense])["hidden"] if dense else None,
        experts=experts,
        bias=_bias(experts, ffns[-1][0]) if experts else None,
        mtp=mtp,
        depths=depths,
        tied=model["tied_embedding"],
    )


_OF_TRAINING = ("balance", "dispatcher", "token_dropping")
"""Keys of a layer with experts that no forward in evaluation depends on; the bias is looked at by itself."""


def _same(sections: list[tuple[str, Mapping[str, Any]]]) -> Mapping[str, Any]:
    """The one section that all layers have."""
    first = _compared(sections[0][1])
    for path, section in sections[1:]:
        if _compared(section) != first:
            raise Wrong(path, "must be the same in all blocks of its kind: one configuration describes them all")
    return sections[0][1]


def _compared(section: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in section.items() if key not in _OF_TRAINING}
    return kept | {"bias": [s["name"] for s in section.get("balance", ())].index("bias") if _biased(section) else None}


def _biased(section: Mapping[str, Any]) -> bool:
    return any(balancer["name"] == "bias" for balancer in section.get("balance", ()))


def _bias(experts: Mapping[str, Any], path: str) -> Bias | None:
    for index, balancer in enumerate(experts["balance"]):
        if balancer["name"] == "bias":
            if balancer["form"] != "additive":
                raise Wrong(f"{path}.balance.{index}.form", "must be additive: the architecture adds its bias")
            return Bias(index)
    return None


def _multi_token(heads: Mapping[str, Any]) -> tuple[str | None, int]:
    found = [name for name, head in heads.items() if head["name"] == "mtp"]
    for name, head in heads.items():
        if head["name"] not in ("next_token", "mtp") or name in found[1:]:
            raise Wrong(f"model.heads.{name}", "must be next_token, or one mtp: the architecture has no other heads")
    return (found[0], heads[found[0]]["depth"]) if found else (None, 0)
