"""What every component has, whichever slot it fills."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Costs:
    """What a component costs, for one token of a sequence of the context's length.

    Args:
        active: parameters that one token uses (routed experts count top_k of all).
        mixing: forward FLOPs per token that belong to no parameter: attention's scores and weighted
            sums, causal (half of the square), 2 FLOPs a multiply-add.
        cache: elements that decoding keeps per token.
    """

    active: int = 0
    mixing: float = 0.0
    cache: int = 0

    def __add__(self, other: "Costs") -> "Costs":
        return Costs(self.active + other.active, self.mixing + other.mixing, self.cache + other.cache)


@dataclass(frozen=True)
class Environment:
    """The machine that a run would use.

    `fit`, `sweep` and `evaluate --device cuda` refuse to start where a component cannot run on it.
    """

    device: str
    capability: tuple[int, int] | None = None
    cuda: str | None = None


class Component:
    """The common face of all extension points.

    `Config` is the schema of the component's recipe section; its optional `check(parent)` raises `Wrong`
    for values that cannot be right (`parent` is the `Config` of the section around it, or the recipe's
    own section) and must not need torch. `capabilities` are words that other components may ask for, so
    that impossible combinations are refused without anybody's name being known. `example` is a section
    that the catalog prints and the conformance kit builds. `paper` says where the method is published.
    `label` is the name under which a recipe asked for this instance; logs use it.

    `notice` is what nobody who reads this component's results may overlook, one sentence: the catalog,
    `describe` and the start of a run print it, and every summary keeps it. `refuses` names keys that its
    section cannot have although other components of the slot do, each with the reason, which the user is told.
    `traceable` is False where torch.compile cannot take the forward as one graph; it then breaks there. `roles` names
    and explains the roles of its matrix products that are not among the usual ones (`core.contracts.precision.ROLES`);
    recipes can then name them, and reports list them. A component built from `example` has a product of each.
    """

    Config: ClassVar[type]
    capabilities: ClassVar[frozenset[str]] = frozenset()
    example: ClassVar[dict[str, Any]] = {}
    paper: ClassVar[str] = ""
    notice: ClassVar[str] = ""
    refuses: ClassVar[Mapping[str, str]] = {}
    traceable: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, str]] = {}
    label: str = ""

    @classmethod
    def capabilities_of(cls, config: Any) -> frozenset[str]:
        """The capabilities under these settings; the class's own where they depend on none."""
        return cls.capabilities

    @classmethod
    def traceable_of(cls, config: Any) -> bool:
        """`traceable` under these settings."""
        return cls.traceable

    @classmethod
    def requires(cls, config: Any, environment: Environment) -> str | None:
        """Why this component cannot run in `environment`, as one sentence; None if it can."""
        return None
