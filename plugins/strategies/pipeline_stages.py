"""Divides a model into segments of following blocks, and says which rank of a pipeline holds what."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from core.contracts.errors import ConfigError
from core.model.language_model import LanguageModel, block_path
from core.numerics.linear import SharedLinear


@dataclass(frozen=True)
class Segment:
    """Following blocks that one stage holds; with several chunks a stage has several segments.

    Args:
        number: its place in the order in which a micro-batch passes through the segments.
        blocks: the indices of its blocks.
        stage: the stage that holds it.
        is_last: whether it is the last one of all.
    """

    number: int
    blocks: range
    stage: int
    is_last: bool

    @property
    def is_first(self) -> bool:
        """Whether it is the first one of all."""
        return self.number == 0


def segments_of(model: nn.Module, config: Any) -> list[Segment]:
    """The segments of a model, in order; segment i is on stage i modulo the number of stages.

    Args:
        model: a language model.
        config: the settings of the strategy: `stages`, `chunks`, `layers`.
    """
    assert isinstance(model, LanguageModel)
    parts = config.stages * config.chunks
    sizes = config.layers or even(len(model.blocks), parts)
    segments: list[Segment] = []
    begin = 0
    for number, size in enumerate(sizes):
        blocks = range(begin, begin + size)
        segments.append(Segment(number, blocks, number % config.stages, number == parts - 1))
        begin += size
    return segments


def even(blocks: int, parts: int) -> list[int]:
    """The blocks of each part; if they cannot be equal the first ones have one more, since the last has the heads."""
    share, more = divmod(blocks, parts)
    return [share + (part < more) for part in range(parts)]


def in_flight(config: Any, stage: int, micro_batches: int) -> float:
    """The most micro-batches whose activations a stage holds at once.

    With 1F1B they are those between the stage and the last one. With several chunks a stage holds passes of single
    chunks, each a part of a micro-batch: those of the warm-up (Megatron-LM, arXiv 2104.04473, section 2.2) and one.
    """
    after = int(config.stages) - 1 - stage
    if config.chunks == 1:
        return min(micro_batches, after + 1)
    chunks = int(config.chunks)
    passes = (chunks - 1) * int(config.stages) + 2 * after + 1
    return min(micro_batches * chunks, passes) / chunks


def check_heads(model: nn.Module, segments: Sequence[Segment]) -> None:
    """Checks that loss heads read no state that is on another stage than they are.

    Raises:
        ConfigError: one does.
    """
    assert isinstance(model, LanguageModel)
    for name, head in model.loss_heads():
        for index in head.reads_blocks:
            if index not in segments[-1].blocks:
                own = segments[-1].blocks
                why = f"model.heads.{name} reads block {index}, and the last stage has the blocks from {own.start} on"
                raise ConfigError("layers", why)


def reads_embedding(model: LanguageModel) -> bool:
    """Whether the last stage needs the embedding: for the output or for a loss head."""
    if isinstance(model.output, SharedLinear):
        return True
    return any(head.reads_embedding for _, head in model.loss_heads())


def held_modules(model: LanguageModel, segments: Sequence[Segment], stage: int) -> list[str]:
    """The paths of the modules that a stage holds."""
    held: list[str] = []
    for segment in segments:
        if segment.stage != stage:
            continue
        if segment.is_first:
            held += ["embedding", "residual"]
        held += [block_path(index) for index in segment.blocks]
        if segment.is_last:
            held += ["norm", "output", "residual", "heads"]
            if reads_embedding(model):
                held.append("embedding")
    return held


def is_inside(name: str, modules: Sequence[str]) -> bool:
    """Whether a tensor belongs to one of some modules, by its name in the model."""
    return any(name.startswith(f"{path}.") for path in modules)


@contextmanager
def without_others(model: LanguageModel, modules: Sequence[str]) -> Iterator[None]:
    """A context in which a model has only some of its parts, so that an inner strategy divides no others.

    Args:
        model: the model.
        modules: the paths of the parts that it has: blocks by their number, others by their name.
    """
    before = {name: getattr(model, name) for name in ("embedding", "norm", "output", "heads")}
    blocks = model.blocks
    model.blocks = nn.ModuleList(
        block for index, block in enumerate(blocks) if block_path(index) in modules
    )
    for name in before:
        if name not in modules:
            setattr(model, name, nn.ModuleDict() if name == "heads" else nn.Identity())
    residual = model.residual
    if "residual" not in modules:
        model.residual = nn.Identity()  # type: ignore[assignment]
    try:
        yield
    finally:
        model.blocks = blocks
        model.residual = residual
        for name, module in before.items():
            setattr(model, name, module)
