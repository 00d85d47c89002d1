"""Builds what a validated recipe describes: the model, and components that need nothing but their settings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from core.contracts.build import BuildContext, Init, Rope
from core.contracts.errors import ConfigError, SectionError, UserError
from core.contracts.loss_head import LossHead
from core.contracts.precision import Precision, declared_roles
from core.contracts.schema import Section
from core.model.block import Block
from core.model.freezing import freeze
from core.model.initialise import initialise, leave_meta
from core.model.language_model import Embedding, LanguageModel
from core.model.norm import RMSNorm
from core.numerics.draw import without_draws
from core.numerics.linear import SharedLinear
from core.recipe.compose import Recipe
from core.recipe.model_schema import RopeSection
from core.recipe.values import show_value


def build(
    recipe: Recipe,
    *,
    device: str = "cpu",
    precision: Precision | None = None,
    token_counts: Callable[[], Tensor] | None = None,
    parallelize: Callable[[LanguageModel], None] | None = None,
    dispatcher: Section | None = None,
) -> LanguageModel:
    """Builds the recipe's model with its initial weights; on the meta device without any.

    Args:
        recipe: a recipe that `core.compose` returned.
        device: "meta" builds shapes only.
        precision: makes the matrix-product layers; None: the recipe's.
        token_counts: returns how often each token occurs in the training data, int64 V; only components that are
            built from it call it.
        parallelize: shards the weights of the model, which is built on the meta device first; each rank then draws
            the weights that it owns.
        dispatcher: replaces the dispatcher of every layer; None: those of the recipe.

    Raises:
        UserError: a component cannot be built with its settings in this model, or `freeze` chooses nothing, or all;
            the message names the key.
    """
    context = _context(recipe, precision or make(recipe.precision))
    context = replace(context, token_counts=token_counts, dispatcher=dispatcher)
    first_device = "meta" if parallelize else device
    with torch.device(first_device), _float_default(), without_draws():
        try:
            model = _model(recipe, context)
        except SectionError as error:
            raise _at_its_key(recipe, error) from error
        except (RuntimeError, OverflowError, MemoryError) as cause:
            if not _is_of_sizes(cause):
                raise
            why = "its sizes are too large: a tensor of it cannot be addressed, or not be held here"
            raise UserError(f"model: {why} ({' '.join(str(cause).split())[:120]})") from cause
    try:
        freeze(model, recipe.freeze)
    except ConfigError as error:
        raise UserError(f"{error.key}: {error.why}") from error
    if parallelize is not None:
        shard(model, recipe.seed, parallelize, device=device)
    elif device != "meta":
        initialise(model, recipe.seed)
    return model


def shard(
    model: LanguageModel,
    seed: int,
    parallelize: Callable[[LanguageModel], None],
    *,
    device: str = "cpu",
) -> None:
    """Divides the weights of a model on the meta device, and draws those that this rank owns.

    Args:
        model: a model that `build` returned.
        seed: the recipe's seed.
        parallelize: shards the weights.
        device: where the weights are drawn.
    """
    parallelize(model)
    leave_meta(model, device)
    initialise(model, seed)


def _at_its_key(recipe: Recipe, error: SectionError) -> UserError:
    """The error of a component's constructor with the key path and the value that it is about."""
    path = _path_to(recipe, error.section)
    if path is None:
        return error
    key = error.error.key
    value = show_value(getattr(error.section.config, key, None))
    return UserError(f"{path}.{key} = {value}: {error.error.why}")


def _path_to(value: Any, section: Section) -> str | None:
    """The key path of a section inside a recipe or a part of one; None where it is not there."""
    if value is section:
        return ""
    inner: dict[Any, Any] = {}
    if isinstance(value, Section):
        inner = vars(value.config)
    elif isinstance(value, dict):
        inner = value
    elif isinstance(value, list):
        inner = dict(enumerate(value))
    elif is_dataclass(value):
        inner = vars(value)
    for key, item in inner.items():
        below = _path_to(item, section)
        if below is not None:
            return f"{key}.{below}".rstrip(".")
    return None


