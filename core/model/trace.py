"""Traces one forward: which experts every token chose, the latents of every attention, and its largest logits.

The parts return what they compute: a router its `Routing`, an attention what its `inspect` returns. Hooks on the
modules collect both during one forward in evaluation mode, so the layers in loss heads are traced too.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from core.contracts.attention import Attention, AttentionTrace
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.router import Router, Routing
from core.model.language_model import LanguageModel


@dataclass(frozen=True)
class BlockTrace:
    """What the layers of one block computed.

    Args:
        path: the block's path in the model, e.g. `blocks.1` or `heads.mtp.depths.0.block`.
        context: the micro-batch that the block saw; a block of a multi-token module sees later tokens.
        attention: latents and largest logits.
        routing: which token went to which expert; token t is the flat index of B x L. None without experts.
        experts: the number of experts; 0 for a dense layer.
    """

    path: str
    context: SequenceContext
    attention: AttentionTrace
    routing: Routing | None = None
    experts: int = 0

    @property
    def load(self) -> Tensor | None:
        """The assignments of valid tokens to each expert, int64, as the run's own metrics count them."""
        return None if self.routing is None else self.routing.load(self.context.valid().flatten())

    @property
    def max_logit(self) -> Tensor | None:
        """The largest logit of each head over all valid tokens; None where the attention returns none."""
        found_BLH = self.attention.max_logit_BLH
        if found_BLH is None:
            return None
        masked = found_BLH.masked_fill(~self.context.valid()[..., None], -torch.inf)
        return masked.flatten(0, 1).amax(dim=0)


@dataclass(frozen=True)
class Trace:
    """What a model computed for some tokens.

    Args:
        context: the micro-batch; its `valid_BL` is False at padding.
        blocks: what each block computed, by its path, in the order of the forward.
    """

    context: SequenceContext
    blocks: dict[str, BlockTrace]

    @property
    def routings(self) -> dict[str, Routing]:
        """The routing of every layer with experts, by the path of its block."""
        found = {}
        for path, block in self.blocks.items():
            if block.routing is not None:
                found[path] = block.routing
        return found


def trace(model: LanguageModel, tokens: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Trace:
    """Traces a model on tokens; nothing of the model changes.

    Args:
        model: the model, on any device; it is evaluated, and left in the mode it was in.
        tokens: token ids of one sequence, or of several, whose lengths may differ.

    Returns:
        The trace. Sequences shorter than the longest are padded on the right, which `context.valid()` tells.

    Raises:
        UserError: no token, a token that the model does not know, or more tokens than its positions.
    """
    rows = _rows(tokens)
    vocabulary = model.embedding.weight.shape[0]
    for row in rows:
        for token in row:
            if not 0 <= token < vocabulary:
                raise UserError(f"tokens: {token} must be from 0 to {vocabulary - 1}")
    # A multi-token module of depth D needs D tokens more than one; what is added is padding.
    depths = max((head.draft_depths for _, head in model.loss_heads()), default=0)
    length = max(*map(len, rows), min(depths + 1, model.max_length))
    tokens_BL = torch.zeros(len(rows), length, dtype=torch.int64)
    valid_BL = torch.zeros(len(rows), length, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens_BL[index, : len(row)] = torch.tensor(row)
        valid_BL[index, : len(row)] = True
    device = model.embedding.weight.device
    tokens_BL = tokens_BL.to(device)
    # What a head predicts is not traced, so the token after the last one may be any.
    targets_BL = tokens_BL.roll(-1, dims=1)
    context = SequenceContext.of(tokens_BL, targets_BL=targets_BL, valid_BL=valid_BL.to(device))
    return trace_context(model, context)


def _rows(tokens: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> list[list[int]]:
    """The token ids of every sequence."""
    given: Any = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
    rows = [list(row) for row in given] if given and not isinstance(given[0], int) else [given]
    if not all(rows):
        raise UserError("tokens: every sequence must have at least one token")
    return rows


@torch.no_grad()
def trace_context(model: LanguageModel, context: SequenceContext) -> Trace:
    """Traces a model on a micro-batch with targets; see `trace`.

    A compiled model is run as it was written, because its hooks would be compiled otherwise.
    """
    found = _Collector(model)
    with found.hooked(), _evaluating(model), torch.compiler.set_stance("force_eager"):
        model(context)
    return Trace(context, found.blocks())


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Puts all modules in evaluation mode, and each back into its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Collector:
    """Collects what routers and attentions return during a forward."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.routings: dict[str, Routing] = {}
        self.attentions: dict[str, AttentionTrace] = {}
        self.contexts: dict[str, SequenceContext] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Has the model's modules report here."""
        with ExitStack() as stack:
            for path, _, layer in self.model.block_layers():
                if isinstance(layer, Attention):
                    handle = layer.register_forward_hook(self._attention(path), with_kwargs=True)
                    stack.callback(handle.remove)
                    continue
                for module in layer.modules():
                    if isinstance(module, Router):
                        stack.callback(module.register_forward_hook(self._router(path)).remove)
            yield

    def _attention(self, path: str) -> Any:
        def hook(
            layer: Attention, positional: tuple[Any, ...], named: dict[str, Any], _: Any
        ) -> None:
            values = dict(zip(("x_BLD", "context"), positional, strict=False)) | named
            self.contexts[path] = values["context"]
            self.attentions[path] = layer.inspect(values["x_BLD"], values["context"])

        return hook

    def _router(self, path: str) -> Any:
        def hook(router: Router, positional: tuple[Any, ...], routing: Routing) -> None:
            self.routings[path] = routing

        return hook

    def blocks(self) -> dict[str, BlockTrace]:
        """The traces of the blocks that have run, in order."""
        experts = self.model.expert_layers()
        found = {}
        for path, attention in self.attentions.items():
            count = experts[path].experts if path in experts else 0
            routing = self.routings.get(path)
            found[path] = BlockTrace(path, self.contexts[path], attention, routing, count)
        return found
