"""The walk of docs/notebook.md runs from its first block to its last, and what it says of errors holds."""

import re
from pathlib import Path

import pytest
import torch
from lab import Lab
from safetensors.torch import load_file

import core
import moeloom

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.full
def test_the_blocks_of_the_page_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs/notebook.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 7
    names: dict[str, object] = {"__name__": "notebook"}
    for block in blocks:
        exec(compile(block, "docs/notebook.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "bits per byte" in printed
    assert "torch.Size([2, 8, 512])" in printed
    assert "blocks.0 largest logits [" in printed
    assert "blocks.1 [" in printed
    assert "blocks.1 experts of the first token: [" in printed
    assert "switch" in printed
    weights = load_file("runs/notebook/weights.safetensors")
    assert "embedding.weight" in weights


def test_a_model_that_is_called_with_ids_says_what_to_call(lab: Lab) -> None:
    model = core.build(lab.recipe())
    ids = torch.arange(16).reshape(2, 8)
    with pytest.raises(TypeError, match=r"call model\.logits\(ids\)"):
        model(ids)
    assert model.logits(ids).shape == (2, 8, 300)


def test_a_loaded_run_has_its_model_and_its_tokenizer(lab: Lab, tmp_path: Path) -> None:
    lab.fit(tmp_path / "run", "budget.steps=1")
    loaded = moeloom.load_run(tmp_path / "run")
    assert not loaded.model.training
    assert loaded.tokenizer is not None
    prompt = "abc def"
    assert loaded.tokenizer.decode(loaded.tokenizer.prompt(prompt)[1:]) == prompt
    apart = moeloom.complete(loaded.model, [prompt], tokenizer=loaded.tokenizer, tokens=3)
    together = loaded.complete([prompt], tokens=3)
    assert [one.text for one in together] == [one.text for one in apart]