def _is_of_sizes(cause: BaseException) -> bool:
    """Whether torch or Python reports that a size does not fit into memory or into a number."""
    text = str(cause).lower()
    return not isinstance(cause, RuntimeError) or any(part in text for part in _SIZES)


_SIZES = ("overflow", "allocate memory", "out of memory", "bad_alloc", "invalid sizes")


def _context(recipe: Recipe, precision: Precision) -> BuildContext:
    """The build context of the recipe's first block."""
    model = recipe.model
    return BuildContext(
        dim=model.dim,
        vocabulary=recipe.data.tokenizer.vocab,
        length=recipe.data.sequence_length,
        layer=0,
        precision=precision,
        init=Init(model.init.std, model.init.output_std, model.init.embedding_std),
        rope=_rope(model.rope),
        norm_eps=model.norm_eps,
        seed=recipe.seed,
        residual=model.residual,
        ropes={name: _rope(section) for name, section in model.ropes.items()},
        roles=declared_roles(recipe),
    )


def _rope(section: RopeSection) -> Rope:
    return Rope(section.theta, section.max_length, section.yarn)


def _model(recipe: Recipe, context: BuildContext) -> LanguageModel:
    precision = context.precision
    embedding_std = context.init.embedding_std
    if embedding_std is None:
        embedding_std = context.init.std
    embedding = Embedding(
        context.vocabulary,
        context.dim,
        std=embedding_std,
        param_dtype=precision.param_dtype("embedding"),
        compute_dtype=precision.compute_dtype("embedding"),
    )
    output: nn.Module
    if recipe.model.tied_embedding:
        output = SharedLinear(embedding, precision.compute_dtype("head"))
    else:
        output = context.linear(context.dim, context.vocabulary, "head")
    kinds = list(_blocks(recipe))

    def make_block(kind: tuple[str, Section, Section], inner: BuildContext) -> Block:
        name, attention, ffn = kind
        recompute = name in recipe.recompute.blocks
        return Block(attention, ffn, replace(inner, block=None), recompute=recompute)

    blocks: list[Block] = []
    for index, kind in enumerate(kinds):
        blocks.append(make_block(kind, replace(context, layer=index)))

    for_heads = replace(context, layer=len(blocks), block=partial(make_block, kinds[-1]))
    heads: dict[str, LossHead] = {}
    for name, section in recipe.model.heads.items():
        heads[name] = for_heads.make(section)
    return LanguageModel(
        embedding=embedding,
        blocks=blocks,
        residual=context.stream("model"),
        norm=RMSNorm(context.dim, context),
        output=output,
        heads=heads,
        max_length=context.rope.max_length,
    )


def _blocks(recipe: Recipe) -> Iterator[tuple[str, Section, Section]]:
    """Yields the name, the attention and the feed-forward section of every block, in order."""
    for name, block in recipe.model.blocks.items():
        for _ in range(block.count):
            yield name, block.attention or recipe.model.attention, block.ffn


@contextmanager
def _float_default() -> Iterator[None]:
    """Makes fp32 the default format of new modules inside this context, whatever the process's default is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def compile_parts(model: LanguageModel, *, sharded: bool = False, **options: Any) -> None:
    """Compiles every block and every loss head with `torch.compile`, in place; parameters keep their names.

    Args:
        model: a model that `build` returned.
        sharded: whether its weights are sharded; the hooks that gather them then stay outside of what is compiled.
        options: options of `torch.compile`.
    """
    for part in [*model.blocks, *model.heads.values()]:
        if isinstance(part, Block) and part.recompute and not part.traceable:
            part.compile_layers(**options)
        elif sharded:
            part.forward = torch.compile(part.forward, **options)
        else:
            part.compile(**options)


def make(section: Section) -> Any:
    """Makes a component that needs nothing but its settings."""
    return section.component(section.config)
