"""Expert choice (arXiv 2202.09368, section 3.2): every expert takes its k best tokens of a group.

The load is even by construction. The price is causality: whether an expert takes a token depends on the tokens
after it, so information flows backwards (arXiv 2408.15664, section 5.2 and appendix D).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from core.contracts.context import SequenceContext
from core.contracts.errors import ConfigError
from core.contracts.router import AdjustScores, Routing
from core.contracts.schema import setting
from core.routing.gating import TokenGroupRouter
from core.routing.groups import even_share, even_share_of

_FIXED = "every expert takes exactly its even share of the group's tokens (n top_k / E)"


class ExpertChoiceRouter(TokenGroupRouter):
    """Every expert takes, of a group's n tokens, the n c / E with the highest softmax affinity, which is the gate."""

    paper = "Expert Choice (arXiv 2202.09368), section 3.2"
    capabilities = frozenset({"learned"})
    caveat = (
        "expert_choice is not causal: an expert chooses among all tokens of a group, later ones included, so losses "
        "in training and validation are not those of a causal model, and text that is read in chunks or token by "
        "token gets other experts"
    )
    example = {"name": "expert_choice", "top_k": 2}
    rejected_keys = {
        "capacity_factor": f"{_FIXED}, so no capacity is needed; the paper's capacity factor c is top_k here",
        "eval_capacity_factor": f"{_FIXED}, so no capacity is needed",
        "groups": "experts choose tokens here, so no token is limited to groups of experts",
        "group_limit": "experts choose tokens here, so no token is limited to groups of experts",
    }

    @dataclass(kw_only=True)
    class Config:
        """Settings of expert choice."""

        top_k: int = setting(doc="experts per token on average (the paper's capacity factor c)")
        group: Literal["sequence", "batch"] = setting(
            "batch", doc="what experts choose from: a sequence, or a batch"
        )
        chunk: int | None = setting(
            None, doc="consecutive tokens of a sequence to choose from; null: all of the group"
        )

        def check(self, parent: Any) -> None:
            """Raises `ConfigError` for more than every expert, and for chunks of anything but sequences."""
            if not 1 <= self.top_k <= parent.experts:
                raise ConfigError("top_k", f"must be between 1 and experts = {parent.experts}")
            if self.chunk is not None and self.group != "sequence":
                raise ConfigError("chunk", "must be null unless group is sequence")
            if self.chunk is not None and self.chunk < 1:
                raise ConfigError("chunk", "must be at least 1")

    def route(
        self, logits_TE: Tensor, adjust_scores: AdjustScores, context: SequenceContext
    ) -> Routing:
        """The choices of the experts of each group, one after the other, each expert's tokens best first."""
        scores_TE = logits_TE.softmax(dim=1)
        with torch.no_grad():
            groups = self._groups(context)
            parts = [self._choices(scores_TE, token_GN, context) for token_GN in groups]
            token_A, expert_A, kept_A = (torch.cat(column) for column in zip(*parts, strict=True))
        gate_A = scores_TE.flatten().index_select(0, token_A * self.experts + expert_A)
        return Routing(
            token_A=token_A,
            expert_A=expert_A,
            gate_A=gate_A,
            choice_A=torch.zeros_like(token_A),
            scores_TE=scores_TE,
            logits_TE=logits_TE,
            kept_A=kept_A,
        )

    def _groups(self, context: SequenceContext) -> list[Tensor]:
        """The groups as token numbers G x N, one tensor for each size; the last chunk of a sequence may be shorter."""
        batch, length = context.tokens_BL.shape
        token_BL = torch.arange(batch * length, device=context.tokens_BL.device).view(batch, length)
        if self.config.group == "batch":
            return [token_BL.reshape(1, batch * length)]
        chunk = self.config.chunk or max(length, 1)
        whole = length - length % chunk
        return [token_BL[:, :whole].reshape(-1, chunk), token_BL[:, whole:]]

    def _choices(
        self, scores_TE: Tensor, token_GN: Tensor, context: SequenceContext
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The token, the expert and whether the choice is real, for every group, expert and rank.

        A group with padding has fewer real choices than its size would give; the others point at padding, which is
        not counted.
        """
        size = token_GN.shape[1]
        valid_GN = context.valid().flatten()[token_GN]
        score_GNE = scores_TE[token_GN].masked_fill(~valid_GN[:, :, None], -torch.inf)
        most = even_share_of(size, self.experts, self.top_k)
        place_GKE = score_GNE.topk(most, dim=1).indices
        count_G = even_share(valid_GN.sum(dim=1), self.experts, self.top_k)
        real_GK = torch.arange(most, device=count_G.device) < count_G[:, None]
        real_GKE = real_GK[:, :, None].expand_as(place_GKE)
        if size:
            padding_G11 = valid_GN.to(torch.int64).argmin(dim=1)[:, None, None]
            place_GKE = torch.where(real_GKE, place_GKE, padding_G11)
        token_GKE = token_GN.gather(1, place_GKE.flatten(1)).view_as(place_GKE)
        token_GEK = token_GKE.transpose(1, 2)
        expert_GEK = torch.arange(self.experts, device=count_G.device)[:, None].expand_as(token_GEK)
        return token_GEK.flatten(), expert_GEK.flatten(), real_GKE.transpose(1, 2).flatten()
