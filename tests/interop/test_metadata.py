"""What is exported agrees with its own metadata."""

import json
from pathlib import Path
from typing import Any

import pytest
from lab import Lab

from core.interop.metadata import disagreements
from interop.our_runs import random_run


@pytest.fixture(scope="module")
def exported(lab: Lab, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was trained here."""
    place = tmp_path_factory.mktemp("exported")
    run = random_run(lab, finished, place / "run", "model.blocks.moe.ffn.router.top_k=4")
    folder = place / "hf"
    done = lab.command("convert", "to-hf", run, folder)
    assert done.code == 0, done.err
    assert done.err.count("note:") == 1, done.err  # that weights are in bf16
    return folder


def test_an_exported_run_has_no_contradiction(exported: Path) -> None:
    assert disagreements(exported) == []


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "rows": (
        "config.json",
        {"vocab_size": 301},
        "config.json: vocab_size = 301, and model.embed_tokens.weight has 300 rows",
    ),
    "a small vocabulary": (
        "config.json",
        {"vocab_size": 299},
        "config.json: vocab_size = 299, and tokenizer.json has the id 299",
    ),
    "another end": (
        "generation_config.json",
        {"eos_token_id": 7},
        "config.json: eos_token_id = 0, and generation_config.json has 7",
    ),
    "no such id": (
        "generation_config.json",
        {"pad_token_id": 300},
        "generation_config.json: pad_token_id = 300, and vocab_size = 300",
    ),
    "no such text": (
        "tokenizer_config.json",
        {"bos_token": "<begin>"},
        "tokenizer_config.json: bos_token = '<begin>' is no token of tokenizer.json",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_contradiction_is_named(exported: Path, tmp_path: Path, case: str) -> None:
    name, changes, sentence = WRONG[case]
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    changed = tmp_path / name
    changed.write_text(json.dumps({**json.loads(changed.read_text()), **changes}))
    assert sentence in disagreements(tmp_path)


def test_further_tokens_may_end_a_generation(exported: Path, tmp_path: Path) -> None:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    changed = tmp_path / "generation_config.json"
    content = json.loads(changed.read_text())
    changed.write_text(json.dumps({**content, "eos_token_id": [0, 5]}))
    assert disagreements(tmp_path) == []
