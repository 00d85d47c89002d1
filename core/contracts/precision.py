"""The precision slot: who makes the matrix products, and in which number format they run."""

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
from core.contracts.errors import Wrong, nearest
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
"""The usual roles: what a matrix product can be for. A component declares others as its `roles`."""

NEVER_LOW = ("embedding", "norm", "router")
"""Not a product, or one whose contract asks for fp32 or wider: no recipe can make them low."""

HIGH = ("embedding", "head", "router", "norm", "mtp.projection")
"""What stays in high precision unless the recipe says otherwise. Report, section 3.3.1: embedding, output head, gating
and normalisation (attention's own products belong to no layer); the released weights keep the projection too."""


def declared_roles(parent: Any) -> dict[str, str]:
    """The usual roles, and those that components of a recipe's model declare, with what each is for.

    Args:
        parent: what a precision's `check` sees: the recipe, or something without a model.
    """
    found = dict(ROLES)
    for section in sections_in(getattr(parent, "model", None)):
        found |= section.component.roles
    return found


def roles_matching(patterns: Iterable[str], known: Iterable[str] = ROLES) -> frozenset[str]:
    """The roles that some patterns name: a role itself, or with wildcards as in `attention.*`.

    Args:
        patterns: from a recipe.
        known: the roles that there are.

    Raises:
        Wrong: a pattern that names no role; its key is the pattern's index.
    """
    found: set[str] = set()
    for index, pattern in enumerate(patterns):
        named = {role for role in known if fnmatchcase(role, pattern)}
        if not named:
            raise Wrong(str(index), f"is no role; {nearest(pattern, known)}; `attention.*` names all that begin so")
        found |= named
    return frozenset(found)


@dataclass(kw_only=True)
class RoleSettings:
    """The keys that every precision shares in which some roles are low and others high: derive a `Config` from it."""

    high: list[str] = setting(
        list(HIGH), doc="roles that stay in high precision, as embedding, norm and router always do"
    )

    def check(self, parent: Any) -> None:
        """Raises `Wrong` for an unknown role, and for a low output that would share the embedding's weight."""
        try:
            kept = roles_matching(self.high, declared_roles(parent))
        except Wrong as wrong:
            raise Wrong(f"high.{wrong.key}", wrong.why) from wrong
        if getattr(getattr(parent, "model", None), "tied_embedding", False) and "head" not in kept:
            raise Wrong("high", "must name head, because model.tied_embedding makes it the embedding's weight")

    def stays_high(self, role: str) -> bool:
        """Whether a role is kept out of the low format."""
        return role in NEVER_LOW or any(fnmatchcase(role, pattern) for pattern in self.high)


def plain_path(dtype: torch.dtype) -> str:
    """What is said of torch's own product of operands in a format, forward and backward."""
    return f"{str(dtype).removeprefix('torch.')} product"


class Paths:
    """Which code took the products of each role, noted by the layers themselves while they run."""

    def __init__(self) -> None:
        self.ran: dict[str, dict[str, None]] = {}

    def note(self, role: str, path: str) -> None:
        """A product of `role` has just gone this way."""
        self.ran.setdefault(role, {})[path] = None

    def table(self) -> dict[str, str]:
        """Every role whose products ran, in the order of first use; several paths are joined by ` | `."""
        return {role: " | ".join(ways) for role, ways in self.ran.items()}


class StepState(ABC):
    """A layer that keeps more than its weight from one optimizer step to the next: largest values seen, for example.

    A forward or backward may only take maxima into such state, so that recomputation, accumulation and a second
    reading of a batch change nothing; only `end_step` may change what the next product does. It is no part of the
    state dict, whose names are the same in every precision: checkpoints hold it beside the weights.
    """

    @abstractmethod
    def end_step(self, *, done: bool) -> None:
        """An optimizer step is over; `done` is False where it was skipped, and what it saw must be forgotten."""

    def maxima(self) -> list[Tensor]:
        """fp32 tensors that data ranks must agree on: the largest of all ranks is put in before `end_step`."""
        return []

    @abstractmethod
    def step_state(self) -> dict[str, Tensor]:
        """What a checkpoint must keep."""

    @abstractmethod
    def load_step_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `step_state` gave."""


class Precision(Component, ABC):
    """Makes every matrix-product layer of a model.

    Parameter names are the same in every precision: a layer has one parameter `weight`, in high precision,
    of shape [out, in] or [groups, out, in], which absorption, export and chunked losses may read. A *role*, one
    of `ROLES`, says what a layer is for. A layer takes inputs in the format of the residual stream, which is
    `compute_dtype("embedding")`, or wider. What is not finite is never hidden: it makes its row of a product not
    finite.

    A precision whose layers are not `core.numerics.linear`'s has them note in `paths` which code took a product, at
    every product: a run writes down what really ran.

    Capabilities that recipes are checked by: `gpu_only` (training needs a GPU), `remembers_products` (a product
    repeated within a step may differ, so that nothing can be recomputed).
    """

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def linear(self, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        """A layer `(..., in) -> (..., out)` without bias whose weight is drawn from N(0, std)."""

    @abstractmethod
    def grouped_linear(self, groups: int, inputs: int, outputs: int, role: str, *, std: float) -> nn.Module:
        """A layer `(x_AI, offsets_E) -> y_AO`: rows [offsets[e-1], offsets[e]) are multiplied by expert e's weight."""

    @abstractmethod
    def param_dtype(self, role: str) -> torch.dtype:
        """The format in which a role's weight is kept and updated."""

    @abstractmethod
    def compute_dtype(self, role: str) -> torch.dtype:
        """The format of the operands of a role's product, `torch.float8_e4m3fn` for example; of the residual stream
        for `embedding`. `describe` prints it for every role."""

    def gradient_dtype(self, role: str) -> torch.dtype:
        """The format of the output's gradient where it is an operand; that of the other operands if not told."""
        return self.compute_dtype(role)

    def path(self, role: str) -> str:
        """Which code takes a role's products, in a few words: what `describe` prints, and what `paths` then hold."""
        return plain_path(self.compute_dtype(role))

    @cached_property
    def paths(self) -> Paths:
        """What really ran; handed to every layer."""
        return Paths()

    def context(self) -> AbstractContextManager[Any]:
        """Entered around each block, inside the function that is recomputed, and around each multi-token module."""
        return nullcontext()
