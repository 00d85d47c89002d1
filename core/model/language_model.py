"""The language model: embedding, blocks, final norm, output, and the heads that give it losses."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from core.contracts.attention import Attention, Cache
from core.contracts.component import Costs
from core.contracts.context import SequenceContext
from core.contracts.errors import UserError
from core.contracts.ffn import FeedForward
from core.contracts.loss_head import HeadOutput, LossHead, SharedModules
from core.contracts.precision import KernelLog, Precision, StepState
from core.contracts.record import Record, as_pytree
from core.contracts.residual import Residual
from core.model.block import Block
from core.model.norm import RMSNorm
from core.numerics.draw import draw_normal


class Embedding(nn.Module):
    """Token ids to vectors.

    Args:
        vocabulary, dim: `weight` is [vocabulary, dim].
        std: standard deviation of the initial weights.
        param_dtype: format in which the weight is kept.
        compute_dtype: format of the residual stream that starts here.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        *,
        std: float,
        param_dtype: torch.dtype,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.role = "embedding"
        self.std = std
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(torch.empty(vocabulary, dim, dtype=param_dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight from N(0, std)."""
        draw_normal(self.weight, self.std)

    def forward(self, tokens: Tensor) -> Tensor:
        """The vectors of token ids of any shape: that shape x dim."""
        return F.embedding(tokens, self.weight).to(self.compute_dtype)


@as_pytree
@dataclass(frozen=True)
class Losses:
    """The results of one micro-batch that the training step needs.

    Args:
        heads: what each loss head returned, by the head's name.
        records: what the layers of every block saw, heads' own blocks included, by the block's path in the model, then
            by the layer's name in the block (`attention`, `ffn`).
    """

    heads: dict[str, HeadOutput]
    records: dict[str, dict[str, Record]]

    def expert_records(self) -> dict[str, Record]:
        """The records of the layers with experts, by the path of their block."""
        return {path: parts["ffn"] for path, parts in self.records.items() if has_load(parts)}


@dataclass(frozen=True)
class States:
    """The results of a pass through the blocks.

    Args:
        hidden_BLD: states after the final norm.
        records: what the layers of every block saw, by the block's path, then by the layer's name.
        after_blocks: collapsed states after the requested blocks, by their index.
        stream: the residual stream after the last block.
    """

    hidden_BLD: Tensor
    records: dict[str, dict[str, Record]]
    after_blocks: dict[int, Tensor]
    stream: Tensor


@as_pytree
@dataclass(frozen=True)
class Decoded:
    """The results of reading new tokens with caches.

    Args:
        hidden_BLD: states after the final norm, of all new tokens.
        logits_BLV: logits of the next token after each new token, or B x 1 x V of the one that was asked for.
        stream: the residual stream after the last block; None unless a loss head drafts from it.
    """

    hidden_BLD: Tensor
    logits_BLV: Tensor
    stream: Tensor | None = None


def has_load(parts: dict[str, Record]) -> bool:
    """Whether the records of a block are those of a block with experts."""
    return "ffn" in parts and parts["ffn"].load_E is not None


def block_path(index: int) -> str:
    """The path of a block in the model; logs, loads and checkpoints know its layers by it."""
    return f"blocks.{index}"


def head_block_path(head: str, path: str) -> str:
    """The path in the model of a block that a loss head owns."""
    return f"heads.{head}.{path}"


class LanguageModel(nn.Module):
    """A decoder-only language model whose parts are plugins.

    Args:
        embedding: shared by the heads.
        blocks: the blocks, first to last.
        residual: the stream between them.
        norm: applied before the output.
        output: D -> V, no bias.
        heads: loss heads by name.
        max_length: positions that the rotary table holds.

    Attributes:
        absent: names of weights that other ranks hold as a whole; here they stay on the meta device.
    """

    def __init__(
        self,
        *,
        embedding: Embedding,
        blocks: list[Block],
        residual: Residual,
        norm: RMSNorm,
        output: nn.Module,
        heads: dict[str, LossHead],
        max_length: int,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.residual = residual
        self.norm = norm
        self.output = output
        self.heads = nn.ModuleDict(heads)
        self.max_length = max_length
        self.absent: frozenset[str] = frozenset()
        self._check_reads()

    def _check_reads(self) -> None:
        """Raises `UserError` if a head reads the state after a block that does not exist."""
        last = len(self.blocks) - 1
        for name, head in self.loss_heads():
            for index in head.reads_blocks:
                if not 0 <= index <= last:
                    raise UserError(
                        f"model.heads.{name} reads block {index}; there are blocks 0 to {last}"
                    )

    def hidden(
        self, context: SequenceContext, caches: list[Cache] | None = None
    ) -> tuple[Tensor, dict[str, dict[str, Record]]]:
        """Hidden states B x L x D after the final norm, and what each block's layers saw.

        Raises:
            UserError: more positions than the rotary table holds.
        """
        states = self.states(context, caches)
        return states.hidden_BLD, states.records

    def states(
        self,
        context: SequenceContext,
        caches: list[Cache] | None = None,
        blocks: Collection[int] = (),
    ) -> States:
        """The states after the blocks, with those after some of them.

        Args:
            context: the micro-batch.
            caches: one for each block, in decoding only.
            blocks: indices of the blocks whose states are kept.

        Raises:
            UserError: more positions than the rotary table holds.
        """
        if caches is None:
            self._check_length(context.tokens_BL.shape[1])
        records: dict[str, dict[str, Record]] = {}
        kept: dict[int, Tensor] = {}
        stream = self.first_stream(context)
        for index in range(len(self.blocks)):
            stream, records[block_path(index)] = self.run_block(index, stream, context, caches)
            if index in blocks:
                kept[index] = self.residual.collapse(stream)
        return self.last_states(stream, records, kept)

    def first_stream(self, context: SequenceContext) -> Tensor:
        """The residual stream before the first block."""
        stream: Tensor = self.residual.expand(self.embedding(context.tokens_BL))
        return stream

    def run_block(
        self,
        index: int,
        stream: Tensor,
        context: SequenceContext,
        caches: list[Cache] | None = None,
    ) -> tuple[Tensor, dict[str, Record]]:
        """The stream after a block, and what its layers saw; `caches` are those of all blocks, in decoding only."""
        cache = caches[index] if caches is not None else None
        result: tuple[Tensor, dict[str, Record]] = self.blocks[index](stream, context, cache)
        return result

    def last_states(
        self,
        stream: Tensor,
        records: dict[str, dict[str, Record]],
        after_blocks: dict[int, Tensor],
    ) -> States:
        """The states after the final norm, from the stream after the last block."""
        return States(self.norm(self.residual.collapse(stream)), records, after_blocks, stream)

    def _check_length(self, length: int) -> None:
        """Raises `UserError` for more positions than the rotary table holds."""
        if length > self.max_length:
            raise UserError(
                f"{length} tokens are more than model.rope.max_length = {self.max_length}"
            )

    def forward(self, context: SequenceContext) -> Losses:
        """The losses of one micro-batch, before coefficients and denominators of the window.

        Raises:
            TypeError: the argument is a tensor of token ids, for which there is `logits`.
        """
        if isinstance(context, Tensor):
            raise TypeError(
                "a model is called with a SequenceContext and returns losses: for token ids call model.logits(ids), "
                "with ids of the shape batch x length, or core.complete(model, prompts)"
            )
        return self.losses_of(self.states(context, blocks=self.read_by_heads()), context)

    def read_by_heads(self) -> set[int]:
        """The indices of the blocks whose states loss heads read."""
        return {index for _, head in self.loss_heads() for index in head.reads_blocks}

    def losses_of(self, states: States, context: SequenceContext) -> Losses:
        """The losses that the heads compute from the states of a micro-batch, whose records are added to theirs."""
        records = states.records
        heads = {}
        for name, head in self.loss_heads():
            heads[name] = head(states.hidden_BLD, context, self.shared(head, states))
            for path, parts in heads[name].records.items():
                records[head_block_path(name, path)] = parts
        return Losses(heads, records)

    def contexts(self, context: SequenceContext) -> dict[str, SequenceContext]:
        """The contexts that the heads' own blocks see, by the block's path; every other block sees `context` itself."""
        found = {}
        for name, head in self.loss_heads():
            for path, inner in head.contexts(context).items():
                found[head_block_path(name, path)] = inner
        return found

    def logits(self, tokens_BL: Tensor) -> Tensor:
        """Logits B x L x V of the next token after each token."""
        hidden_BLD, _ = self.hidden(SequenceContext.of(tokens_BL))
        result: Tensor = self.output(hidden_BLD)
        return result

    def decode(self, tokens_BL: Tensor, caches: list[Cache]) -> Tensor:
        """Logits B x L x V of new tokens after those that the caches hold of each row; see `read`."""
        return self.read(tokens_BL, caches).logits_BLV

    def read(
        self,
        tokens_BL: Tensor,
        caches: list[Cache],
        *,
        valid_BL: Tensor | None = None,
        logits_at_B: Tensor | None = None,
    ) -> Decoded:
        """Reads new tokens after those that the caches hold of each row; the caches then hold the new ones too.

        Args:
            tokens_BL: the next tokens of each row, whose rows may be of different lengths so far.
            caches: what `new_caches` returned, one for each block.
            valid_BL: bool, False for padding on the right of a row, which the caller then removes from the caches; it
                is the caller that makes sure that no valid token is past `max_length`.
            logits_at_B: the one new token of each row, counted from 0, whose logits are wanted; None: of all.

        Raises:
            UserError: more positions than the rotary table holds.
        """
        context = self.new_tokens(tokens_BL, caches[0], valid_BL)
        return self.decoded(self.states(context, caches), logits_at_B)

    def new_tokens(
        self, tokens_BL: Tensor, cache: Cache, valid_BL: Tensor | None = None
    ) -> SequenceContext:
        """The context of new tokens after those that the cache of a block holds; see `read`.

        Raises:
            UserError: more positions than the rotary table holds.
        """
        if valid_BL is None:
            self._check_length(tokens_BL.shape[1] + cache.longest)
        context = SequenceContext.of(
            tokens_BL, start=cache.longest, valid_BL=valid_BL, recorded=False
        )
        if cache.slots(0) is not None:  # rows of different lengths
            new_L = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)
            positions_BL = cache.lengths[:, None] + new_L
            if valid_BL is not None:
                positions_BL = positions_BL.clamp(max=self.max_length - 1)  # those of padding
            context = replace(context, positions_BL=positions_BL)
        return context

    def decoded(self, states: States, logits_at_B: Tensor | None = None) -> Decoded:
        """The logits of new tokens from their states; see `read`."""
        chosen_BLD = states.hidden_BLD
        if logits_at_B is not None:
            row_B = torch.arange(len(chosen_BLD), device=states.hidden_BLD.device)
            chosen_BLD = chosen_BLD[row_B, logits_at_B][:, None]
        stream = None
        if any(head.drafts and head.reads_streams for _, head in self.loss_heads()):
            stream = states.stream
        return Decoded(states.hidden_BLD, self.output(chosen_BLD), stream)

    def new_caches(
        self, rows: int, capacity: int, device: torch.device | None = None
    ) -> list[Cache]:
        """An empty cache for every block.

        Args:
            rows: sequences that are decoded together.
            capacity: tokens of each row; at most `max_length` can be used.
            device: where the model computes; None: where its weights are.
        """
        device = device or self.embedding.weight.device
        return [block.attention.new_cache(rows, capacity, device) for block in self.blocks]  # type: ignore[union-attr,operator]

    def shared(self, head: LossHead | None = None, states: States | None = None) -> SharedModules:
        """The embedding and the output, and of the states those that a head reads."""
        if head is None or states is None:
            return SharedModules(self.embedding, self.output)
        read = {index: states.after_blocks[index] for index in head.reads_blocks}
        stream = states.stream if head.reads_streams else None
        return SharedModules(self.embedding, self.output, read, stream)

    def loss_heads(self) -> Iterator[tuple[str, LossHead]]:
        """The heads by name."""
        for name, head in self.heads.items():
            assert isinstance(head, LossHead)
            yield name, head

    def block_layers(self) -> Iterator[tuple[str, str, Attention | FeedForward]]:
        """Every attention and feed-forward layer, heads' own included: its block's path, its name there, and itself."""
        for path, module in self.named_modules():
            if isinstance(module, Attention | FeedForward):
                block, _, name = path.rpartition(".")
                yield block, name, module

    def expert_layers(self) -> dict[str, FeedForward]:
        """Every feed-forward layer with experts, in blocks and in loss heads, by the path of its block.

        All modules are searched, so that layers inside loss heads are counted and balanced too.
        """
        found = {}
        for path, _, layer in self.block_layers():
            if isinstance(layer, FeedForward) and layer.experts:
                found[path] = layer
        return found

    def step_states(self) -> dict[str, StepState]:
        """Every product layer that keeps something between steps, by its path."""
        found = {}
        for path, module in self.named_modules():
            if isinstance(module, StepState):
                found[path] = module
        return found

    def holds(self, path: str) -> bool:
        """Whether this rank has all weights of a module, by its path; see `absent`."""
        return not any(name.startswith(f"{path}.") for name in self.absent)

    def kernels_used(self) -> KernelLog:
        """The log of which code has computed the products of each role so far."""
        precision = self.blocks[0].precision
        assert isinstance(precision, Precision)
        return precision.kernels_used

    def costs(self) -> Costs:
        """The main model's costs for one token: without embedding and loss heads, with the output."""
        output = self.embedding.weight.numel()  # as large as the embedding, tied or not
        total = Costs(active=self.norm.dim + output) + self.residual.costs()
        for block in self.blocks:
            assert isinstance(block, Block)
            total = total + block.costs()
        return total
