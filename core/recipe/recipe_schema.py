"""The schema of a recipe: the keys that the core owns. Every section with a `name` belongs to a plugin."""

import math
from dataclasses import dataclass
from typing import Any

from core.contracts.errors import ConfigError
from core.contracts.schedule import Schedule, Scheduled, check_scheduled
from core.contracts.schema import Child, Section, child, children, sections_in, setting
from core.recipe.trainer_keys import check_trainer_values

LONGEST = 2**53
"""Most steps or tokens of a run."""

MOST_MICRO_BATCHES = 1_000_000
"""Most micro-batches of a step."""

MOST_LAYERS = 10_000
"""Most blocks of a model: each is an object, so a million of them take minutes before anything is checked."""


def _at_least(config: Any, low: int, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        if value is None or low <= value < math.inf:
            continue
        if value == math.inf:
            raise ConfigError(key, "must be finite")
        raise ConfigError(key, f"must be at least {low}")


def _positive(config: Any, *keys: str) -> None:
    for key in keys:
        if not 0 < getattr(config, key) < math.inf:
            raise ConfigError(key, "must be more than 0")


@dataclass(kw_only=True)
class YarnSection:
    """YaRN, which lengthens the context of a model trained on shorter ones (report, section 4.3)."""

    factor: float = setting(doc="how many times longer the context gets")
    original_length: int = setting(4096, doc="positions the model was trained on without it")
    beta_fast: float = setting(32.0, doc="rotations above which a frequency is kept")
    beta_slow: float = setting(
        1.0, doc="rotations below which a frequency is divided by the factor"
    )
    mscale: float | None = setting(
        1.0, doc="temperature coefficient of the rotated part; null: none"
    )
    mscale_all_dim: float | None = setting(
        1.0, doc="temperature coefficient of the softmax scale, squared; null: none"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for values from which no table can be computed."""
        _at_least(self, 1, "factor", "original_length")
        _positive(self, "beta_slow", "beta_fast")
        for key in ("mscale", "mscale_all_dim"):
            _at_least(self, 0, key)
        if not self.beta_fast > self.beta_slow:
            raise ConfigError("beta_fast", f"must be more than beta_slow = {self.beta_slow:g}")


@dataclass(kw_only=True)
class RopeSection:
    """Rotary positions of every attention."""

    theta: float = setting(10000.0, doc="base of the frequencies")
    max_length: int = setting(4096, doc="positions that the table holds")
    yarn: YarnSection | None = setting(None, doc="YaRN, for contexts longer than the training's")

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for a table without positions, or one that is longer than YaRN reaches."""
        _positive(self, "theta")
        if self.yarn is not None and self.theta <= 1:
            why = "must be more than 1 with yarn, which counts the rotations of each frequency"
            raise ConfigError("theta", why)
        _at_least(self, 1, "max_length")
        reach = self.yarn.factor * self.yarn.original_length if self.yarn else math.inf
        if self.max_length > reach:
            raise ConfigError("max_length", f"must be at most {reach:.10g}, as far as yarn reaches")


@dataclass(kw_only=True)
class InitSection:
    """The initial weights, drawn from a normal distribution per (seed, parameter name, expert)."""

    std: float = setting(0.006, doc="standard deviation of every matrix (report, section 4.2)")
    output_std: float | None = setting(
        None, doc="standard deviation of matrices that write into the residual stream; null: std"
    )
    embedding_std: float | None = setting(
        None, doc="standard deviation of the embedding; null: std"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for a negative deviation."""
        _at_least(self, 0, "std", "output_std", "embedding_std")


@dataclass(kw_only=True)
class BlockSection:
    """A number of blocks of one kind."""

    count: int = setting(doc="how many")
    ffn: Child = child("ffn", doc="the feed-forward layer of these blocks")
    attention: Child = child(
        "attention", None, outer=True, doc="their attention; null: the model's"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for a negative count."""
        _at_least(self, 0, "count")


TAKEN = frozenset(
    [
        "attention",
        "ffn",
        "T_destination",
        "add_module",
        "apply",
        "bfloat16",
        "buffers",
        "call_super_init",
        "children",
        "clear",
        "compile",
        "cpu",
        "cuda",
        "double",
        "dump_patches",
        "eval",
        "extra_repr",
        "float",
        "forward",
        "get_buffer",
        "get_extra_state",
        "get_parameter",
        "get_submodule",
        "half",
        "ipu",
        "items",
        "keys",
        "load_state_dict",
        "modules",
        "mtia",
        "named_buffers",
        "named_children",
        "named_modules",
        "named_parameters",
        "parameters",
        "pop",
        "register_backward_hook",
        "register_buffer",
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
        "register_load_state_dict_post_hook",
        "register_load_state_dict_pre_hook",
        "register_module",
        "register_parameter",
        "register_state_dict_post_hook",
        "register_state_dict_pre_hook",
        "requires_grad_",
        "set_extra_state",
        "set_submodule",
        "share_memory",
        "state_dict",
        "to",
        "to_empty",
        "train",
        "training",
        "type",
        "update",
        "values",
        "xpu",
        "zero_grad",
    ]
)
"""Names that a head cannot have: attributes of torch's ModuleDict, and names under which layers' metrics are logged."""


@dataclass(kw_only=True)
class ModelSection:
    """The model."""

    dim: int = setting(doc="width of the residual stream")
    attention: Child = child(
        "attention", doc="the attention of every block that does not name its own"
    )
    blocks: dict[str, BlockSection] = setting(doc="the blocks, in order, by a name of your choice")
    residual: Child = child(
        "residual", {"name": "add"}, doc="how layers read and write what flows between blocks"
    )
    heads: Child = children(
        "loss_head", "mapping", {"next_token": {"name": "next_token"}}, doc="what is predicted"
    )
    rope: RopeSection = setting({}, doc="rotary positions")
    ropes: dict[str, RopeSection] = setting(
        {}, doc="further rotary positions, by a name that a layer can use"
    )
    init: InitSection = setting({}, doc="initial weights")
    norm_eps: float = setting(1e-6, doc="epsilon of every RMSNorm")
    tied_embedding: bool = setting(False, doc="the output shares the embedding's weight")

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for a model without blocks or without width."""
        _at_least(self, 1, "dim")
        _positive(self, "norm_eps")
        layers = sum(block.count for block in self.blocks.values())
        if layers < 1:
            raise ConfigError("blocks", "must hold at least one block")
        if layers > MOST_LAYERS:
            raise ConfigError(
                "blocks", f"holds {layers} blocks, and at most {MOST_LAYERS} are built"
            )
        if not self.heads:
            raise ConfigError("heads", "must hold at least one loss head")
        for name in self.heads:
            if name in TAKEN:
                why = "torch's modules or our logs use this name"
                raise ConfigError("heads", f"{name!r} cannot name a head: {why}; choose another")
            if not name.isidentifier() or name.startswith("_"):
                allowed = "use letters, digits and _, and begin with a letter"
                raise ConfigError("heads", f"{name!r} cannot name a head: {allowed}")


@dataclass(kw_only=True)
class TokenizerSection:
    """The byte-level BPE tokenizer, trained on the corpus's training split."""

    vocab: int = setting(doc="entries, the end-of-text marker included")

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for no entry; a vocabulary that is trained needs 257, which training checks."""
        _at_least(self, 1, "vocab")


@dataclass(kw_only=True)
class DataSection:
    """The data that is read."""

    corpus: Child = child("corpus", {"name": "package_text"}, doc="where text comes from")
    tokenizer: TokenizerSection = setting(doc="how text is split into tokens")
    sequence_length: int = setting(doc="tokens in a training sequence")
    mask_documents: bool = setting(
        False, doc="keep attention and predictions inside documents (DeepSeek: false)"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for an empty sequence."""
        _at_least(self, 1, "sequence_length")


@dataclass(kw_only=True)
class BatchSection:
    """The data of one optimizer step: `accumulate` micro-batches of `sequences`."""

    sequences: int = setting(doc="sequences in a micro-batch, over all data ranks together")
    accumulate: Scheduled = setting(1, doc="micro-batches per step; a schedule makes a batch ramp")

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for an empty or fractional batch."""
        _at_least(self, 1, "sequences")
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
        _at_least(self, 1, *given)


@dataclass(kw_only=True)
class CheckpointSection:
    """The intervals at which checkpoints are saved, and how many are kept."""

    every_steps: int = setting(100, doc="optimizer steps between checkpoints")
    keep: int = setting(2, doc="how many of the latest to keep, beside the best")

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` below 1."""
        _at_least(self, 1, "every_steps", "keep")


@dataclass(kw_only=True)
class ValidationSection:
    """The intervals at which the run validates; the whole validation split is always read at the end."""

    every_steps: int | None = setting(
        None, doc="optimizer steps between validations; null: at the end only"
    )
    sequences: int = setting(16, doc="sequences in a validation batch")

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` below 1."""
        _at_least(self, 1, "every_steps", "sequences")


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
    plugins: list[str] = setting([], doc="modules to load beyond the installed plugins")
    model: ModelSection = setting(doc="the model")
    precision: Child = child("precision", {"name": "fp32"}, doc="number formats")
    data: DataSection = setting(doc="corpus, tokenizer and sequence length")
    optimizer: Child = child("optimizer", doc="how weights are updated")
    batch: BatchSection = setting(doc="what one step reads")
    budget: BudgetSection = setting(doc="how long the run is")
    gradient_clip: float | None = setting(1.0, doc="largest global gradient norm; null: none")
    max_skipped_steps: int = setting(
        5, doc="consecutive steps with a non-finite gradient before the run stops"
    )
    checkpoint: CheckpointSection = setting({}, doc="when to save")
    validation: ValidationSection = setting({}, doc="when to validate")
    recompute: RecomputeSection = setting({}, doc="activation recomputation")
    compile: bool = setting(False, doc="compile every block and loss head with torch.compile")
    strategy: Child = child(
        "strategy", {"name": "single"}, doc="the devices, and how they share the work"
    )
    callbacks: Child = children("callback", "list", doc="further Lightning callbacks")
    loggers: Child = children(
        "logger", "list", [{"name": "csv"}, {"name": "tensorboard"}], doc="where metrics go"
    )
    initial_weights: str | None = setting(None, doc="a run or checkpoint to take the weights from")
    trainer: dict[str, Any] = setting({}, doc="passed to lightning.Trainer")
    smoke: dict[str, Any] = setting({}, doc="overrides for tests and smoke runs")

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for keys of different sections that contradict each other."""
        _at_least(self, 0, "seed")
        _at_least(self, 1, "max_skipped_steps")
        check_trainer_values(self.trainer)
        if self.gradient_clip is not None and not 0 < self.gradient_clip < math.inf:
            raise ConfigError("gradient_clip", "must be more than 0, or null for no clipping")
        if self.data.sequence_length > self.model.rope.max_length:
            allowed = f"must be at most model.rope.max_length = {self.model.rope.max_length}"
            raise ConfigError("data.sequence_length", allowed)
        for name in self.recompute.blocks:
            if name not in self.model.blocks:
                why = f"must name blocks of the model: {', '.join(self.model.blocks)}"
                raise ConfigError("recompute.blocks", why)
        ramp = self.batch.accumulate
        if isinstance(ramp, Schedule) and ramp.unit == "fraction" and self.budget.steps is not None:
            why = "must be tokens or steps if the run's length is given in steps (budget.steps)"
            raise ConfigError("batch.accumulate.unit", why)

    def check_components(self) -> None:
        """Raises `ConfigError` if the precision cannot run with recomputation or on the strategy's devices."""
        able = self.precision.component.capabilities_of(self.precision.config)
        if "remembers_products" in able and self.recompute.blocks:
            name = self.precision.name
            why = (
                f"must be empty under precision {name}: as it is set, a recomputed product differs"
            )
            raise ConfigError("recompute.blocks", why)
        if self.strategy.component.shards and self.optimizer.component.needs_whole_matrices:
            why = f"{self.strategy.name} divides the weights, and optimizer {self.optimizer.name} needs whole matrices"
            raise ConfigError("strategy.name", why)
        if "gpu_only" in able and getattr(self.strategy.config, "accelerator", None) == "cpu":
            why = f"must not be cpu under precision {self.precision.name}"
            raise ConfigError("strategy.accelerator", why)

    def sections(self) -> list[Section]:
        """Returns every component section of the recipe, children included, in the recipe's order."""
        return list(sections_in(self))

    def notices(self) -> list[str]:
        """Returns the caveats of the recipe's components, each once: what readers of its results must know."""
        caveats = [section.component.caveat for section in self.sections()]
        return list(dict.fromkeys(caveat for caveat in caveats if caveat))
