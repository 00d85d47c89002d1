"""The schema of a recipe's `model`: the keys that the core owns."""

import math
from dataclasses import dataclass
from typing import Any

from core.contracts.bounds import at_least, positive
from core.contracts.errors import ConfigError
from core.contracts.schema import Child, child, children, setting

MOST_LAYERS = 10_000
"""Most blocks of a model: each is an object, so a million of them take minutes before anything is checked."""


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
        at_least(self, 1, "factor", "original_length")
        positive(self, "beta_slow", "beta_fast")
        for key in ("mscale", "mscale_all_dim"):
            at_least(self, 0, key)
        if self.beta_fast < self.beta_slow:
            raise ConfigError("beta_fast", f"must be at least beta_slow = {self.beta_slow:g}")


@dataclass(kw_only=True)
class RopeSection:
    """Rotary positions of every attention."""

    theta: float = setting(10000.0, doc="base of the frequencies")
    max_length: int = setting(4096, doc="positions that the table holds")
    yarn: YarnSection | None = setting(None, doc="YaRN, for contexts longer than the training's")

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for a table without positions, or one that is longer than YaRN reaches."""
        positive(self, "theta")
        if self.yarn is not None and self.theta <= 1:
            why = "must be more than 1 with yarn, which counts the rotations of each frequency"
            raise ConfigError("theta", why)
        at_least(self, 1, "max_length")
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
        at_least(self, 0, "std", "output_std", "embedding_std")


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
        at_least(self, 0, "count")


RESERVED_HEAD_NAMES = frozenset(
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
        at_least(self, 1, "dim")
        positive(self, "norm_eps")
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
            if name in RESERVED_HEAD_NAMES:
                why = "torch's modules or our logs use this name"
                raise ConfigError("heads", f"{name!r} cannot name a head: {why}; choose another")
            if not name.isidentifier() or name.startswith("_"):
                allowed = "use letters, digits and _, and begin with a letter"
                raise ConfigError("heads", f"{name!r} cannot name a head: {allowed}")
