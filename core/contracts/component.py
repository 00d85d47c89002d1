"""What every component has, whichever slot it fills."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Costs:
    """What a component costs for one token, in a sequence of the build context's length.

    Args:
        active: parameters that one token uses (routed experts count top_k of all).
        attention_flops: forward FLOPs per token that belong to no parameter: attention's scores and weighted
            sums, causal (half of the square), 2 FLOPs a multiply-add.
        cache: elements that decoding keeps per token.
        other_flops: further forward FLOPs per token that belong to no parameter and to no pair of tokens, or to a
            parameter that is used more than once.
    """

    active: int = 0
    attention_flops: float = 0.0
    cache: int = 0
    other_flops: float = 0.0

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(
            self.active + other.active,
            self.attention_flops + other.attention_flops,
            self.cache + other.cache,
            self.other_flops + other.other_flops,
        )


@dataclass(frozen=True)
class Environment:
    """The machine that a run would use.

    `fit`, `sweep` and `evaluate --device cuda` end with an error if a component cannot run on it.

    Args:
        device: the kind of device, `cpu` or `cuda`.
        capability: the GPU's compute capability; None without a GPU.
        cuda: the CUDA version that torch was built for; None without it.
    """

    device: str
    capability: tuple[int, int] | None = None
    cuda: str | None = None


class Component:
    """The base class of every component, whichever slot it fills.

    Class attributes:
        Config: the schema of the component's recipe section, a keyword-only dataclass (`core.contracts.schema`). Its
            optional `check(parent)` raises `ConfigError` for values that cannot be right; `parent` is the `Config` of
            the section around it, or the recipe's own section. `check` must not need torch. A key that depends on the
            rest of the model (the `BuildContext`) is checked by the constructor, which raises `ConfigError` as well.
        capabilities: words that other components may require, so that impossible combinations are found although
            no component knows another one's name.
        example: a section that the catalog prints and the conformance kit builds.
        paper: where the method is published.
        caveat: one sentence that everybody who reads this component's results must know: the catalog, `describe` and
            the start of a run print it, and every summary keeps it. Empty: none.
        rejected_keys: keys that its section cannot have although other components of the slot do, each with the
            reason, which the error message gives.
        traceable: False where torch.compile cannot trace the forward as one graph; the graph then breaks there.
        roles: the roles of its matrix products that are not among the usual ones (`core.contracts.precision.ROLES`),
            each with what it is for. Recipes can then name them, and reports list them. A component built from
            `example` has a product of each.
        weight_roles: the roles of its weights that are in no product of the precision's, each with what it is for.
            Optimizers' settings can name them.
        label: the name in the recipe's section, set on each instance; logs use it.
    """

    Config: ClassVar[type]
    capabilities: ClassVar[frozenset[str]] = frozenset()
    example: ClassVar[dict[str, Any]] = {}
    paper: ClassVar[str] = ""
    caveat: ClassVar[str] = ""
    rejected_keys: ClassVar[Mapping[str, str]] = {}
    traceable: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, str]] = {}
    weight_roles: ClassVar[Mapping[str, str]] = {}
    label: str = ""

    @classmethod
    def capabilities_of(cls, config: Any) -> frozenset[str]:
        """The capabilities under these settings; by default the class's own."""
        return cls.capabilities

    @classmethod
    def traceable_of(cls, config: Any) -> bool:
        """Whether the forward can be traced as one graph under these settings; by default `traceable`."""
        return cls.traceable

    @classmethod
    def requires(cls, config: Any, environment: Environment) -> str | None:
        """Returns why this component cannot run in `environment`, as one sentence; None if it can."""
        return None
