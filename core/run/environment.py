"""Checks of a recipe against the model that it describes and against this machine, before a run begins."""

import os

import torch
from torch import nn

from core.analysis.describe import unmet_requirements
from core.assemble import build, make
from core.contracts.errors import ConfigError, UserError
from core.contracts.strategy import StrategyFactory
from core.contracts.training import OptimizerFactory
from core.data.mixed_tokens import holds_tokens
from core.data.tokenizer import SMALLEST, Tokenizer
from core.data.with_tokenizer import with_tokenizer
from core.model.language_model import LanguageModel
from core.model.parameters import named_parameters
from core.recipe.compose import Recipe
from core.recipe.values import show_value
from core.run.data import fill_in_the_middle, tokenizer_of
from core.training.captured import why_not_captured
from core.training.early_checks import check_corpus


def check_environment(recipe: Recipe) -> None:
    """Raises `UserError` for shapes that a part of the model cannot take, and for components that cannot run here."""
    check_corpus(recipe)
    try:
        model = build(recipe, device="meta")
    except UserError as error:
        raise UserError(f"{recipe.source}: {error}") from error
    _check_vocabulary(recipe)
    _check_strategy(recipe, model)
    _check_optimizer(recipe, model)
    _check_memory(recipe, model)
    _check_capture(recipe, model)
    found = unmet_requirements(recipe)
    if found:
        raise UserError(f"{recipe.source}: cannot run here: {'; '.join(found)}")


def _check_vocabulary(recipe: Recipe) -> None:
    """Raises `UserError` for a vocabulary that no tokenizer of this program can have, where one is to be trained.

    A tokenizer from a file is read, so that one that is missing or too large is reported before the work starts; also
    token ids that `data.fim` would have to rearrange.
    """
    corpora = [make(section) for section in (recipe.data.corpus, recipe.data.validation) if section]
    tokenizer = None if recipe.data.tokenizer.file is None else tokenizer_of(recipe)
    for corpus in corpora:
        try:
            with_tokenizer(corpus, tokenizer)
        except UserError as error:
            raise UserError(f"{recipe.source}: {error}") from error
    _check_fill_in_the_middle(recipe, tokenizer)
    if tokenizer is not None:
        return
    vocab = recipe.data.tokenizer.vocab
    if vocab < SMALLEST and not holds_tokens(corpora[0]):
        allowed = f"must be at least {SMALLEST}, as the corpus is text: 256 bytes and the marker"
        raise UserError(f"{recipe.source}: data.tokenizer.vocab = {vocab}: {allowed}")


def _check_fill_in_the_middle(recipe: Recipe, tokenizer: Tokenizer | None) -> None:
    """Raises `UserError` where `data.fim` has no text to rearrange, or the tokenizer none of its markers."""
    fim = fill_in_the_middle(recipe)
    if fim is None:
        return
    try:
        if holds_tokens(make(recipe.data.corpus)):
            fim.ids(None)
        if tokenizer is None:
            fim.trained_vocabulary(recipe.data.tokenizer.vocab)
        else:
            fim.ids(tokenizer)
            if tokenizer.ending is not None:
                why = "the tokenizer has a marker after every document beside the one before it"
                raise UserError(f"data.fim: must be null: {why}")
    except UserError as error:
        raise UserError(f"{recipe.source}: {error}") from error


def _check_strategy(recipe: Recipe, model: LanguageModel) -> None:
    """Raises `UserError` for a model that the strategy cannot divide."""
    strategy: StrategyFactory = make(recipe.strategy)
    try:
        strategy.check_model(model)
    except ConfigError as error:
        value = show_value(getattr(recipe.strategy.config, error.key, recipe.strategy.name))
        raise UserError(f"{recipe.source}: strategy.{error.key} = {value}: {error.why}") from error


def _check_optimizer(recipe: Recipe, model: LanguageModel) -> None:
    """Raises `UserError` for settings of the optimizer that do not suit the model's weights."""
    optimizer: OptimizerFactory = make(recipe.optimizer)
    try:
        optimizer.check_parameters(named_parameters(model))
    except ConfigError as error:
        raise UserError(f"{recipe.source}: optimizer.{error.key}: {error.why}") from error


def _check_capture(recipe: Recipe, model: LanguageModel) -> None:
    """Raises `UserError` where `cuda_graph` asks for what this machine or this model cannot do."""
    if not recipe.cuda_graph:
        return
    why = why_not_captured(model)
    if not torch.cuda.is_available() or getattr(recipe.strategy.config, "accelerator", "") == "cpu":
        why = "the run is on a CPU, and CUDA graphs need a GPU"
    if why:
        raise UserError(f"{recipe.source}: cuda_graph = true: {why}")


def _check_memory(recipe: Recipe, model: nn.Module) -> None:
    """Raises `UserError` for a model whose weights alone are larger than this machine's memory."""
    needed = sum(tensor.nbytes for tensor in model.state_dict().values() if torch.is_tensor(tensor))
    strategy = recipe.strategy.component
    if strategy.shards:
        needed //= strategy.nodes_of(recipe.strategy.config)
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > held:
        sizes = f"{needed / 1e9:.3g} GB, and this machine has {held / 1e9:.3g} GB of memory"
        raise UserError(f"{recipe.source}: model: its weights need {sizes}")
