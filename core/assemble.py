"""Builds what a validated recipe describes: the model, and the components that need nothing but their settings."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts.build import BuildContext, Init, Rope
from core.contracts.loss_head import LossHead
from core.contracts.precision import Precision, declared_roles
from core.contracts.schema import Section
from core.model.block import Block
from core.model.initialise import initialise
from core.model.language_model import Embedding, LanguageModel
from core.model.norm import RMSNorm
from core.recipe.compose import Recipe


class TiedOutput(nn.Module):
    """The output that shares the embedding's weight, which only the embedding owns."""

    def __init__(self, embedding: Embedding, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self._embedding, self.compute_dtype = [embedding], compute_dtype

    @property
    def weight(self) -> Tensor:
        """[vocabulary, dim]."""
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        return F.linear(x.to(self.compute_dtype), self.weight.to(self.compute_dtype))


def build(
    recipe: Recipe,
    *,
    device: str = "cpu",
    precision: Precision | None = None,
    token_counts: Callable[[], Tensor] | None = None,
    parallelize: Callable[[LanguageModel], None] | None = None,
) -> LanguageModel:
    """The recipe's model with its initial weights; on the meta device without any.

    Args:
        recipe: from `core.compose`.
        device: "meta" builds shapes only.
        precision: who makes the matrix products; None: the recipe's.
        token_counts: how often each token stands in the training data, int64 V; asked only by parts that are made
            from it.
        parallelize: shards the weights of the model, which is built on the meta device first; each rank then draws
            the weights that it owns.
    """
    context = replace(_context(recipe, precision or make(recipe.precision)), token_counts=token_counts)
    with torch.device("meta" if parallelize else device), _float_default():
        model = _model(recipe, context)
    if parallelize is not None:
        parallelize(model)
        model.to_empty(device=device)
    if device != "meta":
        initialise(model, recipe.seed)
    return model


def _context(recipe: Recipe, precision: Precision) -> BuildContext:
    model = recipe.model
    return BuildContext(
        dim=model.dim,
        vocabulary=recipe.data.tokenizer.vocab,
        length=recipe.data.sequence_length,
        layer=0,
        precision=precision,
        init=Init(model.init.std, model.init.output_std, model.init.embedding_std),
        rope=Rope(model.rope.theta, model.rope.max_length, model.rope.yarn),
        norm_eps=model.norm_eps,
        seed=recipe.seed,
        residual=model.residual,
        ropes={name: Rope(rope.theta, rope.max_length, rope.yarn) for name, rope in model.ropes.items()},
        roles=declared_roles(recipe),
    )


def _model(recipe: Recipe, context: BuildContext) -> LanguageModel:
    precision = context.precision
    embedding_std = context.init.std if context.init.embedding_std is None else context.init.embedding_std
    embedding = Embedding(
        context.vocabulary,
        context.dim,
        std=embedding_std,
        param_dtype=precision.param_dtype("embedding"),
        compute_dtype=precision.compute_dtype("embedding"),
    )
    output: nn.Module
    if recipe.model.tied_embedding:
        output = TiedOutput(embedding, precision.compute_dtype("head"))
    else:
        output = context.linear(context.dim, context.vocabulary, "head")
    kinds = list(_blocks(recipe))

    def make_block(kind: tuple[str, Section, Section], inner: BuildContext) -> Block:
        name, attention, ffn = kind
        return Block(attention, ffn, replace(inner, block=None), recompute=name in recipe.recompute.blocks)

    blocks = [make_block(kind, replace(context, layer=index)) for index, kind in enumerate(kinds)]

    for_heads = replace(context, layer=len(blocks), block=partial(make_block, kinds[-1]))
    heads: dict[str, LossHead] = {name: for_heads.make(section) for name, section in recipe.model.heads.items()}
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
    """Name, attention and feed-forward of every block, in order."""
    for name, block in recipe.model.blocks.items():
        for _ in range(block.count):
            yield name, block.attention or recipe.model.attention, block.ffn


@contextmanager
def _float_default() -> Iterator[None]:
    """Modules that name no format are made in fp32, whatever the process's default is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def compile_parts(model: LanguageModel, **options: Any) -> None:
    """`torch.compile` every block and every loss head, in place; parameters keep their names.

    Args:
        model: from `build`.
        options: of `torch.compile`.
    """
    for part in [*model.blocks, *model.heads.values()]:
        part.compile(**options)


def make(section: Section) -> Any:
    """A component that needs nothing but its settings."""
    return section.component(section.config)
