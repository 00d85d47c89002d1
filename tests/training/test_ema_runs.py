"""Whole runs with the callback `ema`: stopped, killed and continued, on several ranks, and their exports."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lab import Lab, assert_same, assert_same_run, forked, last_checkpoint, rows
from rank_runs import assert_same_end, cut_after, fit_on_ranks
from safetensors.torch import load_file

from core.checkpoints.listing import checkpoints_in
from core.checkpoints.reading import read_checkpoint
from core.contracts.errors import NotFiniteError, UserError
from core.run.loading import load
from core.training import averages, callbacks

EMA = "callbacks=[{name: ema, decay: 0.9}]"
LATE = "callbacks=[{name: ema, decay: 0.9, first_step: 11}]"
NONE = "callbacks=[]"


@pytest.fixture(scope="module")
def averaged(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of the small recipe with an average; tests must only read it."""
    folder = tmp_path_factory.mktemp("averaged") / "run"
    lab.fit(folder, EMA, "checkpoint.keep=9")
    return folder


def assert_same_averaged_run(actual: Path, expected: Path) -> None:
    """Asserts that two runs are the same, to the last bit of their averages."""
    assert_same_run(actual, expected)
    one, two = last_checkpoint(actual), last_checkpoint(expected)
    assert_same(one["averages"], two["averages"])
    best = [read_checkpoint(run / "checkpoints" / "best.ckpt") for run in (actual, expected)]
    assert_same(best[0]["averages"], best[1]["averages"])
    first, second = [json.loads((run / "summary.json").read_text()) for run in (actual, expected)]
    for key in ("ema/val_loss", "ema/val_bits_per_byte", "val_loss"):
        assert first[key] == second[key]


# ---- stopped and continued


def in_the_validation_of_the_average() -> None:
    """Ends the process when the model has the averaged weights in place of its own."""
    exchanged = averages.in_place_of_weights

    @contextmanager
    def dying(module: Any, average: Any) -> Iterator[None]:
        with exchanged(module, average):
            if module.windows_done == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            yield

    averages.in_place_of_weights = dying


def after_step(step: int) -> None:
    """Ends the process when a step's row is about to be written, with the average already updated."""

    write = callbacks.StepLog.on_train_batch_end

    def dying(self: Any, trainer: Any, module: Any, *rest: Any) -> None:
        if module.windows_done == step:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, trainer, module, *rest)

    callbacks.StepLog.on_train_batch_end = dying  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "moment",
    [
        lambda: after_step(3),
        lambda: after_step(8),
        lambda: after_step(12),
        in_the_validation_of_the_average,
    ],
)
def test_a_killed_run_continues_with_its_average(
    lab: Lab, averaged: Path, tmp_path: Path, moment: Callable[[], None]
) -> None:
    run = tmp_path / "run"

    def killed() -> None:
        moment()
        lab.fit(run, EMA, "checkpoint.keep=9")

    assert forked(killed).code == 128 + signal.SIGKILL
    lab.fit(run, EMA, "checkpoint.keep=9", resume=True)
    assert_same_averaged_run(run, averaged)


