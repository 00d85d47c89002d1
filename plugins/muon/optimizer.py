"""The component `muon`: which weights Muon updates and which AdamW, and the settings of both."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch

from core.contracts.bounds import fraction, not_negative, positive
from core.contracts.errors import ConfigError
from core.contracts.precision import weight_roles
from core.contracts.schedule import LearningRateSettings
from core.contracts.schema import setting
from core.contracts.training import NamedParameter, OptimizerFactory
from core.model.adamw import (
    AdamWSettings,
    MomentFormat,
    adamw,
    check_bf16_decay,
    check_roles,
    has_role,
    moment_bytes,
)
from plugins.muon.newton_schulz import SCHEDULES
from plugins.muon.update import MatrixWeight, Muon, MuonRule

SPLIT = {"*.gate_up": 2}
"""The weights of this repository in which matrices lie below each other: gate above up."""


@dataclass(kw_only=True)
class AdamWSection(AdamWSettings):
    """AdamW of the weights that Muon does not update."""

    lr_scale: float = setting(1.0, doc="factor of the learning rate of these weights")
    roles: list[str] = setting(
        ["embedding", "head"],
        doc="roles whose matrices AdamW updates, as it does the embedding and all vectors",
    )

    def check(self, parent: Any) -> None:
        """Raises `ConfigError` for values outside their ranges."""
        super().check(parent)
        positive(self, "lr_scale")


class MuonWithAdamW(OptimizerFactory):
    """Muon of matrices and of each expert's; AdamW of embedding, head and vectors, as in DeepSeek-V4."""

    paper = "Muon is Scalable for LLM Training (arXiv 2502.16982); DeepSeek-V4 (arXiv 2606.19348)"
    example = {"name": "muon", "lr": 0.001}
    needs_whole_matrices = True
    gathers_matrices = True

    @dataclass(kw_only=True)
    class Config(LearningRateSettings):
        """Settings of Muon, and of AdamW as `adamw`."""

        momentum: float = setting(0.95, doc="decay of the momentum")
        nesterov: bool = setting(True, doc="look one step of the momentum ahead")
        weight_decay: float = setting(0.1, doc="decoupled weight decay of Muon's matrices")
        no_decay: list[str] = setting([], doc="roles of Muon's matrices that are not decayed")
        newton_schulz: Literal["v4", "quintic5"] = setting(
            "v4", doc="v4: DeepSeek-V4's 8 + 2 steps; quintic5: the 5 steps of the original Muon"
        )
        update_rms: float = setting(
            0.18, doc="root mean square of an update before the learning rate (Moonlight: 0.2)"
        )
        eps: float = setting(1e-7, doc="smallest Frobenius norm that a matrix is divided by")
        products: Literal["auto", "weights", "bf16"] = setting(
            "auto",
            doc="format of the iterations: the weights', at least fp32, or bf16; auto: bf16 on a GPU",
        )
        moments: MomentFormat = setting(
            "weights", doc="format of the momentum: the weights' own, or bf16"
        )
        split: dict[str, int] = setting(
            SPLIT,
            doc="matrices below each other in one weight, by role: each is orthogonalised by itself",
        )
        adamw: AdamWSection = setting({}, doc="AdamW of all other weights")

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for values outside their ranges, and for roles that do not exist."""
            super().check(parent)
            fraction(self, "momentum")
            not_negative(self, "weight_decay")
            positive(self, "update_rms", "eps")
            if self.moments == "bf16":
                check_bf16_decay("momentum", self.momentum)
            known = weight_roles(parent)
            check_roles("adamw.roles", self.adamw.roles, known)
            check_roles("split", self.split, known)
            check_roles("no_decay", self.no_decay, known)
            check_roles("adamw.no_decay", self.adamw.no_decay, known)
            for pattern, blocks in self.split.items():
                if blocks < 1:
                    raise ConfigError("split", f"{pattern}: {blocks} must be at least 1")

    def is_muons(self, named: NamedParameter) -> bool:
        """Whether Muon updates a weight."""
        if named.kind not in ("matrix", "stack"):
            return False
        return not has_role(named, self.config.adamw.roles)

    def blocks_of(self, named: NamedParameter) -> int:
        """How many matrices lie below each other in each matrix of a weight, by the first pattern that fits."""
        for pattern, blocks in self.config.split.items():
            if fnmatchcase(named.role, pattern):
                return int(blocks)
        return 1

    def check_parameters(self, parameters: Sequence[NamedParameter]) -> None:
        """Raises `ConfigError` if `split` or `no_decay` cannot be honoured for a weight."""
        self._check_owners(parameters)
        for named in parameters:
            blocks = self.blocks_of(named)
            if self.is_muons(named) and named.parameter.shape[-2] % blocks:
                rows = named.parameter.shape[-2]
                why = f"{named.role}: {blocks} must divide the {rows} rows of {named.name}"
                raise ConfigError("split", why)

    def _check_owners(self, parameters: Sequence[NamedParameter]) -> None:
        """Raises `ConfigError` for a pattern of one optimizer that fits weights of the other alone."""
        config = self.config
        patterns: list[tuple[str, str, bool]] = []
        if config.split != SPLIT:
            patterns += [("split", p, True) for p in config.split]
        patterns += [("no_decay", p, True) for p in config.no_decay]
        patterns += [("adamw.no_decay", p, False) for p in config.adamw.no_decay]
        for key, pattern, of_muon in patterns:
            fitting = [named for named in parameters if has_role(named, [pattern])]
            if not fitting or any(self.is_muons(named) == of_muon for named in fitting):
                continue
            why = f"{pattern!r} names weights that Muon updates, which no_decay is for"
            if of_muon:
                instead = "which are not split" if key == "split" else "which adamw.no_decay is for"
                why = f"{pattern!r} names weights that AdamW updates, {instead}"
            raise ConfigError(key, why)

    def make(self, parameters: Sequence[NamedParameter]) -> list[torch.optim.Optimizer]:
        """Muon and AdamW; one of them alone if the other has no weight."""
        config = self.config
        matrices = []
        others = []
        for named in parameters:
            if self.is_muons(named):
                blocks = self.blocks_of(named)
                decays = not has_role(named, config.no_decay)
                matrices.append(MatrixWeight(named.parameter, blocks, named.shard, decays))
            else:
                others.append(named)
        made: list[torch.optim.Optimizer] = []
        if matrices:
            made.append(Muon(matrices, self._rule(), weight_decay=config.weight_decay))
        if others:
            made.append(adamw(others, config.adamw, lr_scale=config.adamw.lr_scale))
        return made

    def _rule(self) -> MuonRule:
        """The update that the settings describe."""
        config = self.config

        def products(device: torch.device) -> torch.dtype | None:
            is_low = config.products == "bf16"
            if config.products == "auto":
                is_low = device.type != "cpu"
            return torch.bfloat16 if is_low else None

        return MuonRule(
            momentum=config.momentum,
            nesterov=config.nesterov,
            schedule=SCHEDULES[config.newton_schulz],
            update_rms=config.update_rms,
            eps=config.eps,
            products=products,
            moments=torch.bfloat16 if config.moments == "bf16" else None,
        )

    def state_bytes_of(self, named: NamedParameter) -> int:
        """The bytes of one moment of Muon's weights and of two of AdamW's; step counters are left out."""
        if self.is_muons(named):
            return moment_bytes(named.parameter, self.config.moments)
        return 2 * moment_bytes(named.parameter, self.config.adamw.moments)
