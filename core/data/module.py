"""Lightning's data module for a run."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor

from core.contracts.corpus import Corpus
from core.data.fim import FillInTheMiddle, RearrangedTokens, rearrange
from core.data.held_out import HeldOut
from core.data.loaders import ValidationLoader, WindowLoader
from core.data.mixed_tokens import holds_tokens
from core.data.mixture_order import MixtureOrder
from core.data.parts import Part, parts_of, step_of_shift
from core.data.prepare import prepare
from core.data.prepared import Prepared
from core.data.recorded import RecordedData
from core.data.run_text import read_text
from core.data.sequences import Packing, Sequences, sequences_of
from core.data.tokenizer import END, Tokenizer
from core.recipe.plan import TrainingPlan

_PIECE = 1 << 24
"""Tokens that are counted at once."""


def _alone() -> tuple[int, int]:
    return 0, 1


class TextData(LightningDataModule):
    """Tokenizer, streams and loaders of one corpus for a run.

    The Trainer needs `use_distributed_sampler=False`, because the loaders shard the global order themselves.

    Args:
        corpus: the source of the documents.
        vocab: entries of the vocabulary.
        length: tokens in a sequence; must be the plan's.
        plan: the run's steps and the micro-batches that each reads.
        seed: the seed of the training order.
        rank_and_world: returns this data rank and how many there are; called when loaders are made, because the
            process group exists by then.
        validation_sequences: sequences in a validation batch, all data ranks together.
        recorded: the data of the run that reads the corpus again; None: a new run.
        held_out: how the validation text is chosen; None: by the documents' names.
        tokenizer: returns the tokenizer that the recipe names, when the data are prepared; None: one is trained.
        packing: how documents become sequences.
        fim: how training documents are rearranged; None: not at all.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        vocab: int,
        length: int,
        plan: TrainingPlan,
        seed: int,
        rank_and_world: Callable[[], tuple[int, int]] = _alone,
        validation_sequences: int,
        recorded: RecordedData | None = None,
        held_out: HeldOut | None = None,
        tokenizer: Callable[[], Tokenizer] | None = None,
        packing: Packing = "stream",
        fim: FillInTheMiddle | None = None,
    ) -> None:
        super().__init__()
        assert length == plan.length, f"sequences of {length} tokens in a plan for {plan.length}"
        self.plan = plan
        self._corpus = corpus
        self._vocab = vocab
        self._seed = seed
        self._rank_and_world = rank_and_world
        self._validation_sequences = validation_sequences
        self._recorded = recorded
        self._held_out = held_out or HeldOut()
        self._given = tokenizer
        self._packing = packing
        self._fim = fim

    def prepare(self) -> None:
        """Reads the corpus and prepares its tokens; a second call does nothing.

        Call it before anything expensive, because every error in the data is reported here.

        Raises:
            UserError: the corpus cannot be read, is too short, or is not the recorded one; the vocabulary
                does not fit it; the run has no step on one side of a shift; the cache cannot be written.
        """
        self._parts  # noqa: B018 - raises an error for a stream, or a part of it, that is too short
        self._order  # noqa: B018 - raises an error for a part that is too short

    @cached_property
    def _order(self) -> MixtureOrder | None:
        """The order of a mixture's sequences; None for one corpus."""
        sources = self._prepared.sources
        if sources is None:
            return None
        counts = self._sequences.counts
        return MixtureOrder(sources.names, sources.weights, counts, self.plan.length, self._seed)

    @cached_property
    def _sequences(self) -> Sequences:
        """The sequences of the training stream: a stretch for each part of a mixture, or side of a shift."""
        tokenizer = self.tokenizer
        return sequences_of(
            self._prepared.train,
            self.plan.length,
            self._packing,
            by_source=self._prepared.sources is not None,
            shifts=self.shift_step is not None,
            marker=END if tokenizer is None else tokenizer.begin,
        )

    def sequence_lines(self) -> list[str]:
        """Lines about rearranged documents, and about sequences that are not simply cut out of the stream."""
        lines = []
        if self._fim is not None:
            tokens = self._prepared.train.tokens
            assert isinstance(tokens, RearrangedTokens)
            count = tokens.rearranged
            lines.append(f"  fim: {count:,} of {self.train_documents:,} documents are rearranged")
        note = self._sequences.note()
        return lines if note is None else [*lines, note]

    @property
    def source_bytes(self) -> dict[str, int]:
        """The bytes of each part's validation text, for a mixture; empty for one corpus."""
        sources = self._prepared.sources
        if sources is None:
            return {}
        return dict(zip(sources.names, sources.validation_bytes, strict=True))

    def source_weights(self) -> dict[str, float]:
        """The share of each part of a mixture in the training sequences; empty for one corpus."""
        sources = self._prepared.sources
        if sources is None:
            return {}
        return dict(zip(sources.names, sources.weights, strict=True))

    def source_epochs(self, tokens: int) -> dict[str, float]:
        """How often the first `tokens` of the run read each part of a mixture; empty for one corpus."""
        if self._order is None:
            return {}
        epochs = self._order.epochs(tokens // self.plan.length)
        return dict(zip(self.source_weights(), epochs, strict=True))

    @cached_property
    def _parts(self) -> list[Part]:
        """The stretches of the training stream: two where the data shift."""
        return parts_of(self._sequences, self.plan, self.shift_step)

    def epochs_around_shift(self) -> tuple[float, float] | None:
        """How often the run reads the text before the shift of its data and the text after it; None: no shift."""
        if self.shift_step is None:
            return None
        before, after = self._parts
        read_before = after.first * self.plan.sequences
        read_after = (self.plan.micro_batches - after.first) * self.plan.sequences
        return read_before / before.count, read_after / after.count

    @cached_property
    def _prepared(self) -> Prepared:
        given = None if self._given is None else self._given()
        prepared = prepare(
            self._corpus, self._vocab, self._recorded, self._held_out, given, self._fim
        )
        if self._fim is None:
            return prepared
        ids = self._fim.ids(prepared.tokenizer)
        return replace(prepared, train=rearrange(prepared.train, self._fim, ids, self._seed))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the tokens; None where only token ids are known."""
        return self._prepared.tokenizer

    @property
    def fingerprint(self) -> str:
        """The hash of everything that made the tokens; two runs with the same fingerprint read the same data."""
        return self._prepared.fingerprint

    @property
    def shift_step(self) -> int | None:
        """The number of steps before the data shift; None where they do not."""
        return step_of_shift(self._prepared.shift_at, self.plan.steps)

    @property
    def documents(self) -> str | None:
        """The list of documents that a run folder keeps; None for a corpus of tokens, or of very many documents."""
        return self._prepared.documents

    def token_counts(self) -> Tensor:
        """How often each token occurs in the training stream, int64 V; counted once and kept."""
        return self._token_counts

    @cached_property
    def _token_counts(self) -> Tensor:
        tokens = self._prepared.train.tokens
        pieces = range(0, len(self._prepared.train), _PIECE)
        counts = sum(np.bincount(tokens[i : i + _PIECE], minlength=self._vocab) for i in pieces)
        return torch.as_tensor(counts, dtype=torch.int64)

    @property
    def train_tokens(self) -> int:
        """Tokens of the training stream, markers included."""
        return len(self._prepared.train)

    @property
    def train_bytes(self) -> int:
        """Bytes of the training documents' text."""
        return self._prepared.train.bytes

    @property
    def validation_bytes(self) -> int:
        """Bytes of the validation documents' text: the denominator of bits per byte; 0 where there are none."""
        return self._prepared.validation.bytes

    @property
    def validation_tokens(self) -> int:
        """Tokens of the held-out documents, with their markers."""
        return len(self._prepared.validation)

    @property
    def validation_documents(self) -> int:
        """The number of documents that are held out."""
        return self._prepared.validation.documents

    @property
    def train_documents(self) -> int:
        """The number of documents that are trained on."""
        return self._prepared.train.documents

    def notes(self) -> list[str]:
        """What the corpora say of the last reading, a sentence each; call it after `prepare`."""
        found = self._corpus.notes()
        if self._held_out.corpus is not None:
            found += [f"data.validation: {note}" for note in self._held_out.corpus.notes()]
        return found

    @cached_property
    def tokens_only(self) -> bool:
        """Whether the corpus holds token ids and no text."""
        return holds_tokens(self._corpus)

    def read_text(self) -> tuple[bytes, bytes]:
        """The training and the validation text, joined in order of names."""
        text = read_text(self._corpus, self._vocab, self._held_out)
        train, validation = [
            b"".join(document.data for _, part in side.documents for document in part)
            for side in (text.train, text.validation)
        ]
        return train, validation

    def epochs(self) -> float:
        """How often the run reads the whole training stream; incomplete sequences at its end are left out."""
        read = self.plan.micro_batches * self.plan.sequences
        return read / sum(part.count for part in self._parts)

    def train_dataloader(self) -> WindowLoader:
        """This rank's share of every step's window."""
        rank, world = self._rank_and_world()
        store = self._prepared.train
        return WindowLoader(
            store,
            plan=self.plan,
            seed=self._seed,
            rank=rank,
            world=world,
            order=self._order,
            shift_step=self.shift_step,
            sequences=self._sequences,
        )

    def val_dataloader(self) -> ValidationLoader | list[ValidationLoader]:
        """This rank's share of the validation stream; an empty list where nothing is held out."""
        if not self._prepared.validation.documents:
            return []
        return self.held_out_sequences(self.plan.length, self._validation_sequences)

    def held_out_sequences(self, length: int, sequences: int) -> ValidationLoader:
        """This rank's share of the validation stream, in sequences of any length.

        Args:
            length: L, tokens in a sequence.
            sequences: S, sequences in a batch, all data ranks together.
        """
        rank, world = self._rank_and_world()
        return ValidationLoader(
            self._prepared.validation,
            length=length,
            sequences=sequences,
            rank=rank,
            world=world,
            by_source=self._prepared.sources is not None,
        )
