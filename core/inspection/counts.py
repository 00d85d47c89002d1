"""Exact counts of who goes where, over any number of traced micro-batches."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.model.trace import BlockTrace, Trace

Integers = NDArray[np.int64]


@dataclass
class LayerCounts:
    """The counts of one layer with experts; every number is an exact integer.

    E experts, V token ids, S sources. An assignment is one of a token's choices, before any drop.

    Args:
        experts: E.
        assigned_EV: assignments of each token id to each expert.
        assigned_ES: assignments of tokens of each source to each expert.
        together_EE: tokens that went to both experts; on the diagonal those that went to the expert.
        tokens: valid tokens that the layer saw.
        dropped: assignments that were not carried out.
        first: the expert of the largest gate for each valid token of the text in reading order, a micro-batch at a
            time; -1 where there is none, as for the tokens that a multi-token module does not read.
    """

    experts: int
    vocabulary: int
    sources: int
    tokens: int = 0
    dropped: int = 0
    first: list[Integers] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.assigned_EV = np.zeros((self.experts, self.vocabulary), dtype=np.int64)
        self.assigned_ES = np.zeros((self.experts, self.sources), dtype=np.int64)
        self.together_EE = np.zeros((self.experts, self.experts), dtype=np.int64)

    @property
    def load(self) -> Integers:
        """The assignments to each expert, as the run's metrics count them."""
        load_E: Integers = self.assigned_EV.sum(axis=1)
        return load_E

    def add(self, block: BlockTrace, valid_BL: Tensor) -> None:
        """Adds what a layer did in one micro-batch, whose valid tokens are `valid_BL`."""
        routing = block.routing
        assert routing is not None
        context = block.context
        valid_T = context.valid().flatten().cpu()
        ids_T = context.tokens_BL.flatten().cpu()
        source_T = torch.zeros_like(ids_T)
        if context.source_B is not None:
            source_T = context.source_B.cpu().repeat_interleave(context.tokens_BL.shape[1])
        token_A = routing.token_A.cpu()
        counted_A = valid_T[token_A]
        token_A = token_A[counted_A]
        expert_A = routing.expert_A.cpu()[counted_A]
        self.assigned_EV += _pairs(expert_A, ids_T[token_A], self.experts, self.vocabulary)
        self.assigned_ES += _pairs(expert_A, source_T[token_A], self.experts, self.sources)
        chosen_TE = torch.zeros(len(ids_T), self.experts, dtype=torch.float64)
        chosen_TE[token_A, expert_A] = 1.0
        # Sums of ones in fp64 are exact up to 2^53.
        self.together_EE += (chosen_TE.T @ chosen_TE).to(torch.int64).numpy()
        self.tokens += int(valid_T.sum())
        self.dropped += int(routing.dropped(context.valid().flatten()))
        # A multi-token module's block sees the sequences from a later token on.
        first_BL = torch.full(valid_BL.shape, -1, dtype=torch.int64)
        own_T = first_experts(block).masked_fill(~valid_T, -1)
        length = block.context.tokens_BL.shape[1]
        first_BL[:, valid_BL.shape[1] - length :] = own_T.view(-1, length)
        self.first.append(first_BL[valid_BL.cpu()].numpy())


def first_experts(block: BlockTrace) -> Tensor:
    """The expert with the largest gate of each token, of equal gates the first choice: int64 T, -1 without any."""
    routing = block.routing
    assert routing is not None
    tokens = block.context.tokens_BL.numel()
    token_A = routing.token_A.cpu()
    gate_A = routing.gate_A.detach().double().cpu()
    order_A = torch.argsort(routing.choice_A.cpu(), descending=True, stable=True)
    order_A = order_A[torch.argsort(gate_A[order_A], stable=True)]
    found_T = torch.full((tokens,), -1, dtype=torch.int64)
    # The last one written stays: assignments are in the order of rising gates.
    found_T.numpy()[token_A[order_A].numpy()] = routing.expert_A.cpu()[order_A].numpy()
    return found_T


def _pairs(row_A: Tensor, column_A: Tensor, rows: int, columns: int) -> Integers:
    """How often each pair of a row and a column occurs: rows x columns."""
    flat = torch.bincount(row_A * columns + column_A, minlength=rows * columns)
    result: Integers = flat.view(rows, columns).numpy()
    return result


@dataclass
class Counts:
    """The counts of a whole model over a text.

    Args:
        vocabulary: the token ids of the model.
        sources: the names of the text's sources.
        layers: the counts of each layer with experts, by the path of its block.
        max_logits: the largest attention logit of each head so far, by the path of the block.
        latents: mean square of each latent's elements, as sum and count, by path and name.
        ids: the valid tokens in reading order, a micro-batch at a time.
    """

    vocabulary: int
    sources: tuple[str, ...]
    layers: dict[str, LayerCounts] = field(default_factory=dict)
    max_logits: dict[str, list[float]] = field(default_factory=dict)
    latents: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    ids: list[Integers] = field(default_factory=list)

    def add(self, trace: Trace) -> None:
        """Adds one traced micro-batch."""
        valid_BL = trace.context.valid()
        self.ids.append(trace.context.tokens_BL[valid_BL].cpu().numpy())
        for path, block in trace.blocks.items():
            self._add_attention(path, block)
            if block.routing is None:
                continue
            if path not in self.layers:
                self.layers[path] = LayerCounts(block.experts, self.vocabulary, len(self.sources))
            self.layers[path].add(block, valid_BL)

    def _add_attention(self, path: str, block: BlockTrace) -> None:
        valid_BL = block.context.valid()
        if not bool(valid_BL.any()):
            return
        for name, latent_BLC in block.attention.latents.items():
            values = latent_BLC[valid_BL].double()
            total, count = self.latents.get((path, name), (0.0, 0))
            new = float(values.square().sum())
            self.latents[path, name] = (total + new, count + values.numel())
        maxima = block.max_logit
        if maxima is not None:
            before = self.max_logits.get(path, [float("-inf")] * len(maxima))
            pairs = zip(before, maxima.double().tolist(), strict=True)
            self.max_logits[path] = [max(pair) for pair in pairs]
