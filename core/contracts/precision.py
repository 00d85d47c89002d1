"""The precision slot: the layers that compute matrix products, and the number formats in which they run."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from core.contracts.component import Component
from core.contracts.errors import ConfigError, nearest
from core.contracts.schema import sections_in, setting

ROLES = {
    "embedding": "token ids to vectors, and the format of the residual stream",
    "norm": "the weights of every RMSNorm",
    "router": "affinities of tokens to experts",
    "attention.q": "queries without a latent",
    "attention.q_down": "to the latent of the queries",
    "attention.q_up": "from it to the queries",
    "attention.k": "keys without a latent",
    "attention.v": "values without a latent",
    "attention.kv_down": "to the latent of keys and values, and to the rotated key",
    "attention.kv_up": "from that latent to keys and values",
    "attention.output": "what the heads found, back to the residual stream",
    "ffn.gate_up": "into a dense feed-forward layer",
    "ffn.down": "and out of it",
    "experts.gate_up": "into the routed experts, grouped",
    "experts.down": "and out of them",
    "shared_experts.gate_up": "into the shared experts",
    "shared_experts.down": "and out of them",
    "mtp.projection": "embedding and state of a multi-token module to its block",
    "head": "states to logits",
}
"""The usual roles: what a matrix product is for. A component declares others as its `roles`."""

NEVER_LOW = ("embedding", "norm", "router")
"""Roles that no recipe can make low: two are not products, and the router's contract requires fp32 or wider."""

HIGH = ("embedding", "head", "router", "norm", "mtp.projection")
"""Roles that stay in high precision unless the recipe says otherwise.

The report's section 3.3.1 names embedding, output head, gating and normalisation (attention's own products belong to no
layer); the released weights keep the projection too.
"""


def declared_roles(parent: Any) -> dict[str, str]:
    """Collects the usual roles and those that components of a recipe's model declare, with what each is for.

    Args:
        parent: what a precision's `check` sees: the recipe, or something without a model.
    """
    found = dict(ROLES)
    for section in sections_in(getattr(parent, "model", None)):
        found |= section.component.roles
    return found


def weight_roles(parent: Any) -> dict[str, str]:
    """Collects the roles of all weights: `declared_roles`, and those of weights that no precision computes with.

    Args:
        parent: what an optimizer's `check` sees: the recipe, or something without a model.
    """
    found = declared_roles(parent)
    for section in sections_in(getattr(parent, "model", None)):
        found |= section.component.weight_roles
    return found


def roles_matching(patterns: Iterable[str], known: Iterable[str] = ROLES) -> frozenset[str]:
    """The roles that patterns name: a pattern is a role, or has wildcards as in `attention.*`.

    Args:
        patterns: the patterns of a recipe.
        known: the roles that exist.

    Raises:
        ConfigError: a pattern names no role; the error's key is the pattern's index.
    """
    found: set[str] = set()
    for index, pattern in enumerate(patterns):
        named = {role for role in known if fnmatchcase(role, pattern)}
        if not named:
            allowed = f"{nearest(pattern, known)}; `attention.*` names all that begin so"
            raise ConfigError(str(index), f"is not a role; {allowed}")
        found |= named
    return frozenset(found)