def test_a_signal_in_the_validation_of_the_average_saves_the_trained_weights(
    lab: Lab, averaged: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"

    def stopped() -> None:
        from lab import run_command_here

        before = averages.Averages._validate

        def signalled(self: Any, trainer: Any, module: Any, average: Any) -> None:
            if module.windows_done == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            before(self, trainer, module, average)

        averages.Averages._validate = signalled  # type: ignore[method-assign]
        run_command_here("fit", lab.file, EMA, "checkpoint.keep=9", "--out", run)

    result = forked(stopped)
    assert result.code == 128 + signal.SIGTERM, result.err
    assert checkpoints_in(run)[-1].name == "step-00000006.ckpt"
    assert [row["step"] for row in rows(run) if "val_loss" in row] == []
    lab.fit(run, EMA, "checkpoint.keep=9", resume=True)
    one, two = last_checkpoint(run), last_checkpoint(averaged)
    for key in ("state_dict", "optimizer_states", "averages"):
        assert_same(one[key], two[key])
    assert_same(rows(run), rows(averaged))


def test_a_run_that_is_stopped_before_the_average_begins_continues(
    lab: Lab, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    lab.fit(whole, LATE, "checkpoint.keep=9")
    assert [row["step"] for row in rows(whole) if "ema/val_loss" in row] == ["12"]
    first = read_checkpoint(whole / "checkpoints" / "step-00000005.ckpt")["averages"]["ema"]
    assert (first["updates"], first["weights"]) == (0, {})
    assert last_checkpoint(whole)["averages"]["ema"]["updates"] == 2
    run = cut_after(whole, 5, tmp_path / "run")
    lab.fit(run, LATE, "checkpoint.keep=9", resume=True)
    assert_same(last_checkpoint(run)["averages"], last_checkpoint(whole)["averages"])
    assert_same(rows(run), rows(whole))


# ---- a recipe and a checkpoint that do not agree


def test_an_average_that_the_checkpoint_lacks_begins_anew_with_a_note(
    lab: Lab, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    lab.fit(whole, "checkpoint.keep=9")
    run = cut_after(whole, 10, tmp_path / "run")
    summary = lab.fit(run, EMA, resume=True)
    assert summary["notices"] == [
        "ema: step-00000010.ckpt holds no such average, so it begins anew"
    ]
    assert last_checkpoint(run)["averages"]["ema"]["updates"] == 2
    assert_same(last_checkpoint(run)["state_dict"], last_checkpoint(whole)["state_dict"])


def test_an_average_that_the_recipe_lacks_is_dropped_with_a_note(
    lab: Lab, averaged: Path, tmp_path: Path
) -> None:
    run = cut_after(averaged, 10, tmp_path / "run")
    summary = lab.fit(run, resume=True)
    (note,) = summary["notices"]
    assert note == (
        "ema: step-00000010.ckpt holds this average, and later checkpoints will not, as the recipe does not ask for it"
    )
    assert "averages" not in last_checkpoint(run)
    assert_same(last_checkpoint(run)["state_dict"], last_checkpoint(averaged)["state_dict"])


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "averages: must be a section": lambda content: content.update(averages=3),
    "averages.ema: must be a section": lambda content: content["averages"].update(ema=3),
    "settings and weights are missing": lambda content: content["averages"]["ema"].pop("weights"),
    "averages.ema.updates = -1": lambda content: content["averages"]["ema"].update(updates=-1),
    "0 tensors after 12 updates": lambda content: content["averages"]["ema"]["weights"].clear(),
    "no tensor of the model": lambda content: content["averages"]["ema"]["weights"].update(
        {"model.more": torch.zeros(2)}
    ),
    "the model's [32]": lambda content: content["averages"]["ema"]["weights"].update(
        {"model.norm.weight": torch.zeros(2)}
    ),
    "averages.ema: tensor model.norm.weight is missing": lambda content: content["averages"]["ema"][
        "weights"
    ].pop("model.norm.weight"),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_a_damaged_average_is_one_sentence(
    lab: Lab, averaged: Path, tmp_path: Path, sentence: str
) -> None:
    run = cut_after(averaged, 12, tmp_path / "run")
    file = checkpoints_in(run)[-1]
    content = read_checkpoint(file)
    DAMAGES[sentence](content)
    torch.save(content, file)
    with pytest.raises(UserError) as raised:
        lab.fit(run, EMA, resume=True)
    assert sentence in str(raised.value)


def test_an_average_that_is_not_finite_is_not_continued(
    lab: Lab, averaged: Path, tmp_path: Path
) -> None:
    run = cut_after(averaged, 12, tmp_path / "run")
    file = checkpoints_in(run)[-1]
    content = read_checkpoint(file)
    content["averages"]["ema"]["weights"]["model.norm.weight"][0] = float("nan")
    torch.save(content, file)
    with pytest.raises(NotFiniteError, match="in the average ema, "):
        lab.fit(run, EMA, resume=True)


# ---- several ranks

LAYOUTS = {
    "ddp": (2, "strategy={name: ddp, ranks: 2}"),
    "fsdp": (2, "strategy={name: fsdp, ranks: 2}"),
    "fsdp, gathered for a step": (
        2,
        "strategy={name: fsdp, ranks: 2, reshard_after_forward: false}",
    ),
    "experts": (2, "strategy={name: expert_parallel, expert_ranks: 2}"),
    "data x experts": (4, "strategy={name: expert_parallel, expert_ranks: 2, ranks: 4}"),
}
FP64 = ("precision.name=fp64", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def in_fp64(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run on one rank in fp64."""
    folder = tmp_path_factory.mktemp("one") / "run"
    lab.fit(folder, *FP64, EMA)
    return folder


@pytest.mark.parametrize(
    ("layout", "sharded", "device"),
    [
        ("ddp", "false", "same"),
        ("fsdp", "true", "same"),
        ("fsdp", "false", "cpu"),
        ("fsdp, gathered for a step", "true", "same"),
        ("experts", "true", "cpu"),
        ("experts", "false", "same"),
        ("data x experts", "true", "same"),
        ("data x experts", "false", "same"),
    ],
)
def test_ranks_reach_the_average_of_one(
    lab: Lab, in_fp64: Path, tmp_path: Path, layout: str, sharded: str, device: str
) -> None:
    ranks, strategy = LAYOUTS[layout]
    overrides = (*FP64, strategy, f"checkpoint.sharded={sharded}")
    ema = f"callbacks=[{{name: ema, decay: 0.9, device: {device}}}]"
    run = tmp_path / "run"
    fit_on_ranks(lab, run, *overrides, ema, ranks=ranks)
    assert_same_end(run, in_fp64)
    one, two = last_checkpoint(run)["averages"]["ema"], last_checkpoint(in_fp64)["averages"]["ema"]
    assert one["updates"] == two["updates"]
    assert list(one["weights"]) == list(two["weights"])
    for name, tensor in two["weights"].items():
        torch.testing.assert_close(one["weights"][name], tensor, rtol=1e-9, atol=1e-9)
    loaded = load(run, weights="ema").state_dict()
    assert all(
        torch.equal(loaded[name.removeprefix("model.")], tensor)
        for name, tensor in one["weights"].items()
    )
    again = cut_after(run, 5, tmp_path / "again")
    fit_on_ranks(lab, again, *overrides, ema, ranks=ranks, resume=True)
    assert_same(last_checkpoint(again)["averages"], last_checkpoint(run)["averages"])
    assert_same(rows(again), rows(run))


@pytest.mark.parametrize(("first", "then"), [("experts", "one"), ("one", "fsdp"), ("fsdp", "ddp")])
def test_an_average_continues_under_another_strategy(
    lab: Lab, in_fp64: Path, tmp_path: Path, first: str, then: str
) -> None:
    whole = in_fp64
    if first != "one":
        ranks, strategy = LAYOUTS[first]
        whole = tmp_path / "whole"
        fit_on_ranks(lab, whole, *FP64, EMA, strategy, ranks=ranks)
    run = cut_after(whole, 5, tmp_path / "run")
    if then == "one":
        lab.fit(run, *FP64, EMA, resume=True)
    else:
        ranks, strategy = LAYOUTS[then]
        fit_on_ranks(lab, run, *FP64, EMA, strategy, ranks=ranks, resume=True)
    assert_same_end(run, in_fp64)
    for name, tensor in last_checkpoint(in_fp64)["averages"]["ema"]["weights"].items():
        found = last_checkpoint(run)["averages"]["ema"]["weights"][name]
        torch.testing.assert_close(found, tensor, rtol=1e-9, atol=1e-9)


def test_an_asynchronous_save_has_the_average_of_its_step(lab: Lab, tmp_path: Path) -> None:
    runs = []
    for asynchronous in ("false", "true"):
        run = tmp_path / asynchronous
        more = ("strategy={name: fsdp, ranks: 2}", f"checkpoint.asynchronous={asynchronous}")
        fit_on_ranks(lab, run, *FP64, EMA, "checkpoint.every_steps=1", *more)
        runs.append(run)
    for one, two in zip(*map(checkpoints_in, runs), strict=True):
        assert_same(read_checkpoint(one)["averages"], read_checkpoint(two)["averages"])


# ---- exports

EXPORTED = "model.blocks.moe.ffn.router.group_score=2"


def test_an_export_has_the_averaged_weights(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    lab.fit(run, EMA, EXPORTED)
    for folder, options in (("trained", []), ("ema", ["--weights", "ema"])):
        target = tmp_path / folder
        made = lab.command("convert", "to-hf", run, target, "--dtype", "fp32", *options)
        assert made.code == 0, made.err
    content = last_checkpoint(run)
    average = content["averages"]["ema"]["weights"]
    state = content["state_dict"]
    for folder, tensors in (("trained", state), ("ema", {**state, **average})):
        files = load_file(tmp_path / folder / "model.safetensors")
        embedding = files["model.embed_tokens.weight"]
        assert torch.equal(embedding, tensors["model.embedding.weight"])
        gate = files["model.layers.1.mlp.gate.weight"]
        router = next(name for name in tensors if name.endswith("router.centroids.weight"))
        assert torch.equal(gate, tensors[router])
        bias = next(name for name in state if name.startswith("model.blocks.1") and "bias" in name)
        assert torch.equal(
            files["model.layers.1.mlp.gate.e_score_correction_bias"].flatten(), state[bias]
        )


def test_an_export_reads_averages_of_a_sharded_checkpoint(lab: Lab, tmp_path: Path) -> None:
    run = tmp_path / "run"
    fit_on_ranks(lab, run, EMA, EXPORTED, LAYOUTS["experts"][1], ranks=2)
    assert checkpoints_in(run)[-1].is_dir()
    made = lab.command(
        "convert", "to-hf", run, tmp_path / "hf", "--dtype", "fp32", "--weights", "ema"
    )
    assert made.code == 0, made.err
    files = load_file(tmp_path / "hf" / "model.safetensors")
    average = last_checkpoint(run)["averages"]["ema"]["weights"]
    assert torch.equal(files["model.embed_tokens.weight"], average["model.embedding.weight"])


def test_a_text_is_written_with_the_averaged_weights(lab: Lab, averaged: Path) -> None:
    """A run folder whose trained weights are the average writes the same."""
    asked = ("--prompt", "ab", "--tokens", "12", "--json")
    own = json.loads(lab.command("generate", averaged, "--weights", "ema", *asked).out)
    copied = averaged.parent / "copied"
    shutil.copytree(averaged, copied)
    file = checkpoints_in(copied)[-1]
    content = read_checkpoint(file)
    content["state_dict"].update(content["averages"]["ema"]["weights"])
    torch.save(content, file)
    same = json.loads(lab.command("generate", copied, *asked).out)
    assert own["text"] == same["text"]


@pytest.mark.parametrize(
    "command", [("evaluate",), ("generate", "--prompt", "a"), ("convert", "to-hf")]
)
def test_a_run_without_an_average_is_a_sentence(
    lab: Lab, finished: Path, averaged: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    name, *more = command
    last = [tmp_path / "hf"] if name == "convert" else []
    arguments = [*more, finished] if name == "convert" else [finished, *more]
    result = lab.command(name, *arguments, *last, "--weights", "ema")
    assert result.code == 2
    file = checkpoints_in(finished)[-1]
    assert result.sentence == (
        f"--weights ema: {file} holds no average of this name: its run keeps no average, or had not begun it"
    )
    arguments = [*more, averaged] if name == "convert" else [averaged, *more]
    result = lab.command(name, *arguments, *last, "--weights", "swa")
    assert result.code == 2
    assert result.sentence.endswith("holds no average of this name: it holds ema")
