"""A trained model goes to TRL, takes a step of reinforcement learning (GRPO), and comes back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lab import ROOT, Lab
from repository.documents import blocks
from torch import Tensor

import core
from core.data.tokenizer import Tokenizer
from core.run.training import fit
from core.training.run_folder import RunFolder

from .conftest import GROUPS
from .questions import MULTIPLE_CHOICE, write_task

pytest.importorskip("trl", reason="needs trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")

PROMPTS = ["abc de", "f", "ghi jkl", "abc"]
BIAS = "e_score_correction_bias"


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Counts different letters: any rule that gives answers different rewards is enough."""
    return [float(len(set(text))) for text in completions]


@pytest.fixture(scope="module")
def stepped(
    lab: Lab, exported: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The step and the way back, once: the weights before it, the model after it, the run that came back."""
    folder = tmp_path_factory.mktemp("stepped")
    trainer, before = _step(exported[1], folder)
    back = lab.command("convert", "from-hf", folder / "tuned", folder / "back")
    assert back.code == 0, back.err
    log = trainer.state.log_history
    return {
        "before": before,
        "model": trainer.model,
        "log": log,
        "printed": back.out + back.err,
        "run": folder / "back",
        "tuned": folder / "tuned",
    }


def _step(export: Path, folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """The first and the last block of the document; ours are the folders, the reward, and how small the step is."""
    from datasets import Dataset

    found = [block.text for block in blocks(ROOT / "docs" / "post_training.md", "python")]
    load, _, train = found[-3:]
    small = "learning_rate=1e-3, max_steps=1, per_device_train_batch_size=8, save_strategy='no', logging_steps=1"
    names: dict[str, Any] = {
        "reward": reward,
        "prompts": Dataset.from_list([{"prompt": text} for text in PROMPTS]),
    }
    exec(_with(load, EXPORT=str(export)), names)
    before = {name: tensor.detach().clone() for name, tensor in names["model"].state_dict().items()}
    changes = {
        '"out"': f'"{folder / "out"}"',
        "num_generations=8": "num_generations=4",
        "=128": "=8",
        "bf16=True": f"bf16=False, use_cpu=True, {small}",
    }
    for old, new in changes.items():
        assert train.count(old) == 1, f"the document has no {old}"
        train = train.replace(old, new)
    exec(_with(train, TUNED=str(folder / "tuned")), names)
    return names["trainer"], before


def _with(code: str, **folders: str) -> str:
    for name, folder in folders.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(folder))
    return code


def test_the_step_had_something_to_learn(stepped: dict[str, Any]) -> None:
    log = stepped["log"][0]
    assert log["step"] == 1
    assert log["reward_std"] > 0
    assert log["grad_norm"] > 0


def test_every_weight_moves_by_adams_first_step_at_most_and_the_router_bias_not_at_all(
    stepped: dict[str, Any],
) -> None:
    """Adam's first step is the learning rate times the gradient's sign, or less where the gradient is tiny."""
    after = stepped["model"].state_dict()
    moved = {
        name: float((after[name] - tensor).abs().max())
        for name, tensor in stepped["before"].items()
    }
    biases = {name for name in moved if name.endswith(BIAS)}
    assert len(biases) == 1
    assert all(stepped["before"][name].abs().max() > 0 for name in biases), (
        "training left the bias at 0"
    )
    assert {name for name, most in moved.items() if most == 0} == biases
    assert max(moved.values()) <= 1e-3 * (1 + 1e-3)
    parameters = dict(stepped["model"].named_parameters())
    assert biases & set(parameters) == set()


def test_every_prompt_begins_with_the_marker(exported: tuple[Path, Path]) -> None:
    """Prompts begin as in training; TRL encodes them with the tokenizer's own settings."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(exported[1])
    ours = Tokenizer.load(exported[0] / "tokenizer.json")
    for prompt in PROMPTS:
        assert theirs(prompt)["input_ids"] == [0, *ours.encode(prompt)]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 0, 0)


def test_the_tokenizer_comes_back_as_it_was(
    exported: tuple[Path, Path], stepped: dict[str, Any]
) -> None:
    """TRL saves it with the marker built in; ours adds none to a text, whatever the file says."""
    from transformers import AutoTokenizer

    ours, back = (Tokenizer.load(run / "tokenizer.json") for run in (exported[0], stepped["run"]))
    saved = AutoTokenizer.from_pretrained(stepped["tuned"])
    for prompt in PROMPTS:
        assert back.encode(prompt) == ours.encode(prompt)
        assert saved(prompt)["input_ids"] == [0, *ours.encode(prompt)]


def test_what_comes_back_computes_what_trl_left(
    exported: tuple[Path, Path], stepped: dict[str, Any]
) -> None:
    tokens_BL = torch.tensor([[0, 17, 40, 5, 200, 3, 77, 12], [0, 3, 3, 9, 110, 250, 7, 1]])
    theirs = stepped["model"].eval()
    with torch.no_grad():
        before_BLV = core.load(exported[0]).logits(tokens_BL)
        ours_BLV = core.load(stepped["run"]).logits(tokens_BL)
        theirs_BLV = theirs(tokens_BL).logits
    assert float((ours_BLV - theirs_BLV).abs().max()) <= 1e-5 * max(
        1.0, float(theirs_BLV.abs().max())
    )
    assert float((ours_BLV - before_BLV).abs().max()) > 1e-3


def test_transformers_drops_the_multi_token_head_and_the_way_back_says_so(
    stepped: dict[str, Any],
) -> None:
    assert not any("layers.2" in name for name in stepped["before"])
    assert "no multi-token head" in stepped["printed"]
    assert set(dict(core.load(stepped["run"]).loss_heads())) == {"next_token"}


def test_what_came_back_is_a_run_like_any_other(
    lab: Lab, stepped: dict[str, Any], tmp_path: Path, cache: None
) -> None:
    write_task(
        tmp_path / "tasks",
        "one",
        MULTIPLE_CHOICE,
        [{"query": "abc", "choices": ["de", "f"], "gold": 0}],
    )
    for command, *arguments in (
        ("generate", "--prompt", "abc", "--tokens", "4"),
        ("evaluate", "--tasks", "one", "--task-path", tmp_path / "tasks"),
    ):
        result = lab.command(command, stepped["run"], *arguments, "--json")
        assert result.code == 0, result.err
    no_mtp = "model.heads.mtp=null"
    weights = f"initial_weights={stepped['run']}"
    messages: list[str] = []
    recipe = lab.recipe(no_mtp, GROUPS, weights, "budget.steps=1", "optimizer.lr=1e-9")
    summary = fit(recipe, RunFolder(tmp_path / "next"), say=messages.append)
    assert not any("another tokenizer" in line for line in messages), "TRL saved the same entries"
    assert (stepped["run"] / "tokenizer.json").read_text() != (
        tmp_path / "next/tokenizer.json"
    ).read_text()
    fresh = lab.fit(tmp_path / "fresh", no_mtp, GROUPS, "budget.steps=1", "optimizer.lr=1e-9")
    assert summary["val_loss"] < fresh["val_loss"] - 0.1, "the new run began with other weights"