@dataclass(kw_only=True)
class RoleSettings:
    """The keys of a precision in which some roles are low and others high: derive its `Config` from this class."""

    high: list[str] = setting(
        list(HIGH), doc="roles that stay in high precision, as embedding, norm and router always do"
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for an unknown role, and for a low output that would share the embedding's weight."""
        try:
            kept = roles_matching(self.high, declared_roles(parent))
        except ConfigError as error:
            raise ConfigError(f"high.{error.key}", error.why) from error
        if getattr(getattr(parent, "model", None), "tied_embedding", False) and "head" not in kept:
            why = "must name head, because model.tied_embedding makes it the embedding's weight"
            raise ConfigError("high", why)

    def stays_high(self, role: str) -> bool:
        """Whether a role is kept out of the low format."""
        return role in NEVER_LOW or any(fnmatchcase(role, pattern) for pattern in self.high)


def plain_path(dtype: torch.dtype) -> str:
    """The name of the path of torch's own product of operands in a format, forward and backward."""
    return f"{str(dtype).removeprefix('torch.')} product"


class KernelLog:
    """Records which code path computed the products of each role; the layers note it while they run."""

    def __init__(self) -> None:
        self.ran: dict[str, dict[str, None]] = {}

    def note(self, role: str, path: str) -> None:
        """Notes that a product of `role` has just been computed on this path."""
        self.ran.setdefault(role, {})[path] = None

    def table(self) -> dict[str, str]:
        """The paths of every role whose products ran, in the order of first use; several are joined by ` | `."""
        return {role: " | ".join(paths) for role, paths in self.ran.items()}


class StepState(ABC):
    """A layer that keeps more than its weight from one optimizer step to the next: the largest values, for example.

    A forward or backward may only update this state by a maximum, so that recomputation, accumulation and a second
    reading of a batch change nothing; only `end_step` may change what the next product does. The state is not part of
    the state dict, whose names are the same in every precision: checkpoints hold it beside the weights.
    """

    @abstractmethod
    def end_step(self, *, done: bool) -> None:
        """Ends an optimizer step; if it was skipped (`done` is False), its values must be forgotten."""

    def maxima(self) -> list[Tensor]:
        """The fp32 tensors that are set to their maximum over all data ranks before `end_step`."""
        return []

    @abstractmethod
    def step_state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint must keep, by name."""

    @abstractmethod
    def load_step_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `step_state` returned."""


class Precision(Component, ABC):
    """Makes every matrix-product layer of a model.

    Parameter names are the same in every precision: a layer has one parameter `weight`, in high precision,
    of shape [out, in] or [groups, out, in], which absorption, export and chunked losses may read. A *role*, one
    of `ROLES`, says what a layer is for. A layer takes inputs in the format of the residual stream, which is
    `compute_dtype("embedding")`, or wider. A value that is not finite is never hidden: it makes its row of a product
    not finite.

    Layers that are not from `core.numerics.linear` must note in `kernels_used`, at every product, which code path
    computed it: a run records what really ran.

    Recipes are checked against two capabilities: `gpu_only` (training needs a GPU) and `remembers_products` (a
    product repeated within a step may differ, so that nothing can be recomputed).
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        """Makes a layer `(..., in) -> (..., out)` without bias; its weight is drawn from N(0, std)."""

    @abstractmethod
    def grouped_linear(
        self, groups: int, inputs: int, outputs: int, role: str, *, std: float
    ) -> nn.Module:
        """Makes a layer `(x_AI, offsets_E) -> y_AO`: rows [offsets[e-1], offsets[e]) are multiplied by weight e."""

    @abstractmethod
    def param_dtype(self, role: str) -> torch.dtype:
        """The format in which a role's weight is kept and updated."""

    @abstractmethod
    def compute_dtype(self, role: str) -> torch.dtype:
        """The format of the operands of a role's product, `torch.float8_e4m3fn` for example.

        For `embedding` it is the format of the residual stream. `describe` prints it for every role.
        """

    def gradient_dtype(self, role: str) -> torch.dtype:
        """The format of the output's gradient if it is an operand; by default that of the other operands."""
        return self.compute_dtype(role)

    def path(self, role: str) -> str:
        """The code path of a role's products in a few words, as `describe` prints it and `kernels_used` notes it."""
        return plain_path(self.compute_dtype(role))

    @cached_property
    def kernels_used(self) -> KernelLog:
        """The log of the paths that really ran; every layer is given it."""
        return KernelLog()

    def context(self) -> AbstractContextManager[Any]:
        """A context that is entered around each block, inside recomputation, and around each multi-token module."""
        return nullcontext()
