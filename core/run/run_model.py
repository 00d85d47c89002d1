"""The model that a run trains: built for its strategy, whole or divided over ranks, with the weights it starts from."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from core.assemble import build, compile_parts, shard
from core.contracts.strategy import StrategyFactory
from core.data.module import TextData
from core.model.language_model import LanguageModel
from core.recipe.compose import Recipe
from core.recipe.selection import Selection
from core.recipe.trust import check_run_links
from core.run.initial_weights import InitialWeights, initial_weights
from core.training.resume import newest_checkpoint
from core.training.run_folder import RunFolder
from core.training.weight_shards import weight_shards

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class RunModel:
    """The model of a run, which may be divided later, when the run's process group exists.

    Args:
        recipe: a validated recipe.
        strategy: the recipe's strategy.
        data: the run's data.

    Attributes:
        model: with initial weights on the CPU, or on the meta device if the strategy divides weights.
    """

    def __init__(self, recipe: Recipe, strategy: StrategyFactory, data: TextData) -> None:
        self.recipe = recipe
        self.strategy = strategy
        self.data = data
        self.taken: InitialWeights | None = None
        device = "cpu"
        dispatcher = None
        if strategy.shards:
            device = "meta"
            dispatcher = strategy.replaced_dispatcher()
        self.model: LanguageModel = build(
            recipe, device=device, token_counts=data.token_counts, dispatcher=dispatcher
        )

    def load_initial_weights(self, say: Callable[[str], None], *, trust: bool) -> InitialWeights:
        """Loads the weights that the recipe starts from; those of a divided model when it is divided.

        Args:
            say: prints what is made, drawn and left out, and whether the weights have another tokenizer.
            trust: whether links may lead out of the folder of their run.

        Returns:
            What was taken.

        Raises:
            UserError: the checkpoint does not fit, or a link leads out of its folder.
        """
        selection = self.recipe.selection
        assert selection is not None
        source = _source_of(selection, trust=trust)
        taken = initial_weights(self.model, source, selection, trust=trust)
        if self.strategy.shards:
            self.taken = taken
        else:
            taken.load(self.model)
        for sentence in taken.sentences:
            say(f"note: {sentence}")
        _warn_other_tokenizer(source, self.data, say)
        return taken

    def compile(self) -> None:
        """Compiles blocks and heads if the recipe says so; of a divided model this is done when it is divided."""
        if self.recipe.compile and not self.strategy.shards:
            compile_parts(self.model)

    @property
    def shard_weights(self) -> "Callable[[DeviceMesh], None] | None":
        """Divides the weights over a mesh; None if the strategy leaves them whole."""
        return self._shard if self.strategy.shards else None

    def _shard(self, mesh: "DeviceMesh") -> None:
        shard(self.model, self.recipe.seed, lambda model: self.strategy.parallelize(model, mesh))
        if self.taken is not None:
            parts = dict(weight_shards(self.model, self.strategy.expert_group(mesh)))
            self.taken.load(self.model, parts)
        if self.recipe.compile:
            compile_parts(self.model, sharded=True)


def _warn_other_tokenizer(source: Path, data: TextData, say: Callable[[str], None]) -> None:
    """Warns if the initial weights were trained with another tokenizer, whose ids mean other text."""
    run = RunFolder(source.parent.parent)
    if data.tokenizer is None:
        return
    if not run.tokenizer.is_file():
        if run.converted_weights.is_file():
            own = (
                "this run has trained one of its own, so the weights have to learn the tokens anew"
            )
            say(f"note: {run.path} has no tokenizer: {own}")
        return
    if run.load_tokenizer().entries() != data.tokenizer.entries():
        say(
            f"note: {run.tokenizer} is another tokenizer than this run's, so its weights have to learn the tokens anew"
        )


def check_selection(recipe: Recipe, selection: Selection, *, trust: bool) -> None:
    """Raises `UserError` if a recipe's model cannot begin with the weights that it names; no number is read."""
    source = _source_of(selection, trust=trust)
    initial_weights(build(recipe, device="meta"), source, selection, trust=trust)


def _source_of(selection: Selection, *, trust: bool) -> Path:
    """The checkpoint that a recipe begins with; raises `UserError` for a link that leads out of its run's folder."""
    source = newest_checkpoint(Path(selection.path))
    recipe = RunFolder(source.parent.parent).recipe
    if recipe.exists() and not trust:
        check_run_links(recipe)
    return source
