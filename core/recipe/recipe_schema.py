"""The schema of a recipe: the keys that the core owns. Every section with a `name` belongs to a plugin."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from core.contracts.bounds import at_least
from core.contracts.errors import ConfigError
from core.contracts.name_patterns import check_patterns
from core.contracts.schedule import Schedule, Scheduled, check_scheduled
from core.contracts.schema import Child, Section, child, children, sections_in, setting
from core.recipe.model_schema import ModelSection
from core.recipe.selection import Selection
from core.recipe.trainer_keys import check_trainer_values

LONGEST = 2**53
"""Most steps or tokens of a run."""

MOST_MICRO_BATCHES = 1_000_000
"""Most micro-batches of a step."""

LONGEST_SPIKE_WINDOW = 100_000
"""Most gradient norms that are kept: every checkpoint holds them."""


@dataclass(kw_only=True)
class TokenizerSection:
    """The tokenizer: a byte-level BPE that is trained on the corpus's training split, or one from a file."""

    vocab: int = setting(
        doc="entries, the end-of-text marker included; with `file` it may be left out: as many as it has"
    )
    file: str | None = setting(
        None,
        doc="a tokenizer.json, a Hugging Face folder, a run or a tiktoken file, relative to the recipe; "
        "null: one is trained",
    )
    pattern: str | None = setting(
        None, doc="the regular expression that cuts text, for a tiktoken file"
    )
    begin: str | None = setting(
        None, doc="the entry before every document; null: the file's, or `end` where it has none"
    )
    end: str | None = setting(None, doc="the entry that ends a document; null: the file's")
    pad_to_multiple_of: int = setting(
        1, doc="`vocab` is rounded up to a multiple of this; the model has rows that no text uses"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for no entry; a vocabulary that is trained needs 257, which training checks."""
        at_least(self, 1, "vocab", "pad_to_multiple_of")
        if self.file is None:
            for key in ("pattern", "begin", "end"):
                if getattr(self, key) is not None:
                    raise ConfigError(key, "must be null without data.tokenizer.file")
            if self.pad_to_multiple_of != 1:
                why = "must be 1 without data.tokenizer.file: vocab itself says how many entries"
                raise ConfigError("pad_to_multiple_of", why)
        elif self.vocab % self.pad_to_multiple_of:
            why = f"must divide data.tokenizer.vocab = {self.vocab}; leave vocab out to round it up"
            raise ConfigError("pad_to_multiple_of", why)


@dataclass(kw_only=True)
class FimSection:
    """Fill-in-the-middle: training documents that read prefix, suffix, middle (DeepSeek-V3 report, section 4.1)."""

    rate: float = setting(0.1, doc="the share of training documents that is rearranged")
    tokens: list[str] = setting(
        ["<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"],
        doc="the markers before prefix, suffix and middle; a trained tokenizer gets them as its last entries",
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for a rate that is no share, and for markers that are not three different texts."""
        if not 0 < self.rate <= 1:
            raise ConfigError("rate", "must be more than 0 and at most 1")
        if len(self.tokens) != 3 or len(set(self.tokens)) != 3 or not all(self.tokens):
            raise ConfigError("tokens", "must be three different texts, none of them empty")


@dataclass(kw_only=True)
class DataSection:
    """The data that is read."""

    corpus: Child = child(
        "corpus",
        {"name": "package_text"},
        optional=True,
        doc="where text comes from; null, as in a converted run: to be given before the model is trained",
    )
    validation: Child = child(
        "corpus", None, doc="a corpus of its own to validate on; null: a part of `corpus`"
    )
    validation_fraction: float | None = setting(
        None,
        doc="the part of the documents that is held out, or of every document where there are too "
        "few; null: every twentieth, by name",
    )
    tokenizer: TokenizerSection = setting(doc="how text is split into tokens")
    sequence_length: int = setting(doc="tokens in a training sequence")
    fim: FimSection | None = setting(
        None, doc="rearrange some training documents to fill in their middle; null: none"
    )
    packing: Literal["stream", "best_fit"] = setting(
        "stream",
        doc="stream: sequences are cut out of all documents in a row; best_fit: of whole documents",
    )
    mask_documents: bool = setting(
        False, doc="keep attention and predictions inside documents (DeepSeek: false)"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for an empty sequence, or a fraction that leaves nothing on one side."""
        at_least(self, 1, "sequence_length")
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise ConfigError("validation_fraction", "must be more than 0 and less than 1, or null")


@dataclass(kw_only=True)
class BatchSection:
    """The data of one optimizer step: `accumulate` micro-batches of `sequences`."""

    sequences: int = setting(doc="sequences in a micro-batch, over all data ranks together")
    accumulate: Scheduled = setting(1, doc="micro-batches per step; a schedule makes a batch ramp")

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for an empty or fractional batch."""
        at_least(self, 1, "sequences")
        if isinstance(self.accumulate, Schedule) and self.accumulate.wsd is not None:
            raise ConfigError("accumulate.wsd", "a batch ramp has start and segments instead")
        check_scheduled(self.accumulate, "accumulate", low=1, high=MOST_MICRO_BATCHES)
        if not isinstance(self.accumulate, Schedule) and self.accumulate != int(self.accumulate):
            raise ConfigError("accumulate", "must be a whole number")


@dataclass(kw_only=True)
class BudgetSection:
    """The length of a run: exactly one of these keys is given."""

    steps: int | None = setting(None, doc="optimizer steps")
    tokens: int | None = setting(None, doc="training tokens")
    flops: float | None = setting(
        None, doc="training FLOPs, by the convention that `describe` names"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` unless one budget is given."""
        for key in ("steps", "tokens"):
            value = getattr(self, key)
            if value is not None and value > LONGEST:
                raise ConfigError(key, f"must be at most {LONGEST}")
        given = [key for key in ("steps", "tokens", "flops") if getattr(self, key) is not None]
        if len(given) != 1:
            key = "steps"
            why = "exactly one of steps, tokens, flops must be given"
            if given:
                key = given[-1]
                why = f"{why}, and {' and '.join(given)} are; set the others to null"
            raise ConfigError(key, why)
        at_least(self, 1, *given)


@dataclass(kw_only=True)
class CheckpointSection:
    """The intervals at which checkpoints are saved, and how many are kept."""

    every_steps: int | None = setting(
        100, doc="optimizer steps between checkpoints; null: none is saved, also at the end"
    )
    keep: int = setting(2, doc="how many of the latest to keep, beside the best")
    keep_every_steps: int | None = setting(
        None, doc="keep for good the checkpoint of every so many steps too; null: none"
    )
    sharded: bool | None = setting(
        None, doc="each rank writes its own parts of the weights; null: if the strategy shards them"
    )
    asynchronous: bool = setting(
        False, doc="train on while a sharded checkpoint is written from a copy in the CPU's memory"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` below 1, and for steps that are kept and never saved."""
        at_least(self, 1, "every_steps", "keep", "keep_every_steps")
        if self.keep_every_steps is None:
            return
        if self.every_steps is None:
            why = "must be null where checkpoint.every_steps is, because nothing is saved"
            raise ConfigError("keep_every_steps", why)
        if self.keep_every_steps % self.every_steps:
            why = f"must be a multiple of checkpoint.every_steps = {self.every_steps}"
            raise ConfigError("keep_every_steps", why)


@dataclass(kw_only=True)
class SpikeSection:
    """The gradient norms at which a step is skipped, beside those that are not finite."""

    factor: float = setting(
        doc="skip a step whose norm is more than this many times that of the steps before"
    )
    window: int = setting(
        128, doc="applied steps before it that count; the first so many are never skipped"
    )
    statistic: Literal["median", "mean"] = setting(
        "median", doc="what of their norms is taken: the median or the mean"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for a factor that would skip usual steps, and for a window that is empty or huge."""
        if not 1 < self.factor < math.inf:
            raise ConfigError("factor", "must be more than 1 and finite")
        at_least(self, 1, "window")
        if self.window > LONGEST_SPIKE_WINDOW:
            raise ConfigError("window", f"must be at most {LONGEST_SPIKE_WINDOW}")


@dataclass(kw_only=True)
class ValidationSection:
    """The intervals at which the run validates; the whole validation split is always read at the end."""

    every_steps: int | None = setting(
        None, doc="optimizer steps between validations; null: at the end only"
    )
    sequences: int = setting(16, doc="sequences in a validation batch")

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` below 1."""
        at_least(self, 1, "every_steps", "sequences")


@dataclass(kw_only=True)
class RecomputeSection:
    """Activation recomputation, which saves memory and costs one more forward."""

    blocks: list[str] = setting(
        [], doc="names of the blocks that are recomputed in the backward pass"
    )


@dataclass(kw_only=True)
class RecipeSchema:
    """A whole recipe."""

    seed: int = setting(
        0, doc="seed of the initial weights, the data order and every random choice"
    )
    plugins: list[str] = setting(
        [], doc="modules, or files (./my_router.py), to load beyond the installed plugins"
    )
    model: ModelSection = setting(doc="the model")
    precision: Child = child("precision", {"name": "fp32"}, doc="number formats")
    data: DataSection = setting(doc="corpus, tokenizer and sequence length")
    optimizer: Child = child("optimizer", doc="how weights are updated")
    batch: BatchSection = setting(doc="what one step reads")
    budget: BudgetSection = setting(doc="how long the run is")
    gradient_clip: float | None = setting(1.0, doc="largest global gradient norm; null: none")
    max_skipped_steps: int = setting(5, doc="consecutive skipped steps before the run stops")
    skip_spikes: SpikeSection | None = setting(
        None, doc="skip steps whose gradient norm is far above those before; null: none"
    )
    checkpoint: CheckpointSection = setting({}, doc="when to save")
    validation: ValidationSection = setting({}, doc="when to validate")
    recompute: RecomputeSection = setting({}, doc="activation recomputation")
    compile: bool = setting(False, doc="compile every block and loss head with torch.compile")
    cuda_graph: bool = setting(
        False, doc="replay forward and backward of each step as one CUDA graph; needs compile"
    )
    strategy: Child = child(
        "strategy", {"name": "single"}, doc="the devices, and how they share the work"
    )
    callbacks: Child = children("callback", "list", doc="further Lightning callbacks")
    loggers: Child = children(
        "logger", "list", [{"name": "csv"}, {"name": "tensorboard"}], doc="where metrics go"
    )
    initial_weights: str | Selection | None = setting(
        None, doc="a run or checkpoint to take the weights from, or a section that takes a part"
    )
    freeze: list[str] = setting(
        [], doc="patterns of weights that are not trained, and of balancers that are not updated"
    )
    trainer: dict[str, Any] = setting({}, doc="passed to lightning.Trainer")
    smoke: dict[str, Any] = setting({}, doc="overrides for tests and smoke runs")

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for keys of different sections that contradict each other."""
        at_least(self, 0, "seed")
        at_least(self, 1, "max_skipped_steps")
        check_trainer_values(self.trainer)
        check_patterns(self.freeze, "freeze")
        if self.gradient_clip is not None and not 0 < self.gradient_clip < math.inf:
            raise ConfigError("gradient_clip", "must be more than 0, or null for no clipping")
        if self.data.sequence_length > self.model.rope.max_length:
            allowed = f"must be at most model.rope.max_length = {self.model.rope.max_length}"
            raise ConfigError("data.sequence_length", allowed)
        for name in self.recompute.blocks:
            if name not in self.model.blocks:
                why = f"must name blocks of the model: {', '.join(self.model.blocks)}"
                raise ConfigError("recompute.blocks", why)
        if self.cuda_graph and not self.compile:
            raise ConfigError("cuda_graph", "must be false unless compile is true")
        ramp = self.batch.accumulate
        if isinstance(ramp, Schedule) and ramp.unit == "fraction" and self.budget.steps is not None:
            why = "must be tokens or steps if the run's length is given in steps (budget.steps)"
            raise ConfigError("batch.accumulate.unit", why)

    def check_components(self) -> None:
        """Raises `ConfigError` if the precision cannot run with recomputation or on the strategy's devices."""
        if self.data.validation is not None and self.data.validation_fraction is not None:
            why = "must be null where data.validation names a corpus to validate on"
            raise ConfigError("data.validation_fraction", why)
        able = self.precision.component.capabilities_of(self.precision.config)
        if "remembers_products" in able and self.recompute.blocks:
            name = self.precision.name
            why = (
                f"must be empty under precision {name}: as it is set, a recomputed product differs"
            )
            raise ConfigError("recompute.blocks", why)
        needs_whole = self.optimizer.component.needs_whole_of(self.optimizer.config)
        if self.strategy.component.divides_weights_of(self.strategy.config) and needs_whole:
            why = f"{self.strategy.name} divides the weights, and optimizer {self.optimizer.name} needs whole matrices"
            raise ConfigError("strategy.name", why)
        ranks = self.strategy.component.ranks_of(self.strategy.config)
        if self.cuda_graph and (ranks > 1 or self.strategy.component.shards):
            why = f"must be false under strategy {self.strategy.name}: exchanges between ranks are not captured"
            raise ConfigError("cuda_graph", why)
        if "gpu_only" in able and getattr(self.strategy.config, "accelerator", None) == "cpu":
            why = f"must not be cpu under precision {self.precision.name}"
            raise ConfigError("strategy.accelerator", why)
        try:
            self.strategy.component.check_recipe(self.strategy.config, self)
        except ConfigError as error:
            raise ConfigError(f"strategy.{error.key}", error.why) from error
        self._check_checkpoints()
        self._check_averages()

    def _check_averages(self) -> None:
        """Raises `ConfigError` if two callbacks keep averaged weights under one name."""
        known: set[str] = set()
        for section in self.callbacks:
            name = section.component.average
            if name in known:
                raise ConfigError("callbacks", f"two of them keep the average {name}: remove one")
            if name is not None:
                known.add(name)

    @property
    def selection(self) -> Selection | None:
        """What the run takes its initial weights from; None: it draws all of them."""
        given = self.initial_weights
        return Selection(path=given) if isinstance(given, str) else given

    @property
    def shards_checkpoints(self) -> bool:
        """Whether each rank writes its own parts of a checkpoint."""
        shards: bool | None = self.checkpoint.sharded
        return self.strategy.component.saves_shards if shards is None else shards

    def _check_checkpoints(self) -> None:
        """Raises `ConfigError` for what a strategy that leaves weights whole cannot save."""
        name = self.strategy.name
        if self.checkpoint.sharded and not self.strategy.component.saves_shards:
            why = f"must be false or null under strategy {name}, which leaves weights whole"
            if self.strategy.component.shards:
                why = f"must be false or null under strategy {name}, which writes a checkpoint as one file"
            raise ConfigError("checkpoint.sharded", why)
        if self.checkpoint.asynchronous and not self.shards_checkpoints:
            why = "must be false unless checkpoints are sharded (checkpoint.sharded)"
            raise ConfigError("checkpoint.asynchronous", why)

    def sections(self) -> list[Section]:
        """Returns every component section of the recipe, children included, in the recipe's order."""
        return list(sections_in(self))

    def notices(self) -> list[str]:
        """Returns the caveats of the recipe's components, each once: what readers of its results must know."""
        caveats = [section.component.caveat for section in self.sections()]
        return list(dict.fromkeys(caveat for caveat in caveats if caveat))
