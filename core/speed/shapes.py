"""The models that are measured: four sizes, or a recipe of the user's, without what the peer cannot do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from core.contracts.errors import UserError
from core.recipe.compose import Recipe, compose

BASE = "dsv3_small"
"""The recipe whose sizes are changed; four experts a token in two of four groups, one shared expert, fp32."""


@dataclass(frozen=True)
class Shape:
    """A model and its micro-batch.

    Args:
        name: what tables call it.
        recipe: a recipe file, or the name of a shipped one.
        overrides: what is changed in it.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()


def _sized(
    dim: int, heads: int, ranks: tuple[int, int], hidden: int, layers: int, experts: tuple[int, int]
) -> tuple[str, ...]:
    """The overrides of `BASE` for one size.

    Args:
        dim: width of the residual stream.
        heads: attention heads.
        ranks: widths of the query latent and of the key-value latent.
        hidden: inner width of the dense block.
        layers: blocks with experts.
        experts: routed experts of each, and the inner width of one.
    """
    ffn = "model.blocks.moe.ffn"
    return (
        f"model.dim={dim}",
        f"model.attention.heads={heads}",
        f"model.attention.q_rank={ranks[0]}",
        f"model.attention.kv_rank={ranks[1]}",
        f"model.blocks.dense.ffn.hidden={hidden}",
        f"model.blocks.moe.count={layers}",
        f"{ffn}.experts={experts[0]}",
        f"{ffn}.expert_hidden={experts[1]}",
    )


def _batch(sequences: int, length: int) -> tuple[str, ...]:
    """The overrides of a micro-batch; the rotary table also holds a decoded text."""
    return (
        f"batch.sequences={sequences}",
        f"data.sequence_length={length}",
        f"model.rope.max_length={max(length, 2048)}",
    )


M7 = _sized(256, 4, (128, 64), 768, 3, (16, 96))
M37 = _sized(384, 8, (192, 128), 1856, 4, (32, 192))
M240 = _sized(512, 8, (256, 128), 1408, 6, (64, 384))

TRAINED = (
    Shape("7 M, 16 experts, 8 x 256", BASE, M7 + _batch(8, 256)),
    Shape("37 M, 32 experts, 8 x 256", BASE, M37 + _batch(8, 256)),
    Shape("37 M, 32 experts, 2 x 1024", BASE, M37 + _batch(2, 1024)),
    Shape("240 M, 64 experts, 4 x 256", BASE, M240 + _batch(4, 256)),
)
"""What is trained if no recipe is named: 7.1, 36.7 and 240.7 million parameters."""

DECODED = TRAINED[:2]
"""What decodes if no recipe is named."""

QUICK = Shape(
    "quick",
    BASE,
    (
        *_sized(32, 2, (16, 16), 64, 1, (8, 16)),
        *_batch(2, 32),
        "model.attention.nope_dim=8",
        "model.attention.rope_dim=8",
        "model.attention.value_dim=16",
        "data.tokenizer.vocab=512",
    ),
)
"""A tiny model, with which `--quick` runs every measurement once."""


@dataclass(frozen=True)
class Comparable:
    """A recipe as it is measured.

    Args:
        shape: the model that was asked for.
        recipe: it, without the parts that no peer has.
        overrides: what makes this recipe of the shape's file, for another process.
        notes: what was left out, one sentence each.
    """

    shape: Shape
    recipe: Recipe
    overrides: tuple[str, ...]
    notes: tuple[str, ...]


def comparable(shape: Shape, *, trust: bool = False) -> Comparable:
    """The recipe of a shape with next-token prediction alone, and without balance losses.

    Both sides of a comparison must compute the same numbers, and transformers computes neither multi-token losses nor
    these balance losses. A selection bias stays: both sides have one.

    Raises:
        UserError: the recipe is wrong, or predicts no next token.
    """
    recipe = compose(shape.recipe, shape.overrides, trust=trust)
    removed: list[str] = []
    notes: list[str] = []
    kept_heads = 0
    for name, head in recipe.model.heads.items():
        if "next_token" in head.component.capabilities:
            kept_heads += 1
        else:
            removed.append(f"model.heads.{name}=null")
            notes.append(f"without model.heads.{name}")
    if not kept_heads:
        raise UserError(
            f"{recipe.source}: model.heads: none predicts the next token, so there is no step to measure"
        )
    for name, block in recipe.model.blocks.items():
        key = f"model.blocks.{name}.ffn.balance"
        balance: Sequence[Any] = getattr(block.ffn.config, "balance", ())
        kept = [section for section in balance if not _has_loss(section)]
        if len(kept) < len(balance):
            removed.append(f"{key}={_shown(kept)}")
            lost = ", ".join(section.name for section in balance if _has_loss(section))
            notes.append(f"without the balance loss of {key} ({lost})")
    overrides = (*shape.overrides, *removed)
    if removed:
        recipe = compose(shape.recipe, overrides, trust=trust)
    return Comparable(shape, recipe, overrides, tuple(notes))


def _has_loss(balancer: Any) -> bool:
    """Whether a balancer forms a loss: all but those that work on the selection of experts alone."""
    return "selects_with_bias" not in balancer.component.needs


def _shown(sections: Sequence[Any]) -> str:
    """Sections as an override writes a list."""
    import yaml

    from core.recipe.key_paths import to_dict

    plain = [to_dict(section) for section in sections]
    return yaml.safe_dump(plain, default_flow_style=True, width=10_000).strip()
