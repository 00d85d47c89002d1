"""The model that a run trains: built for its strategy, whole or divided over ranks, with the weights it starts from."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from core.assemble import build, compile_parts, shard
from core.contracts.strategy import StrategyFactory
from core.data.module import TextData
from core.model.language_model import LanguageModel
from core.recipe.compose import Recipe
from core.recipe.trust import check_run_links
from core.run.loading import added_to, check_weights, load_weights
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
        self.source: Path | None = None
        self.added: set[str] = set()
        device = "cpu"
        dispatcher = None
        if strategy.shards:
            device = "meta"
            dispatcher = getattr(strategy.config, "dispatcher", None)
        self.model: LanguageModel = build(
            recipe, device=device, token_counts=data.token_counts, dispatcher=dispatcher
        )

    def load_initial_weights(self, say: Callable[[str], None], *, trust: bool) -> None:
        """Loads the weights that the recipe starts from, or checks them if they are loaded when the model is divided.

        Args:
            say: prints a note if they were trained with another tokenizer.
            trust: whether links may lead out of the folder of their run.

        Raises:
            UserError: the checkpoint does not fit, or a link leads out of its folder.
        """
        source = newest_checkpoint(Path(str(self.recipe.initial_weights)))
        source_recipe = RunFolder(source.parent.parent).recipe
        if source_recipe.exists() and not trust:
            check_run_links(source_recipe)
        self.added = added_to(self.model, source)
        if self.strategy.shards:
            check_weights(self.model, source, self.added)
            self.source = source
        else:
            load_weights(self.model, source, added=self.added)
        own = self.model.state_dict()
        new = [name for name in own if name in self.added]
        if new:
            say(
                f"note: {source} lacks {len(new)} tensors that this model adds, which are drawn: {new[0]}, ..."
            )
        _warn_other_tokenizer(source, self.data, say)

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
        if self.source is not None:
            parts = dict(weight_shards(self.model, self.strategy.expert_group(mesh)))
            load_weights(self.model, self.source, parts, added=self.added)
        if self.recipe.compile:
            compile_parts(self.model, sharded=True)


def _warn_other_tokenizer(source: Path, data: TextData, say: Callable[[str], None]) -> None:
    """Warns if the initial weights were trained with another tokenizer, whose ids mean other text."""
    run = RunFolder(source.parent.parent)
    if data.tokenizer is None or not run.tokenizer.is_file():
        return
    if run.load_tokenizer().entries() != data.tokenizer.entries():
        say(
            f"note: {run.tokenizer} is another tokenizer than this run's, so its weights have to learn the tokens anew"
        )
