"""The text that a run's model writes at its end, while all ranks still run."""

from typing import Any

import lightning as L

from core.contracts.errors import NotFiniteError
from core.data.tokenizer import END, Tokenizer
from core.generation.sample import sample
from core.training.module import TrainingModule
from core.training.ranks import broadcast_int, is_rank_zero
from core.training.run_folder import RunFolder

TOKENS = 128
"""The most tokens of the text."""


class SampleAtEnd(L.Callback):
    """Writes `sample.txt` when training is done, and looks for a weight that is not finite.

    Every rank takes part where weights are sharded, because each holds only some of them.

    Args:
        folder: the run folder.
        tokenizer: the run's tokenizer; None: the ids are written.

    Attributes:
        error: why there is no text; None if there is one.
        weight_not_finite: a sentence about a weight that is not finite, on whichever rank; None if there is none.
    """

    def __init__(self, folder: RunFolder, tokenizer: Tokenizer | None) -> None:
        self.folder = folder
        self.tokenizer = tokenizer
        self.error: str | None = None
        self.weight_not_finite: str | None = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Samples a text, while the model is still on its device and the ranks can reach each other."""
        assert isinstance(pl_module, TrainingModule)
        self.weight_not_finite = pl_module.weight_not_finite()
        if pl_module.strategy.shards or is_rank_zero():
            pl_module.eval()
            self._sample(pl_module)
            pl_module.train()

    def _sample(self, pl_module: TrainingModule) -> None:
        """Samples a text that begins with the marker, at temperature 0.8 from the tokens that make up 0.9."""
        together = pl_module.strategy.shards

        def agreed(token: int) -> int:
            return broadcast_int(token, pl_module.device) if together else token

        opening = END if self.tokenizer is None else self.tokenizer.begin
        ending = END if self.tokenizer is None else self.tokenizer.end
        length = min(TOKENS, pl_module.model.max_length)
        options: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "stop": ending}
        text = sample(
            pl_module.model,
            [opening],
            tokens=length,
            device=pl_module.device,
            agreed=agreed,
            **options,
        )
        try:
            written = list(text)
        except NotFiniteError as cause:
            self.error = str(cause)
            return
        if is_rank_zero():
            self.folder.write_text("sample.txt", self._text(written) + "\n")

    def _text(self, ids: list[int]) -> str:
        """The text of some ids; the ids themselves where no tokenizer is known."""
        if self.tokenizer is None:
            return " ".join(map(str, ids))
        return self.tokenizer.decode(ids)
